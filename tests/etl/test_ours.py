"""Only what is ours is ever removed, and only when nobody needs it: see annbatch_dask.etl.ours."""

import json
import os
import shutil
import threading
from pathlib import Path

import dask
import pytest

from annbatch_dask import DatasetCollection, Loader
from annbatch_dask.cli import main
from annbatch_dask.errors import CollectionError, StorageError
from annbatch_dask.etl import build as run_module
from annbatch_dask.etl import gather as gather_module
from annbatch_dask.etl import spilled as spilled_module
from annbatch_dask.etl.ours import contents_of, dataset_attributes
from annbatch_dask.events import Callback
from annbatch_dask.manifest import Manifest
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.scratch import ScratchGoneError
from annbatch_dask.storage.spill import SpillReader
from annbatch_dask.testing import make_adata

ANNBATCHS = Path(__file__).parents[1] / "peers/annbatch_collection.zip"
GENES = [f"g{i}" for i in range(20)]


class CrashError(BaseException):
    """What a kill looks like from inside."""


class CrashAt(Callback):
    """Raises at the end of a stage, or after its first task."""

    def __init__(self, stage, when="end"):
        self.stage, self.when = stage, when

    def on_task_end(self, event):
        if self.when == "task" and event.stage == self.stage:
            raise CrashError

    def on_stage_end(self, event):
        if self.when == "end" and event.stage == self.stage:
            raise CrashError


class Reused(Callback):
    """How many tasks were done before."""

    def __init__(self):
        self.n = 0

    def on_task_end(self, event):
        self.n += event.reused


@pytest.fixture
def paths(tmp_path):
    """Four files."""
    found = [tmp_path / f"{i}.h5ad" for i in range(4)]
    for i, path in enumerate(found):
        make_adata(100, GENES, seed=i).write_h5ad(path)
    return found


def add(out, paths, *callbacks, **options):
    with dask.config.set(scheduler="synchronous"):
        return DatasetCollection(out).add_adatas(paths, dataset_size=60, callbacks=callbacks, progress=False, **options)


def crash(out, paths, stage, when="end", **options):
    with pytest.raises(CrashError):
        add(out, paths, CrashAt(stage, when), **options)


