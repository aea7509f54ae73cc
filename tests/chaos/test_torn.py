"""Scratch files and finished datasets damaged between an interrupted build and its resume: that work, and no other, is done again."""

import shutil

import dask
import numpy as np
import pytest

from annbatch_dask import DatasetCollection
from annbatch_dask.errors import IntegrityError
from annbatch_dask.etl import compare as compare_module
from annbatch_dask.events import Callback
from annbatch_dask.testing import make_adata
from tests.tools import tree_digest

GENES = [f"g{i}" for i in range(40)]


class StopError(BaseException):
    """Ends a build as a kill would."""


class StopAfter(Callback):
    """Stops after a number of gather tasks."""

    def __init__(self, n):
        self.left = n

    def on_task_end(self, event):
        self.left -= event.stage == "gather"
        if event.stage == "gather" and not self.left:
            raise StopError


class Tasks(Callback):
    """Tasks that ran, and were not taken over, by stage."""

    def __init__(self):
        self.ran = {"scatter": [], "gather": []}

    def on_task_end(self, event):
        if not event.reused and event.stage in self.ran:
            self.ran[event.stage].append(event.task)


def build(out, path, *callbacks):
    with pytest.MonkeyPatch.context() as patch, dask.config.set(scheduler="synchronous"):
        patch.setitem(dask.config.config, "annbatch_dask", {"block_size": 12_000})
        DatasetCollection(out).add_adatas([path], seed=2, dataset_size=40, callbacks=callbacks, progress=False)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A build with all blocks scattered and datasets 2 and 3 of 4 written; its input; digest of an undisturbed one."""
    folder = tmp_path_factory.mktemp("torn")
    make_adata(160, GENES, seed=0).write_h5ad(folder / "a.h5ad")
    build(folder / "whole.zarr", folder / "a.h5ad")
    (folder / "work").mkdir()
    with pytest.raises(StopError):
        build(folder / "work/o.zarr", folder / "a.h5ad", StopAfter(2))
    shutil.copytree(folder / "work", folder / "kept")
    return folder, tree_digest(folder / "whole.zarr")


@pytest.fixture
def interrupted(first):
    """Folder of the interrupted build as it was left, in its own place, as a resume is by path; input; digest."""
    folder, digest = first
    restore(folder)
    return folder / "work", folder / "a.h5ad", digest


def restore(folder):
    shutil.rmtree(folder / "work")
    shutil.copytree(folder / "kept", folder / "work")


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_first(file):
    flip(file, 30)


def flip_middle(file):
    flip(file, file.stat().st_size // 2)


def flip_early(file):
    flip(file, file.stat().st_size // 4)  # a row of one of the first datasets


def flip_last(file):
    flip(file, file.stat().st_size - 20)  # concerns the last dataset alone


def flip(file, at):
    raw = bytearray(file.read_bytes())
    raw[at] ^= 4
    file.write_bytes(raw)


def gone(file):
    file.unlink()


SPILL, SCATTERED, GATHERED = "spill-000001.bin", "scatter-000001.json", "gather-000003.json"
CASES = [
    # a damaged spill file is noticed as its size is wrong, or when the datasets that are still to be written read it
    (SPILL, cut, {"scatter": [1], "gather": [0, 1]}, []),
    (SPILL, gone, {"scatter": [1], "gather": [0, 1]}, []),
    (SPILL, flip_first, {"scatter": [], "gather": [0, 1]}, [1]),
    (SPILL, flip_early, {"scatter": [], "gather": [0, 1]}, [1]),
    (SPILL, flip_last, {"scatter": [], "gather": [0, 1]}, []),
    (SCATTERED, cut, {"scatter": [1], "gather": [0, 1]}, []),
    (SCATTERED, flip_middle, {"scatter": [1], "gather": [0, 1]}, []),
    (SCATTERED, gone, {"scatter": [1], "gather": [0, 1]}, []),
    (GATHERED, cut, {"scatter": [], "gather": [0, 1, 3]}, []),
    (GATHERED, flip_middle, {"scatter": [], "gather": [0, 1, 3]}, []),
    (GATHERED, gone, {"scatter": [], "gather": [0, 1, 3]}, []),
    ("job-*", cut, {"scatter": [], "gather": [0, 1]}, []),
    ("job-*", flip_middle, {"scatter": [], "gather": [0, 1]}, []),
    ("job-*", gone, {"scatter": [], "gather": [0, 1]}, []),
    (".attempt-*-dataset_3/X/data/c/0", cut, {"scatter": [], "gather": [0, 1, 3]}, []),
    (".attempt-*-dataset_3/X/data/c/0", gone, {"scatter": [], "gather": [0, 1, 3]}, []),
    (".attempt-*-dataset_3/zarr.json", flip_middle, {"scatter": [], "gather": [0, 1, 3]}, []),
]


def cases():
    """Every file with every damage; one of each file, and all of the spill file's, in the usual run."""
    seen = set()
    for case in CASES:
        usual = case[0] not in seen or case[0] == SPILL
        seen.add(case[0])
        marks = () if usual else (pytest.mark.chaos,)
        yield pytest.param(*case, marks=marks, id=f"{case[0]}-{case[1].__name__}")


@pytest.mark.parametrize(("name", "damage", "ran", "again"), list(cases()))
def test_a_resume_does_again_what_was_damaged_and_no_more(interrupted, monkeypatch, name, damage, ran, again):
    work, path, want = interrupted
    base = work / "o.zarr" if "dataset" in name else next((work / "o.zarr.scratch").iterdir())
    damage(*base.glob(name))
    scattered_again, tasks = [], Tasks()
    original = compare_module.scatter_again
    monkeypatch.setattr(
        compare_module, "scatter_again", lambda scratch, b: scattered_again.append(b) or original(scratch, b)
    )
    build(work / "o.zarr", path, tasks)
    assert {stage: sorted(done) for stage, done in tasks.ran.items()} == ran
    assert scattered_again == again
    assert tree_digest(work / "o.zarr") == want
    assert {p.name for p in work.iterdir()} == {"o.zarr", "o.zarr.log"}


@pytest.mark.chaos
def test_every_flipped_bit_of_a_spill_file_is_found(interrupted):
    work, path, want = interrupted
    rng = np.random.default_rng(0)
    for _ in range(6):
        restore(work.parent)
        file = next((work / "o.zarr.scratch").iterdir()) / SPILL
        flip(file, int(rng.integers(file.stat().st_size)))
        build(work / "o.zarr", path)
        assert tree_digest(work / "o.zarr") == want


def test_a_disk_that_damages_a_block_twice_is_named(interrupted, monkeypatch):
    work, path, _ = interrupted
    scratch = next((work / "o.zarr.scratch").iterdir())
    flip(scratch / SPILL, 30)
    monkeypatch.setattr(compare_module, "scatter_again", lambda *_: None)
    with pytest.raises(IntegrityError, match=f"{scratch}/{SPILL} has crc32c .* was written anew; check the disk"):
        build(work / "o.zarr", path)
    assert not (work / "o.zarr/zarr.json").exists()
