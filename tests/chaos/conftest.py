"""What tests of clusters build from."""

from __future__ import annotations

import pytest

from annbatch_dask.testing import make_adata

N_ROWS = 50


@pytest.fixture(scope="session")
def many_inputs(tmp_path_factory):
    """Paths of so many small files of 50 cells each, the same ones in every test."""
    folder, paths = tmp_path_factory.mktemp("inputs"), []

    def first(n):
        for i in range(len(paths), n):
            paths.append(folder / f"{i:03}.h5ad")
            make_adata(N_ROWS, [f"g{k}" for k in range(30)], seed=i).write_h5ad(paths[-1])
        return paths[:n]

    return first
