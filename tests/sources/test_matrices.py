"""Sparse rows are the same however many entries are worked on at a time, and wherever they come from."""

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
import zarr

from annbatch_dask.errors import SchemaError
from annbatch_dask.etl import blocks as join
from annbatch_dask.etl.blocks import dense_to_csr, in_gene_order
from annbatch_dask.kernels import rows
from annbatch_dask.sources import hdf5 as h5ad
from annbatch_dask.sources import matrices
from annbatch_dask.sources.matrices import describe_matrix, matrix_rows

X = sp.random(70, 23, 0.3, format="csr", random_state=np.random.default_rng(0), dtype=np.float64)
X.data = np.ceil(X.data * 100)


@pytest.fixture(params=["hdf5", "gzip", "zarr"])
def stored(request, tmp_path):
    """Writes a matrix to a file, in small chunks; returns its group."""

    def write(x, **options):
        if request.param == "zarr":
            root = zarr.create_group(tmp_path / "x.zarr", overwrite=True)
        else:
            root = h5py.File(tmp_path / "x.h5", "w")
            request.addfinalizer(root.close)
        compression = {"compression": "gzip"} if request.param == "gzip" else {}
        with ad.settings.override(auto_shard_zarr_v3=False):
            ad.io.write_elem(root, "X", x, dataset_kwargs=compression | options)
        return root["X"]

    return write


def collected(csr):
    """A CsrRows as scipy has it."""
    n = int(csr.offsets[-1])
    indices, values = np.full(n, -1, np.int64), np.full(n, np.nan)
    for into, visit in ((indices, csr.indices), (values, csr.values)):

        def put(first, piece, into=into):
            into[first : first + len(piece)] = piece

        visit(put)
    return sp.csr_matrix((values, indices, csr.offsets), shape=(len(csr.offsets) - 1, X.shape[1]))


@pytest.mark.parametrize("dtype", ["float32", "float64", "int8", "bool"])
@pytest.mark.parametrize("slab", [1, 7, 2**20])
def test_rows_of_a_column_compressed_matrix(stored, monkeypatch, dtype, slab):
    monkeypatch.setattr(matrices, "_CSC_SLAB", slab)
    x = X.astype(dtype).tocsc()
    x.eliminate_zeros()
    x.data[0] = 1
    group = stored(x, chunks=(5,))
    schema = describe_matrix("X", group)
    for start, stop in ((0, 70), (13, 14), (20, 61), (69, 70)):
        found = collected(matrix_rows(group, schema, start, stop))
        assert found.has_sorted_indices
        np.testing.assert_array_equal(found.toarray(), x[start:stop].toarray())


def test_a_row_index_outside_a_column_compressed_matrix_is_refused(stored):
    x = X.tocsc()
    group = stored(x)
    schema = describe_matrix("X", group)
    group["indices"][3] = 70
    with pytest.raises(SchemaError, match="row indices run from 0 to 70 in a matrix of 70 rows"):
        matrix_rows(group, schema, 0, 10)


@pytest.mark.parametrize("step", [1, 50, 2**20])
def test_non_zeros_of_dense_rows(monkeypatch, step):
    monkeypatch.setattr(join, "_STEP", step)
    x = X.toarray()
    x[0], x[1, :3] = 0, (np.nan, -0.0, np.inf)
    found = collected(dense_to_csr(x))
    np.testing.assert_array_equal(found.toarray(), np.where(x == 0, 0, x))
    assert found.nnz == (x != 0).sum()
    assert collected(dense_to_csr(x[:0])).shape == (0, 23)
    assert dense_to_csr(x[:, :0]).offsets.tolist() == [0] * 71


@pytest.mark.parametrize("step", [1, 50, 2**20])
@pytest.mark.parametrize("n_left_out", [0, 5, 23])
@pytest.mark.parametrize("shuffled", [False, True])
def test_genes_left_out_and_put_in_order_in_place(monkeypatch, step, n_left_out, shuffled):
    monkeypatch.setattr(join, "_STEP", step)
    monkeypatch.setattr(rows, "_SORT", step)
    rng = np.random.default_rng(1)
    order = rng.permutation(23) if shuffled else np.arange(23)
    gene_map = order.astype(np.int32)
    gene_map[rng.permutation(23)[:n_left_out]] = -1
    offsets, indices, values = in_gene_order(X.indptr.astype(np.int64), gene_map[X.indices], X.data.copy(), gene_map)
    found = sp.csr_matrix((values, indices, offsets), shape=(70, 23))
    want = np.zeros((70, 23))
    want[:, gene_map[gene_map >= 0]] = X.toarray()[:, gene_map >= 0]
    np.testing.assert_array_equal(found.toarray(), want)
    assert all((np.diff(indices[a:b]) > 0).all() for a, b in zip(offsets[:-1], offsets[1:], strict=True))


@pytest.mark.parametrize("waiting", [1, 2**24])
def test_dense_rows_of_large_chunks(stored, monkeypatch, waiting):
    monkeypatch.setattr(h5ad, "_WAITING_NBYTES", waiting)
    monkeypatch.setattr(matrices, "_ZARR_NBYTES", waiting)
    x = X.toarray()
    values = stored(x, chunks=(9, 5))
    schema = describe_matrix("X", values)
    assert schema.in_flight_nbytes > 0
    for start, stop in ((0, 70), (13, 14), (20, 61)):
        np.testing.assert_array_equal(matrix_rows(values, schema, start, stop), x[start:stop])
