"""What a repeated call does, and what it takes up of an interrupted one: decided by what is asked and what is there."""

import os
import subprocess
import sys
import warnings

import anndata as ad
import dask
import numpy as np
import pytest
import zarr

from annbatch_dask import DatasetCollection, concat_lazy
from annbatch_dask.cli import main
from annbatch_dask.errors import CollectionError, SourceError, StorageError
from annbatch_dask.events import Callback
from annbatch_dask.sources.identity import function_identity, identity_of
from annbatch_dask.sources.open import SourceRef
from annbatch_dask.testing import make_adata
from tests.tools import Counter, tree_digest

pytestmark = pytest.mark.usefixtures("in_this_process")

GENES = [f"g{i}" for i in range(20)]


def small(n=60, seed=0):
    a = make_adata(n, GENES, seed=seed)
    a.layers["counts"] = a.X * 10
    return a


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"{k}.h5ad" for k in range(2)]
    for k, path in enumerate(paths):
        small(seed=k).write_h5ad(path)
    return paths


def build(path, paths, **options):
    return DatasetCollection(path).add_adatas(paths, **{"seed": 0, "dataset_size": 50} | options)


def write_store(path, seed, zarr_format=3):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on consolidated metadata, the default format, and, by 0.13, its setting
        with ad.settings.override(zarr_write_format=zarr_format, auto_shard_zarr_v3=False):
            small(seed=seed).write_zarr(path)


def times_in_place(path, factor):
    data = zarr.open_group(path, mode="r+", use_consolidated=False)["X/data"]
    data[:] = data[:] * factor


def times(path, factor):
    """Replace a file by one of other values."""
    a = ad.read_h5ad(path)
    a.X = a.X * factor
    a.write_h5ad(path)


def total(collection, path=None):
    found = [ad.io.read_zarr(g) for g in collection]
    return sum(a.X[(a.obs["src_path"] == str(path)).to_numpy() if path else slice(None)].sum() for a in found)


class Interrupt(Callback):
    """Stops the build after a task."""

    def __init__(self, stage="scatter"):
        self.stage = stage

    def on_task_end(self, event):
        if event.stage == self.stage:
            raise KeyboardInterrupt


def interrupted(path, paths, **options):
    with pytest.raises(KeyboardInterrupt):
        build(path, paths, callbacks=[Interrupt()], **options)


# --- a call that was made before -----------------------------------------------------------------------------------


def test_the_very_same_call_is_done_once(tmp_path, files):
    collection = build(tmp_path / "o.zarr", files)
    before = tree_digest(tmp_path / "o.zarr")
    seen = Counter()
    build(tmp_path / "o.zarr", files, callbacks=[seen])
    assert not seen.tasks
    assert tree_digest(tmp_path / "o.zarr") == before
    assert collection.n_obs == 120


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "reshuffle"},
        {"counts": "layers/counts", "elements": ["-layers"]},
        {"groupby": "cell_type"},
        {"seed": 5},
        {"dataset_size": 30},
        {"zarr_compressor": ()},
    ],
    ids=lambda o: next(iter(o)),
)
def test_the_same_files_with_other_options_are_added_again_with_a_warning(tmp_path, files, options):
    first = {"elements": options["elements"]} if "elements" in options else {}
    build(tmp_path / "o.zarr", files, **first)
    with pytest.warns(UserWarning, match=r"\.h5ad is in .*o\.zarr already, with 60 cells, and is added again"):
        assert build(tmp_path / "o.zarr", files, **options).n_obs == 240
    assert DatasetCollection(tmp_path / "o.zarr").verify().ok


def test_duplicates_are_refused_where_asked(tmp_path, files):
    build(tmp_path / "o.zarr", files)
    with pytest.raises(CollectionError, match=r"0\.h5ad is in .* already, with 60 cells; leave it out"):
        build(tmp_path / "o.zarr", files, seed=1, on_duplicate_source="error")
    with pytest.raises(ValueError, match="on_duplicate_source is 'ask'"):
        build(tmp_path / "o.zarr", files, seed=1, on_duplicate_source="ask")


def test_a_file_that_was_replaced_is_not_taken_for_the_old_one(tmp_path, files):
    build(tmp_path / "o.zarr", files)
    small(70).write_h5ad(files[0])
    with pytest.warns(UserWarning, match="is added again"):
        assert build(tmp_path / "o.zarr", files).n_obs == 120 + 130


