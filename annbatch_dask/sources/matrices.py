"""Matrices of a source: what one holds, and any rows of it; stored and in-memory ones alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr
from numpy.typing import NDArray

from annbatch_dask.errors import IntegrityError, SchemaError
from annbatch_dask.kernels.rows import find_rows, offsets_of, place_columns
from annbatch_dask.manifest import SOURCE_DTYPE
from annbatch_dask.plan.dtypes import is_number
from annbatch_dask.plan.schema import MatrixKind, MatrixSchema, heaviest_at
from annbatch_dask.sources.hdf5 import SLAB_NBYTES, in_flight_nbytes, read_h5_rows, visit_h5
from annbatch_dask.storage.transient import is_transient

__all__ = [
    "ROW_STEP",
    "CscSlab",
    "CsrRows",
    "Visitor",
    "are_whole",
    "check_row_indices",
    "check_rows",
    "column_pointers",
    "counted",
    "csc_rows",
    "describe_matrix",
    "is_group",
    "is_matrix",
    "matrix_rows",
    "n_rows_of",
    "places_of",
    "read_dense",
    "read_flat",
    "read_pointers",
    "row_of",
    "rows_of_slabs",
    "visit_entries",
    "whole_chunks",
]

_SAMPLE = 4096
"""Values looked at in each of three places."""
Visitor = Callable[[int, NDArray], None]
_CSC_SLAB = 2**20
"""Entries of a column-compressed matrix that go by at a time, about."""
_ZARR_NBYTES = 2 * SLAB_NBYTES
ROW_STEP = 64
"""Rows between the points at which the stored values of a source are counted."""


@dataclass(frozen=True)
class CsrRows:
    """Rows of a sparse matrix, not yet read.

    Attributes
    ----------
    offsets
        (n_rows + 1,) int64 first entry of each row, from 0.
    indices, values
        Call with a visitor ``(first_entry, entries)``; pieces come in no order and from several threads. Indices may
        be visited once only: they are let go of then.
    """

    offsets: NDArray[np.int64]
    indices: Callable[[Visitor], None]
    values: Callable[[Visitor], None]


def n_rows_of(elem: Any) -> int:
    """Rows of a stored matrix, as its metadata say."""
    shape = elem.attrs.get("shape", elem.attrs.get("h5sparse_shape")) if hasattr(elem, "keys") else elem.shape
    return int(shape[0])


def check_rows(label: str, name: str, n_rows: int, n_obs: int) -> None:
    """Refuse a matrix or column that is not aligned with obs."""
    if n_rows != n_obs:
        msg = f"{label}: {name} has {n_rows:,} rows and obs has {n_obs:,}; the file is damaged, write it anew"
        raise SchemaError(msg)


def describe_matrix(
    name: str, values: Any, *, metadata_only: bool = False, rows: NDArray[np.bool_] | None = None
) -> MatrixSchema | None:
    """Schema of a matrix; None for an element that is no numeric matrix.

    With ``metadata_only`` a stored one is not read: its stored values are taken to be spread evenly over its rows.
    With ``rows``, (n_rows,), it is that of the rows of which they are true.
    """
    if is_group(values):
        return _describe_stored_sparse(name, values, metadata_only=metadata_only, rows=rows)
    dtype, ndim = getattr(values, "dtype", None), getattr(values, "ndim", 0)
    if isinstance(values, pd.DataFrame) or dtype is None or not is_matrix(name, dtype, ndim):
        return None
    if sp.issparse(values):
        kind: MatrixKind = "csc" if values.format == "csc" else "csr"
        schema = MatrixSchema(name, kind, dtype.name, "int32", values.shape[1])
        return counted(schema, np.cumsum(_row_counts(values)), rows=rows)
    stored_nbytes = _in_flight(values) if hasattr(values, "chunks") else 0
    schema = MatrixSchema(name, "dense", _source_dtype(values, dtype), "", **row_of(values.shape))
    return replace(schema, in_flight_nbytes=stored_nbytes)


def is_group(values: Any) -> bool:
    """True if a matrix is a group of arrays in a file. Data frames have both as well, arrays of AnnData views keys."""
    return hasattr(values, "keys") and hasattr(values, "attrs") and not isinstance(values, pd.DataFrame)


def columnless(n_obs: int) -> Any:
    """X of cells that have no genes, as those whose images are in obsm: a matrix of no columns."""
    return sp.csr_matrix((n_obs, 0), dtype=np.float32)


def is_matrix(name: str, dtype: np.dtype, ndim: int) -> bool:
    """True if rows of such an array can be carried: vectors of numbers, and in ``obsm`` arrays of any dimensions."""
    return is_number(dtype) and (ndim == 2 or (ndim > 2 and name.startswith("obsm/")))


def row_of(shape: tuple[int, ...]) -> dict[str, Any]:
    """Number of values, and shape where there is more to say, of a row of a dense matrix."""
    row = tuple(int(n) for n in shape[1:])
    return {"n_cols": prod(row), "row_shape": row if len(row) > 1 else ()}


def _source_dtype(elem: Any, stored: np.dtype) -> str:
    """Dtype of the values: what a collection's datasets were made of, which may be wider than what they store."""
    return str(getattr(elem, "attrs", {}).get(SOURCE_DTYPE) or stored.newbyteorder("=").name)


