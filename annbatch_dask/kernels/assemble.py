"""Rows from load buffers into batches: one pass, values cast on the way.

All kernels release the GIL and run on a part of the rows, so that callers spread them over threads of their
own. They compile on first use, once per combination of dtypes, and are cached on disk. To keep those
combinations few, copies between equal dtypes run on unsigned integers of the same size.
"""

from __future__ import annotations

import math
import os
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba.core.compiler_lock import global_compiler_lock
from numpy.typing import NDArray

from annbatch_dask.kernels.compiled import compiled
from annbatch_dask.kernels.densify import Rows, scatter, scatter_past, scatter_selected
from annbatch_dask.kernels.prefetch import copy_past
from annbatch_dask.kernels.rows import order_row

__all__ = [
    "Places",
    "SparseRows",
    "as_unsigned",
    "copy_rows",
    "count_selected",
    "goes_past_cache",
    "half_bits",
    "has_kernels",
    "normalize_rows",
    "scatter_rows",
    "select_rows",
    "sum_dtype",
    "take_columns",
    "total",
]

Array = NDArray[Any]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Places = NDArray[np.int32]

if hasattr(os, "register_at_fork"):
    # A worker that is forked while a thread compiles would inherit the compiler's lock in a locked state.
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )

_SAME_SIZE = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_N_KNOWN = 64
_STREAMED = frozenset(map(np.dtype, (np.int32, np.uint32, np.float32)))
_MIN_STREAM_NBYTES = 8 * 1024 * 1024  # less may still be in a cache when it is used
_MAX_ROW_NBYTES = 1024 * 1024  # a row is put together in a core's own cache
_MAX_SUMMED_NBYTES = 4


class SparseRows(NamedTuple):
    """Flat values and columns, 1-D, C-contiguous.

    ``value_starts`` says where each row's values begin where that is not where its columns do.
    """

    values: Array
    columns: Array
    value_starts: Ints | None = None

    def at(self, starts: Ints, lengths: Ints) -> Rows:
        """Some rows: values, where each row of them begins, columns, where each row of them begins, lengths."""
        return self.values, starts if self.value_starts is None else self.value_starts, self.columns, starts, lengths


def copy_rows(source: Array, starts: Ints, lengths: Ints, dest: Array, dest_starts: Ints) -> None:
    """Copy stretches of a flat array to places in another, casting.

    Parameters
    ----------
    source, dest
        1-D, C-contiguous.
    starts, lengths, dest_starts
        (n,) int64: stretch ``i`` goes from ``source[starts[i]:]`` to ``dest[dest_starts[i]:]``.
    """
    source, dest = as_unsigned(source, dest)
    if not (has_kernels(source.dtype) and has_kernels(dest.dtype)):
        _copy_plain(source, dest, starts, lengths, dest_starts)
        return
    kernel = copy_past if goes_past_cache(source, dest) else _copy
    kernel(source, starts, lengths, dest, dest_starts)


def _copy_plain(source: Array, dest: Array, starts: Ints, lengths: Ints, dest_starts: Ints) -> None:
    """Copy in numpy, for dtypes that numba does not support."""
    for start, length, to in zip(starts.tolist(), lengths.tolist(), dest_starts.tolist(), strict=True):
        dest[to : to + length] = source[start : start + length]


def normalize_rows(
    source: Array,
    starts: Ints,
    lengths: Ints,
    dest: Array,
    dest_starts: Ints,
    *,
    target_sum: float,
    totals: Floats | None = None,
) -> None:
    """Scale each stretch to a sum, take log(1 + x): scanpy's ``normalize_total`` and ``log1p`` in one pass.

    A stretch that sums to 0 stays as it is.

    Parameters
    ----------
    source
        1-D, C-contiguous: stretch ``i`` is ``source[starts[i]:starts[i] + lengths[i]]``, all values of a row unless
        there are ``totals``.
    dest
        1-D, of floats; stretch ``i`` goes to ``dest[dest_starts[i]:]``.
    target_sum
        What a row is scaled to.
    totals
        (n,) the sum of each row, where stretches lack some of its values.
    """
    if not has_kernels(source.dtype):
        copy_rows(source, starts, lengths, dest, dest_starts)
        source, starts = dest, dest_starts
    if totals is None:
        totals = np.empty(len(starts), np.float64)
        _sum_up(source, starts, lengths, np.zeros(1, sum_dtype(source.dtype)), totals)
    _normalize(source, starts, lengths, dest, dest_starts, float(target_sum), totals)


def sum_dtype(dtype: np.dtype[Any]) -> Any:
    """What a row of such values is added up in; None where they are cast before.

    Whole numbers that cannot overflow it are added in any order, many at a time.
    """
    if not has_kernels(dtype) or dtype.kind == "c":
        return None
    return np.int64 if dtype.kind in "iu" and dtype.itemsize <= _MAX_SUMMED_NBYTES else np.float64


