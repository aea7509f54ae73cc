"""Rows in any order as runs to read, and where each row is in what was read."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from annbatch_dask.kernels.compiled import compiled
from annbatch_dask.kernels.rows import order_row
from annbatch_dask.kernels.shared import pointer_at

__all__ = [
    "deal_batches",
    "deal_entries",
    "deal_request",
    "deal_rows",
    "find_runs",
    "lay_out",
    "lie_within",
    "locate_rows",
    "pick_rows",
    "place_entries",
    "place_rows",
    "row_bounds",
]

_U = np.uint64  # an index of this type is not looked at for a sign


@compiled
def lay_out(runs: Any) -> Any:
    """The rows of (n, 3) runs, one behind the other: each from a first row to before a last one, in steps of 1 or more."""  # noqa: E501
    n_rows = 0
    for k in range(len(runs)):
        n_rows += max(0, (runs[k, 1] - runs[k, 0] + runs[k, 2] - 1) // runs[k, 2])
    rows, n = np.empty(n_rows, np.int64), 0
    for k in range(len(runs)):
        own = rows[n : n + max(0, (runs[k, 1] - runs[k, 0] + runs[k, 2] - 1) // runs[k, 2])]
        for i in range(own.shape[0]):
            own[i] = runs[k, 0] + i * runs[k, 2]
        n += own.shape[0]
    return rows


@compiled
def lie_within(rows: Any, n_rows: int) -> Any:
    """True if all rows are from 0 to before ``n_rows``."""
    low, high = 0, -1
    for i in range(len(rows)):
        low, high = min(low, rows[i]), max(high, rows[i])
    return low >= 0 and high < n_rows


@compiled
def find_runs(rows: Any) -> Any:
    """Ascending runs of consecutive rows that cover all of some.

    Parameters
    ----------
    rows
        (n,) in any order, repeats allowed.

    Returns
    -------
    spans
        (n_spans, 2) half-open, ascending, apart from each other.
    span
        (n,) of each row.
    position
        (n,) of each row in the rows of all spans.
    """
    n_rows, n_runs = len(rows), 0
    firsts = np.empty(n_rows + 1, np.int64)
    for i in range(_U(n_rows)):
        firsts[_U(n_runs)] = i
        n_runs += i == _U(0) or rows[i] != rows[i - _U(1)] + 1
    firsts[n_runs] = n_rows
    starts, order, spare = np.empty(n_runs, np.int64), np.empty(n_runs, np.int64), np.empty(n_runs, np.int64)
    for run in range(n_runs):
        starts[run] = rows[firsts[run]]
    order_row(starts, order, spare)
    spans, offsets, found = np.empty((n_runs, 2), np.int64), np.zeros(n_runs + 1, np.int64), np.empty(n_runs, np.int64)
    n_spans = 0
    for i in range(n_runs):
        run = order[i]
        start, stop = starts[run], starts[run] + firsts[run + 1] - firsts[run]
        if n_spans == 0 or start > spans[n_spans - 1, 1]:
            spans[n_spans, 0], spans[n_spans, 1] = start, stop
            n_spans += 1
        else:
            spans[n_spans - 1, 1] = max(spans[n_spans - 1, 1], stop)
        found[run] = n_spans - 1
        offsets[n_spans] = offsets[n_spans - 1] + spans[n_spans - 1, 1] - spans[n_spans - 1, 0]
    span, position = np.empty(n_rows, np.int64), np.empty(n_rows, np.int64)
    for run in range(n_runs):
        k = found[run]
        first = offsets[k] + starts[run] - spans[k, 0]
        its_span, its_position = span[firsts[run] : firsts[run + 1]], position[firsts[run] : firsts[run + 1]]
        for i in range(its_span.shape[0]):
            its_span[i], its_position[i] = k, first + i
    return spans[:n_spans], span, position


@compiled
def place_entries(indptr: Any, rows: Any, row_spans: Any, span: Any) -> Any:
    """The runs of entries of a CSR matrix that hold some rows.

    Parameters
    ----------
    indptr
        (n_rows + 1,) of the matrix.
    rows, row_spans, span
        See :func:`find_runs`.

    Returns
    -------
    spans
        (n_spans, 2) half-open runs of entries.
    starts, lengths
        (n,) where each row begins in the entries of all spans, and how many it has.
    """
    spans, shifts = np.empty((len(row_spans), 2), np.int64), np.empty(len(row_spans), np.int64)
    offset = 0
    for k in range(len(row_spans)):
        spans[k, 0], spans[k, 1] = indptr[row_spans[k, 0]], indptr[row_spans[k, 1]]
        shifts[k] = offset - spans[k, 0]
        offset += spans[k, 1] - spans[k, 0]
    starts, lengths = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
    for i in range(_U(len(rows))):
        start = indptr[_U(rows[i])]
        starts[i], lengths[i] = start + shifts[_U(span[i])], indptr[_U(rows[i] + 1)] - start
    return spans, starts, lengths


@compiled
def locate_rows(indptr: Any, rows: Any) -> Any:
    """What :func:`find_runs` and :func:`place_entries` find of some rows, in one call.

    Returns
    -------
    row_spans, position
        See :func:`find_runs`.
    spans, starts, lengths
        See :func:`place_entries`.
    n_entries
        Of all spans.
    """
    row_spans, span, position = find_runs(rows)
    spans, starts, lengths = place_entries(indptr, rows, row_spans, span)
    n_entries = 0
    for k in range(len(spans)):
        n_entries += spans[k, 1] - spans[k, 0]
    return row_spans, position, spans, starts, lengths, n_entries


@compiled
def row_bounds(indptr: Any, row_spans: Any) -> Any:
    """(n_rows + 1,) where each row of some runs of rows begins among the entries of all of these, and the end."""
    n_rows = 0
    for k in range(len(row_spans)):
        n_rows += row_spans[k, 1] - row_spans[k, 0]
    bounds = np.zeros(n_rows + 1, np.int64)
    i = 0
    for k in range(len(row_spans)):
        for row in range(row_spans[k, 0], row_spans[k, 1]):
            bounds[i + 1] = bounds[i] + indptr[row + 1] - indptr[row]
            i += 1
    return bounds


@compiled
def _last_at_most(bounds: Any, row: int) -> Any:
    """The last of ascending bounds that is at most ``row``."""
    low, high = 0, len(bounds)
    while high - low > 1:
        middle = (low + high) // 2
        if bounds[middle] <= row:
            low = middle
        else:
            high = middle
    return low


@compiled
def deal_rows(rows: Any, bounds: Any) -> Any:
    """Rows by the part that holds them; part ``k`` has rows ``bounds[k]:bounds[k + 1]``, the first one from 0 on.

    Returns
    -------
    firsts
        (n_parts + 1,) the rows of part ``k`` are ``firsts[k]:firsts[k + 1]`` of both arrays that follow; the first is
        -1, and nothing else is told, if there is a row that no part has.
    places, local
        (n,) where each stood in ``rows``, ascending within a part, and which of the part's rows it is.
    number, position
        (n,) of each of ``rows``: the number of its part among those that have any, and which of its rows here it is.
    """
    n_rows, n_parts = len(rows), len(bounds) - 1
    firsts, n_runs = np.zeros(n_parts + 1, np.int64), 0
    starts, parts = np.empty(n_rows + 1, np.int64), np.empty(n_rows, np.int64)  # of runs of rows of one part
    low = high = 0
    for i in range(_U(n_rows)):
        if not low <= rows[i] < high:
            if not 0 <= rows[i] < bounds[n_parts]:
                firsts[0] = -1
                return firsts, parts, parts, parts, parts
            k = _last_at_most(bounds, rows[i])
            low, high = bounds[k], bounds[k + 1]
            starts[_U(n_runs)], parts[_U(n_runs)] = i, k
            n_runs += 1
    starts[n_runs] = n_rows
    for run in range(n_runs):
        firsts[parts[run] + 1] += starts[run + 1] - starts[run]
    for k in range(n_parts):
        firsts[k + 1] += firsts[k]
    numbers, n_there = np.empty(n_parts, np.int64), 0
    for k in range(n_parts):
        numbers[k] = n_there
        n_there += firsts[k + 1] > firsts[k]
    after, places, local = firsts.copy(), np.empty(n_rows, np.int64), np.empty(n_rows, np.int64)
    part, position = np.empty(n_rows, np.int64), np.empty(n_rows, np.int64)
    for run in range(n_runs):
        k, start, stop = parts[run], starts[run], starts[run + 1]
        at, number, first = after[k], numbers[k], after[k] - firsts[k]
        after[k] += stop - start
        own, its_part, its_position = rows[start:stop], part[start:stop], position[start:stop]
        its_places, its_local = places[at : after[k]], local[at : after[k]]
        for i in range(own.shape[0]):  # over slices, many at a time
            its_part[i], its_position[i] = number, first + i
            its_places[i], its_local[i] = start + i, own[i] - bounds[k]
    return firsts, places, local, part, position


@compiled
def deal_request(rows: Any, runs: Any, bounds: Any, dealt: Any) -> Any:
    """All that is asked of the rows of a request, in one call.

    Parameters
    ----------
    rows, runs
        One by one, or else as runs, see :func:`lay_out`.
    bounds
        See :func:`deal_rows`.
    dealt
        (n,) which of them are in batches.

    Returns
    -------
    rows
        One by one.
    parts
        What :func:`deal_rows` finds of them.
    taken
        ``rows[dealt]``, if all of these lie within the request.
    are_within
        Whether they do.
    """
    if len(runs):
        rows = lay_out(runs)
    are_within = lie_within(dealt, len(rows))
    taken = np.empty(len(dealt) if are_within else 0, np.int64)
    for i in range(_U(len(taken))):
        taken[i] = rows[_U(dealt[i])]
    return rows, deal_rows(rows, bounds), taken, are_within


@compiled
def deal_batches(dealt: Any, ends: Any, number: Any, position: Any, firsts: Any) -> Any:
    """The rows of each batch by the part that holds them.

    Parameters
    ----------
    dealt
        (n,) which rows of a window all batches have, one behind the other.
    ends
        (n_batches,) where each ends.
    number, position
        See :func:`deal_rows`.
    firsts
        (n_parts,) where the rows of each part begin, if those of all parts stand one behind the other.

    Returns
    -------
    slots
        (n,) where each row is in its batch; ascending within a part.
    rows
        (n,) where each row is among those of all parts.
    cuts
        (n_batches, n_parts + 1) the rows of a batch that are in part ``k`` are ``cuts[batch, k]:cuts[batch, k + 1]``.
    """
    n_batches, n_parts = len(ends), len(firsts)
    slots, rows = np.empty(len(dealt), np.int64), np.empty(len(dealt), np.int64)
    cuts, after, start = np.zeros((n_batches, n_parts + 1), np.int64), np.zeros(n_parts, np.int64), 0
    if n_parts == 1:
        for batch in range(n_batches):
            cuts[batch, 0], cuts[batch, 1] = start, ends[batch]
            for i in range(_U(start), _U(ends[batch])):
                slots[i], rows[i] = i - _U(start), position[_U(dealt[i])]
            start = ends[batch]
        return slots, rows, cuts
    for batch in range(n_batches):
        for i in range(_U(start), _U(ends[batch])):
            after[_U(number[_U(dealt[i])])] += 1
        cuts[batch, 0] = start
        for k in range(n_parts):
            cuts[batch, k + 1] = cuts[batch, k] + after[k]
            after[k] = cuts[batch, k]
        for i in range(_U(start), _U(ends[batch])):
            row = _U(dealt[i])
            its = _U(number[row])
            at = _U(after[its])
            slots[at], rows[at] = i - _U(start), firsts[its] + position[row]
            after[its] += 1
        after[:] = 0
        start = ends[batch]
    return slots, rows, cuts


@compiled
def pick_rows(rows: Any, cuts: Any, part: int, first: int, starts: Any, lengths: Any, out: Any) -> None:  # noqa: PLR0913, PLR0917
    """Where the rows of one part, that are in batches, begin there, and how long they are.

    Parameters
    ----------
    rows, cuts
        See :func:`deal_batches`.
    part, first
        Its number, and where its rows begin among those of all parts.
    starts, lengths
        Of each of its rows.
    out
        (2, n) starts and lengths of ``rows``; those of the part are written.
    """
    for batch in range(len(cuts)):
        for i in range(_U(cuts[batch, part]), _U(cuts[batch, part + 1])):
            row = _U(rows[i] - first)
            out[0, i], out[1, i] = starts[row], lengths[row]


@compiled
def place_rows(slots: Any, cuts: Any, lengths: Any) -> Any:
    """Where the entries of each row go, if those of a batch stand one behind the other in the order of its rows.

    Parameters
    ----------
    slots, cuts
        See :func:`deal_batches`.
    lengths
        (n,) entries of each row.

    Returns
    -------
    pointers
        (n + n_batches,) for each batch 0, and where each of its rows ends.
    dest
        (n,) where each of the rows begins in its batch, in the order of ``slots``.
    """
    n_batches, n_parts = cuts.shape[0], cuts.shape[1] - 1
    pointers, dest = np.zeros(len(slots) + n_batches, np.int64), np.empty(len(slots), np.int64)
    for batch in range(n_batches):
        start, stop = cuts[batch, 0], cuts[batch, n_parts]
        own = pointers[start + batch : stop + batch + 1]
        for i in range(_U(start), _U(stop)):
            own[_U(slots[i]) + _U(1)] = lengths[i]
        for i in range(_U(1), _U(len(own))):
            own[i] += own[i - _U(1)]
        for i in range(_U(start), _U(stop)):
            dest[i] = own[_U(slots[i])]
    return pointers, dest


@compiled
def deal_entries(dealt: Any, ends: Any, number: Any, position: Any, parts: Any) -> Any:
    """Where in memory the entries of each row of all batches begin, and where they go.

    Parameters
    ----------
    dealt, ends, number, position
        See :func:`deal_batches`.
    parts
        (n_parts, 6) addresses of the starts and of the lengths of each part's rows, then, of its values and of its
        columns, the address and the bytes of one.

    Returns
    -------
    values, columns
        (n,) addresses.
    pointers
        (n + n_batches,) for each batch 0, and where each of its rows ends.
    short
        The same in 32 bits, of which higher ones are lost.
    """
    # Of each row of the window, in its order: what is looked up at random is in one cache line, not in four.
    found = np.empty((len(number), 4), np.int64)
    j = 0
    while j < len(number):
        its, stop = number[j], j + 1
        while stop < len(number) and number[stop] == its:
            stop += 1
        starts = numba.carray(pointer_at(parts[its, 0], number), (1,))
        lengths = numba.carray(pointer_at(parts[its, 1], number), (1,))
        values_at, value_nbytes, columns_at, column_nbytes = parts[its, 2], parts[its, 3], parts[its, 4], parts[its, 5]
        for i in range(_U(j), _U(stop)):
            start = starts[_U(position[i])]
            found[i, 0], found[i, 1] = values_at + start * value_nbytes, columns_at + start * column_nbytes
            found[i, 2] = lengths[_U(position[i])]
        j = stop
    values, columns = np.empty(len(dealt), np.int64), np.empty(len(dealt), np.int64)
    pointers, start = np.empty(len(dealt) + len(ends), np.int64), 0
    short = np.empty(len(pointers), np.int32)
    for batch in range(len(ends)):
        at, short_at = pointers[start + batch :], short[start + batch :]
        n_entries = at[0] = short_at[0] = 0
        for i in range(_U(ends[batch] - start)):
            row = _U(dealt[_U(start) + i])
            values[_U(start) + i], columns[_U(start) + i] = found[row, 0], found[row, 1]
            n_entries += found[row, 2]
            at[i + _U(1)] = short_at[i + _U(1)] = n_entries
        start = ends[batch]
    return values, columns, pointers, short
