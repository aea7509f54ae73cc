"""repack: the same collection in the other layout, whatever interrupts it."""

import shutil

import numpy as np
import pytest

from annbatch_dask import DatasetCollection, Loader
from annbatch_dask.cli import main
from annbatch_dask.errors import CollectionError, IntegrityError, LayoutError
from annbatch_dask.etl import repack as module
from annbatch_dask.etl.inputs import known_inputs
from annbatch_dask.storage.packed import PACKED
from tests.etl.packed import assert_same, build, codecs_of, read

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture
def collection(paths, tmp_path):
    return build(tmp_path / "a.zarr", paths, dataset_size=90)


def matrices(folder):
    """Bytes of every file of the matrices that a layout is about, and of all others but metadata."""
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: content for name, content in files.items() if not name.endswith("zarr.json")}


def test_there_and_back(collection, paths, tmp_path):
    packed = collection.repack(tmp_path / "b.zarr", "packed")
    assert all(codecs_of(g["X"][part]) == [PACKED, "crc32c"] for g in packed for part in ("data", "indices"))
    assert_same(read(packed), read(collection))
    assert packed.verify(against=paths).ok
    assert not packed.verify().leftovers
    assert packed.manifest.layout == "packed"
    assert packed.manifest.identity == collection.manifest.identity
    back = packed.repack(tmp_path / "d.zarr", "open")
    assert matrices(tmp_path / "d.zarr") == matrices(tmp_path / "a.zarr")
    assert back.verify(against=paths).ok


def test_it_writes_what_a_build_would(collection, paths, tmp_path):
    collection.repack(tmp_path / "b.zarr", "packed")
    build(tmp_path / "c.zarr", paths, dataset_size=90, layout="packed")
    assert matrices(tmp_path / "b.zarr") == matrices(tmp_path / "c.zarr")


def test_states_and_splits_of_one_are_good_for_the_other(collection, tmp_path):
    packed = collection.repack(tmp_path / "b.zarr", "packed")
    options = {
        "batch_size": 16,
        "chunk_size": 4,
        "preload_nchunks": 4,
        "shuffle": True,
        "seed": 0,
        "layers": [],
        "obsm": [],
    }
    loaders = [Loader(preload_to_gpu=False, **options).use_collection(c) for c in (collection, packed)]
    batches = iter(loaders[0])
    for _ in range(5):
        next(batches)
    state = loaders[0].state_dict()
    rest = [b["X"].toarray() for b in batches]
    loaders[1].load_state_dict(state)
    for a, b in zip(rest, loaders[1], strict=True):
        np.testing.assert_array_equal(a, b["X"].toarray())
    splits = collection.split({"train": 0.5, "test": 0.5})
    splits.save(tmp_path / "splits")
    assert (packed.read_split(tmp_path / "splits")["train"] == splits["train"]).all()


@pytest.mark.parametrize("n_written", [0, 1, 2])
def test_an_interrupted_one_goes_on(collection, tmp_path, monkeypatch, n_written):
    """After whole datasets, and in the middle of one."""
    written, publish = [], module.publish_dataset

    def publishing(folder, *args):
        if len(written) == n_written:
            raise KeyboardInterrupt
        written.append(folder.url)
        return publish(folder, *args)

    monkeypatch.setattr(module, "publish_dataset", publishing)
    with pytest.raises(KeyboardInterrupt):
        collection.repack(tmp_path / "b.zarr", "packed")
    monkeypatch.setattr(
        module, "publish_dataset", lambda folder, *args: (written.append(folder.url), publish(folder, *args))[1]
    )
    packed = collection.repack(tmp_path / "b.zarr", "packed")
    assert len(written) == len(set(written)) == len(collection)
    assert_same(read(packed), read(collection))
    assert packed.verify().ok
    assert not packed.verify().leftovers


@pytest.mark.parametrize("mode", ["extend", "append"])
def test_an_interrupted_one_of_a_collection_that_was_extended_since_starts_anew(
    collection, paths, tmp_path, monkeypatch, mode
):
    written, publish = [], module.publish_dataset

    def publishing(folder, *args):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(folder.url)
        return publish(folder, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "publish_dataset", publishing)
        collection.repack(tmp_path / "b.zarr", "packed")
    with pytest.warns(UserWarning, match="is in .* already"):
        extended = build(tmp_path / "a.zarr", paths[:1], seed=7, mode=mode)
    packed = extended.repack(tmp_path / "b.zarr", "packed")
    assert packed.manifest.identity == extended.manifest.identity
    assert packed.verify().ok
    assert not packed.verify().leftovers
    assert {p.name for p in (tmp_path / "b.zarr").iterdir()} == {
        *(d.name for d in packed.manifest.datasets),
        "zarr.json",
    }