def tree(folder):
    """Every file below, with its content."""
    return {p.relative_to(folder): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def names(folder):
    return {p.name for p in Path(folder).iterdir()}


# --- strangers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dataset_0/raw_counts.mtx", "dataset_0", "notes.txt", ".tmp-mine", ".claim-me"])
def test_a_folder_with_something_of_the_users_own_is_refused(tmp_path, paths, capsys, name):
    project = tmp_path / "project.zarr"
    project.mkdir()
    (project / name).mkdir() if name == "dataset_0" else None
    if name != "dataset_0":
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text("precious")
    before = tree(tmp_path)
    for command in (["shuffle", str(paths[0]), "-o", str(project), "--no-progress"], ["gc", str(project)]):
        assert main(command) == 1
        assert name.split("/")[0] in capsys.readouterr().err
    assert tree(tmp_path) == before
    assert names(project) == {name.split("/")[0]}


@pytest.mark.parametrize("name", ["dataset_17/raw_counts.mtx", "notes.txt", ".generation-00000000"])
def test_a_collection_with_something_of_the_users_own_is_read_and_not_changed(tmp_path, paths, name):
    out = tmp_path / "o.zarr"
    add(out, paths[:1])
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("precious")
    before = tree(tmp_path)
    match = f"holds 1 thing that this package did not write for this collection: {name.split('/')[0]}; move it elsewhe"
    with pytest.raises(CollectionError, match=match):
        add(out, paths[1:2])
    with pytest.raises(CollectionError, match=match):
        DatasetCollection(out).gc()
    with pytest.raises(CollectionError, match=match):
        replaced = DatasetCollection(out, mode="w")
        with dask.config.set(scheduler="synchronous"):
            replaced.add_adatas(paths[1:2])
    assert tree(tmp_path) == before
    assert sum(len(b["obs"]) for b in Loader(batch_size=10).use_collection(DatasetCollection(out, mode="r"))) == 100


@pytest.mark.parametrize("mode", ["extend", "reshuffle", "w"])
def test_a_file_that_somebody_put_into_a_dataset_keeps_it(tmp_path, paths, mode):
    """Also one that was put there while the dataset was read, and replaced."""
    out, options = tmp_path / "o.zarr", {} if mode == "w" else {"mode": mode}
    add(out, paths[:1])
    note = out / "dataset_0/notes/mine.csv"
    note.parent.mkdir()
    note.write_text("mine")
    with pytest.raises(CollectionError, match=r"dataset_0/notes/mine.csv; move it elsewhere"):
        DatasetCollection(out, mode="w").add_adatas(paths[1:2], progress=False) if mode == "w" else add(
            out, paths[1:2], **options
        )
    assert note.read_text() == "mine"
    note.unlink()
    note.parent.rmdir()
    loader = Loader(batch_size=10, preload_to_gpu=False).use_collection(DatasetCollection(out))
    add(out, paths[1:2])
    (out / "dataset_0/mine.csv").write_text("mine")
    del loader
    with pytest.raises(CollectionError, match=r"dataset_0/mine.csv; move it elsewhere"):
        DatasetCollection(out).gc()
    assert (out / "dataset_0/mine.csv").read_text() == "mine"
    (out / "dataset_0/mine.csv").unlink()
    assert "dataset_0" in DatasetCollection(out).gc()


def test_a_dataset_of_another_collection_is_a_stranger(tmp_path, paths):
    add(tmp_path / "a.zarr", paths[:1])
    add(tmp_path / "b.zarr", paths[1:2])
    shutil.copytree(tmp_path / "a.zarr/dataset_0", tmp_path / "b.zarr/dataset_9")
    with pytest.raises(CollectionError, match="dataset_9"):
        DatasetCollection(tmp_path / "b.zarr").gc()
    shutil.copytree(tmp_path / "a.zarr/dataset_0", tmp_path / "c.zarr/dataset_0")
    with pytest.raises(CollectionError, match=r"it holds \['dataset_0'\]"):
        add(tmp_path / "c.zarr", paths[:1])


def test_files_beside_the_collection_that_have_the_names_of_ours_stay(tmp_path, paths):
    (tmp_path / "o.zarr.scratch").mkdir()
    (tmp_path / "o.zarr.scratch/thesis.tex").write_text("precious")
    add(tmp_path / "o.zarr", paths[:1])
    DatasetCollection(tmp_path / "o.zarr").gc()
    assert names(tmp_path / "o.zarr.scratch") == {"thesis.tex"}
    (tmp_path / "q.zarr.lock").write_text("precious")
    with pytest.raises(CollectionError, match=r"q\.zarr\.lock would be the lock of a build and is another file"):
        add(tmp_path / "q.zarr", paths[:1])
    assert (tmp_path / "q.zarr.lock").read_text() == "precious"
    (tmp_path / "p.zarr.lock").touch()
    add(tmp_path / "p.zarr", paths[:1])
    assert (tmp_path / "p.zarr.lock").read_bytes() == b""


def test_attributes_of_the_users_own_stay(tmp_path, paths):
    out = tmp_path / "o.zarr"
    add(out, paths[:1])
    root = json.loads((out / "zarr.json").read_text())
    root["attributes"]["doi"] = "10.1000/182"
    (out / "zarr.json").write_text(json.dumps(root))
    collection = add(out, paths[1:2])
    assert json.loads((out / "zarr.json").read_text())["attributes"]["doi"] == "10.1000/182"
    assert collection.verify().ok


def test_a_dataset_that_is_a_link_loses_the_link_alone(tmp_path, paths):
    out = tmp_path / "o.zarr"
    add(out, paths[:1])
    shutil.move(out / "dataset_0", tmp_path / "elsewhere")
    (out / "dataset_0").symlink_to(tmp_path / "elsewhere")
    before = tree(tmp_path / "elsewhere")
    assert add(out, paths[1:2]).verify(against=paths[:2]).ok
    assert not (out / "dataset_0").is_symlink()
    assert tree(tmp_path / "elsewhere") == before


# --- collections of annbatch and of earlier releases ----------------------------------------------------------------


@pytest.fixture
def annbatchs(tmp_path):
    """A collection that annbatch wrote."""
    shutil.unpack_archive(ANNBATCHS, tmp_path)
    return tmp_path / "annbatch.zarr"


def test_gc_removes_nothing_of_a_collection_that_annbatch_wrote(annbatchs):
    before = tree(annbatchs)
    assert DatasetCollection(annbatchs).gc() == []
    assert main(["gc", str(annbatchs)]) == 0
    assert tree(annbatchs) == before


@pytest.mark.parametrize("crashed", [False, True])
def test_a_collection_that_annbatch_wrote_is_extended_and_its_datasets_go(annbatchs, tmp_path, crashed):
    adata = make_adata(30, list(DatasetCollection(annbatchs).var.index), seed=1)
    del adata.obs
    adata.write_h5ad(tmp_path / "new.h5ad")
    if crashed:
        crash(annbatchs, [tmp_path / "new.h5ad"], "commit")
        assert {"dataset_0", "dataset_1"} < names(annbatchs)
    collection = add(annbatchs, [tmp_path / "new.h5ad"])
    assert len(collection.obs()) == 90
    collection.check()
    assert names(annbatchs) == {d.name for d in collection.manifest.datasets} | {"zarr.json"}
    shutil.copytree(annbatchs / "dataset_3", annbatchs / "dataset_17")  # "plan" and "collection" say whose it is
    assert collection.gc() == ["dataset_17"]


def test_a_collection_of_an_earlier_release_is_extended_and_its_datasets_go(tmp_path, paths, monkeypatch):
    out = tmp_path / "o.zarr"
    with monkeypatch.context() as patch:
        only_plan = lambda plan, _: dataset_attributes(plan, "") | {"annbatch_dask": {"plan": plan}}  # noqa: E731
        patch.setattr(gather_module, "dataset_attributes", only_plan)
        patch.setattr("annbatch_dask.etl.job.Job.collection_id", "")
        assert add(out, paths[:1]).manifest.id == ""
    lease = DatasetCollection(out, mode="r").lease()
    collection = add(out, paths[1:2])
    assert collection.manifest.id
    assert {"dataset_0", "dataset_1"} < names(out)
    lease.close()
    assert {"dataset_0", "dataset_1"} < set(collection.gc())
    assert names(out) == {d.name for d in collection.manifest.datasets} | {"zarr.json"}


# --- leftovers of ours ----------------------------------------------------------------------------------------------


def test_gc_removes_leftovers_and_nothing_else(tmp_path, paths, capsys):
    out = tmp_path / "o.zarr"
    add(out, paths[:1])
    before = tree(out)
    crash(out, paths[1:2], "gather")
    (out / ".tmp-1234abcd-zarr.json").write_text("{")
    all_of_it = tree(tmp_path)
    left = names(out) - names_of(before)
    assert len(left) == 4  # two datasets, a claim and an unfinished file
    assert set(DatasetCollection(out).verify().leftovers) == left
    assert main(["gc", str(out), "--dry-run"]) == 0
    assert f"o.zarr: would remove {', '.join(sorted(left))}, {out}.scratch/" in capsys.readouterr().out
    assert tree(tmp_path) == all_of_it
    assert main(["gc", str(out)]) == 0
    assert f"o.zarr: removed {', '.join(sorted(left))}, {out}.scratch/" in capsys.readouterr().out
    assert tree(out) == before
    assert not Path(f"{out}.scratch").exists()
    assert DatasetCollection(out).gc() == []


def names_of(files):
    return {path.parts[0] for path in files}


@pytest.mark.parametrize(("stage", "reused"), [("scatter", 2), ("gather", 2 + 4), ("commit", 0)])
def test_the_same_call_goes_on_without_a_seed_and_leaves_nothing_anywhere(tmp_path, paths, stage, reused):
    out, scratch = tmp_path / "o.zarr", tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "of somebody else").touch()
    crash(out, paths[:1], "scatter")  # beside the collection, and never taken up
    crash(out, paths[:2], "scatter", scratch=tmp_path / "new", seed=3)
    crash(out, paths[:2], stage, scratch=scratch)
    seen = Reused()
    collection = add(out, paths[:2], seen, scratch=scratch)
    assert seen.n == reused
    assert collection.manifest.seed == 0
    assert names(scratch) == {"of somebody else"}
    assert names(out) == {d.name for d in collection.manifest.datasets} | {"zarr.json"}
    assert names(tmp_path) == {"o.zarr", "o.zarr.log", "scratch", *(p.name for p in paths)}


