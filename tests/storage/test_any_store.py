"""Zarr groups on any store are read: by the Loader, by views, and as inputs of builds."""

import shutil
import zipfile
from pathlib import Path

import anndata as ad
import dask
import numpy as np
import pytest
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore, ZipStore

from annbatch_dask import DatasetCollection, Loader, concat_lazy, read_lazy
from annbatch_dask.errors import CollectionError, SourceError
from tests.etl.inputs import dense_x

KINDS = ("memory", "zip", "obstore", "icechunk")


@pytest.fixture(scope="module")
def built(tmp_path_factory, h5ad_pair):
    folder = tmp_path_factory.mktemp("any")
    with dask.config.set(scheduler="synchronous"):
        return DatasetCollection(folder / "c.zarr").add_adatas(h5ad_pair, seed=0, dataset_size=200)


@pytest.fixture
def group(request, built, tmp_path):
    """The collection on another store."""
    store = {"memory": in_memory, "zip": zipped, "obstore": by_obstore, "icechunk": by_icechunk}[request.param]
    store = store(built.path, tmp_path)
    yield zarr.open_group(store, mode="r")
    store.close()


def copy(path, store):
    """All files of a folder."""
    for file in (f for f in sorted(files_of(path)) if f.is_file()):
        payload = default_buffer_prototype().buffer.from_bytes(file.read_bytes())
        sync(store.set(str(file.relative_to(path)), payload))
    return store


def files_of(path):
    return [f for f in Path(path).rglob("*") if not any(part.startswith(".") for part in f.relative_to(path).parts)]


def in_memory(path, _):
    return copy(path, MemoryStore())


def zipped(path, tmp_path):
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        for file in files_of(path):
            archive.write(file, file.relative_to(path))
    return ZipStore(tmp_path / "c.zip", mode="r")


def by_obstore(path, tmp_path):
    stores = pytest.importorskip("obstore.store")
    shutil.copytree(path, tmp_path / "c.zarr", ignore=shutil.ignore_patterns(".*"))
    return zarr.storage.ObjectStore(stores.LocalStore(str(tmp_path / "c.zarr")), read_only=True)


def by_icechunk(path, tmp_path):
    icechunk = pytest.importorskip("icechunk")
    repository = icechunk.Repository.create(icechunk.local_filesystem_storage(str(tmp_path / "repository")))
    session = repository.writable_session("main")
    found = zarr.open_group(path, mode="r")
    group = zarr.create_group(session.store, attributes=dict(found.attrs))
    with ad.settings.override(auto_shard_zarr_v3=False):
        for name in ("dataset_0", "dataset_1", "dataset_2"):
            ad.io.write_elem(group, name, ad.io.read_zarr(found[name]))
    session.commit("all of it")
    return repository.readonly_session("main").store


@pytest.mark.parametrize("group", KINDS, indirect=True)
def test_the_loader_reads_a_collection_on_any_store(group, built):
    want = dense_x(ad.concat([ad.io.read_zarr(g) for g in built]))
    loader = Loader(batch_size=64, preload_to_gpu=False, obs_columns=["cell_type"], return_index=True)
    seen = []
    for batch in loader.use_collection(DatasetCollection(group)):
        np.testing.assert_array_equal(batch["X"].toarray(), want[batch["index"]])
        seen.append(batch["index"])
    assert sorted(np.concatenate(seen)) == list(range(500))
    parts = [group[f"dataset_{k}"] for k in range(3)]
    adatas = [ad.AnnData(X=ad.io.sparse_dataset(g["X"]), obs=ad.io.read_elem(g["obs"])) for g in parts]
    assert sum(b["X"].shape[0] for b in Loader(batch_size=64, preload_to_gpu=False).add_adatas(adatas)) == 500


@pytest.mark.parametrize("group", KINDS, indirect=True)
def test_views_are_of_any_store(group, built):
    collection = DatasetCollection(group)
    want = ad.concat([ad.io.read_zarr(g) for g in built])
    np.testing.assert_array_equal(dense_x(collection.to_lazy().to_memory()), dense_x(want))
    assert dict(collection.obs_dataset().sizes) == {"obs": 500}
    assert collection.report().n_obs == 500
    assert collection.obs().equals(built.obs())
    some = concat_lazy([group["dataset_0"], group["dataset_1"]])
    np.testing.assert_array_equal(some[150:250].to_memory().X.toarray(), want[150:250].X.toarray())
    assert read_lazy(group["dataset_2"]).n_obs == 100


@pytest.mark.parametrize("group", KINDS, indirect=True)
def test_groups_of_any_store_are_inputs(group, built, tmp_path):
    inputs = [group["dataset_0"], group["dataset_1"]]
    with dask.config.set(scheduler="synchronous"):
        options = {"seed": 0, "elements": ["-obs/src_path"]}
        made = DatasetCollection(tmp_path / "o.zarr").add_adatas(inputs, **options)
        lazily = DatasetCollection(tmp_path / "l.zarr").add_adatas(
            inputs, load_adata=ad.experimental.read_lazy, **options
        )
    for collection, load in ((made, None), (lazily, ad.experimental.read_lazy)):
        assert collection.n_obs == 400
        assert collection.verify(against=inputs, load_adata=load).ok
    names = made.obs()["src_path"].cat.categories
    assert not any("0x" in name for name in names), list(names)


@pytest.mark.parametrize("group", KINDS, indirect=True)
def test_a_build_says_that_it_needs_a_path(group, h5ad_pair):
    collection = DatasetCollection(group)
    with pytest.raises(CollectionError, match=f"need a path or URL .* and {type(group.store).__name__} has none"):
        collection.add_adatas(h5ad_pair, seed=0)


def test_an_input_that_cannot_be_sent_to_workers_is_refused(built, tmp_path):
    stores = pytest.importorskip("obstore.store")
    store = copy(built.path, zarr.storage.ObjectStore(stores.MemoryStore()))
    group = zarr.open_group(store, mode="r")["dataset_0"]
    with pytest.raises(SourceError, match="cannot be sent to workers .*; give its path or URL"):
        DatasetCollection(tmp_path / "o.zarr").add_adatas([group], seed=0)
    assert read_lazy(group).to_memory().n_obs == 200