def test_another_folders_file_of_the_same_name_is_another_input(tmp_path, monkeypatch):
    for k in range(2):
        (tmp_path / f"donor{k}").mkdir()
        small(40 + k, seed=k).write_h5ad(tmp_path / f"donor{k}/m.h5ad")
    monkeypatch.chdir(tmp_path / "donor0")
    build(tmp_path / "o.zarr", ["m.h5ad"])
    monkeypatch.chdir(tmp_path / "donor1")
    with pytest.warns(UserWarning, match=r"has cells of another m\.h5ad"):
        collection = build(tmp_path / "o.zarr", ["m.h5ad"], on_duplicate_source="error")
    assert collection.n_obs == 81
    both = [tmp_path / f"donor{k}/m.h5ad" for k in range(2)]
    assert collection.verify(against=both).ok
    assert "was not given: 40 cells" in str(collection.verify(against=both[1:]).problems)


def test_a_file_that_is_there_twice_is_verified(tmp_path, files):
    build(tmp_path / "o.zarr", files[:1], elements=["-layers"])
    with pytest.warns(UserWarning, match="is added again"):
        collection = build(tmp_path / "o.zarr", files[:1], counts="layers/counts", elements=["-layers"])
    assert collection.verify(against=files[:1]).ok
    times(files[0], 2)
    assert not collection.verify(against=files[:1]).ok


def test_a_call_whose_inputs_were_forgotten_is_refused(tmp_path, files):
    build(tmp_path / "o.zarr", files)
    for path in (tmp_path / "o.zarr.log").glob("*.inputs.json"):
        path.unlink()
    with pytest.raises(CollectionError, match=r"was built last by this very call, .* give another seed"):
        build(tmp_path / "o.zarr", files)


@pytest.mark.parametrize("dies", ["before the commit", "after the commit"])
def test_a_build_that_died_about_its_commit_is_told_by_the_next_call(tmp_path, files, monkeypatch, dies):
    from annbatch_dask.etl import build as module

    commit = module.commit

    def die(*args):
        if dies == "after the commit":
            commit(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "commit", die)
        build(tmp_path / "o.zarr", files)
    seen = Counter()
    assert build(tmp_path / "o.zarr", files, callbacks=[seen]).n_obs == 120
    assert bool(seen.tasks) == (dies == "before the commit")
    assert not (tmp_path / "o.zarr.scratch").exists()


def test_the_record_of_inputs_is_one_and_holds_no_path(tmp_path, files):
    build(tmp_path / "o.zarr", files[:1])
    collection = build(tmp_path / "o.zarr", files[1:])
    (record,) = (tmp_path / "o.zarr.log").glob("*.inputs.json")
    assert str(tmp_path) not in record.read_text()
    assert record.name.startswith(collection.manifest.identity)


@pytest.mark.filterwarnings("always")
def test_the_command_line_refuses_duplicates_unless_told(tmp_path, files, capsys):
    command = ["shuffle", str(files[0]), "-o", str(tmp_path / "o.zarr"), "--no-progress"]
    assert main(command) == main(command) == 0
    assert main([*command, "--seed", "1"]) == 1
    assert "already, with 60 cells" in capsys.readouterr().err
    assert main([*command, "--seed", "1", "--on-duplicate-source", "warn"]) == 0
    assert DatasetCollection(tmp_path / "o.zarr").n_obs == 120


# --- one input under many names ------------------------------------------------------------------------------------


def spellings(path):
    link = path.with_name("link.h5ad")
    link.symlink_to(path)
    return [path.name, f"./{path.name}", path, link, f"file://{path}"]


