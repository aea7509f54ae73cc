"""A commit keeps its number, and older ones can be opened as long as they are kept."""

import json
import os
import pickle
import shutil
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import dask
import fsspec
import pytest
import zarr
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from annbatch_dask import DatasetCollection, Loader
from annbatch_dask.cli import main
from annbatch_dask.errors import CollectionError, SelectionError, StateError, VersionNotFoundError
from annbatch_dask.etl import commit as commit_module
from annbatch_dask.etl import ours as ours_module
from annbatch_dask.etl import start as start_module
from annbatch_dask.events import Callback
from annbatch_dask.storage.folder import Folder
from annbatch_dask.testing import make_adata
from tests.tools import tree_digest

ANNBATCHS = Path(__file__).parents[1] / "peers/annbatch_collection.zip"
GENES = [f"g{i}" for i in range(8)]
N_OBS = 20


class CrashError(BaseException):
    """What a kill looks like from inside."""


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Five files."""
    folder = tmp_path_factory.mktemp("inputs")
    found = [folder / f"{i}.h5ad" for i in range(5)]
    for i, path in enumerate(found):
        make_adata(N_OBS, GENES, seed=i).write_h5ad(path)
    return found


@pytest.fixture(params=["disk", "store"])
def out(request, tmp_path):
    """Where the collection lies: on a disk, and in a store without locks."""
    yield str(tmp_path / "o.zarr") if request.param == "disk" else "memory://versions/o.zarr"
    fsspec.filesystem("memory").store.clear()


def add(out, paths, mode="a", callbacks=(), **options):
    with dask.config.set(scheduler="synchronous"):
        collection = DatasetCollection(out, mode=mode)
        return collection.add_adatas(paths, dataset_size=15, progress=False, callbacks=callbacks, **options)


def names(out):
    """First parts of the paths in the collection."""
    fs, root = fsspec.core.url_to_fs(str(out))
    return {path.removeprefix(f"{root}/").split("/")[0] for path in fs.find(root)}


def files(out):
    fs, root = fsspec.core.url_to_fs(str(out))
    return {path.removeprefix(f"{root}/"): fs.cat_file(path) for path in fs.find(root)}


def rows(collection):
    """Names of the cells that a loader delivers."""
    loader = Loader(batch_size=5, chunk_size=5, preload_nchunks=2, shuffle=True, seed=0, preload_to_gpu=False)
    return sorted(name for batch in loader.use_collection(collection) for name in batch["obs"].index)


def cells(*numbers):
    return sorted(f"s{k}_{i}" for k in numbers for i in range(N_OBS))


# --- what a version is ----------------------------------------------------------------------------------------------


def test_each_commit_has_the_number_after_the_one_before(out, paths):
    collection = DatasetCollection(out)
    assert (collection.version, collection.versions) == (None, [])
    assert add(out, paths[:1]).version == 1
    assert add(out, paths[:1]).version == 1  # nothing to do
    assert add(out, paths[1:2]).version == 2
    assert add(out, paths[2:3], mode="w").version == 3
    assert add(out, paths[3:4]).version == 4
    found = DatasetCollection(out, mode="r").versions
    assert [(v.number, v.mode, v.sources, v.is_kept, v.n_obs) for v in found] == [
        (3, "create", (str(paths[2]),), False, None),
        (4, "extend", (str(paths[3]),), True, 40),
    ]
    assert [v.is_current for v in found] == [False, True]
    assert "versions" not in names(out)


def test_versions_are_opened_as_they_were(out, paths, tmp_path):
    add(out, paths[:1])
    first = files(out)
    add(out, paths[1:2], keep=3)
    add(out, paths[2:3], mode="w")  # keeps as many as the last one did
    assert names(out) > {"versions", *(name.split("/")[0] for name in first)}
    for number, held in {1: (0,), 2: (0, 1), 3: (2,)}.items():
        version = DatasetCollection(out, version=number)
        assert version.version == number
        assert rows(version) == cells(*held)
        assert sorted(version.obs().index) == cells(*held)
        assert version.to_lazy().n_obs == version.report().n_obs == N_OBS * len(held)
        assert version.verify(against=[paths[k] for k in held]).ok
        assert [v.number for v in version.versions] == [1, 2, 3]
    assert {k: v for k, v in files(out).items() if k in first and k != "zarr.json"}.items() < first.items()
    assert files(out)["versions/1.json"] == first["zarr.json"]
    old = DatasetCollection(out, version=1)
    assert repr(old) == f"DatasetCollection({out!r}, version 1, 2 datasets, 20 cells x 8 genes)"
    again = old.repack(tmp_path / "packed.zarr", "packed")
    assert (again.version, rows(again), [v.is_kept for v in again.versions]) == (2, cells(0), [False, True])


def test_a_collection_keeps_as_many_as_its_last_build_was_told_to(out, paths):
    add(out, paths[:1], keep=2)
    add(out, paths[1:2])
    add(out, paths[2:3])
    assert [v.number for v in DatasetCollection(out).versions if v.is_kept] == [2, 3]
    collection = add(out, paths[3:4], keep=1)
    collection.gc()
    assert [v.number for v in collection.versions if v.is_kept] == [4]
    assert names(out) == {d.name for d in collection.manifest.datasets} | {"zarr.json"}
    add(out, paths[4:5])
    assert [v.number for v in DatasetCollection(out).versions if v.is_kept] == [5]


def test_a_build_that_keeps_none_writes_what_it_always_wrote(tmp_path, paths):
    for name, keep in (("a", None), ("b", 1)):
        add(tmp_path / name / "o.zarr", paths[:1])
        add(tmp_path / name / "o.zarr", paths[1:2], keep=keep)
    assert tree_digest(tmp_path / "a/o.zarr") == tree_digest(tmp_path / "b/o.zarr")
    manifest = json.loads((tmp_path / "a/o.zarr/zarr.json").read_text())["attributes"]["annbatch_dask"]
    assert not {"earlier", "keep", "kept"} & set(manifest)


def test_two_builds_that_keep_a_version_are_equal(tmp_path, paths):
    for name in "ab":
        add(tmp_path / name / "o.zarr", paths[:1])
        add(tmp_path / name / "o.zarr", paths[1:2], keep=2)
        add(tmp_path / name / "o.zarr", paths[2:3], mode="w")
    assert tree_digest(tmp_path / "a/o.zarr") == tree_digest(tmp_path / "b/o.zarr")


def test_zarr_and_annbatchs_reader_do_not_see_versions(tmp_path, paths):
    out = tmp_path / "o.zarr"
    add(out, paths[:1])
    add(out, paths[1:2], keep=2, mode="a")
    group = zarr.open_group(out, mode="r")
    now = {d.name for d in DatasetCollection(out).manifest.datasets}
    assert set(group.keys()) == now
    assert {n for n, _ in group.members()} == now


# --- wrong numbers, and what cannot be done -------------------------------------------------------------------------


def test_a_version_that_is_not_there_is_said_with_those_that_are(out, paths):
    add(out, paths[:1])
    add(out, paths[1:2])
    add(out, paths[2:3], keep=2)
    with pytest.raises(
        VersionNotFoundError, match=r"does not keep version 1 any more: it is at version 3, .* at 2, 3$"
    ):
        DatasetCollection(out, version=1)
    for number in (0, -1, 4, 999):
        with pytest.raises(
            LookupError, match=f"has no version {number}: it is at version 3, and can be opened at 2, 3"
        ):
            DatasetCollection(out, version=number)
    with pytest.raises(CollectionError, match="there is no collection at .*; check the path"):
        DatasetCollection(f"{out}/../nothing.zarr", version=1)


def test_a_version_is_read_only(out, paths):
    add(out, paths[:1])
    add(out, paths[1:2], keep=2)
    before = files(out)
    for number in (1, 2):
        version = DatasetCollection(out, version=number)
        for change in (
            lambda v=version: v.add_adatas(paths[2:3]),
            lambda v=version: v.plan_adatas(paths[2:3]),
            version.gc,
        ):
            with pytest.raises(CollectionError, match=rf"was opened at version {number}, which stays as it is: to "):
                change()
    with pytest.raises(ValueError, match="version=1 is read only, and mode='w' is for what is there now"):
        DatasetCollection(out, version=1, mode="w")
    with pytest.raises(ValueError, match="a folder of h5ad files has none"):
        DatasetCollection(out, version=1, is_collection_h5ad=True)
    assert files(out) == before


def test_numbers_that_make_no_sense(tmp_path, paths):
    for keep in (0, -1):
        with pytest.raises(ValueError, match="keep must be 1 or more"):
            add(tmp_path / "o.zarr", paths[:1], keep=keep)
    add(tmp_path / "o.zarr", paths[:1])
    with pytest.raises(TypeError, match="keep is '2'; it must be a whole number"):
        add(tmp_path / "o.zarr", paths[:1], keep="2")
    with pytest.raises(VersionNotFoundError, match="has no version '1': it is at version 1"):
        DatasetCollection(tmp_path / "o.zarr", version="1")
    with pytest.raises(ValueError, match="keep_last must be 1 or more"):
        DatasetCollection(tmp_path / "o.zarr").gc(keep_last=0)
    with pytest.warns(UserWarning, match="h5ad"):
        files = DatasetCollection(tmp_path / "files", is_collection_h5ad=True)
    assert files.versions == []
    with pytest.raises(ValueError, match="keep=2 keeps versions, and a folder of h5ad files has none"):
        files.add_adatas(paths[:1], keep=2)


def test_what_annbatch_wrote_is_no_version(tmp_path):
    shutil.unpack_archive(ANNBATCHS, tmp_path)
    out = tmp_path / "annbatch.zarr"
    collection = DatasetCollection(out)
    assert (collection.version, collection.versions) == (None, [])
    with pytest.raises(CollectionError, match="has no versions: annbatch wrote it"):
        DatasetCollection(out, version=1)
    adata = make_adata(30, list(collection.var.index), seed=1)
    del adata.obs
    adata.write_h5ad(tmp_path / "new.h5ad")
    with pytest.raises(CollectionError, match="written by annbatch, and keep=2 cannot keep that as a version"):
        add(out, [tmp_path / "new.h5ad"], keep=2)
    assert add(out, [tmp_path / "new.h5ad"], keep=1).version == 1


# --- what is removed, and what stays --------------------------------------------------------------------------------


def test_gc_removes_versions_when_it_is_told_to(out, paths):
    for k in range(4):
        add(out, paths[k : k + 1], keep=4)
    collection = DatasetCollection(out)
    assert collection.gc() == []
    would = collection.gc(keep_last=2, dry_run=True)
    assert [v.number for v in collection.versions if v.is_kept] == [1, 2, 3, 4]
    assert collection.gc(keep_last=2) == would
    assert {"versions/1.json", "versions/2.json"} < set(would)
    assert [v.number for v in collection.versions if v.is_kept] == [3, 4]
    assert [v.number for v in collection.versions] == [1, 2, 3, 4]
    assert rows(DatasetCollection(out, version=3)) == cells(0, 1, 2)
    assert collection.gc(keep_last=9) == []
    collection.gc(keep_last=1)
    assert names(out) == {d.name for d in collection.manifest.datasets} | {"zarr.json"}
    assert not os.path.exists(f"{out}/versions")
    assert collection.verify().ok


def test_a_reader_of_a_version_ends_its_epoch(tmp_path, paths):
    out = tmp_path / "o.zarr"
    add(out, paths[:1])
    add(out, paths[1:2], keep=2)
    loader = Loader(batch_size=3, chunk_size=3, preload_nchunks=1, shuffle=True, seed=0, preload_to_gpu=False)
    loader.use_collection(DatasetCollection(out, version=1))
    batches = iter(loader)
    got = list(next(batches)["obs"].index)
    assert DatasetCollection(out).gc(keep_last=1) == []  # it is held
    collection = add(out, paths[2:3], keep=1)
    assert "versions" in names(out)
    with pytest.raises(VersionNotFoundError, match="can be opened at 3$"):
        DatasetCollection(out, version=1)
    copied = pickle.loads(pickle.dumps(loader))
    got += [name for batch in batches for name in batch["obs"].index]
    assert sorted(got) == cells(0)
    del loader, batches
    assert not [n for n in collection.gc() if n.startswith("versions")]  # the copy has a lease of its own
    assert sorted(name for batch in copied for name in batch["obs"].index) == cells(0)
    del copied
    assert {"versions/1.json", "dataset_0", "dataset_1"} <= set(collection.gc())
    assert names(out) == {d.name for d in collection.manifest.datasets} | {"zarr.json"}


def test_a_collection_that_was_opened_goes_on_where_its_version_is_kept(out, paths):
    opened = add(out, paths[:1])
    opened = DatasetCollection(out, mode="r")
    add(out, paths[1:2], keep=2)
    assert sorted(opened.obs().index) == rows(opened) == cells(0)
    assert opened.verify(against=paths[:1]).ok
    DatasetCollection(out).gc(keep_last=1)
    with pytest.raises(CollectionError, match="was changed since it was opened"):
        opened.obs()


def test_files_of_others_among_versions_stay(tmp_path, paths):
    out = tmp_path / "o.zarr"
    add(out, paths[:1])
    add(out, paths[1:2], keep=2)
    for name, content in (("notes.txt", "mine"), ("7.json", "{}"), ("2.json", (out / "versions/1.json").read_text())):
        (out / "versions" / name).write_text(content)
        with pytest.raises(CollectionError, match=f"did not write for this collection: versions/{name}"):
            DatasetCollection(out).gc()
        with pytest.raises(CollectionError, match=f"versions/{name}"):
            add(out, paths[2:3], keep=1)
        assert (out / "versions" / name).read_text() == content
        (out / "versions" / name).unlink()
    assert add(out, paths[2:3], keep=1).verify().ok
    (out / "versions").mkdir()
    (out / "versions/mine.txt").touch()
    with pytest.raises(CollectionError, match=r"versions/mine\.txt"):
        DatasetCollection(out).gc()


def test_a_damaged_copy_loses_no_dataset(tmp_path, paths):
    out = tmp_path / "o.zarr"
    add(out, paths[:1])
    whole = files(out)
    add(out, paths[1:2], keep=2)
    (out / "versions/1.json").write_text('{"zarr_format": 3,')
    with pytest.raises(CollectionError, match=r"versions/1\.json"):
        DatasetCollection(out).gc(keep_last=1)
    (out / "versions/1.json").write_bytes(whole["zarr.json"])
    assert rows(DatasetCollection(out, version=1)) == cells(0)


# --- crashes --------------------------------------------------------------------------------------------------------


def crash_at(monkeypatch, n):
    """Die before the n-th change of a file, counted from now; returns what counts."""
    left = [n]

    def dying(method):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise CrashError
            return method(*args, **kwargs)

        return call

    for name in ("write", "replace", "unlink", "remove", "remove_files"):
        monkeypatch.setattr(Folder, name, dying(getattr(Folder, name)))
    monkeypatch.setattr(ours_module, "unlink_unheld", dying(ours_module.unlink_unheld))
    for name in ("rename", "replace", "rmdir"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))
    return left


class FromCommit(Callback):
    """Calls a function when the commit begins."""

    def __init__(self, then):
        self.then = then

    def on_stage_start(self, event):
        if event.stage == "commit":
            self.then()


EVERY = [
    pytest.param("disk", 30),
    pytest.param("store", 10),
    pytest.param("disk", 1, marks=pytest.mark.chaos),
    pytest.param("store", 1, marks=pytest.mark.chaos),
]


@pytest.mark.parametrize(("kind", "step"), EVERY)
def test_a_crash_before_any_write_of_a_commit_and_its_clean_up(tmp_path, paths, monkeypatch, kind, step):
    """What was a version stays one, whole, until the new root is there; then those that it keeps are."""
    base = tmp_path / "base/o.zarr"
    add(base, paths[:1])
    add(base, paths[1:2], keep=2)
    place = tmp_path / "o.zarr" if kind == "disk" else "memory://crash/o.zarr"
    fs, root = fsspec.core.url_to_fs(str(place))
    outcomes, n = Counter(), 0
    while True:
        if fs.exists(root):
            fs.rm(root, recursive=True)
        put_tree(base, fs, root)
        with monkeypatch.context() as patch:
            patch.setattr(start_module, "_records", lambda *_: [])  # its thread would outlive the crash
            try:
                add(place, paths[2:3], callbacks=[FromCommit(lambda p=patch, k=n: crash_at(p, k))])
            except CrashError:
                crashed = True
            else:
                crashed = False
        found = {v.number for v in DatasetCollection(place).versions if v.is_kept}
        outcomes[tuple(sorted(found))] += 1
        assert found in ({1, 2}, {2, 3}), n
        for number in found:
            version = DatasetCollection(place, version=number)
            assert version.verify().ok
            assert sorted(version.obs().index) == cells(*range(number))
        collection = add(place, paths[2:3])  # the same call again
        assert {v.number for v in collection.versions if v.is_kept} == {2, 3}
        collection.gc()
        kept = [*collection.manifest.datasets, *DatasetCollection(place, version=2).manifest.datasets]
        assert names(place) == {d.name for d in kept} | {"zarr.json", "versions"}
        assert [f for f in files(place) if f.startswith("versions/")] == ["versions/2.json"]
        if not crashed:
            break
        n += step
    assert outcomes[1, 2]
    assert outcomes[2, 3]
    assert step > 1 or outcomes[1, 2] > 3 < outcomes[2, 3]
    fsspec.filesystem("memory").store.clear()


def put_tree(folder, fs, root):
    for path in Path(folder).rglob("*"):
        if path.is_file():
            target = f"{root}/{path.relative_to(folder).as_posix()}"
            fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            fs.pipe_file(target, path.read_bytes())


@pytest.mark.parametrize(("kind", "step"), EVERY)
def test_a_crash_before_any_removal_of_gc(tmp_path, paths, monkeypatch, kind, step):
    """A version that is listed as kept is whole, whenever it stops; and the next call removes the rest."""
    base = tmp_path / "base/o.zarr"
    for k in range(3):
        add(base, paths[k : k + 1], keep=3)
    place = tmp_path / "o.zarr" if kind == "disk" else "memory://crash/o.zarr"
    fs, root = fsspec.core.url_to_fs(str(place))
    n, crashed = 0, True
    while crashed:
        if fs.exists(root):
            fs.rm(root, recursive=True)
        put_tree(base, fs, root)
        with monkeypatch.context() as patch:
            crash_at(patch, n)
            try:
                DatasetCollection(place).gc(keep_last=1)
                crashed = False
            except CrashError:
                n += step
        for version in DatasetCollection(place).versions:
            if version.is_kept:
                assert DatasetCollection(place, version=version.number).verify().ok
        collection = DatasetCollection(place)
        collection.gc(keep_last=1)
        assert names(place) == {d.name for d in collection.manifest.datasets} | {"zarr.json"}
    assert n > 3
    fsspec.filesystem("memory").store.clear()


# --- two at once, without locks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mine", "theirs"), [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("stage", ["scatter", "commit"])
def test_of_two_builds_the_winner_decides_what_is_kept(paths, mine, theirs, stage):
    out = "memory://two/o.zarr"
    add(out, paths[:1])

    class Second(Callback):
        def on_stage_start(self, event):
            if event.stage == stage:
                add(out, paths[1:2], keep=theirs)

    with pytest.raises(CollectionError, match="was changed by another build"):
        add(out, paths[2:3], callbacks=[Second()], keep=mine)
    collection = DatasetCollection(out)
    assert {v.number for v in collection.versions if v.is_kept} == ({1, 2} if theirs == 2 else {2})
    for number in {1, 2} if theirs == 2 else {2}:
        assert rows(DatasetCollection(out, version=number)) == cells(*range(number))
    collection.gc()
    assert ("versions" in names(out)) == (theirs == 2)
    fsspec.filesystem("memory").store.clear()


def test_a_copy_that_the_loser_left_is_no_version(paths, monkeypatch):
    """It copies the root document, and then another build commits that keeps nothing."""
    out = "memory://late/o.zarr"
    add(out, paths[:1])
    save = commit_module.save_version

    def overtaken(*args):
        save(*args)
        monkeypatch.setattr(commit_module, "save_version", save)
        add(out, paths[1:2], keep=1)

    monkeypatch.setattr(commit_module, "save_version", overtaken)
    with pytest.raises(CollectionError, match="was (changed|written) by another build"):
        add(out, paths[2:3], keep=2)
    collection = DatasetCollection(out)
    assert [v.number for v in collection.versions if v.is_kept] == [2]
    with pytest.raises(VersionNotFoundError, match="does not keep version 1"):
        DatasetCollection(out, version=1)
    collection.gc()
    assert names(out) == {d.name for d in collection.manifest.datasets} | {"zarr.json"}
    assert rows(collection) == cells(0, 1)
    fsspec.filesystem("memory").store.clear()


# --- splits and states ----------------------------------------------------------------------------------------------


def loader_of(collection):
    loader = Loader(batch_size=4, chunk_size=4, preload_nchunks=1, shuffle=True, seed=0, preload_to_gpu=False)
    return loader.use_collection(collection)


def test_a_split_says_its_version(tmp_path, paths):
    out = tmp_path / "o.zarr"
    split = add(out, paths[:1]).split({"a": 0.5, "b": 0.5})
    assert split.version == 1
    split.save(tmp_path / "s.npz")
    collection = add(out, paths[1:2], keep=2)
    with pytest.raises(SelectionError, match=r"of collection \w+, version 1, .* is \w+, version 2: .*, version=1\)$"):
        collection.read_split(tmp_path / "s.npz")
    old = DatasetCollection(out, version=1)
    assert (old.read_split(tmp_path / "s.npz")["a"] == split["a"]).all()
    packed = old.repack(tmp_path / "p.zarr", "packed")  # the same rows, with another number
    assert (packed.read_split(tmp_path / "s.npz")["a"] == split["a"]).all()


def test_a_state_says_its_version(tmp_path, paths):
    out = tmp_path / "o.zarr"
    loader = loader_of(add(out, paths[:1]))
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    assert state["collection_version"] == 1
    rest = [list(batch["obs"].index) for batch in batches]
    collection = add(out, paths[1:2], keep=2)
    with pytest.raises(StateError, match=r"over version 1 of its collection .* has version 2 .*, version=1\)$"):
        loader_of(collection).load_state_dict(state)
    del state["collection_version"]  # of an earlier release
    with pytest.raises(StateError, match="over other data"):
        loader_of(collection).load_state_dict(state)
    again = loader_of(DatasetCollection(out, version=1))
    again.load_state_dict(state)
    assert [list(batch["obs"].index) for batch in again] == rest


# --- the command line -----------------------------------------------------------------------------------------------


def test_the_commands(tmp_path, paths, capsys):
    out = str(tmp_path / "o.zarr")
    for k in range(2):
        add(out, paths[k : k + 1], keep=2)
    assert main(["versions", out]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("version 1: 20 cells in 2 datasets, create of 1 source, seed 0, built 20")
    assert second.startswith("version 2: 40 cells in 2 datasets, extend of 1 source, seed 0, built 20")
    assert second.endswith(", current")
    assert main(["versions", out, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [v["number"] for v in document["versions"]] == [1, 2]
    assert main(["info", out, "--of-version", "1"]) == 0
    assert "cells:        20\n" in capsys.readouterr().out
    assert main(["info", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == 2
    assert main(["verify", out, "--of-version", "1", "--against", str(paths[0])]) == 0
    assert "20 cells in 2 datasets" in capsys.readouterr().out
    assert main(["verify", out, "--of-version", "7"]) == 1
    assert "has no version 7: it is at version 2, and can be opened at 1, 2" in capsys.readouterr().err
    assert main(["gc", out, "--keep-last", "1", "--dry-run"]) == 0
    assert "would remove dataset_0, dataset_1, versions/1.json" in capsys.readouterr().out
    assert main(["gc", out, "--keep-last", "1"]) == 0
    assert main(["versions", out]) == 0
    assert "version 1: not kept, create" in capsys.readouterr().out


# --- any sequence ---------------------------------------------------------------------------------------------------


class AnySequence(RuleBasedStateMachine):
    """Builds, gc and readers of versions, beside a plain model: which can be opened, and which rows each gives."""

    place = "disk"

    @initialize()
    def start(self):
        self.folder = Path(tempfile.mkdtemp())
        self.out = str(self.folder / "o.zarr") if self.place == "disk" else f"memory://any{self.folder}/o.zarr"
        self.paths = [self.folder / f"{i}.h5ad" for i in range(5)]
        for i, path in enumerate(self.paths):
            make_adata(N_OBS, GENES, seed=i).write_h5ad(path)
        self.held, self.keep, self.number, self.readers = {}, 1, 0, []
        self.listed, self.gone = [], set()  # what the last build was told to keep, and what gc has removed

    @property
    def kept(self):
        return [n for n in self.listed if n not in self.gone]

    @rule(
        k=st.integers(0, 4),
        mode=st.sampled_from(["extend", "append", "reshuffle", "w"]),
        keep=st.sampled_from([None, 1, 2, 3]),
    )
    def add(self, k, mode, keep):
        now = self.held.get(self.number, ())
        if mode != "w" and k in now:
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*already", UserWarning)
            options = {"keep": keep, "seed": self.number}  # another one each time: it is no repeated call
            if mode == "w":
                add(self.out, self.paths[k : k + 1], mode="w", **options)
            else:
                with dask.config.set(scheduler="synchronous"):
                    DatasetCollection(self.out).add_adatas(
                        self.paths[k : k + 1], mode=mode, dataset_size=15, progress=False, **options
                    )
        self.keep = keep or self.keep
        before = [*self.listed, self.number] if self.number else []
        self.listed = before[max(len(before) - self.keep + 1, 0) :]
        self.number += 1
        self.held[self.number] = (k,) if mode == "w" else (*now, k)

    @precondition(lambda self: self.number)
    @rule(keep_last=st.sampled_from([None, 1, 2, 3]))
    def gc(self, keep_last):
        collection = DatasetCollection(self.out)
        would = collection.gc(keep_last=keep_last, dry_run=True)
        assert collection.gc(keep_last=keep_last) == would
        if keep_last is not None:
            readers = {n for n, _, _ in self.readers} if self.place == "disk" else set()
            there = {v.number for v in collection.versions if v.is_kept}
            for n in self.listed[: max(len(self.listed) - keep_last + 1, 0)]:
                if n not in readers or n not in there:  # which may hold it by another root document, as it was current
                    self.gone.add(n)

    @precondition(lambda self: self.number)
    @rule(back=st.integers(0, 3))
    def open_reader(self, back):
        there = [*self.kept, self.number]
        number = there[max(len(there) - 1 - back, 0)]
        loader = loader_of(DatasetCollection(self.out, version=number))
        self.readers.append((number, iter(loader), loader))

    @precondition(lambda self: self.readers)
    @rule()
    def end_reader(self):
        number, batches, _ = self.readers.pop(0)
        try:
            got = sorted(name for batch in batches for name in batch["obs"].index)
        except CollectionError:
            assert self.place != "disk"
        else:
            assert got == cells(*self.held[number])

    @invariant()
    def what_is_kept_is_whole(self):
        if not getattr(self, "number", 0):
            return
        there = [*self.kept, self.number]
        collection = DatasetCollection(self.out)
        assert [v.number for v in collection.versions if v.is_kept] == there
        for number in there:
            version = DatasetCollection(self.out, version=number)
            assert sorted(version.obs().index) == cells(*self.held[number])
            version.check()
        for number in {*range(1, self.number + 2)} - {*there}:
            with pytest.raises(VersionNotFoundError, match=rf"opened at {', '.join(map(str, there))}$"):
                DatasetCollection(self.out, version=number)

    def teardown(self):
        for _, batches, _ in getattr(self, "readers", ()):
            batches.close()
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)
        fsspec.filesystem("memory").store.clear()


class AnySequenceWithoutLocks(AnySequence):
    """The same on a store."""

    place = "store"


def case(machine, examples, steps, *marks):
    test = type(f"Test{machine.__name__}{examples}", (machine.TestCase,), {})
    test.settings = settings(max_examples=examples, stateful_step_count=steps, deadline=None)
    test.pytestmark = [pytest.mark.timeout(1800), *marks]
    return test


TestAnySequence = case(AnySequence, 1, 7)
TestAnySequenceWithoutLocks = case(AnySequenceWithoutLocks, 1, 7)
TestAnySequenceLong = case(AnySequence, 20, 15, pytest.mark.chaos)
TestAnySequenceWithoutLocksLong = case(AnySequenceWithoutLocks, 20, 15, pytest.mark.chaos)
