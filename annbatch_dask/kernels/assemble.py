"""Rows from load buffers into batches: one pass, values cast on the way.

All kernels release the GIL and run on a part of the rows, so that callers spread them over threads of their
own. They compile on first use, once per combination of dtypes, and are cached on disk. To keep those
combinations few, copies between equal dtypes run on unsigned integers of the same size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

__all__ = ["copy_rows", "scatter_rows"]

Array = NDArray[Any]
Ints = NDArray[np.int64]
F = TypeVar("F", bound=Callable[..., Any])

_compiled = cast("Callable[[F], F]", numba.njit(nogil=True, cache=True))

_SAME_SIZE = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def copy_rows(source: Array, starts: Ints, lengths: Ints, dest: Array, dest_starts: Ints) -> None:
    """Copy stretches of a flat array to places in another, casting.

    Parameters
    ----------
    source, dest
        1-D, C-contiguous.
    starts, lengths, dest_starts
        (n,) int64: stretch ``i`` goes from ``source[starts[i]:]`` to ``dest[dest_starts[i]:]``.
    """
    if source.dtype == dest.dtype and source.itemsize in _SAME_SIZE:
        unsigned = _SAME_SIZE[source.itemsize]
        source, dest = source.view(unsigned), dest.view(unsigned)
    if _has_kernels(source.dtype) and _has_kernels(dest.dtype):
        _copy(source, starts, lengths, dest, dest_starts)
        return
    for start, length, to in zip(starts.tolist(), lengths.tolist(), dest_starts.tolist(), strict=True):
        dest[to : to + length] = source[start : start + length]


def scatter_rows(values: Array, columns: Array, starts: Ints, lengths: Ints, dest: Array, dest_rows: Ints) -> int:
    """Turn sparse rows into dense ones: zero the row, add its values.

    A row is finished while it is in the cache. Entries that name a column twice are added up, as scipy does.

    Parameters
    ----------
    values, columns
        1-D, C-contiguous: row ``i`` is ``starts[i]:starts[i] + lengths[i]`` of both.
    dest
        2-D, C-contiguous; row ``i`` becomes ``dest[dest_rows[i]]``.

    Returns
    -------
    int
        Entries left out because their column is not in ``dest``: 0 on sound data.
    """
    if _has_kernels(values.dtype) and _has_kernels(dest.dtype):
        return int(_scatter(values, columns, starts, lengths, dest, dest_rows))
    n_outside = 0
    for start, length, row in zip(starts.tolist(), lengths.tolist(), dest_rows.tolist(), strict=True):
        column = columns[start : start + length].astype(np.int64)
        is_inside = (column >= 0) & (column < dest.shape[1])
        n_outside += int(length - is_inside.sum())
        dest[row] = 0
        np.add.at(dest[row], column[is_inside], values[start : start + length][is_inside])
    return n_outside


def _has_kernels(dtype: np.dtype[Any]) -> bool:
    """Whether numba computes with it on a CPU."""
    return dtype.isnative and (dtype.kind in "biu" or dtype in (np.float32, np.float64, np.complex64, np.complex128))


@_compiled
def _copy(source: Array, starts: Ints, lengths: Ints, dest: Array, dest_starts: Ints) -> None:
    for i in range(starts.shape[0]):
        n = lengths[i]
        # Slices first: indices that start at 0 need no check for negative ones, so the loop vectorises.
        row = source[starts[i] : starts[i] + n]
        to = dest[dest_starts[i] : dest_starts[i] + n]
        for j in range(n):
            to[j] = row[j]


@_compiled
def _scatter(values: Array, columns: Array, starts: Ints, lengths: Ints, dest: Array, dest_rows: Ints) -> int:
    n_columns = np.uint64(dest.shape[1])
    n_outside = 0
    for i in range(starts.shape[0]):
        row_values = values[starts[i] : starts[i] + lengths[i]]
        row_columns = columns[starts[i] : starts[i] + lengths[i]]
        row = dest[dest_rows[i]]
        row[:] = 0
        for j in range(row_columns.shape[0]):
            column = np.uint64(row_columns[j])  # a negative one becomes huge
            if column < n_columns:
                row[column] += row_values[j]
            else:
                n_outside += 1
    return n_outside
