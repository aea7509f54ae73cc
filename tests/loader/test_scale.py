"""transforms.Scale: what scanpy.pp.scale makes of all cells, batch by batch."""

import dataclasses
import pickle

import dask
import numpy as np
import pandas as pd
import pytest
import scanpy as sc

from annbatch_dask import Loader
from annbatch_dask.transforms import NormalizeLog1p, Scale
from tests.statistics.made import adatas, build, joined, write

SIZES = {"batch_size": 60, "chunk_size": 20, "preload_nchunks": 6, "layers": [], "return_index": True}


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scale")
    return build(folder / "c.zarr", write(folder, adatas(n_vars=80)), stats=True)


@pytest.fixture(scope="module")
def stats(collection):
    with dask.config.set(scheduler="synchronous"):
        return collection.gene_stats()


def all_rows(collection, **options):
    """X of an epoch, in the order of the collection."""
    loader = Loader(**SIZES, seed=1, shuffle=True, **options).use_collection(collection)
    parts = [(b["index"], b["X"]) for b in loader]
    rows, X = np.concatenate([r for r, _ in parts]), [x for _, x in parts]
    X = np.concatenate([x.toarray() if hasattr(x, "toarray") else np.asarray(x) for x in X])
    return X[np.argsort(rows)]


def wanted(collection, *, values, genes=None, **options):
    a = joined(collection)
    a.X = a.X.astype(np.float64)
    if values == "log":
        sc.pp.normalize_total(a, target_sum=1e4)
        sc.pp.log1p(a)
    if options["zero_center"]:
        a.X = a.X.toarray()
    sc.pp.scale(a, **options)
    a = a if genes is None else a[:, genes]
    return a.X.toarray() if hasattr(a.X, "toarray") else np.asarray(a.X)


@pytest.mark.parametrize("values", ["log", "counts"])
@pytest.mark.parametrize(("zero_center", "dense"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("max_value", [None, 2.5])
def test_scanpys_values(collection, stats, values, zero_center, dense, max_value):
    scale = Scale(stats, values=values, zero_center=zero_center, max_value=max_value)
    steps = [NormalizeLog1p(1e4), scale] if values == "log" else [scale]
    got = all_rows(collection, dense=dense, transform=steps)
    want = wanted(collection, values=values, zero_center=zero_center, max_value=max_value)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


def test_chosen_genes_have_their_own_figures(collection, stats):
    genes = list(stats.index[[40, 3, 17]])
    got = all_rows(collection, dense=True, var_names=genes, transform=[NormalizeLog1p(1e4), Scale(stats)])
    want = wanted(collection, values="log", genes=genes, zero_center=True)
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("to", ["torch", "jax"])
def test_other_arrays(collection, stats, to):
    pytest.importorskip(to)
    steps = [NormalizeLog1p(1e4), Scale(stats, max_value=3)]
    got = all_rows(collection, dense=True, to=to, transform=steps)
    np.testing.assert_allclose(got, all_rows(collection, dense=True, transform=steps), rtol=1e-6, atol=1e-6)


def test_it_travels_with_two_columns(stats):
    scale = pickle.loads(pickle.dumps(Scale(stats)))
    assert list(scale.stats) == ["log_mean", "log_variance"]


def test_another_is_made_of_one(collection, stats):
    counts = Scale(stats, values="counts")
    cut = dataclasses.replace(counts, max_value=2)
    pd.testing.assert_frame_equal(cut.stats, counts.stats)
    wanted = np.clip(all_rows(collection, dense=True, transform=counts), -2, 2)
    np.testing.assert_array_equal(all_rows(collection, dense=True, transform=cut), wanted)


def test_what_makes_no_sense_is_refused(collection, stats):
    for options, message in [
        ({"values": "raw"}, "give 'log' or 'counts'"),
        ({"max_value": 0}, "must be greater than 0"),
        ({"stats": stats[["sum"]]}, "give collection.gene_stats()"),
        ({"stats": pd.concat({"a": stats})}, "give collection.gene_stats()"),
        ({"stats": stats.assign(log_variance=np.nan)}, "have no finite mean and variance of log"),
    ]:
        with pytest.raises(ValueError, match=message):
            Scale(**{"stats": stats} | options)
    with pytest.raises(TypeError, match="zero_center makes sparse X dense; give dense=True"):
        all_rows(collection, transform=Scale(stats))
    with pytest.raises(ValueError, match="1 of 80 genes are not in stats: 'g0003'"):
        all_rows(collection, dense=True, transform=Scale(stats.drop(index="g0003")))
