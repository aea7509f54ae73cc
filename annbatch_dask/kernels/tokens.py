"""Cells as sequences of genes, ranked by their scaled counts; and what :mod:`annbatch_dask.kernels.bins` has in common.

All kernels release the GIL and run on a part of the rows. The columns of a row must ascend, as anndata writes them.
Rows of which they do not are named and passed over, to be given again by :func:`ordered`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.kernels.assemble import SparseRows, copy_rows
from annbatch_dask.kernels.compiled import compiled

__all__ = [
    "N_BAD",
    "Counts",
    "Frame",
    "Genes",
    "Picked",
    "PickedRows",
    "find_longest",
    "finish",
    "keep",
    "native",
    "ordered",
    "rank_rows",
]

Array = NDArray[Any]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Tokens = NDArray[np.int32]
Keys = NDArray[np.uint64]
Mask = NDArray[np.bool_]
Picked = tuple[SparseRows, Ints, Ints]
"""Rows: where their entries are, and for each where its columns begin and how many they are."""
Genes = tuple[Tokens, Floats]
"""For each column its token, -1 for one that is left out; and what to divide its values by."""
PickedRows = tuple[Array, Ints, Array, Ints, Ints]

_N_OUTSIDE, N_BAD = range(2)
_LOW = np.uint64(0xFFFFFFFF)


class Frame(NamedTuple):
    """Tokens before and behind the genes of a cell, -1 for none, and the one that fills up."""

    first: int
    last: int
    pad: int


class Counts(NamedTuple):
    """Entries that cannot be taken: their column does not exist, or their value is negative, infinite or no number."""

    n_outside: int
    n_bad: int


def rank_rows(picked: Picked, genes: Genes, frame: Frame, out: tuple[Array, Mask], places: Ints) -> tuple[Counts, Ints]:
    """Write the tokens of each row's genes, that of the greatest scaled value first, of equal ones by token.

    Parameters
    ----------
    picked
        The rows. Zeros are passed over.
    genes
        What becomes of each column.
    frame
        Tokens around those of the genes.
    out
        Tokens, and whether each is none that fills up; 2-D, as wide as a row may be long.
    places
        (n,) row ``i`` becomes row ``places[i]`` of both.

    Returns
    -------
    counts, disordered
        Entries that cannot be taken; the rows that were passed over, since their columns do not ascend.
    """
    found, is_disordered = np.zeros(2, np.int64), np.zeros(len(places), bool)
    _rank(native(picked), genes, tuple(frame), out, places, (found, is_disordered))
    return Counts(*found.tolist()), np.flatnonzero(is_disordered)


def ordered(picked: Picked) -> Picked:
    """Rows with ascending columns, entries of one column added up, as scipy does; float64."""
    sparse, starts, lengths = picked
    _, value_starts, *_ = sparse.at(starts, lengths)
    ends = np.cumsum(lengths)
    n = int(ends[-1]) if len(ends) else 0
    values, columns, flat = np.empty(n, np.float64), np.empty(n, np.int64), ends - lengths
    copy_rows(sparse.values, value_starts, lengths, values, flat)
    copy_rows(sparse.columns, starts, lengths, columns, flat)
    row = np.repeat(np.arange(len(starts)), lengths)
    order = np.lexsort((columns, row))
    row, columns, values = row[order], columns[order], values[order]
    is_first = np.ones(n, bool)
    is_first[1:] = (np.diff(row) > 0) | (np.diff(columns) > 0)
    firsts = np.flatnonzero(is_first)
    counts = np.bincount(row[firsts], minlength=len(starts)).astype(np.int64)
    summed = np.add.reduceat(values, firsts) if n else values
    return SparseRows(summed, columns[firsts]), np.cumsum(counts) - counts, counts


def native(picked: Picked) -> PickedRows:
    """The rows, with values that numba knows."""
    sparse, starts, lengths = picked
    dtype = sparse.values.dtype
    if dtype.isnative and (dtype.kind in "biu" or dtype in (np.float32, np.float64)):
        return sparse.at(starts, lengths)
    _, value_starts, *_ = sparse.at(starts, lengths)
    ends = np.cumsum(lengths)
    values = np.empty(int(ends[-1]) if len(ends) else 0, np.float64)
    copy_rows(sparse.values, value_starts, lengths, values, ends - lengths)
    return SparseRows(values, sparse.columns, ends - lengths).at(starts, lengths)


@compiled
def find_longest(lengths: Ints) -> int:
    """Entries of the longest row."""
    longest = 0
    for i in range(lengths.shape[0]):
        longest = max(longest, lengths[i])
    return longest


@compiled
def keep(rows: PickedRows, i: int, genes: Genes, kept: Tokens, scaled: Floats, found: Ints) -> int:
    """Tokens and scaled values of the entries of a row that are to come; returns how many, -1 if columns descend."""
    values, value_starts, columns, starts, lengths = rows
    tokens, scales = genes
    n_columns = np.uint64(tokens.shape[0])
    row_values = values[value_starts[i] : value_starts[i] + lengths[i]]
    row_columns = columns[starts[i] : starts[i] + lengths[i]]
    n_down = 0
    for j in range(1, row_columns.shape[0]):
        n_down += row_columns[j] <= row_columns[j - 1]
    if n_down:
        return -1
    n = 0
    for j in range(row_columns.shape[0]):
        column = np.uint64(row_columns[j])  # a negative one becomes huge
        if column >= n_columns:
            found[_N_OUTSIDE] += 1
            continue
        value = np.float64(row_values[j])
        if tokens[column] < 0 or value == 0:
            continue
        found[N_BAD] += not 0 < value < np.inf
        kept[n], scaled[n] = tokens[column], value / scales[column]
        n += 1
    return n


@compiled
def finish(ids: Array, mask: Mask, n: int, frame: tuple[int, int, int]) -> int:
    """Write what follows the genes; returns where the row ends."""
    if frame[1] >= 0:
        ids[n] = frame[1]
        n += 1
    ids[n:] = frame[2]
    mask[:n] = True
    mask[n:] = False
    return n


# ------------------------------------------------------------------------------------------------- ranks


@compiled
def _sort_pairs(pairs: Keys, spare: Keys) -> bool:
    """Sort by the upper 32 bits, stable; the lower ones go with them. True if the result is in ``spare``.

    Radix sort; D. Knuth, The Art of Computer Programming, volume 3, section 5.2.5.
    """
    n = pairs.shape[0]
    differing = np.uint64(0)
    for k in range(1, n):
        differing |= pairs[k] ^ pairs[0]
    places = np.empty(2048, np.int64)
    is_spare = False
    shift = np.uint64(32)
    while shift < 64 and differing >> shift:
        if (differing >> shift) & np.uint64(2047):
            places[:] = 0
            for k in range(n):
                places[(pairs[k] >> shift) & np.uint64(2047)] += 1
            total = 0
            for digit in range(2048):
                total, places[digit] = total + places[digit], total
            for k in range(n):
                at = (pairs[k] >> shift) & np.uint64(2047)
                spare[places[at]] = pairs[k]
                places[at] += 1
            pairs, spare = spare, pairs
            is_spare = not is_spare
        shift += np.uint64(11)
    return is_spare


@compiled
def _order_alike(keys: Keys, tokens: Tokens, pairs: Keys) -> None:
    """Put entries whose upper bits are alike, by their numbers in the lower ones, in order of key and token.

    They are few that differ in later bits; or many that are equal, and told apart by their tokens.
    """
    n = pairs.shape[0]
    is_ordered = True
    for k in range(1, n):
        a, b = pairs[k - 1] & _LOW, pairs[k] & _LOW
        is_ordered &= keys[a] < keys[b] or (keys[a] == keys[b] and tokens[a] < tokens[b])
    if is_ordered:
        return
    own, spare = np.empty(n, np.uint64), np.empty(n, np.uint64)
    for step in range(3):  # the least significant part first: the token, then both halves of the key
        for k in range(n):
            number = pairs[k] & _LOW
            part = np.uint64(tokens[number])
            if step == 1:
                part = keys[number] & _LOW
            elif step == 2:  # noqa: PLR2004
                part = keys[number] >> np.uint64(32)
            own[k] = part << np.uint64(32) | number
        pairs[:] = spare if _sort_pairs(own, spare) else own


@compiled
def _pair(keys: Keys, pairs: Keys) -> None:
    """Numbers of the keys, below the 32 upper bits of what the keys differ in."""
    n = keys.shape[0]
    least, most = np.uint64(0xFFFFFFFFFFFFFFFF), np.uint64(0)
    for k in range(n):
        least, most = min(least, keys[k]), max(most, keys[k])
    shift = np.uint64(0)
    while n and (most - least) >> shift >> np.uint64(32):
        shift += np.uint64(1)
    for k in range(n):
        pairs[k] = ((keys[k] - least) >> shift) << np.uint64(32) | np.uint64(k)


@compiled
def _rank(
    rows: PickedRows,
    genes: Genes,
    frame: tuple[int, int, int],
    out: tuple[Array, Mask],
    places: Ints,
    marks: tuple[Ints, Mask],
) -> None:
    longest = find_longest(rows[4])
    quotients, kept = np.empty(longest, np.float64), np.empty(longest, np.int32)
    bits = quotients.view(np.uint64)  # of positive numbers: they grow with them
    pairs, spare = np.empty(longest, np.uint64), np.empty(longest, np.uint64)
    for i in range(places.shape[0]):
        n = keep(rows, i, genes, kept, quotients, marks[0])
        if n < 0:
            marks[1][i] = True
            continue
        for k in range(n):
            bits[k] = ~bits[k]  # the greatest comes first
        _pair(bits[:n], pairs)
        ranked = spare[:n] if _sort_pairs(pairs[:n], spare[:n]) else pairs[:n]
        ids, mask = out[0][places[i]], out[1][places[i]]
        first = 0
        if frame[0] >= 0:
            ids[0] = frame[0]
            first = 1
        n_taken = min(n, ids.shape[0] - first - (frame[1] >= 0))
        begin = 0
        for k in range(1, n + 1):
            if k == n or ranked[k] >> np.uint64(32) != ranked[begin] >> np.uint64(32):
                if k - begin > 1:
                    _order_alike(bits, kept, ranked[begin:k])
                begin = k
                if k >= n_taken:
                    break
        for k in range(n_taken):
            ids[first + k] = kept[ranked[k] & _LOW]
        finish(ids, mask, first + n_taken, frame)
