"""Datasets with layers and obsm of every kind, in memory and on disk."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from tests.loader.data import frame, genes, matrix, write_zarr

SMALL = {"chunk_size": 5, "preload_nchunks": 4, "batch_size": 4, "preload_to_gpu": False, "return_index": True}
SIZES = (30, 1, 12)
CHOSEN = ["g7", "g0", "g22", "g3"]


def make_adata(number: int, first: int) -> ad.AnnData:
    """A dataset with layers and obsm of every kind; categories differ between datasets, some values are missing."""
    n_obs = SIZES[number]
    x = matrix(n_obs, first=first, seed=number)
    obs = frame(n_obs, first=first)
    obs["kind"] = pd.Categorical.from_codes(
        np.arange(n_obs) % 3 - (number == 2), [["b", "a"], ["c", "b"], ["a", "d"]][number] + ["z"]
    )
    obs["donor"] = [f"d{(first + i) % 4}" for i in range(n_obs)]
    return ad.AnnData(
        sp.csr_matrix(x),
        obs=obs,
        var=genes(),
        layers={"counts": sp.csr_matrix(x * 2).astype(np.int32), "scaled": x / 7},
        obsm={
            "pca": x[:, :3].astype(np.float64),
            "image": x[:, :12].reshape(-1, 2, 3, 2).astype(np.uint8),
            "protein": sp.csr_matrix(x[:, 3:9]),
        },
    )


@pytest.fixture(scope="module")
def adatas():
    firsts = np.cumsum([0, *SIZES[:-1]]).tolist()
    return [make_adata(k, first) for k, first in enumerate(firsts)]


@pytest.fixture(scope="module")
def stored(adatas, tmp_path_factory):
    """The same on disk."""

    class Stored:
        is_empty = False

        def __iter__(self):
            return iter(groups)

    folder = tmp_path_factory.mktemp("aligned")
    groups = [write_zarr(adata, folder / f"{k}.zarr") for k, adata in enumerate(adatas)]
    return Stored()


EVERYTHING = {"layers": ["counts", "scaled"], "obsm": ["pca", "image", "protein"]}
PLAIN = {"layers": [], "obsm": []}
