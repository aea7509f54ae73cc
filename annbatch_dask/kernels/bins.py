"""Cells as sequences of genes, each with the quantile bin of its value."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.kernels.compiled import compiled
from annbatch_dask.kernels.splitmix import finalise
from annbatch_dask.kernels.tokens import (
    N_BAD,
    Counts,
    Frame,
    Genes,
    Picked,
    PickedRows,
    find_longest,
    finish,
    keep,
    native,
)

__all__ = ["Bins", "bin_rows"]

Array = NDArray[Any]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Tokens = NDArray[np.int32]
Keys = NDArray[np.uint64]
Mask = NDArray[np.bool_]

_N_KNOWN = 1024  # whole counts below are sorted by counting, and looked up once a row
_ROW = np.uint64(0x9E3779B97F4A7C15)
_GENE = np.uint64(0xD1B54A32D192ED03)


class Bins(NamedTuple):
    """How values become bins.

    Attributes
    ----------
    quantiles
        (n_edges,) of the values of a row that are edges; ascending, in [0, 1].
    draws_ties, draws_genes
        Whether values that are edges are drawn; and whether the genes of a row that is too long are drawn, or the
        first ones taken.
    key, numbers
        What the draws depend on beside the gene: something of all rows, and the (n,) numbers of the rows.
    """

    quantiles: Floats
    draws_ties: bool
    draws_genes: bool
    key: int
    numbers: Ints


def bin_rows(  # noqa: PLR0913
    picked: Picked, genes: Genes, frame: Frame, bins: Bins, out: tuple[Array, Array, Mask], places: Ints
) -> tuple[Counts, Ints]:
    """Write the tokens of each row's genes, in the order of the columns, and the quantile bin of each value.

    A value is in the bin whose number is that of the edges that are no greater. One that is an edge, of several bins
    maybe, is in any of these if it is to be drawn, all alike. Parameters and results are those of
    :func:`annbatch_dask.kernels.tokens.rank_rows`; ``out`` has the bins behind the tokens.
    """
    found, is_disordered = np.zeros(2, np.int64), np.zeros(len(places), bool)
    how = (bins.quantiles, bins.draws_ties, bins.draws_genes, np.uint64(bins.key), bins.numbers)
    _bin(native(picked), genes, tuple(frame), how, out, places, (found, is_disordered))
    return Counts(*found.tolist()), np.flatnonzero(is_disordered)


@compiled
def _sorted(values: Floats, counts: Ints) -> Floats:
    """The values in ascending order: small whole ones by counting, in ``counts``, zeros before and afterwards."""
    n = values.shape[0]
    top = 0
    for k in range(n):
        small = int(values[k]) if 0 <= values[k] < _N_KNOWN else -1
        if small != values[k]:
            counts[: top + 1] = 0
            return np.sort(values)
        counts[small] += 1
        top = max(top, small)
    ascending = np.empty(n, np.float64)
    at = 0
    for small in range(top + 1):
        ascending[at : at + counts[small]] = small
        at += counts[small]
    counts[: top + 1] = 0
    return ascending


@compiled
def _find_edges(ascending: Floats, quantiles: Floats, edges: Floats) -> None:
    """Quantiles of ascending values, by linear interpolation: numpy's default."""
    n = ascending.shape[0]
    for e in range(quantiles.shape[0]):
        at = (n - 1) * quantiles[e]
        low = int(at)
        share = at - low
        below, above = ascending[low], ascending[min(low + 1, n - 1)]
        step = above - below
        edges[e] = above - step * (1 - share) if share >= 0.5 else below + step * share  # noqa: PLR2004


@compiled
def _find_bins(edges: Floats, value: float) -> tuple[int, int]:
    """How many edges are less than a value, and how many are no greater."""
    low, high = 0, edges.shape[0]
    while low < high:
        middle = (low + high) // 2
        if edges[middle] < value:
            low = middle + 1
        else:
            high = middle
    n_less = low
    while low < edges.shape[0] and edges[low] <= value:
        low += 1
    return n_less, low


