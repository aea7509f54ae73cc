"""Sparse rows made dense, one at a time: kernels of :func:`annbatch_dask.kernels.assemble.scatter_rows`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.kernels.compiled import compiled
from annbatch_dask.kernels.prefetch import end_stream, prefetch_row, put_row, shift_to

__all__ = ["Rows", "scatter", "scatter_past", "scatter_selected"]

Array = NDArray[Any]
Ints = NDArray[np.int64]
Places = NDArray[np.int32]
Rows = tuple[Array, Ints, Array, Ints, Ints]
"""Values, where each row of them begins, columns, where each row of them begins, lengths."""

_LINE_ITEMS = 64  # as many as a cache line has at most


@compiled
def _is_plain(columns: Array, n_columns: np.uint64) -> bool:
    """True if a row's columns ascend and all exist, as anndata writes them: then each is there once."""
    n = columns.shape[0]
    n_down = 0
    for j in range(1, n):
        n_down += columns[j] <= columns[j - 1]
    return n == 0 or bool(n_down == 0 and columns[0] >= 0 and np.uint64(columns[n - 1]) < n_columns)


@compiled
def _add_row(values: Array, columns: Array, row: Array) -> tuple[int, int]:
    """Add the entries of a row, in any order, to what is there; returns entries outside, and repeated ones."""
    n_columns, n_outside, n_repeated = np.uint64(row.shape[0]), 0, 0
    for j in range(columns.shape[0]):
        column = np.uint64(columns[j])  # a negative one becomes huge
        if column < n_columns:
            n_repeated += row[column] != 0
            row[column] += values[j]
        else:
            n_outside += 1
    return n_outside, n_repeated


@compiled
def scatter(rows: Rows, dest: Array, dest_rows: Ints) -> tuple[int, int]:
    """Make rows dense where they are: zero each, add its values. Returns entries outside, and repeated ones."""
    values, value_starts, columns, starts, lengths = rows
    n_columns = np.uint64(dest.shape[1])
    n_outside = n_repeated = 0
    last = starts.shape[0] - 1
    for i in range(starts.shape[0]):
        row_values = values[value_starts[i] : value_starts[i] + lengths[i]]
        row_columns = columns[starts[i] : starts[i] + lengths[i]]
        row = dest[dest_rows[i]]
        row[:] = 0
        prefetch_row(dest[dest_rows[min(i + 1, last)]])
        if _is_plain(row_columns, n_columns):
            for j in range(row_columns.shape[0]):
                row[np.uint64(row_columns[j])] = row_values[j]
            continue
        outside, repeated = _add_row(row_values, row_columns, row)
        n_outside, n_repeated = n_outside + outside, n_repeated + repeated
    return n_outside, n_repeated


@compiled
def scatter_past(rows: Rows, dest: Array, dest_rows: Ints) -> tuple[int, int]:
    """As `scatter`, but in a row beside, of which only the entries are made zero again: memory is written once."""
    values, value_starts, columns, starts, lengths = rows
    n_columns = np.uint64(dest.shape[1])
    n_outside = n_repeated = 0
    spare = np.zeros(dest.shape[1] + _LINE_ITEMS, dest.dtype)
    for i in range(starts.shape[0]):
        row_values = values[value_starts[i] : value_starts[i] + lengths[i]]
        row_columns = columns[starts[i] : starts[i] + lengths[i]]
        row = dest[dest_rows[i]]
        at = shift_to(spare, row)
        made = spare[at : at + n_columns]
        if _is_plain(row_columns, n_columns):
            for j in range(row_columns.shape[0]):
                made[np.uint64(row_columns[j])] = row_values[j]
            put_row(spare, at, row)
            for j in range(row_columns.shape[0]):
                made[np.uint64(row_columns[j])] = 0
            continue
        outside, repeated = _add_row(row_values, row_columns, made)
        n_outside, n_repeated = n_outside + outside, n_repeated + repeated
        put_row(spare, at, row)
        made[:] = 0
    end_stream()
    return n_outside, n_repeated


@compiled
def scatter_selected(rows: Rows, places: Places, dest: Array, dest_rows: Ints) -> tuple[int, int]:
    """As `scatter`, of chosen columns alone, each at its place."""
    values, value_starts, columns, starts, lengths = rows
    n_columns = np.uint64(places.shape[0])
    n_outside = n_repeated = 0
    last, longest = starts.shape[0] - 1, 0
    for i in range(lengths.shape[0]):
        longest = max(longest, lengths[i])
    kept = np.empty(longest + 1, np.int64)
    for i in range(starts.shape[0]):
        row_values = values[value_starts[i] : value_starts[i] + lengths[i]]
        row_columns = columns[starts[i] : starts[i] + lengths[i]]
        row = dest[dest_rows[i]]
        row[:] = 0
        prefetch_row(dest[dest_rows[min(i + 1, last)]])
        # Which entries stay is found first, without a branch: the few chosen ones cannot be predicted.
        n_kept = 0
        if _is_plain(row_columns, n_columns):
            for j in range(row_columns.shape[0]):
                kept[n_kept] = j
                n_kept += places[np.uint64(row_columns[j])] >= 0
            for k in range(n_kept):
                j = kept[k]
                row[np.uint64(places[np.uint64(row_columns[j])])] = row_values[j]
            continue
        for j in range(row_columns.shape[0]):
            column = np.uint64(row_columns[j])
            if column < n_columns:
                kept[n_kept] = j
                n_kept += 1 if places[column] >= 0 else 0
            else:
                n_outside += 1
        for k in range(n_kept):
            j = kept[k]
            place = np.uint64(places[np.uint64(row_columns[j])])
            n_repeated += row[place] != 0
            row[place] += row_values[j]
    return n_outside, n_repeated
