"""highly_variable: scanpy's genes, and its figures, out of sums instead of the matrix."""

import warnings

import anndata as ad
import dask
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from annbatch_dask import Loader
from annbatch_dask.errors import CollectionError, MissingPackageError
from tests.statistics.made import adatas, build, joined, write


@pytest.fixture(autouse=True)
def here():
    with dask.config.set(scheduler="synchronous"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="scanpy")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="(skmisc|scanpy)")
        yield


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """With statistics by donor; every cell has one."""
    files = adatas(donors=(("b", "a"), ("c", "a"), ("d", "b")))
    folder = tmp_path_factory.mktemp("variable")
    return build(folder / "c.zarr", write(folder, files), stats_by="donor")


@pytest.fixture(scope="module")
def whole(collection):
    return joined(collection)


def wanted(whole, n_top, flavor, batch_key=None):
    """What scanpy finds; with seurat_v3 in each batch by itself, put together as it does.

    Its own moments of several batches are off by some 1e-14 of themselves, of which loess makes half a percent.
    """
    if flavor == "seurat_v3" and batch_key is not None:
        return of_batches(whole, n_top, batch_key)
    return by_scanpy(whole, n_top, flavor, batch_key)


def of_batches(whole, n_top, batch_key):
    """Genes by the median of their ranks in the batches that have them among their highest, and by how many have."""
    found = [
        by_scanpy(whole[rows], n_top, "seurat_v3")
        for rows in whole.obs.groupby(batch_key, observed=True).indices.values()
    ]
    normed = np.stack([f["variances_norm"] for f in found])
    ranks = np.argsort(np.argsort(-normed, axis=1), axis=1).astype(np.float32)
    df = by_scanpy(whole, n_top, "seurat_v3")[["means", "variances"]]
    df["highly_variable_nbatches"] = (ranks < n_top).sum(0)
    df["highly_variable_rank"] = pd.DataFrame(np.where(ranks < n_top, ranks, np.nan)).median(axis=0).to_numpy()
    df["variances_norm"] = normed.mean(0)
    order = df.sort_values(["highly_variable_rank", "highly_variable_nbatches"], ascending=[True, False]).index
    return df.assign(highly_variable=df.index.isin(order[:n_top]))


def by_scanpy(whole, n_top, flavor, batch_key=None):
    """What one call of it finds."""
    whole = whole.copy()
    if flavor != "seurat_v3":
        sc.pp.normalize_total(whole, target_sum=1e4)
        sc.pp.log1p(whole)
    options = {"n_top_genes": n_top, "flavor": flavor, "batch_key": batch_key, "inplace": False}
    return sc.pp.highly_variable_genes(whole, **options).loc[whole.var_names]


def assert_alike(got, want, rtol=1e-4):
    assert list(got.index[got["highly_variable"]]) == list(want.index[want["highly_variable"].astype(bool)])
    for name in set(want) - {"mean_bin", "gene_name", "highly_variable"}:
        ours, theirs = got[name].to_numpy(float), want[name].to_numpy(float)
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("n_top", [1, 40, 500])
@pytest.mark.parametrize("batch_key", [None, "donor", "src_path"])
@pytest.mark.parametrize("flavor", ["seurat", "cell_ranger", "seurat_v3"])
def test_scanpys_genes(collection, whole, flavor, batch_key, n_top):
    if flavor == "seurat_v3":
        pytest.importorskip("skmisc")
    got = collection.highly_variable(n_top, flavor=flavor, batch_key=batch_key, details=True)
    assert_alike(got, wanted(whole, n_top, flavor, batch_key))
    names = collection.highly_variable(n_top, flavor=flavor, batch_key=batch_key)
    assert list(names) == list(got.index[got["highly_variable"]])


@pytest.mark.parametrize("n_top", [1, 40, 500])
@pytest.mark.parametrize("batch_key", ["donor", "src_path"])
def test_scanpys_genes_of_several_batches_but_for_the_last_ones(collection, whole, batch_key, n_top):
    """One in fifty may be another, as loess scatters; see `wanted`."""
    pytest.importorskip("skmisc")
    got = collection.highly_variable(n_top, flavor="seurat_v3", batch_key=batch_key, details=True)
    want = by_scanpy(whole, n_top, "seurat_v3", batch_key)
    ours, theirs = (set(df.index[df["highly_variable"].astype(bool)]) for df in (got, want))
    assert len(ours - theirs) <= max(1, n_top // 50)
    np.testing.assert_allclose(got["variances_norm"], want["variances_norm"].to_numpy(float), rtol=1e-2)


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10**6),
    flavor=st.sampled_from(["seurat", "seurat_v3"]),
    n_obs=st.sampled_from([40, 150]),
    n_top=st.integers(1, 120),
    batches=st.integers(1, 3),
)
def test_any_counts(tmp_path_factory, seed, flavor, n_obs, n_top, batches):
    if flavor == "seurat_v3":
        pytest.importorskip("skmisc")
    rng = np.random.default_rng(seed)
    mean = rng.lognormal(-0.5, 1.2, 120)
    X = rng.poisson(mean * rng.gamma(2, 0.5, (n_obs, 120))).astype(np.float64)
    obs = pd.DataFrame({"batch": pd.Categorical(np.arange(n_obs) % batches)}, index=[f"c{i}" for i in range(n_obs)])
    a = ad.AnnData(sp.csr_matrix(X), obs=obs, var=pd.DataFrame(index=[f"g{i:03d}" for i in range(120)]))
    folder = tmp_path_factory.mktemp("any")
    collection = build(folder / "c.zarr", write(folder, [a]), stats_by="batch", dataset_size=60)
    key = "batch" if batches > 1 else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*normali[sz]ed dispersion")  # of fewer genes than asked for
        try:
            want = wanted(a, n_top, flavor, key)
        except ValueError:  # its loess finds too few different means
            with pytest.raises(ValueError, match="condition number|svddc|pseudo|near"):
                collection.highly_variable(n_top, flavor=flavor, batch_key=key)
            return
        assert_alike(collection.highly_variable(n_top, flavor=flavor, batch_key=key, details=True), want)


