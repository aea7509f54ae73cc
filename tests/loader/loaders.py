"""Small loaders, and a check that an epoch holds each row of a collection once."""

from __future__ import annotations

import numpy as np
import pandas as pd
import scipy.sparse as sp

from annbatch_dask.loader import Loader
from tests.loader.data import dense, matrix

SMALL = {"chunk_size": 10, "preload_nchunks": 4, "preload_to_gpu": False, "return_index": True}


def make(collection, **kwargs):
    return Loader(**{**SMALL, "batch_size": 8, **kwargs}).use_collection(collection)


def check_epoch(loader, collection, n_rows=None):
    """Every batch holds the rows its index says, and the epoch each row once."""
    seen = []
    for batch in loader:
        assert list(batch) == ["X", "obs", "var", "index"]
        index = batch["index"]
        np.testing.assert_array_equal(dense(batch["X"]), collection.x[index])
        pd.testing.assert_frame_equal(batch["obs"], collection.obs.iloc[index])
        assert batch["var"] is loader.var
        seen += index.tolist()
    assert len(set(seen)) == len(seen) == (len(collection.x) if n_rows is None else n_rows)
    return seen


def csr(n_obs=20, **kwargs):
    return sp.csr_matrix(matrix(n_obs, **kwargs))
