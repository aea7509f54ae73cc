"""Chosen rows of a matrix of a source: what lies between them is read where it has to be, and let go of at once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import h5py
import numpy as np
import scipy.sparse as sp
import zarr
from numpy.typing import NDArray

from annbatch_dask.kernels.rows import copy_runs, offsets_of
from annbatch_dask.plan.schema import MatrixSchema
from annbatch_dask.sources.matrices import (
    CsrRows,
    Visitor,
    csc_rows,
    is_group,
    matrix_rows,
    read_dense,
    read_pointers,
    visit_entries,
    whole_chunks,
)

__all__ = ["pick_rows", "windows"]

_POINTERS = 2**20
"""Row pointers that are read at a time."""
_DENSE_NBYTES = 2**24
"""Of dense rows that are read at a time, about."""
_GAP = 2**18
"""Entries between chosen rows that are read rather than skipped."""


def pick_rows(values: Any, matrix: MatrixSchema, rows: NDArray[np.int64]) -> CsrRows | NDArray:
    """Rows of a stored or in-memory matrix, by their ascending numbers; as :func:`matrix_rows`, of which it is a part.

    Parameters
    ----------
    rows
        (n_chosen,) int64, one at least.
    """
    if is_group(values):
        if matrix.kind == "csc":
            return csc_rows(values, int(rows[0]), int(rows[-1]) + 1, rows)
        return _pick_stored(values, rows)
    if isinstance(values, h5py.Dataset | zarr.Array):
        return _pick_dense(values, matrix, rows)
    if sp.issparse(values) and not values.dtype.isnative:  # see matrix_rows
        values = values.astype(values.dtype.newbyteorder("="))
    return matrix_rows(values[rows], matrix, 0, len(rows))


def windows(rows: NDArray[np.int64], size: int) -> Iterator[tuple[int, int]]:
    """Cut ascending rows into pieces [a, b) that lie in one window of ``size`` rows of the source each."""
    cuts = np.flatnonzero(np.diff(rows // size)) + 1
    yield from pairwise([0, *cuts.tolist(), len(rows)])


def _pick_dense(array: Any, matrix: MatrixSchema, rows: NDArray[np.int64]) -> NDArray:
    row_nbytes = max(1, array.dtype.itemsize * matrix.n_cols)
    out = np.empty((len(rows), matrix.n_cols), array.dtype)
    for a, b in windows(rows, whole_chunks(array, _DENSE_NBYTES // row_nbytes)):
        first = int(rows[a])
        found = read_dense(array, first, int(rows[b - 1]) + 1)
        out[a:b] = found.reshape(len(found), matrix.n_cols)[rows[a:b] - first]
    return out.astype(matrix.dtype, copy=False)


def _pick_stored(group: Any, rows: NDArray[np.int64]) -> CsrRows:
    first, length = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
    for a, b in windows(rows, _POINTERS):
        low = int(rows[a])
        pointers = read_pointers(group, low, int(rows[b - 1]) + 1)
        at = rows[a:b] - low
        first[a:b], length[a:b] = pointers[at], pointers[at + 1] - pointers[at]
    offsets = offsets_of(length)
    return CsrRows(
        offsets,
        partial(_visit_picked, group["indices"], first, offsets),
        partial(_visit_picked, group["data"], first, offsets),
    )


def _visit_picked(array: Any, first: NDArray[np.int64], offsets: NDArray[np.int64], visit: Visitor) -> None:
    """Visit the entries of rows that begin at ``first``, as if these rows were all that there are."""
    length = np.diff(offsets)
    filled = length > 0
    at, to, length = first[filled], offsets[:-1][filled], length[filled]
    far = at[1:] - (at[:-1] + length[:-1]) > max(_GAP, whole_chunks(array, 1))  # no chunk is decoded for two spans
    for a, b in pairwise([0, *(np.flatnonzero(far) + 1).tolist(), len(at)]):
        if a < b:
            low, high = int(at[a]), int(at[b - 1] + length[b - 1])
            visit_entries(array, low, high, partial(_pick, at[a:b] - low, to[a:b], length[a:b], visit))


def _pick(
    at: NDArray[np.int64], to: NDArray[np.int64], length: NDArray[np.int64], visit: Visitor, first: int, piece: NDArray
) -> None:
    """Visit what of a piece of a span is in runs of it: from ``at``, which become entries from ``to``."""
    ends, stop = at + length, first + len(piece)
    a, b = int(np.searchsorted(ends, first, side="right")), int(np.searchsorted(at, stop, side="left"))
    if a >= b:
        return
    starts = np.maximum(at[a:b], first)
    counts = np.minimum(ends[a:b], stop) - starts
    found = np.empty(int(counts.sum()), piece.dtype)
    copy_runs(np.ascontiguousarray(piece), starts - first, found, offsets_of(counts)[:-1], counts)
    visit(int(to[a] + starts[0] - at[a]), found)