@pytest.mark.parametrize("flavor", ["seurat", "seurat_v3"])
def test_real_cells(tmp_path, flavor):
    """Of scanpy's own file; values that its authors have normalised, which both take for what they are."""
    if flavor == "seurat_v3":
        pytest.importorskip("skmisc")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pbmc = sc.datasets.pbmc68k_reduced()
        a = ad.AnnData(sp.csr_matrix(pbmc.raw.X), obs=pbmc.obs[["phase", "bulk_labels"]], var=pbmc.raw.var[[]])
    collection = build(tmp_path / "c.zarr", write(tmp_path, [a]), stats=True, dataset_size=300)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(expects counts|expects raw count data)")
        for batch_key in (None, "phase"):
            got = collection.highly_variable(100, flavor=flavor, batch_key=batch_key, details=True)
            assert_alike(got, wanted(a, 100, flavor, batch_key), rtol=1e-3)


def test_they_choose_what_a_loader_delivers(collection):
    genes = collection.highly_variable(30)
    loader = Loader(batch_size=50, chunk_size=10, preload_nchunks=5, dense=True, var_names=genes, layers=[])
    batch = next(iter(loader.use_collection(collection)))
    assert batch["X"].shape == (50, len(genes))
    assert list(batch["var"].index) == list(genes)


def test_without_scikit_misc(collection, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "skmisc", None)
    monkeypatch.setitem(sys.modules, "skmisc.loess", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'annbatch-dask\[hvg\]'"):
        collection.highly_variable(10, flavor="seurat_v3")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_named(tmp_path, value):
    [a] = adatas(n_vars=40)[:1]
    a.X = sp.csr_matrix(a.X)
    a.X.data[0] = value
    c = build(tmp_path / "c.zarr", write(tmp_path, [a]))
    with pytest.raises(CollectionError, match=r"\d of 40 genes have no mean or variance \('\w+'.*; mend X in"):
        c.highly_variable(10)


def test_what_makes_no_sense_is_refused(tmp_path, collection):
    with pytest.raises(ValueError, match="give one of 'seurat', 'cell_ranger', 'seurat_v3'"):
        collection.highly_variable(10, flavor="mine")
    with pytest.raises(ValueError, match="n_top is 0"):
        collection.highly_variable(0)
    with pytest.raises(ValueError, match=r"n_top is 2\.5; it must be a whole number"):
        collection.highly_variable(2.5)
    with pytest.raises(CollectionError, match="obs has no column 'nobody'"):
        collection.highly_variable(10, batch_key="nobody")
    for span in (0, 0.001, 1.5):  # of 0.001, loess aborts the process
        with pytest.raises(CollectionError, match=f"span is {span}, a share of .* genes that vary.*give a larger span"):
            collection.highly_variable(10, flavor="seurat_v3", span=span)
    files = adatas(n_vars=40)
    files[0].obs["donor"] = pd.Categorical(["alone", *["b"] * (files[0].n_obs - 1)])
    lone = build(tmp_path / "c.zarr", write(tmp_path, files))
    with pytest.raises(CollectionError, match="cells have no 'donor'; give another batch_key"):
        lone.highly_variable(10, batch_key="donor")
    with pytest.raises(CollectionError, match="batch 'alone' of donor has 1 cell, and a variance needs 2"):
        build(tmp_path / "d.zarr", write(tmp_path, files[:1])).highly_variable(10, batch_key="donor")
    files[0].obs["run"] = [0.5, *[1.0] * (files[0].n_obs - 1)]
    with pytest.raises(CollectionError, match=r"batch 0\.5 of run has 1 cell, and a variance needs 2"):
        build(tmp_path / "f.zarr", write(tmp_path, files[:1])).highly_variable(10, batch_key="run")
    with pytest.raises(CollectionError, match="genes have the same; leave out genes that no cell has"):
        a = ad.AnnData(sp.csr_matrix(np.eye(50, 60, dtype=np.float32)))
        build(tmp_path / "e.zarr", write(tmp_path, [a])).highly_variable(10, flavor="cell_ranger")
