"""Builds, loads, verifications and extensions on Google's and Azure's stores, by their emulators."""

import dask
import fsspec
import numpy as np
import pytest

from annbatch_dask import DatasetCollection
from tests.s3.emulators import azure, google
from tests.s3.tools import At, CrashError, contents, crash, epoch, names

pytestmark = pytest.mark.chaos


@pytest.fixture(scope="module", params=[google, azure], ids=["gs", "abfs"])
def store(request, h5ad_pair):
    """A store with the inputs."""
    with request.param() as found:
        for path in h5ad_pair:
            found.fs.put_file(str(path), f"atlas/in/{path.name}")
        yield found


@pytest.fixture
def inputs(store, h5ad_pair):
    return [f"{store.url}/in/{path.name}" for path in h5ad_pair]


@pytest.fixture
def url(store, request):
    """A collection's for one test."""
    folder = request.node.name.split("[")[0]
    with dask.config.set(scheduler="threads"):
        yield f"{store.url}/{folder}/o.zarr"
    if found := store.fs.find(f"atlas/{folder}"):
        store.fs.rm(found)


def build(url, store, inputs, **options):
    collection = DatasetCollection(url, storage_options=store.options)
    return collection.add_adatas(inputs, seed=0, dataset_size=150, storage_options=store.options, **options)


def test_built_loaded_and_verified_as_on_a_disk(url, store, inputs, tmp_path):
    local = DatasetCollection(tmp_path / "o.zarr").add_adatas(
        inputs, seed=0, dataset_size=150, storage_options=store.options
    )
    build(url, store, inputs)
    assert contents(store.fs, url) == contents(fsspec.filesystem("file"), str(tmp_path / "o.zarr"))
    left = {path.split("/")[2] for path in store.fs.find(store.fs._strip_protocol(url).rpartition("/")[0])}
    assert left == {"o.zarr", "o.zarr.log"}  # no scratch, no claim
    opened = DatasetCollection(url, mode="r", storage_options=store.options)
    assert [s.path for s in opened.manifest.sources] == inputs
    assert opened.obs()["src_path"].cat.categories.tolist() == sorted(inputs)
    assert opened.verify(against=inputs, storage_options=store.options).ok
    np.testing.assert_array_equal(np.concatenate(epoch(opened)), np.concatenate(epoch(local)))


def test_extended_and_what_was_replaced_is_removed(url, store, inputs):
    n_obs = build(url, store, inputs[:1]).n_obs
    both = build(url, store, inputs[1:])
    assert both.n_obs > n_obs
    assert both.verify(against=inputs, storage_options=store.options).ok
    again = DatasetCollection(url, storage_options=store.options)
    again.gc()
    assert names(store.fs, url) == {d.name for d in again.manifest.datasets} | {"zarr.json"}
    assert again.verify().ok
    assert np.concatenate(epoch(again)).shape[0] == both.n_obs


def test_an_interrupted_build_goes_on(url, store, inputs):
    for stage in ("scatter", "gather"):
        with pytest.raises(CrashError):
            build(url, store, inputs, callbacks=[At(stage, crash)])
        assert not store.fs.exists(f"{url}/zarr.json")
    seen = At()
    collection = build(url, store, inputs, callbacks=[seen])
    assert seen.reused["scatter"] == 2
    assert seen.reused["gather"] == len(collection)
    assert collection.verify(against=inputs, storage_options=store.options).ok


def test_a_collection_of_a_store_is_an_input(url, store, inputs, tmp_path):
    """zarr's files are read, not a file of HDF5."""
    first = build(url, store, inputs)
    datasets = [f"{url}/{d.name}" for d in first.manifest.datasets]
    local = DatasetCollection(tmp_path / "again.zarr").add_adatas(
        datasets, seed=1, storage_options=store.options, elements=["-obs/src_path"]
    )
    assert local.n_obs == first.n_obs
    assert local.verify(against=datasets, storage_options=store.options).ok


def test_damage_is_found(url, store, inputs):
    build(url, store, inputs)
    path = next(path for path in store.fs.find(url) if path.endswith("c/0"))
    payload = bytearray(store.fs.cat_file(path))
    payload[len(payload) // 2] ^= 1
    store.fs.pipe_file(path, bytes(payload))
    found = DatasetCollection(url, mode="r", storage_options=store.options).verify()
    assert not found.ok
    assert any(path.rpartition("o.zarr/")[2] in f"{p.where} {p}" for p in found.problems), found.problems
