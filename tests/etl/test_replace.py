"""mode="w": a collection is replaced as every other build publishes, at once and at the end."""

import dask
import fsspec
import numpy as np
import pytest

from annbatch_dask import DatasetCollection, Loader
from annbatch_dask.errors import CollectionBusyError
from annbatch_dask.events import Callback
from annbatch_dask.testing import make_adata


class CrashError(BaseException):
    """What a kill looks like from inside."""


class At(Callback):
    """Calls a function when a stage begins."""

    def __init__(self, stage, then):
        self.stage, self.then = stage, then

    def on_stage_start(self, event):
        if event.stage == self.stage:
            self.then()


@pytest.fixture(params=["disk", "store"])
def out(request, tmp_path):
    """Where the collection lies: on a disk, and in a store without locks."""
    with dask.config.set(scheduler="synchronous"):
        yield str(tmp_path / "o.zarr") if request.param == "disk" else "memory://replace/o.zarr"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def paths(tmp_path):
    """Three files."""
    found = [tmp_path / f"{i}.h5ad" for i in range(3)]
    for i, path in enumerate(found):
        make_adata(100, [f"g{j}" for j in range(10)], seed=i).write_h5ad(path)
    return found


def files(out):
    fs, root = fsspec.core.url_to_fs(out)
    return {path.split(root)[1]: fs.cat_file(path) for path in fs.find(root)}


def loader_of(out):
    loader = Loader(batch_size=10, chunk_size=5, preload_nchunks=2, shuffle=True, seed=1, dense=True)
    return loader.use_collection(DatasetCollection(out, mode="r"))


def add(collection, path, **options):
    return collection.add_adatas([path], dataset_size=40, **options)


def test_nothing_is_removed_before_the_new_one_is_there(out, paths):
    add(DatasetCollection(out), paths[0])
    before = files(out)
    collection = DatasetCollection(out, mode="w")
    assert collection.is_empty
    assert (len(collection), collection.manifest, list(collection)) == (0, None, [])
    assert files(out) == before

    def crash():
        raise CrashError

    for stage in ("scatter", "gather", "commit"):
        with pytest.raises(CrashError):
            add(collection, paths[1], callbacks=[At(stage, crash)])
        assert collection.is_empty
        assert DatasetCollection(out, mode="r").verify(against=paths[:1]).ok
    assert before.items() <= files(out).items()
    add(collection, paths[1])
    assert collection.verify(against=paths[1:2]).ok
    assert [d.name for d in collection.manifest.datasets] == ["dataset_3", "dataset_4", "dataset_5"]
    assert collection.n_obs == 100
    add(collection, paths[2])  # which is there now, and extended
    assert collection.verify(against=paths[1:]).ok


def test_its_readers_end_their_epoch(out, paths):
    add(DatasetCollection(out), paths[0])
    want = [batch["X"].copy() for batch in loader_of(out)]
    loader = loader_of(out)
    batches = iter(loader)
    got = [next(batches)["X"].copy()]
    new = add(DatasetCollection(out, mode="w"), paths[1])
    got += [batch["X"].copy() for batch in batches]
    np.testing.assert_array_equal(got, want)
    del loader, batches
    assert {"dataset_0", "dataset_1", "dataset_2"} <= set(new.gc())
    assert new.verify(against=paths[1:2]).ok
    assert {name.split("/")[1] for name in files(out)} == {d.name for d in new.manifest.datasets} | {"zarr.json"}
    assert new.manifest.id != ""


def test_a_build_that_runs_is_not_disturbed(tmp_path, paths):
    out = str(tmp_path / "o.zarr")

    def replace():
        other = DatasetCollection(out, mode="w")
        with pytest.raises(CollectionBusyError):
            add(other, paths[2])

    with dask.config.set(scheduler="synchronous"):
        add(DatasetCollection(out), paths[0])
        assert add(DatasetCollection(out), paths[1], callbacks=[At("gather", replace)]).verify(against=paths[:2]).ok


def test_gc_of_it_is_that_of_the_collection_that_is_there(out, paths):
    add(DatasetCollection(out), paths[0])
    collection = DatasetCollection(out, mode="w")
    assert collection.gc() == []
    assert collection.is_empty
    assert DatasetCollection(out, mode="r").verify(against=paths[:1]).ok