def half_bits(values: Array, *, bfloat16: bool) -> NDArray[np.uint16]:
    """Values in half precision, rounded to the nearest, as the 16 bits that stand for them.

    numba and numpy know too little of half precision to compute in it; bits can be moved like any integer.
    """
    if not bfloat16:
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    bits = values.astype(np.float32).view(np.uint32)
    is_nan = np.isnan(values)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(is_nan, np.uint16(0x7FC0), rounded.astype(np.uint16))


def scatter_rows(
    sparse: SparseRows, starts: Ints, lengths: Ints, dest: Array, dest_rows: Ints, places: Places | None = None
) -> tuple[int, int]:
    """Turn sparse rows into dense ones: zero the row, add its values.

    A row is finished while it is in the cache. Entries that name a column twice are added up, as scipy does.

    Parameters
    ----------
    sparse
        Values and columns; row ``i`` is ``starts[i]:starts[i] + lengths[i]`` of the columns.
    dest
        2-D, C-contiguous; row ``i`` becomes ``dest[dest_rows[i]]``.
    places
        Where each column goes, -1 for one that is left out; None puts each where it was.

    Returns
    -------
    n_outside, n_repeated
        Entries left out because their column does not exist, 0 on sound data; entries added to another.
    """
    if not (has_kernels(sparse.values.dtype) and has_kernels(dest.dtype)):
        return _scatter_plain(sparse, starts, lengths, dest, dest_rows, places)
    rows = sparse.at(starts, lengths)
    if places is not None:
        found: tuple[int, int] = scatter_selected(rows, places, dest, dest_rows)
        return found
    found = (scatter_past if _is_made_beside(dest) else scatter)(rows, dest, dest_rows)
    return found


def _scatter_plain(
    sparse: SparseRows, starts: Ints, lengths: Ints, dest: Array, dest_rows: Ints, places: Places | None
) -> tuple[int, int]:
    """Like `scatter_rows`, in numpy, for dtypes that numba does not support."""
    values, value_starts, columns, *_ = sparse.at(starts, lengths)
    n_columns, n_outside = dest.shape[1] if places is None else len(places), 0
    for start, value_start, length, row in zip(starts, value_starts, lengths, dest_rows, strict=True):
        column = columns[start : start + length].astype(np.int64)
        is_inside = (column >= 0) & (column < n_columns)
        n_outside += int(length - is_inside.sum())
        value, column = values[value_start : value_start + length][is_inside], column[is_inside]
        place = column if places is None else places[column]
        dest[row] = 0
        np.add.at(dest[row], place[place >= 0], value[place >= 0])
    return n_outside, 0


def count_selected(columns: Array, starts: Ints, lengths: Ints, places: Places) -> tuple[Ints, int]:
    """Count the entries of each row that ``places`` keeps, and the entries whose column does not exist."""
    counts = np.empty(len(starts), np.int64)
    return counts, int(_count(columns, starts, lengths, places, counts))


def select_rows(
    sparse: SparseRows, starts: Ints, lengths: Ints, places: Places, dest: tuple[Array, Array], dest_starts: Ints
) -> None:
    """Copy the entries of chosen columns, casting; within a row they come in ascending order of the new column.

    Parameters
    ----------
    sparse, starts, lengths, places
        As for :func:`scatter_rows`; columns must have been checked, as :func:`count_selected` does.
    dest, dest_starts
        Values and columns; row ``i`` goes to ``dest_starts[i]:`` of both.
    """
    kept = places[places >= 0]
    is_sorted = bool((np.diff(kept) > 0).all())
    values, dest_values = as_unsigned(sparse.values, dest[0])
    rows = SparseRows(values, sparse.columns, sparse.value_starts).at(starts, lengths)
    _select(rows, places, (dest_values, dest[1]), dest_starts, not is_sorted)


def take_columns(source: Array, starts: Ints, columns: Ints, dest: Array, dest_rows: Ints) -> None:
    """Copy chosen values of dense rows, casting: ``dest[dest_rows[i]] = source[starts[i] + columns]``."""
    source, dest = as_unsigned(source, dest)
    if has_kernels(source.dtype) and has_kernels(dest.dtype):
        _take(source, starts, columns, dest, dest_rows)
        return
    for start, row in zip(starts.tolist(), dest_rows.tolist(), strict=True):
        dest[row] = source[start + columns]


def as_unsigned(source: Array, dest: Array) -> tuple[Array, Array]:
    """Arrays of one dtype as integers of the same size: copying them needs no kernel of its own."""
    if source.dtype != dest.dtype or source.itemsize not in _SAME_SIZE:
        return source, dest
    unsigned = _SAME_SIZE[source.itemsize]
    return source.view(unsigned), dest.view(unsigned)


@cache  # there are few dtypes, and numpy takes its time to compare them
def has_kernels(dtype: np.dtype[Any]) -> bool:
    """True if numba computes with it on a CPU."""
    return dtype.isnative and (dtype.kind in "biu" or dtype in (np.float32, np.float64, np.complex64, np.complex128))


