"""aggregate: pseudobulk as scanpy makes it in memory."""

import dask
import numpy as np
import pytest
import scanpy as sc

from annbatch_dask import DatasetCollection
from annbatch_dask.errors import CollectionError
from tests.statistics.made import adatas, build, joined, write

FUNCTIONS = ["sum", "mean", "count_nonzero"]


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aggregate")
    return build(folder / "c.zarr", write(folder, adatas(n_vars=50)))


@pytest.fixture(scope="module")
def whole(collection):
    return joined(collection)


@pytest.mark.parametrize(
    ("by", "func", "layer", "scheduler"),
    [
        ("donor", "sum", None, "synchronous"),
        (["src_path"], ["mean"], None, "synchronous"),
        (["donor", "src_path"], FUNCTIONS, None, "threads"),
        (["side", "donor"], FUNCTIONS, "twice", "synchronous"),
    ],
)
def test_scanpys_sums(collection, whole, by, func, layer, scheduler):
    names = [by] if isinstance(by, str) else by
    has = whole.obs[names].notna().all(axis=1).to_numpy()  # earlier releases of scanpy count the others somewhere
    want = sc.get.aggregate(whole[has].copy(), by, func, layer=layer)
    with dask.config.set(scheduler=scheduler):
        got = collection.aggregate(by, func, layer=layer)
    assert list(got.obs_names) == list(want.obs_names)
    assert got.var.equals(want.var)
    assert set(got.layers) == set(want.layers)
    for name in want.layers:
        np.testing.assert_array_equal(got.layers[name], want.layers[name])
        assert got.layers[name].dtype == np.float64
    for name in names:
        assert list(got.obs[name]) == list(want.obs[name])
    counts = whole.obs[has].groupby(names, observed=True).size().to_numpy()
    np.testing.assert_array_equal(got.obs["n_obs_aggregated"], counts)


def test_it_adds_up_with_the_statistics(collection):
    with dask.config.set(scheduler="synchronous"):
        bulk, stats = collection.aggregate("src_path", FUNCTIONS), collection.gene_stats()
    np.testing.assert_array_equal(bulk.layers["sum"].sum(0), stats["sum"])
    np.testing.assert_array_equal(bulk.layers["count_nonzero"].sum(0), stats["n_nonzero"])


def test_dense_matrices(tmp_path):
    files = adatas(n_vars=30)
    for a in files:
        a.X = a.X.toarray()
        del a.layers["twice"]
    files = [a[:, 10:25].copy() for a in files[:1]] * 1
    collection = build(tmp_path / "c.zarr", write(tmp_path, files))
    with dask.config.set(scheduler="synchronous"):
        got = collection.aggregate("donor", FUNCTIONS)
    want = sc.get.aggregate(joined(collection), "donor", FUNCTIONS)
    for name in FUNCTIONS:
        np.testing.assert_allclose(got.layers[name], want.layers[name])


def test_what_is_not_there_is_refused(tmp_path, collection):
    with pytest.raises(ValueError, match="func is 'median'; give any of 'sum', 'mean', 'count_nonzero'"):
        collection.aggregate("donor", "median")
    with pytest.raises(ValueError, match="name at least one column"):
        collection.aggregate([])
    with pytest.raises(CollectionError, match="obs has no column 'nobody'"):
        collection.aggregate(["donor", "nobody"])
    with pytest.raises(CollectionError, match="has no layer 'logs'; it has 'twice'"):
        collection.aggregate("donor", layer="logs")
    with pytest.raises(CollectionError, match="no zarr datasets"):
        DatasetCollection(tmp_path / "new.zarr").aggregate("donor")
