"""Entries of wanted columns of CSR rows, read, checked, decoded and picked in one call that holds no lock of Python's.

What is not wanted is decoded at most to a few kilobytes that stay in a core's cache, and written nowhere. As in
:mod:`annbatch_dask.chunks.native`, what is not as it should be is only reported, never explained.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from annbatch_dask.chunks.native import BLOSC, PLAIN, c_function, crc_matches, decode, read_file, unpack_from
from annbatch_dask.kernels.compiled import compiled
from annbatch_dask.kernels.packed import BLOCK_VALUES

__all__ = ["STEP", "hand_out", "pick"]

STEP = 4 * BLOCK_VALUES
"""Entries that are decoded at a time."""

_find = c_function(64, 64, 64, 64, 64, 64, 64)
_take = c_function(64, 64, 64, 64, 64, 64)
_add_up = c_function(64, 64, 64, 64, 64, 64, 64, 64)


@compiled
def _load(array: Any, k: int, c: Any, found: Any) -> Any:
    """Read the chunk ``k`` and check it: where its values, or what they are to be unpacked from, are; 0 if nowhere."""
    reads, how, raw, spare, _ = array
    source, size = np.int64(raw.ctypes.data), reads[k, 4]
    if not read_file(reads[k], reads[k, 3], size, c, raw, found):
        return 0, 0
    if how[1]:
        size -= 4
        if size < 0 or not crc_matches(raw, 0, size, c):
            return 0, 0
    if how[0] == PLAIN:
        return (source if size == how[2] * how[3] else 0), size
    if how[0] == BLOSC:
        target = np.int64(spare.ctypes.data)
        return (target if decode(raw, 0, size, how, c, target) else 0), size
    return source, size


@compiled
def _values_at(array: Any, loaded: Any, start: int, n: int) -> Any:
    """The address of n values of a chunk that was loaded, from ``start`` on; 0 where they are damaged."""
    _, how, _, _, step = array
    source, size = loaded
    if source == 0 or how[0] == PLAIN or how[0] == BLOSC:
        return source + start * how[3] if source else 0
    target = np.int64(step.ctypes.data)
    return target if unpack_from(how[0], source, size, how[2], start, target, n) == 0 else 0


@compiled
def _find_step(there: int, at: int, n: int, itemsize: int, wanted: Any, places: int, rows: Any, counts: Any) -> Any:  # noqa: PLR0913, PLR0917
    """Find what is wanted of n entries, of which the first is the ``at``-th of all; -1 where a column does not exist.

    ``rows`` are the bounds of all rows, the first and the current one, which moves on.
    """
    bounds, state = rows
    n_kept, k = 0, 0
    while k < n:
        while bounds[state[1] + 1] <= at + k:
            state[1] += 1
        n_here = min(n - k, bounds[state[1] + 1] - at - k)
        given = (there + k * itemsize, n_here, wanted[1], wanted[2], k, places + 4 * n_kept)
        n_found = _find(wanted[0], given)
        if n_found < 0:
            return -1
        counts[state[1] - state[0]] += n_found
        n_kept += n_found
        k += n_here
    return n_kept


@compiled
def pick(  # noqa: PLR0913, PLR0917 - a kernel
    first: int,
    bounds: Any,
    pieces: Any,
    columns: Any,
    values: Any,
    wanted: Any,
    c: Any,
    kept: Any,
    counts: Any,
    totals: Any,
) -> bool:
    """Pick the wanted entries of some rows, one behind the other; writes nothing beside.

    Parameters
    ----------
    first
        The first of the rows; there are as many as ``counts``.
    bounds
        (n_rows + 1,) where the entries of all rows begin among all of them, and end.
    pieces
        (n, 4) entries ``[start, stop)`` of a chunk, their place among all entries, and the number of the chunk; in the
        order of the rows.
    columns, values
        Of each: the chunks as ``reads`` of :func:`annbatch_dask.chunks.native.fill`, in the order of the rows; how
        they are encoded, whether a crc32c follows, entries of a chunk, bytes of each, the address of the output and
        that of :func:`annbatch_dask.kernels.wanted.taker`'s function; bytes to work in: as many as the largest chunk
        has in its file, a decoded one, and ``STEP`` entries. Outputs need room for all entries of the rows.
    wanted
        (3,) the address of :func:`annbatch_dask.kernels.wanted.finder`'s function, that of its table, and for how many
        columns it is.
    c
        :func:`annbatch_dask.chunks.native.functions`.
    kept
        uint32, ``STEP`` of them, to work in.
    counts
        Zeros: takes how many entries were picked of each row.
    totals
        (3,) the address of :func:`annbatch_dask.kernels.wanted.adder`'s function, or 0; that of ``bounds``, and that of
        the totals of all rows, to which the values of these rows are added, picked or not.

    Returns
    -------
    is_sound
        False where a chunk is damaged, a file is not as it was, or a column does not exist; outputs hold anything then.
    """
    begin, end = bounds[first], bounds[first + len(counts)]
    found, places, state = np.zeros(33, np.int64), np.int64(kept.ctypes.data), np.array([first, first])
    c_how, v_how = columns[1], values[1]
    c_loaded = v_loaded = (np.int64(0), np.int64(0))
    n_out, chunk, has_values = 0, np.int64(-1), False
    for p in range(len(pieces)):
        shift = pieces[p, 2] - pieces[p, 0]  # from the place in the chunk to that among all
        at, until = max(pieces[p, 0], begin - shift), min(pieces[p, 1], end - shift)
        if at < until and pieces[p, 3] != chunk:
            chunk, has_values = pieces[p, 3], False
            c_loaded = _load(columns, chunk, c, found)
        while at < until:
            n = min(until, (at // STEP + 1) * STEP) - at
            there = _values_at(columns, c_loaded, at, n)
            if there == 0:
                return False
            row = state[1]
            n_kept = _find_step(there, at + shift, n, c_how[3], wanted, places, (bounds, state), counts)
            if n_kept < 0:
                return False
            if n_kept:
                _take(c_how[5], (there, n, places, n_kept, c_how[4] + n_out * c_how[3]))
            if n_kept or totals[0]:
                if not has_values:  # a chunk of which nothing is wanted is not read
                    v_loaded, has_values = _load(values, chunk, c, found), True
                there = _values_at(values, v_loaded, at, n)
                if there == 0:
                    return False
                _take(v_how[5], (there, n, places, n_kept, v_how[4] + n_out * v_how[3]))
            if totals[0]:
                _add_up(totals[0], (there, n, at + shift, totals[1], row, totals[2], len(bounds) - 1))
            n_out += n_kept
            at += n
    return True


@compiled
def hand_out(first: int, begin: int, counts: Any, position: Any, starts: Any, lengths: Any) -> None:  # noqa: PLR0913, PLR0917
    """Say of each row that was asked for, and was picked here, where it begins and how long it is.

    Parameters
    ----------
    first, counts
        See :func:`pick`.
    begin
        Where the entries of the first row begin.
    position
        (n,) of each row that was asked for, which of all rows it is.
    starts, lengths
        (n,) take where its entries begin, and how many they are.
    """
    begins = np.empty(len(counts), np.int64)
    for row in range(len(counts)):
        begins[row] = begin
        begin += counts[row]
    for i in range(len(position)):
        row = position[i] - first
        if 0 <= row < len(counts):
            starts[i], lengths[i] = begins[row], counts[row]