def test_one_that_builds_replace_meanwhile_is_written_as_it_was(collection, paths, tmp_path, monkeypatch):
    publish = module.publish_dataset

    def publishing(folder, *args):
        if folder.url.endswith(f"/{collection.manifest.datasets[0].name}"):
            with pytest.warns(UserWarning, match="is in .* already"):
                build(tmp_path / "a.zarr", paths[:1], seed=7)
        return publish(folder, *args)

    before, manifest = read(collection), collection.manifest
    inputs = known_inputs(collection._root.target, manifest)
    assert all(i.content for i in inputs)
    monkeypatch.setattr(module, "publish_dataset", publishing)
    packed = collection.repack(tmp_path / "b.zarr", "packed")
    assert DatasetCollection(tmp_path / "a.zarr").version == manifest.version + 1
    assert packed.manifest.identity == manifest.identity
    assert_same(read(packed), before)
    assert packed.verify(against=paths).ok
    assert known_inputs(packed._root.target, packed.manifest) == inputs
    assert DatasetCollection(tmp_path / "a.zarr").gc()  # nothing holds the original any more


def test_one_that_is_done_is_not_done_again(collection, paths, tmp_path):
    collection.repack(tmp_path / "b.zarr", "packed")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "b.zarr").rglob("*")}
    assert collection.repack(tmp_path / "b.zarr", "packed").n_obs == collection.n_obs
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "b.zarr").rglob("*")} == before
    with pytest.warns(UserWarning, match="is in .* already"):
        build(tmp_path / "b.zarr", paths[:1], seed=7)
    with pytest.raises(CollectionError, match="no repack of this one as it is now"):  # it has other cells by now
        collection.repack(tmp_path / "b.zarr", "packed")


def test_it_can_be_extended(collection, paths, tmp_path):
    packed = collection.repack(tmp_path / "b.zarr", "packed")
    with pytest.warns(UserWarning, match="is in .* already"):
        extended = build(tmp_path / "b.zarr", paths[:1], seed=7)
    assert extended.manifest.layout == "packed"
    assert extended.n_obs == collection.n_obs + 150
    assert extended.verify().ok
    assert packed.path == extended.path


def test_damage_is_found(collection, tmp_path):
    shard = next((tmp_path / "a.zarr").glob("*/X/data/c/*"))
    raw = bytearray(shard.read_bytes())
    raw[40] ^= 1
    shard.write_bytes(raw)
    with pytest.raises((IntegrityError, CollectionError), match="damaged|changed"):
        DatasetCollection(tmp_path / "a.zarr").repack(tmp_path / "b.zarr", "packed")
    assert not (tmp_path / "b.zarr" / "zarr.json").exists()


def test_damage_of_what_is_copied_is_found(collection, tmp_path):
    copied = next(p for p in (tmp_path / "a.zarr").glob("*/obs/n_counts/c/*"))
    raw = bytearray(copied.read_bytes())
    raw[-1] ^= 1
    copied.write_bytes(raw)
    with pytest.raises(IntegrityError, match="was written with"):
        DatasetCollection(tmp_path / "a.zarr").repack(tmp_path / "b.zarr", "packed")
    assert not (tmp_path / "b.zarr" / "zarr.json").exists()


def test_nothing_else_is_written_over(collection, tmp_path):
    (tmp_path / "b.zarr").mkdir()
    (tmp_path / "b.zarr" / "notes.txt").write_text("mine")
    with pytest.raises(CollectionError, match=r"notes\.txt in it is not of a repack"):
        collection.repack(tmp_path / "b.zarr", "packed")
    with pytest.raises(CollectionError, match="holds a collection already"):
        collection.repack(tmp_path / "a.zarr", "packed")
    shutil.copytree(tmp_path / "a.zarr" / "dataset_0", tmp_path / "c.zarr" / "dataset_7")
    with pytest.raises(CollectionError, match=r"dataset_7 in it is not of a repack"):
        collection.repack(tmp_path / "c.zarr", "packed")
    shutil.rmtree(tmp_path / "c.zarr")
    with pytest.raises(CollectionError, match="has layout 'open' already"):
        collection.repack(tmp_path / "c.zarr", "open")
    with pytest.raises(LayoutError, match="'open' or 'packed'"):
        collection.repack(tmp_path / "c.zarr", "closed")


def test_the_command_line(collection, tmp_path, capsys):
    assert main(["repack", str(tmp_path / "a.zarr"), "-o", str(tmp_path / "b.zarr"), "--layout", "packed"]) == 0
    assert "240 cells in 3 datasets, layout packed" in capsys.readouterr().out
    assert DatasetCollection(tmp_path / "b.zarr").verify().ok
