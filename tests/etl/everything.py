"""Inputs with everything an AnnData can hold."""

from __future__ import annotations

from importlib.metadata import version

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

GENES = (["a", "b", "c"], ["d", "b", "a"])
RAW = (["a", "b", "c", "x"], ["y", "d", "b", "a"])


def make(k, *, n_obs=30, genes=None, raw=None):
    """An input with everything: raw on more genes, layers, and obsm of every kind."""
    rng = np.random.default_rng(k)
    genes, raw = genes or GENES[k], raw or RAW[k]
    counts = rng.poisson(1, (n_obs, len(raw))).astype(np.float32)
    X = np.log1p(counts[:, [raw.index(g) for g in genes]])
    names = [f"{k}-{i}" for i in range(n_obs)]
    frame = pd.DataFrame(
        {"x": rng.random(n_obs), "side": pd.Categorical(rng.choice(["left", "right"], n_obs))}, index=names
    )
    out = ad.AnnData(
        X=sp.csr_matrix(X),
        obs=pd.DataFrame({"row": np.arange(n_obs)}, index=names),
        var=pd.DataFrame({"length": np.arange(len(genes)) + k}, index=genes),
        layers={"twice": sp.csr_matrix(2 * X), "plain": X + 1},
        obsm={"place": rng.random((n_obs, 2)), "few": sp.csr_matrix(np.eye(n_obs, 4)), "frame": frame},
        varm={"load": np.arange(2.0 * len(genes)).reshape(-1, 2)},
        varp={"near": np.arange(float(len(genes) ** 2)).reshape(len(genes), -1)},
        uns={"note": "x", "deep": {"k": np.arange(3)}, "file": k},
        obsp={"knn": sp.eye(n_obs, format="csr")},
    )
    out.raw = ad.AnnData(X=sp.csr_matrix(counts), obs=out.obs, var=pd.DataFrame({"long": raw}, index=raw))
    return out


def write(folder, inputs, suffix="h5ad"):
    paths = [folder / f"{k}.{suffix}" for k in range(len(inputs))]
    zarr_v3 = {"zarr_write_format": 3} if version("anndata") < "0.13" else {}  # then it is all there is
    with ad.settings.override(auto_shard_zarr_v3=False, **zarr_v3):
        for a, path in zip(inputs, paths, strict=True):
            a.write_h5ad(path) if suffix == "h5ad" else ad.io.write_zarr(path, a)
    return paths