def are_whole(values: Any) -> bool | None:
    """True if a sample of a matrix's values, from its start, middle and end, are whole numbers; None if all are 0."""
    if sp.issparse(values):
        stored: Any = values.data
    else:
        stored = values["data"] if is_group(values) else values
    if stored.dtype.kind in "biu":
        return True
    width = prod(stored.shape[1:])
    n = max(1, _SAMPLE // max(1, width))
    last = int(stored.shape[0])
    starts = {0, max(0, (last - n) // 2), max(0, last - n)}
    found = np.concatenate([np.asarray(stored[a : min(a + n, last)]).reshape(-1) for a in sorted(starts)])
    found = found[np.isfinite(found) & (found != 0)]
    return bool((found == np.trunc(found)).all()) if len(found) else None


def _row_counts(matrix: Any) -> NDArray[np.int64]:
    return (
        np.bincount(matrix.indices, minlength=matrix.shape[0])
        if matrix.format == "csc"
        else np.diff(matrix.tocsr().indptr)
    )


def counted(
    schema: MatrixSchema, ends: NDArray, *, exact: bool = True, rows: NDArray[np.bool_] | None = None
) -> MatrixSchema:
    """A sparse matrix with what is known of its rows, from the stored values up to and with each of them.

    ``rows``: see :func:`describe_matrix`.
    """
    if rows is not None:
        ends = np.cumsum(np.diff(ends, prepend=ends.dtype.type(0))[rows])
    at = np.minimum(np.arange(-(-len(ends) // ROW_STEP) + 1) * ROW_STEP, len(ends))
    nnz = np.concatenate([[0], ends])[at].astype(np.int64)
    places = heaviest_at(len(ends))
    if exact:
        heaviest = np.cumsum(np.sort(np.diff(ends, prepend=0))[::-1])[places]
    else:  # spread evenly, as far as is known
        heaviest = nnz[-1] * (places + 1) / max(1, len(ends))
    heaviest = np.ceil(heaviest).astype(np.int64)
    return replace(schema, row_step=ROW_STEP, nnz=nnz, heaviest=heaviest, exact=exact)


def _describe_stored_sparse(
    name: str, group: Any, *, metadata_only: bool, rows: NDArray[np.bool_] | None
) -> MatrixSchema | None:
    encoding = str(group.attrs.get("encoding-type", ""))
    if encoding not in ("csr_matrix", "csc_matrix") or not is_number(group["data"].dtype):
        return None
    kind: MatrixKind = "csr" if encoding == "csr_matrix" else "csc"
    n_rows, n_cols = (int(n) for n in group.attrs["shape"])
    dtypes = (_source_dtype(group, group["data"].dtype), group["indices"].dtype.name)
    ends = _even_ends(group, n_rows) if metadata_only else _row_ends(group, kind, n_rows)
    n_stored = int(group["data"].shape[0]) if kind == "csc" else 0
    in_flight = _in_flight(group["data"], group["indices"])
    schema = MatrixSchema(name, kind, *dtypes, n_cols, in_flight_nbytes=in_flight, n_stored=n_stored)
    return counted(schema, ends, exact=not metadata_only, rows=rows)


def _even_ends(group: Any, n_rows: int) -> NDArray[np.float64]:
    """(n_rows,) stored values up to and with each row, if all rows had as many."""
    return np.linspace(0, group["data"].shape[0], n_rows + 1)[1:]


def _row_ends(group: Any, kind: MatrixKind, n_rows: int) -> NDArray[np.integer]:
    """(n_rows,) stored values up to and with each row."""
    if kind == "csr":
        ends = np.asarray(group["indptr"][1:])
        if n_rows and not ends[-1] and (n := group["indices"].shape[0]):
            msg = f"indptr gives no row any of {n:,} values, as zarr reads it where its file is missing; copy it again"
            raise SchemaError(msg)
        return ends
    counts, n = np.zeros(n_rows, np.int64), group["indices"].shape[0]
    for a in range(0, n, SLAB_NBYTES):
        rows = group["indices"][a : min(a + SLAB_NBYTES, n)]
        check_row_indices(rows, n_rows)
        counts += np.bincount(rows, minlength=n_rows)
    return np.cumsum(counts)


def check_row_indices(rows: NDArray, n_rows: int) -> None:
    """Refuse a column-compressed matrix that names rows it has not: their values would be lost."""
    if len(rows) and (rows.min() < 0 or rows.max() >= n_rows):
        msg = f"row indices run from {rows.min():,} to {rows.max():,} in a matrix of {n_rows:,} rows; write it anew"
        raise SchemaError(msg)


def matrix_rows(values: Any, matrix: MatrixSchema, start: int, stop: int) -> CsrRows | NDArray:
    """Rows [start, stop) of a stored or in-memory matrix; dense ones as (rows, n_cols) in the schema's dtype."""
    if is_group(values):
        return _stored_csr(values, start, stop) if matrix.kind == "csr" else csc_rows(values, start, stop)
    elif isinstance(values, h5py.Dataset | zarr.Array):
        values = read_dense(values, start, stop)
    else:
        if sp.issparse(values) and not values.dtype.isnative:  # scipy slices this machine's byte order alone
            values = values.astype(values.dtype.newbyteorder("="))
        values = values[start:stop]
    if sp.issparse(values):
        return _csr_in_memory(values.tocsr())
    return np.asarray(values).reshape(stop - start, matrix.n_cols).astype(matrix.dtype, copy=False)


def read_dense(array: Any, start: int, stop: int) -> NDArray:
    """Rows [start, stop) of a stored array."""
    is_h5 = isinstance(array, h5py.Dataset)
    return read_h5_rows(array, start, stop) if is_h5 else _zarr_dense(array, start, stop)


def _native(values: NDArray) -> NDArray:
    """Convert values to this machine's byte order, which compiled kernels need."""
    return values if values.dtype.isnative else values.astype(values.dtype.newbyteorder("="))


def _csr_in_memory(rows: Any) -> CsrRows:
    offsets = rows.indptr.astype(np.int64)
    _check_pointers(offsets, rows.indices, rows.data)
    return CsrRows(offsets, lambda visit: visit(0, _native(rows.indices)), lambda visit: visit(0, _native(rows.data)))


def _check_pointers(offsets: NDArray[np.int64], indices: Any, data: Any) -> None:
    """Refuse row pointers that go back, or beyond what is stored: values would be lost, or be whatever lay there."""
    stored = min(int(indices.shape[0]), int(data.shape[0]))
    if offsets[0] < 0 or (np.diff(offsets) < 0).any() or offsets[-1] > stored:
        msg = (
            f"indptr runs from {offsets.min():,} to {offsets.max():,}, and {indices.shape[0]:,} indices and "
            f"{data.shape[0]:,} values are stored; it must never fall, nor pass their end: write the file anew"
        )
        raise SchemaError(msg)


def _stored_csr(group: Any, start: int, stop: int) -> CsrRows:
    offsets = read_pointers(group, start, stop)
    low, high = int(offsets[0]), int(offsets[-1])
    return CsrRows(
        offsets - low,
        lambda visit: visit_entries(group["indices"], low, high, visit),
        lambda visit: visit_entries(group["data"], low, high, visit),
    )


def read_pointers(group: Any, start: int, stop: int) -> NDArray[np.int64]:
    """First entries of rows [start, stop) of a stored CSR matrix, and the end of the last.

    Raises
    ------
    SchemaError
        If they are not there, or go back, or beyond what is stored.
    """
    found = _pointers(group, start, stop + 1)
    if len(found) != stop - start + 1:
        msg = f"indptr ends after {start + len(found) - 1:,} rows and shape says at least {stop:,}; write the file anew"
        raise SchemaError(msg)
    _check_pointers(found, group["indices"], group["data"])
    return found


def _pointers(group: Any, start: int, stop: int) -> NDArray[np.int64]:
    pointers = group["indptr"]
    rows = _zarr_rows(pointers, start, stop) if isinstance(pointers, zarr.Array) else pointers[start:stop]
    return np.asarray(rows).astype(np.int64)


def visit_entries(array: Any, start: int, stop: int, visit: Visitor) -> None:
    """Visit entries [start, stop) of a stored array in pieces, counted from ``start``."""
    if not array.dtype.isnative:
        visit = _swapped(visit)
    if isinstance(array, h5py.Dataset):
        visit_h5(array, start, stop, visit)
        return
    for lo, hi in _zarr_pieces(array, start, stop):
        visit(lo - start, _zarr_rows(array, lo, hi))


def _swapped(visit: Visitor) -> Visitor:
    return lambda first, piece: visit(first, _native(piece))


def _zarr_pieces(array: zarr.Array, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Cut rows [start, stop) where its chunks are, into pieces of about a slab."""
    step = _zarr_step(array)
    for a in range(start // step * step, stop, step):
        yield max(a, start), min(a + step, stop)


def _zarr_step(array: zarr.Array) -> int:
    """Rows read at a time: whole chunks."""
    row_nbytes = max(1, array.dtype.itemsize * prod(array.shape[1:]))
    return whole_chunks(array, _ZARR_NBYTES // row_nbytes)


def _zarr_dense(array: zarr.Array, start: int, stop: int) -> NDArray:
    """Rows [start, stop), piece by piece: zarr holds those that it decodes a second time."""
    out = np.empty((stop - start, *array.shape[1:]), array.dtype)
    for lo, hi in _zarr_pieces(array, start, stop):
        out[lo - start : hi - start] = _zarr_rows(array, lo, hi)
    return out


def _in_flight(*arrays: Any) -> int:
    """Bytes at most that reading any rows of one of the arrays holds beside them."""
    return max(
        in_flight_nbytes(a)
        if isinstance(a, h5py.Dataset)
        else 3 * _zarr_step(a) * a.dtype.itemsize * max(1, prod(a.shape[1:]))
        for a in arrays
    )


def _zarr_rows(array: zarr.Array, start: int, stop: int) -> NDArray:
    try:
        return np.asarray(array[start:stop])
    except (ValueError, RuntimeError) as e:  # zarr's own pipeline, and that of zarrs
        if is_transient(e):  # says nothing about the file
            raise
        msg = f"{array.store_path}: entries {start:,} to {stop:,} are damaged ({e}); restore the file"
        raise IntegrityError(msg) from e


def csc_rows(group: Any, start: int, stop: int, rows: NDArray[np.int64] | None = None) -> CsrRows:
    """Rows of a column-compressed matrix: all of it goes by, in slabs, and what is in the rows stays.

    ``rows``: numbers of those of [start, stop) that are wanted, ascending; None for all.

    Raises
    ------
    SchemaError
        For a row index outside the matrix.
    """
    indptr = column_pointers(group)
    n_rows, place = places_of(start, stop, rows)
    slabs = _csc_slabs(group, indptr, start, stop, place)
    return rows_of_slabs(slabs, n_rows, group["data"].dtype.newbyteorder("="))


def column_pointers(group: Any) -> NDArray[np.int64]:
    """(n_cols + 1,) first entries of the columns of a stored matrix, and the end of the last."""
    indptr = np.asarray(group["indptr"][:]).astype(np.int64)
    _check_pointers(indptr, group["indices"], group["data"])
    return indptr


def places_of(start: int, stop: int, rows: NDArray[np.int64] | None) -> tuple[int, NDArray[np.int64] | None]:
    """How many of rows [start, stop) are wanted, and the place of each among them, -1 for none; None for all."""
    if rows is None:
        return stop - start, None
    place = np.full(stop - start, -1, np.int64)
    place[rows - start] = np.arange(len(rows))
    return len(rows), place


@dataclass(frozen=True)
class CscSlab:
    """Entries of some columns of a matrix that are in some rows, which are counted from 0."""

    column: int
    offsets: NDArray[np.int64]
    rows: NDArray[np.uint32]
    values: NDArray


def rows_of_slabs(slabs: Iterable[CscSlab], n_rows: int, dtype: np.dtype) -> CsrRows:
    """Rows of a matrix from slabs of its columns, the first ones first."""
    kept, counts = [], np.zeros(n_rows, np.int64)
    for slab in slabs:
        counts += np.bincount(slab.rows, minlength=n_rows)
        kept.append(slab)
    offsets = offsets_of(counts)
    at, cols = offsets[:-1].copy(), [np.empty(int(offsets[-1]), np.int32)]
    values = np.empty(int(offsets[-1]), dtype)
    kept.reverse()
    while kept:  # each slab is let go of as it is put into its rows
        slab = kept.pop()
        entries = slab.rows, slab.values.astype(dtype, copy=False)
        place_columns(slab.column, slab.offsets, entries, at, (cols[0], values))
    return CsrRows(offsets, lambda visit: visit(0, cols.pop()), lambda visit: visit(0, values))


def _csc_slabs(
    group: Any, indptr: NDArray[np.int64], start: int, stop: int, place: NDArray[np.int64] | None
) -> Iterator[CscSlab]:
    indices, data, n_rows = group["indices"], group["data"], n_rows_of(group)
    step = max(whole_chunks(indices, _CSC_SLAB), whole_chunks(data, _CSC_SLAB))
    for a in range(0, int(indptr[-1]), step):
        b = min(a + step, int(indptr[-1]))
        rows = read_flat(indices, a, b)
        at = np.empty(b - a + 1, np.int64)
        check_row_indices(rows, n_rows)
        at = at[: find_rows(rows, start, stop, at)]
        numbers = (rows[at] - start).astype(np.uint32)
        if place is not None:
            wanted = place[numbers]
            at, numbers = at[wanted >= 0], wanted[wanted >= 0].astype(np.uint32)
        first, last = np.searchsorted(indptr, [a, b - 1], side="right").tolist()
        offsets = np.searchsorted(at + a, indptr[first - 1 : last + 1])
        yield CscSlab(first - 1, offsets, numbers, read_flat(data, a, b)[at])


def whole_chunks(array: Any, size: int) -> int:
    """About ``size`` entries or rows, as whole chunks."""
    chunk = int((array.chunks or (1,))[0])
    return max(1, size // chunk) * chunk


def read_flat(array: Any, start: int, stop: int) -> NDArray:
    """Entries [start, stop) of a stored array, in this machine's byte order."""
    rows = read_h5_rows(array, start, stop) if isinstance(array, h5py.Dataset) else _zarr_rows(array, start, stop)
    return _native(rows)