def test_one_file_under_many_names_is_given_twice(tmp_path, files, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = spellings(files[0])
    for name in names[1:]:
        with pytest.raises(SourceError, match=r"0\.h5ad is given 2 times, as .*; give each input once"):
            build(tmp_path / "o.zarr", [names[0], name])
    build(tmp_path / "o.zarr", names[:1])
    for name in names:
        with pytest.raises(CollectionError, match="already, with 60 cells"):
            build(tmp_path / "o.zarr", [name], seed=1, on_duplicate_source="error")


def test_a_group_and_its_path_are_one_input(tmp_path):
    write_store(tmp_path / "a.zarr", seed=0)
    with pytest.raises(SourceError, match="is given 2 times"):
        build(tmp_path / "o.zarr", [zarr.open_group(tmp_path / "a.zarr", mode="r"), tmp_path / "a.zarr"])


def test_a_collection_is_not_extended_by_itself(tmp_path, files):
    collection = build(tmp_path / "o.zarr", files)
    for name in ("o.zarr/dataset_0", "o.zarr", "o.zarr/../o.zarr/dataset_1"):
        for do in (collection.add_adatas, collection.plan_adatas):
            with pytest.raises(CollectionError, match="lies in the collection .* itself"):
                do([tmp_path / name], mode="append")


# --- what an interrupted build leaves ------------------------------------------------------------------------------


def load_once(path):
    return ad.read_h5ad(path)


def test_another_function_begins_anew(tmp_path, files):
    def mended(path):
        a = ad.read_h5ad(path)
        a.X = a.X * 100
        return a

    interrupted(tmp_path / "o.zarr", files, load_adata=load_once)
    seen = Counter()
    collection = build(tmp_path / "o.zarr", files, load_adata=mended, callbacks=[seen])
    assert seen.reused == 0
    for path in files:
        assert total(collection, path) == mended(path).X.sum()


def test_the_same_function_goes_on_unless_its_file_was_changed(tmp_path, files):
    interrupted(tmp_path / "o.zarr", files, load_adata=load_once)
    seen = Counter()
    build(tmp_path / "o.zarr", files, load_adata=load_once, callbacks=[seen])
    assert seen.reused == 1
    build(tmp_path / "o.zarr", files, load_adata=load_once, callbacks=[seen := Counter()])
    assert not seen.tasks

    interrupted(tmp_path / "p.zarr", files, load_adata=load_once)
    for path in files:
        times(path, 7)
    collection = build(tmp_path / "p.zarr", files, load_adata=load_once, callbacks=[seen := Counter()])
    assert seen.reused == 0
    for path in files:
        assert total(collection, path) == ad.read_h5ad(path).X.sum()


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_store_that_was_written_to_is_read_again(tmp_path, zarr_format):
    paths = [tmp_path / f"{k}.zarr" for k in range(2)]
    for k, path in enumerate(paths):
        write_store(path, k, zarr_format)
    interrupted(tmp_path / "o.zarr", paths)
    for path in paths:
        times_in_place(path, 3)
    seen = Counter()
    collection = build(tmp_path / "o.zarr", paths, callbacks=[seen])
    assert seen.reused == 0
    for path in paths:
        assert total(collection, path) == ad.read_zarr(path).X.sum()


def test_a_lazy_view_of_files_that_were_changed_is_read_again(tmp_path, files):
    interrupted(tmp_path / "o.zarr", [concat_lazy(files)])
    seen = Counter()
    build(tmp_path / "o.zarr", [concat_lazy(files)], callbacks=[seen])
    assert seen.reused == 1
    interrupted(tmp_path / "p.zarr", [concat_lazy(files)])
    for path in files:
        times(path, 3)
    collection = build(tmp_path / "p.zarr", [concat_lazy(files)], callbacks=[seen := Counter()])
    assert seen.reused == 0
    assert total(collection) == sum(ad.read_h5ad(p).X.sum() for p in files)


def test_another_merge_begins_anew(tmp_path, files):
    """Receipts of datasets would bring uns of the first call."""
    for k, path in enumerate(files):
        a = small(seed=k)
        a.uns["study"] = f"study {k}"
        a.write_h5ad(path)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "o.zarr", files, merge="first", callbacks=[Interrupt("gather")])
    with pytest.warns(UserWarning, match="left out: uns/study"):
        collection = build(tmp_path / "o.zarr", files, merge="same")
    assert [dict(ad.io.read_zarr(g).uns) for g in collection] == [{}] * 3


# --- inputs that change during the build ---------------------------------------------------------------------------


class Replace(Callback):
    """Replaces inputs after the first scatter task."""

    def __init__(self, change):
        self.change, self.done = change, False

    def on_task_end(self, event):
        if event.stage == "scatter" and not self.done:
            self.done = True
            self.change()