@compiled
def _find_limit(drawn: Keys, n_taken: int) -> Any:
    """The greatest of the ``n_taken`` least numbers."""
    counts = np.zeros(2048, np.int64)
    for k in range(drawn.shape[0]):
        counts[drawn[k] >> np.uint64(53)] += 1
    digit, n_below = 0, 0
    while n_below + counts[digit] < n_taken:
        n_below += counts[digit]
        digit += 1
    near = np.empty(counts[digit], np.uint64)
    n = 0
    for k in range(drawn.shape[0]):
        if drawn[k] >> np.uint64(53) == digit:
            near[n] = drawn[k]
            n += 1
    return np.sort(near)[n_taken - n_below - 1]


@compiled
def _write_bins(
    entries: tuple[Tokens, Floats, Keys],
    edges: Floats,
    limit: Any,
    draws_ties: bool,  # noqa: FBT001
    known: tuple[Tokens, Tokens],
    out: tuple[Array, Array],
) -> int:
    """Token and bin of each entry that was drawn, until there is no room; returns how many."""
    tokens, values, drawn = entries
    n_taken, room = 0, out[0].shape[0]
    known[0][:] = -1
    for k in range(tokens.shape[0]):
        if drawn[k] > limit or n_taken == room:
            continue
        small = int(values[k]) if values[k] < _N_KNOWN else 0
        if small != values[k]:
            low, high = _find_bins(edges, values[k])
        else:
            if known[0][small] < 0:
                known[0][small], known[1][small] = _find_bins(edges, values[k])
            low, high = known[0][small], known[1][small]
        if draws_ties and high - low > 1:
            high -= int(((finalise(drawn[k]) >> np.uint64(32)) * np.uint64(high - low)) >> np.uint64(32))
        out[0][n_taken], out[1][n_taken] = tokens[k], high
        n_taken += 1
    return n_taken


@compiled
def _bin(
    rows: PickedRows,
    genes: Genes,
    frame: tuple[int, int, int],
    how: tuple[Floats, bool, bool, np.uint64, Ints],
    out: tuple[Array, Array, Mask],
    places: Ints,
    marks: tuple[Ints, Mask],
) -> None:
    quantiles, draws_ties, draws_genes, key, numbers = how
    longest = find_longest(rows[4])
    kept, own, drawn = np.empty(longest, np.int32), np.empty(longest, np.float64), np.empty(longest, np.uint64)
    edges, counts = np.empty(quantiles.shape[0], np.float64), np.zeros(_N_KNOWN, np.int64)
    known = np.empty(_N_KNOWN, np.int32), np.empty(_N_KNOWN, np.int32)
    for i in range(places.shape[0]):
        n_bad = marks[0][N_BAD]
        n = keep(rows, i, genes, kept, own, marks[0])
        if n < 0:
            marks[1][i] = True
            continue
        ids, bins, mask = out[0][places[i]], out[1][places[i]], out[2][places[i]]
        first = 0
        if frame[0] >= 0:
            ids[0], bins[0] = frame[0], 0
            first = 1
        room = ids.shape[0] - (frame[1] >= 0)
        end = first
        if n and marks[0][N_BAD] == n_bad:
            _find_edges(_sorted(own[:n], counts), quantiles, edges)
            start = finalise(key + np.uint64(numbers[i]) * _ROW)
            for k in range(n):
                drawn[k] = finalise(start + np.uint64(kept[k]) * _GENE)
            limit = np.uint64(0xFFFFFFFFFFFFFFFF)
            if n > room - first and draws_genes:
                limit = _find_limit(drawn[:n], room - first)
            entries = kept[:n], own[:n], drawn[:n]
            end += _write_bins(entries, edges, limit, draws_ties, known, (ids[first:room], bins[first:room]))
        bins[end:] = 0
        finish(ids, mask, end, frame)
