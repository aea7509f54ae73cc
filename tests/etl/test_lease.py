"""A loader that is open while its collection is extended goes on reading what it opened."""

import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import dask
import numpy as np
import pytest

from annbatch_dask import DatasetCollection, Loader
from annbatch_dask.errors import CollectionChangedError, CollectionError
from annbatch_dask.testing import make_adata
from tests.tools import At

HOLDER = """
import sys
from annbatch_dask import DatasetCollection
lease = DatasetCollection(sys.argv[1], mode="r").lease()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def opened(tmp_path):
    """A collection and the files to extend it with."""
    paths = [tmp_path / f"{i}.h5ad" for i in range(3)]
    for i, path in enumerate(paths):
        make_adata(200, [f"g{j}" for j in range(20)], seed=i).write_h5ad(path)
    with dask.config.set(scheduler="synchronous"):
        collection = DatasetCollection(tmp_path / "o.zarr").add_adatas(paths[:1], seed=0, dataset_size=70)
    return collection, paths


def loader_of(collection):
    loader = Loader(
        batch_size=10, chunk_size=5, preload_nchunks=4, shuffle=True, rng=np.random.default_rng(0), dense=True
    )
    return loader.use_collection(DatasetCollection(collection.path, mode="r"))


def extend(collection, path, **options):
    with dask.config.set(scheduler="synchronous"):
        DatasetCollection(collection.path).add_adatas([path], seed=1, **options)


def names(collection):
    return {p.name for p in Path(collection.path).iterdir()}


def datasets(removed):
    """Those among the names that gc says; the root document that was replaced goes with them."""
    (generation,) = (n for n in removed if n.startswith(".generation-"))
    return set(removed) - {generation}


@pytest.mark.parametrize("mode", ["extend", "reshuffle"])
def test_an_epoch_ends_as_it_began(opened, mode):
    collection, paths = opened
    want = [batch["X"].copy() for batch in loader_of(collection)]
    loader = loader_of(collection)
    batches = iter(loader)
    got = [next(batches)["X"].copy()]
    old = {d.name for d in collection.manifest.datasets}
    extend(collection, paths[1], mode=mode)
    got += [batch["X"].copy() for batch in batches]
    np.testing.assert_array_equal(got, want)
    again = [batch["X"].copy() for batch in loader]  # another epoch has another order of the same rows
    assert sorted(map(bytes, np.concatenate(again))) == sorted(map(bytes, np.concatenate(want)))
    assert old < names(collection)
    assert DatasetCollection(collection.path).verify().ok
    assert DatasetCollection(collection.path).gc() == []  # still held
    del loader, batches
    assert datasets(DatasetCollection(collection.path).gc()) == old
    new = DatasetCollection(collection.path, mode="r")
    assert names(collection) == {d.name for d in new.manifest.datasets} | {"zarr.json"}
    assert sum(len(batch["X"]) for batch in loader_of(collection)) == 400


def test_the_next_build_removes_what_is_not_held_any_more(opened):
    collection, paths = opened
    lease = collection.lease()
    extend(collection, paths[1])
    assert {d.name for d in collection.manifest.datasets} < names(collection)
    lease.close()
    extend(collection, paths[2])
    new = DatasetCollection(collection.path, mode="r")
    assert names(collection) == {d.name for d in new.manifest.datasets} | {"zarr.json"}


def test_a_killed_reader_holds_nothing(opened):
    collection, paths = opened
    reader = subprocess.Popen(
        [sys.executable, "-c", HOLDER, collection.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert reader.stdout.readline() == "held\n"
    old = {d.name for d in collection.manifest.datasets}
    extend(collection, paths[1])
    assert old < names(collection)
    reader.kill()
    reader.communicate()
    assert datasets(DatasetCollection(collection.path).gc()) == old


def test_a_pickled_lease_holds_its_own(opened):
    collection, paths = opened
    lease = collection.lease()
    other = pickle.loads(pickle.dumps(lease))
    lease.close()
    extend(collection, paths[1])
    assert DatasetCollection(collection.path).gc() == []
    other.close()
    assert DatasetCollection(collection.path).gc()


def test_a_collection_that_changed_since_it_was_opened_is_refused(opened):
    collection, paths = opened
    old = DatasetCollection(collection.path, mode="r")
    extend(collection, paths[1])
    said = "was changed since it was opened: .*dataset_0 among them, were replaced or removed; open it again"
    with pytest.raises(CollectionError, match=said):
        Loader(batch_size=10, chunk_size=5, preload_nchunks=4).use_collection(old)


@pytest.mark.parametrize("look", [DatasetCollection.verify, DatasetCollection.check])
def test_what_was_replaced_is_not_called_damaged(opened, look):
    collection, paths = opened
    old = DatasetCollection(collection.path, mode="r")
    extend(collection, paths[1])
    with pytest.raises(CollectionChangedError, match="was changed since it was opened"):
        look(old)


def test_verify_ends_as_it_began(opened):
    collection, paths = opened
    beside = At("verify", 1, lambda: extend(collection, paths[1]))
    with dask.config.set(scheduler="synchronous"):
        assert DatasetCollection(collection.path).verify(callbacks=[beside]).ok
    assert DatasetCollection(collection.path).n_obs == 400


def test_verify_does_not_call_a_rebuilt_collection_damaged(opened):
    collection, paths = opened

    def rebuild():
        shutil.rmtree(collection.path)
        extend(collection, paths[1], dataset_size=70)

    with dask.config.set(scheduler="synchronous"), pytest.raises(CollectionChangedError, match="open it again"):
        DatasetCollection(collection.path).verify(callbacks=[At("verify", 1, rebuild)])
    assert DatasetCollection(collection.path).verify().ok
