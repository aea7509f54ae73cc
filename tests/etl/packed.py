"""Inputs of the tests of both layouts, and what is compared of collections."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from annbatch_dask import DatasetCollection
from annbatch_dask.testing import make_adata

GENES = [f"g{i:02d}" for i in range(40)]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Two files of different genes; a layer of fractions, one of large and negative numbers, and one of long rows."""
    folder, out = tmp_path_factory.mktemp("inputs"), []
    for k, n in enumerate((150, 90)):
        a = make_adata(n, GENES[5 * k : 30 + 5 * k], seed=k)
        a.obs["row"] = np.arange(n)
        a.X = sp.csr_matrix(a.X.toarray() * (np.arange(n) >= n // 10)[:, None].astype(np.float32))
        a.layers["fractions"] = a.X / 3
        a.layers["large"] = a.X.astype(np.int64) * -(2**35)
        a.obsm["dense"] = np.arange(2 * n, dtype=np.float32).reshape(n, 2)
        out.append(folder / f"{k}.h5ad")
        a.write_h5ad(out[-1])
    return out


def build(path, paths, **options):
    return DatasetCollection(path).add_adatas(paths, **{"seed": 0, "dataset_size": 100, "n_obs_per_chunk": 8} | options)


def read(collection):
    return [ad.io.read_zarr(group) for group in collection]


def codecs_of(array):
    """Names of what is done to the chunks of a sharded array."""
    return [c["name"] for c in array.metadata.to_dict()["codecs"][0]["configuration"]["codecs"]]


def assert_same(one, two):
    for a, b in zip(one, two, strict=True):
        assert a.var_names.tolist() == b.var_names.tolist()
        assert a.obs.equals(b.obs)
        for x, y in ((a.X, b.X), *((a.layers[k], b.layers[k]) for k in a.layers)):
            assert x.dtype == y.dtype
            assert (x.toarray() == y.toarray()).all()
        for k in a.obsm:
            np.testing.assert_array_equal(a.obsm[k], b.obsm[k])