def goes_past_cache(source: Array, dest: Array) -> bool:
    """True if a processor's cache would read most of ``dest`` only for it to be overwritten, and it need not."""
    is_known = source.dtype.kind in "iu" and source.itemsize <= _MAX_SUMMED_NBYTES and dest.dtype in _STREAMED
    return is_known and dest.nbytes >= _MIN_STREAM_NBYTES and bool(dest.flags.aligned)


def _is_made_beside(dest: Array) -> bool:
    """True if rows are best put together elsewhere, and written past a processor's cache."""
    row_nbytes = dest.shape[1] * dest.itemsize
    is_known = dest.itemsize in _SAME_SIZE and dest.ctypes.data % dest.itemsize == 0
    return is_known and dest.nbytes >= _MIN_STREAM_NBYTES and row_nbytes <= _MAX_ROW_NBYTES


@compiled
def _copy(source: Array, starts: Ints, lengths: Ints, dest: Array, dest_starts: Ints) -> None:
    for i in range(starts.shape[0]):
        n = lengths[i]
        # Slices first: indices that start at 0 need no check for negative ones, so the loop vectorises.
        row = source[starts[i] : starts[i] + n]
        to = dest[dest_starts[i] : dest_starts[i] + n]
        for j in range(n):
            to[j] = row[j]


@compiled
def total(values, before, room):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """The sum of values after that of the values before, in the dtype of ``room``, which has one element.

    It is the same however a row is cut into runs that follow each other.
    """
    room[0] = before
    so_far = room[0]
    for k in range(values.shape[0]):
        so_far += values[k]
    return np.float64(so_far)


@compiled
def _sum_up(source: Array, starts: Ints, lengths: Ints, room: Array, totals: Floats) -> None:
    for i in range(starts.shape[0]):
        totals[i] = total(source[starts[i] : starts[i] + lengths[i]], 0.0, room)


@compiled
def _normalize(  # noqa: PLR0913, PLR0917
    source: Array, starts: Ints, lengths: Ints, dest: Array, dest_starts: Ints, target_sum: float, totals: Floats
) -> None:
    # log1p is most of the work, and most counts are small: each is computed once a row.
    known = np.empty(_N_KNOWN, dest.dtype)
    for i in range(starts.shape[0]):
        n = lengths[i]
        row = source[starts[i] : starts[i] + n]
        to = dest[dest_starts[i] : dest_starts[i] + n]
        scale = target_sum / totals[i] if totals[i] != 0 else 1.0
        known[:] = -1
        for j in range(n):
            small = int(row[j]) if 0 <= row[j] < _N_KNOWN else 0
            if small != row[j]:
                to[j] = math.log1p(row[j] * scale)
                continue
            if known[small] < 0:
                known[small] = math.log1p(small * scale)
            to[j] = known[small]


@compiled
def _count(columns: Array, starts: Ints, lengths: Ints, places: Places, counts: Ints) -> int:
    n_columns = np.uint64(places.shape[0])
    n_outside = 0
    for i in range(starts.shape[0]):
        row = columns[starts[i] : starts[i] + lengths[i]]
        n = 0
        for j in range(row.shape[0]):
            column = np.uint64(row[j])
            if column >= n_columns:
                n_outside += 1
            else:
                n += places[column] >= 0
        counts[i] = n
    return n_outside


@compiled
def _select(
    rows: Rows,
    places: Places,
    dest: tuple[Array, Array],
    dest_starts: Ints,
    needs_sort: bool,  # noqa: FBT001
) -> None:
    values, value_starts, columns, starts, lengths = rows
    dest_values, dest_columns = dest
    longest = 0
    for i in range(lengths.shape[0]):
        longest = max(longest, lengths[i])
    order, spare = np.empty(longest, np.int64), np.empty(longest, np.int64)
    kept_values, kept_columns = np.empty(longest, dest_values.dtype), np.empty(longest, dest_columns.dtype)
    for i in range(starts.shape[0]):
        n = 0
        for j in range(lengths[i]):
            place = places[np.uint64(columns[starts[i] + j])]
            if place >= 0:
                dest_values[dest_starts[i] + n] = values[value_starts[i] + j]
                dest_columns[dest_starts[i] + n] = place
                n += 1
        if needs_sort:
            row_values = dest_values[dest_starts[i] : dest_starts[i] + n]
            row_columns = dest_columns[dest_starts[i] : dest_starts[i] + n]
            for j in range(n):
                kept_values[j], kept_columns[j] = row_values[j], row_columns[j]
            order_row(row_columns, order, spare)
            for j in range(n):
                row_values[j], row_columns[j] = kept_values[order[j]], kept_columns[order[j]]


@compiled
def _take(source: Array, starts: Ints, columns: Ints, dest: Array, dest_rows: Ints) -> None:
    for i in range(starts.shape[0]):
        row = dest[dest_rows[i]]
        for j in range(columns.shape[0]):
            row[j] = source[starts[i] + columns[j]]