def test_gc_finds_what_lies_in_a_scratch_folder_of_the_users_own(tmp_path, paths):
    out, scratch = tmp_path / "o.zarr", tmp_path / "scratch"
    scratch.mkdir()
    crash(out, paths[:1], "gather", scratch=scratch)
    add(tmp_path / "other.zarr", paths[:1])
    crash(tmp_path / "other.zarr", paths[1:2], "gather", scratch=scratch)
    (other,) = (p.name for p in scratch.iterdir() if "other" in (p / "owner.json").read_text())
    (mine,) = names(scratch) - {other}
    assert f"{scratch}/{mine}" in DatasetCollection(out).gc(dry_run=True)
    assert f"{scratch}/{mine}" in DatasetCollection(out).gc()
    assert names(scratch) == {other}
    assert names(out) == set()
    shutil.rmtree(tmp_path / "other.zarr")  # and with it the word of where its scratch folder is
    assert DatasetCollection(tmp_path / "other.zarr").gc() == []
    assert DatasetCollection(tmp_path / "other.zarr").gc(scratch=scratch) == [f"{scratch}/{other}"]
    assert names(scratch) == set()


@pytest.mark.parametrize(("name", "what"), [("scrach", "does not exist"), ("0.h5ad", "is a file")])
def test_gc_refuses_a_scratch_folder_that_was_mistyped(tmp_path, paths, capsys, name, what):
    add(tmp_path / "o.zarr", paths[:1])
    with pytest.raises(StorageError, match=f"{name}' {what}, so there is no scratch folder to search; check the path"):
        DatasetCollection(tmp_path / "o.zarr").gc(scratch=tmp_path / name)
    assert main(["gc", str(tmp_path / "o.zarr"), "--scratch", str(tmp_path / name)]) == 1
    assert what in capsys.readouterr().err


