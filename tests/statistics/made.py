"""Counts as cells have them, in files with donors, and the collections of them."""

import anndata as ad
import dask
import numpy as np
import pandas as pd
import scipy.sparse as sp

from annbatch_dask import DatasetCollection


def counts(n_obs, n_vars, seed):
    """(n_obs, n_vars) negative binomial counts; some genes nobody has, some all cells have alike, some are twins."""
    rng = np.random.default_rng(seed)
    genes = np.random.default_rng(7)
    mean, dispersion = genes.lognormal(-1.5, 1.6, n_vars), genes.gamma(2, 0.3, n_vars)
    depth = rng.lognormal(0, 0.5, (n_obs, 1))
    found = rng.poisson(rng.gamma(1 / dispersion, 1, (n_obs, n_vars)) * dispersion * mean * depth)
    found[:, :3], found[:, 3], found[:, 5] = 0, 2, found[:, 4]
    return found.astype(np.float32)


def adatas(n_vars=600, sizes=(220, 150, 90), donors=(("b", "a"), ("c", "a", None), ("d", "b"))):
    """Files whose donors and genes differ."""
    out = []
    for k, (n, some) in enumerate(zip(sizes, donors, strict=True)):
        X = sp.csr_matrix(counts(n, n_vars, k))
        names = [f"g{i:04d}" for i in range(n_vars)]
        labels = np.array(some, object)[np.random.default_rng(k).integers(0, len(some), n)]
        obs = pd.DataFrame(
            {"donor": pd.Categorical(labels), "side": np.arange(n) % 2}, index=[f"{k}-{i}" for i in range(n)]
        )
        a = ad.AnnData(X, obs=obs, var=pd.DataFrame(index=names))
        out.append(a[:, 5 * k : n_vars - 3 * (k % 2)].copy())
        out[-1].layers["twice"] = out[-1].X * 2
    return out


def write(folder, files):
    """Their paths."""
    paths = [folder / f"{k}.h5ad" for k in range(len(files))]
    for a, path in zip(files, paths, strict=True):
        a.write_h5ad(path)
    return paths


def build(path, paths, **options):
    """A collection of small datasets."""
    with dask.config.set(scheduler="synchronous"):
        return DatasetCollection(path).add_adatas(paths, **{"seed": 0, "dataset_size": 170} | options)


def joined(collection):
    """All cells of a collection in memory, in its order."""
    found = ad.concat([ad.io.read_zarr(g) for g in collection], merge="first")
    for name, column in collection.obs().items():
        found.obs[name] = column.to_numpy() if column.dtype != "category" else pd.Categorical(column)
    return found