@pytest.mark.parametrize("kind", ["h5ad", "zarr", "many files", "load_adata"])
def test_an_input_that_changes_during_the_build_is_refused(tmp_path, files, monkeypatch, kind):
    paths, options = files, {}
    if kind in ("zarr", "many files"):
        paths = [tmp_path / f"{k}.zarr" for k in range(2)]
        for k, path in enumerate(paths):
            write_store(path, k)
    if kind == "many files":
        monkeypatch.setattr("annbatch_dask.sources.identity._MANY_FILES", 3)
    if kind == "load_adata":
        options["load_adata"] = load_once

    def change():
        for path in paths:
            (times if path.is_file() else times_in_place)(path, 3)

    with pytest.raises(SourceError, match=rf"\{paths[0].suffix} was changed while the build read it"):
        build(tmp_path / "o.zarr", paths, callbacks=[Replace(change)], **options)
    assert DatasetCollection(tmp_path / "o.zarr").is_empty
    seen = Counter()
    collection = build(tmp_path / "o.zarr", paths, callbacks=[seen], **options)
    assert seen.reused == 0
    for path in paths:
        assert total(collection, path) == (ad.read_h5ad if path.is_file() else ad.read_zarr)(path).X.sum()


def test_an_input_that_goes_away_during_the_build_is_named(tmp_path, files):
    def remove():
        for path in files:
            path.unlink()

    with pytest.raises(StorageError, match=r"was there before, and is not found now: '.*\.h5ad'"):
        build(tmp_path / "o.zarr", files, callbacks=[Replace(remove)])


# --- identities ----------------------------------------------------------------------------------------------------


def test_a_store_on_an_object_store_is_known_by_its_files(tmp_path):
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.pipe_file("/identity.zarr/.zgroup", b'{"zarr_format":2}')
    fs.pipe_file("/identity.zarr/X/0.0", b"one")
    ref = SourceRef("x", "memory://identity.zarr")
    before = identity_of(ref)
    assert before == identity_of(ref)
    fs.pipe_file("/identity.zarr/X/0.0", b"two")
    assert identity_of(ref) not in ("", before)


SCALE = 2


def scaled(path):
    a = ad.read_h5ad(path)
    a.X = np.multiply(a.X, SCALE)
    return a


def test_functions_are_known_by_what_they_do(monkeypatch):
    def closed(k):
        return lambda path: (k, path)

    assert function_identity(closed(1)) == function_identity(closed(1)) != ""
    assert function_identity(closed(1)) != function_identity(closed(2))
    before = function_identity(scaled)
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 3)
    assert function_identity(scaled) not in ("", before)
    assert function_identity(ad.read_h5ad) not in ("", function_identity(ad.io.read_zarr))
    with open(os.devnull) as f:
        assert function_identity(lambda _: f.read()) == ""


PROGRAM = """
import anndata as ad, numpy as np
from annbatch_dask.sources.identity import function_identity
names = {"a", "b", "c", "d"}
def load(path):
    a = ad.read_h5ad(path)
    return a[:, [n in names or n in {"x", "y", "z"} for n in a.var_names]]
print(function_identity(load))
"""


def test_a_function_is_the_same_in_another_process(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    found = set()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, tmp_path / "program.py"],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        found.add(done.stdout.strip())
    assert len(found) == 1
    assert found != {""}


def test_work_done_with_another_memory_is_said_to_be_lost(tmp_path, files, monkeypatch):
    interrupted(tmp_path / "o.zarr", files)
    monkeypatch.setitem(dask.config.config, "annbatch_dask", {"block_size": 2000})
    (work,) = (tmp_path / "o.zarr.scratch").iterdir()
    with pytest.warns(UserWarning, match=rf"{work.name} holds .* of this build, begun with workers of another memory"):
        assert build(tmp_path / "o.zarr", files).n_obs == 120


def test_a_repeated_call_says_that_it_notes_no_other_number_of_versions(files, tmp_path):
    out = tmp_path / "o.zarr"
    DatasetCollection(out).add_adatas(files[:1], keep=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DatasetCollection(out).add_adatas(files[:1], keep=2)
        DatasetCollection(out).add_adatas(files[:1])
    with pytest.warns(UserWarning, match=r"keep=3 is not noted: it keeps 2; give keep with the next build"):
        DatasetCollection(out).add_adatas(files[:1], keep=3)
    assert DatasetCollection(out).manifest.keep == 2
