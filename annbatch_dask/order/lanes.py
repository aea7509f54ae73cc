"""Global batches of many ranks, of which each rank reads its own part alone.

The rows of some load windows, in the order in which they are read, are cut into lanes of equal length, a chunk or so
each. Every batch takes as many rows of each lane; which ones, the windows' own random order says. A rank has some of
the lanes, all of them stretches of neighbouring rows, so what it reads is its share, and what the batches are does not
depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.order.planned import Planned, as_runs, expand
from annbatch_dask.order.share import Even, slice_batches
from annbatch_dask.types import LoadRequest

__all__ = ["by_lane", "count_lanes"]

Ints = NDArray[np.int64]
MAX_LANES = 64


def count_lanes(batch_size: int) -> int:
    """Lanes of a global batch: a divisor of its size, 64 at most, that many numbers of ranks divide.

    All factors 2 of the size come first, since ranks are mostly a power of 2; then the others, small ones first.
    """
    n_lanes, rest, factor = 1, batch_size, 2
    while rest > 1 and n_lanes * factor <= MAX_LANES:
        if rest % factor:
            factor += 1
        else:
            n_lanes, rest = n_lanes * factor, rest // factor
    return n_lanes


def by_lane(
    stream: Iterable[Planned],
    batch_size: int,
    n_together: int,
    rank: int,
    world_size: int,
    *,
    even: Even | None,
) -> Iterator[Planned]:
    """The rank's part of every batch.

    Parameters
    ----------
    stream
        Load windows of batches of ``batch_size`` rows; only the last batch of all may have fewer.
    batch_size
        Rows of a global batch.
    n_together
        Windows that are cut into lanes together.
    rank, world_size
        This rank, and how many there are. Where they do not divide the lanes, each reads all of them.
    even
        What becomes of the last batch where ``world_size`` does not divide it, as in ``slice_batches``.
    """
    first: Planned | None = None
    for group in _grouped(stream, n_together):
        first = first or group[0]
        n_batches, n_left = divmod(sum(size for item in group for size in item.sizes), batch_size)
        if n_batches:
            yield _part(group, n_batches, batch_size, rank, world_size)
        if n_left:
            last = Planned((n_left,), partial(_make_last, tuple(group), n_batches * batch_size))
            yield from slice_batches([last], rank, world_size, even=even, first=first)


def _grouped(stream: Iterable[Planned], n_together: int) -> Iterator[list[Planned]]:
    group: list[Planned] = []
    for item in stream:
        group.append(item)
        if len(group) == n_together:
            yield group
            group = []
    if group:
        yield group


def _part(group: list[Planned], n_batches: int, batch_size: int, rank: int, world_size: int) -> Planned:
    n_lanes = count_lanes(batch_size)
    make = partial(_make, tuple(group), n_batches, batch_size // n_lanes)
    if n_lanes % world_size:
        whole = Planned((batch_size,) * n_batches, partial(make, 0, n_lanes))
        return next(slice_batches([whole], rank, world_size, even="drop"))
    n_own = n_lanes // world_size
    return Planned((batch_size // world_size,) * n_batches, partial(make, rank * n_own, n_own))


def _rows_and_order(group: tuple[Planned, ...]) -> tuple[Ints, Ints]:
    """The rows of the batches of some windows as they are read, and their places there in the order of the batches."""
    rows, order, n_before = [], [], 0
    for item in group:
        request = item.make()
        its_rows = expand(request["requests"])
        order.append(n_before + np.concatenate(request["splits"]))
        rows.append(its_rows)
        n_before += len(its_rows)
    taken = np.concatenate(order).astype(np.int64, copy=False)
    read = np.sort(taken)  # all rows but those that drop_last leaves out
    place = np.empty(n_before, np.int64)
    place[read] = np.arange(len(read))
    return np.concatenate(rows)[read], place[taken]


def _make(group: tuple[Planned, ...], n_batches: int, n_each: int, lane: int, n_own: int) -> LoadRequest:
    """The request for ``n_own`` lanes from ``lane`` on, whose batches take ``n_each`` rows of each."""
    rows, order = _rows_and_order(group)
    length = n_batches * n_each
    start, stop = lane * length, (lane + n_own) * length
    own = order[(order >= start) & (order < stop)] - start
    by_lanes = own[np.argsort(own // length, kind="stable")].reshape(n_own, n_batches, n_each)
    return {"requests": as_runs(rows[start:stop]), "splits": [by_lanes[:, b].reshape(-1) for b in range(n_batches)]}


def _make_last(group: tuple[Planned, ...], n_before: int) -> LoadRequest:
    """The request for what is left over of the last windows: rows that are read last, one behind the other."""
    rows, _ = _rows_and_order(group)
    return {"requests": as_runs(rows[n_before:]), "splits": [np.arange(len(rows) - n_before)]}