def test_a_removal_that_was_interrupted_is_taken_up(tmp_path, paths, monkeypatch):
    out = tmp_path / "o.zarr"
    add(out, paths[:1])
    before = names(out)
    unlink, left = os.unlink, iter(range(20))

    def dies(path, **kwargs):
        if path.endswith("zarr.json") and next(left) >= 1:  # all else of the second dataset is gone by then
            raise CrashError
        unlink(path, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(CrashError):
        patch.setattr(os, "unlink", dies)
        add(out, paths[1:2])
    collection = DatasetCollection(out)
    assert before & names(out) > {"zarr.json"}
    collection.gc()
    assert names(out) == {d.name for d in collection.manifest.datasets} | {"zarr.json"}


def test_what_a_worker_left_that_died_is_removed_by_the_next_attempt(tmp_path, paths, monkeypatch):
    out, seen = tmp_path / "o.zarr", []
    fill = gather_module._fill_dataset

    def dies(job, _, dataset, folder):
        seen.append(names(out))
        shutil.copytree(folder.path, f"{job.target.path}/.attempt-00000000-{dataset}")  # as of a worker that was killed
        raise CrashError

    with monkeypatch.context() as patch, pytest.raises(CrashError):
        patch.setattr(gather_module, "_fill_dataset", dies)
        add(out, paths[:1])
    (dead,) = names(out) - {".claim-0"}  # the attempt that failed here removed itself
    assert dead.startswith(".attempt-00000000-dataset_")
    with monkeypatch.context() as patch:
        patch.setattr(gather_module, "_fill_dataset", lambda *args: seen.append(names(out)) or fill(*args))
        collection = add(out, paths[:1])
    assert not any(dead in there for there in seen[1:])
    assert names(out) == {d.name for d in collection.manifest.datasets} | {"zarr.json"}


# --- workers that come back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_open", [0, 128])
@pytest.mark.parametrize("where", ["opening", "reading"])
def test_a_worker_that_comes_back_after_the_commit_changes_nothing(tmp_path, paths, monkeypatch, where, max_open):
    """It was cut off while it wrote a dataset, which was written elsewhere, published, and the scratch folder removed."""
    out = tmp_path / "o.zarr"
    paused, go, end = threading.Event(), threading.Event(), []
    method = "__init__" if where == "opening" else "read_ragged"
    original, gather = getattr(SpillReader, method), run_module.gather
    monkeypatch.setattr(spilled_module, "MAX_OPEN", max_open)  # 0: as with very many blocks

    def pause(*args, **kwargs):
        if thread and not paused.is_set():
            paused.set()
            go.wait(60)
        return original(*args, **kwargs)

    def zombie(file, task):
        try:
            end.append(gather(file, task))
        except Exception as e:  # noqa: BLE001
            end.append(e)

    def cut_off(file, task):
        if not thread:
            thread.append(threading.Thread(target=zombie, args=(file, task)))
            thread[0].start()
            assert paused.wait(60)
        return gather(file, task)

    thread = []
    monkeypatch.setattr(SpillReader, method, pause)
    monkeypatch.setattr(run_module, "gather", cut_off)
    collection = add(out, paths[:2])
    before = tree(tmp_path)
    go.set()
    thread[0].join(60)
    assert isinstance(end[0], ScratchGoneError)
    assert tree(tmp_path) == before
    assert names(tmp_path) == {"o.zarr", "o.zarr.log", *(p.name for p in paths)}
    assert collection.verify(against=paths[:2]).ok


def test_a_worker_of_a_build_that_was_given_up_changes_nothing_of_the_next(tmp_path, paths, monkeypatch):
    """Its client died, another build with other options was made, and published: the task goes on to its end."""
    out = tmp_path / "o.zarr"
    paused, go, end, thread = threading.Event(), threading.Event(), [], []
    publish, gather = gather_module.publish_dataset, run_module.gather

    def pause(*args, **kwargs):
        if threading.current_thread().name == "zombie":
            paused.set()
            go.wait(60)
        return publish(*args, **kwargs)

    def zombie(file, task):
        try:
            end.append(gather(file, task))
        except Exception as e:  # noqa: BLE001
            end.append(e)

    def cut_off(file, task):
        thread.append(threading.Thread(target=zombie, args=(file, task), name="zombie"))
        thread[0].start()
        assert paused.wait(60)
        raise CrashError

    with monkeypatch.context() as patch, pytest.raises(CrashError):
        patch.setattr(gather_module, "publish_dataset", pause)
        patch.setattr(run_module, "gather", cut_off)
        add(out, paths[:1], seed=1)
    collection = add(out, paths[:2], seed=2)
    before = tree(tmp_path)
    go.set()
    thread[0].join(60)
    assert isinstance(end[0], OSError | ScratchGoneError)
    assert tree(tmp_path) == before
    assert collection.verify(against=paths[:2]).ok


def test_one_build_of_two_names_of_one_folder(tmp_path, paths):
    """The lock is beside the folder itself, not beside a link to it."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "o.zarr").symlink_to(tmp_path / "disk/o.zarr")

    class Other(Callback):
        def on_stage_start(self, event):
            with pytest.raises(CollectionError, match="is being built by process"):
                add(tmp_path / "disk/o.zarr", paths[1:2])

    assert add(tmp_path / "o.zarr", paths[:1], Other()).verify().ok
    assert add(tmp_path / "disk/o.zarr", paths[1:2]).n_obs == 200


def test_a_manifest_says_what_it_inherited(tmp_path, paths):
    out = tmp_path / "o.zarr"
    add(out, paths[:1])
    lease = DatasetCollection(out, mode="r").lease()
    with dask.config.set(scheduler="synchronous"):
        DatasetCollection(out, mode="w").add_adatas(paths[1:2])
    root = json.loads((out / "zarr.json").read_text())["attributes"]["annbatch_dask"]
    assert Manifest.from_json(root).inherited == ("dataset_0", "dataset_1")
    lease.close()
    assert {"dataset_0", "dataset_1"} < set(DatasetCollection(out).gc())
    assert add(out, paths[2:3]).manifest.inherited == ()


def test_a_claim_that_was_given_up_may_still_be_listed(tmp_path, monkeypatch):
    """By a store whose listings are late."""
    folder = Folder(str(tmp_path))
    monkeypatch.setattr(Folder, "names", lambda self: [".claim-0", "mine.txt"] if self == folder else [])
    assert contents_of(folder).strangers == ("mine.txt",)
