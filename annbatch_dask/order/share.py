"""One stream of load requests shared out among ranks and among the workers of a DataLoader.

What is shared are requests, or single batches of one, never ranges of rows: so it works for every sampler, and
every row may come to every rank.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby, islice
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.order.planned import Planned

__all__ = ["Even", "Worker", "by_rank", "by_worker", "current_worker", "slice_batches"]

Ints = NDArray[np.integer[Any]]
Even = Literal["drop", "pad"]
Batch = tuple[Planned, int]


class Worker(NamedTuple):
    """Rank of this process among the workers of a torch DataLoader.

    All workers of one pass of a DataLoader have the same ``pass_id``, and so do those of other passes where the user
    seeds torch before each. ``first_process`` tells these apart: as many processes had been made before the pass's
    workers, or a few more where another thread made some meanwhile.
    """

    id: int
    n_workers: int
    pass_id: int
    first_process: int = 0


def current_worker() -> Worker | None:
    """None outside a DataLoader's worker process."""
    torch: Any = sys.modules.get("torch")
    if torch is None:  # then no DataLoader can have started this process
        return None
    info = torch.utils.data.get_worker_info()
    if info is None:
        return None
    # multiprocessing numbers the processes that one has started; the workers of a pass are started one after another.
    number = getattr(multiprocessing.current_process(), "_identity", None) or (0,)
    return Worker(info.id, info.num_workers, info.seed - info.id, number[-1] - info.id)


def by_worker(stream: Iterable[Planned], worker: Worker | None, *, in_order: bool) -> Iterator[Planned]:
    """The worker's part of a stream.

    A DataLoader takes batches from its workers in turn. ``in_order`` deals single batches, so that together they
    come as in the stream; every worker then reads part of each request. Otherwise whole requests are dealt.
    """
    if worker is None or worker.n_workers == 1:
        yield from stream
    elif not in_order:
        yield from islice(stream, worker.id, None, worker.n_workers)
    else:
        n_before = 0
        for item in stream:
            n = len(item.sizes)
            mine = range((worker.id - n_before) % worker.n_workers, n, worker.n_workers)
            if mine:
                yield item.pick(mine)
            n_before += n


def by_rank(stream: Iterable[Planned], rank: int, world_size: int, *, even: Even | None) -> Iterator[Planned]:
    """The rank's part of a stream: whole requests in turn, and batches of those that are left over.

    Parameters
    ----------
    stream
        The requests all ranks share.
    rank, world_size
        This rank, and how many there are.
    even
        ``"drop"``: all ranks get as many batches, of the same sizes; what does not go round is left out, at most
        ``world_size`` batches. ``"pad"``: the same, but rows from the start of the epoch fill the gaps. None: every
        row once, ranks may differ by one batch.
    """
    if world_size == 1:
        yield from stream
        return
    first: Planned | None = None
    turn: list[Planned] = []
    rest: dict[int, list[Batch]] = defaultdict(list)
    for item in stream:
        first = first or item
        turn.append(item)
        if len(turn) < world_size:
            continue
        if len({size for planned in turn for size in planned.sizes}) <= 1 and len({len(p.sizes) for p in turn}) == 1:
            yield turn[rank]
        else:
            yield from _collect(_full_rounds(turn, rest, rank, world_size))
        turn = []
    left = list(_full_rounds(turn, rest, rank, world_size))
    if even != "drop":
        over = [batch for size in sorted(rest, reverse=True) for batch in rest[size]]
        if even is None:
            left += over[rank::world_size]
        elif over and first is not None:
            left += _padded(over, first, world_size)[rank::world_size]
    yield from _collect(left)


def slice_batches(  # noqa: PLR0913
    stream: Iterable[Planned],
    rank: int,
    world_size: int,
    *,
    even: Even | None,
    first: Planned | None = None,
    n_together: int = 1,
) -> Iterator[Planned]:
    """The rank's slice of every batch; all ranks together have the batches of the stream, whatever their number.

    A batch that ``world_size`` does not divide, the last one, is left out, filled up or cut unevenly: see ``even``
    of :func:`by_rank`. It is filled up with rows of ``first``, by default the stream's first request. Where
    ``n_together`` rows belong together, so it is with a batch that has not as many of these for each rank.
    """
    step = world_size * n_together
    for item in stream:
        first = first or item
        whole = [b for b, size in enumerate(item.sizes) if size % step == 0]
        if whole:
            yield _sliced(item.pick(whole), rank, world_size)
        for b in sorted(set(range(len(item.sizes))) - set(whole)):
            if even is None:
                yield _sliced(item.pick([b]), rank, world_size)
            elif even == "pad":
                full = -(-max(item.sizes[b], first.sizes[0]) // step) * step
                yield _sliced(item.fill(b, full, first), rank, world_size)


def _sliced(item: Planned, rank: int, world_size: int) -> Planned:
    return item.map_splits(
        tuple(len(_share(np.arange(size), rank, world_size)) for size in item.sizes),
        partial(_share, rank=rank, world_size=world_size),
    )


def _share(split: Ints, rank: int, world_size: int) -> Ints:
    return np.array_split(split, world_size)[rank]


def _full_rounds(turn: list[Planned], rest: dict[int, list[Batch]], rank: int, world_size: int) -> Iterator[Batch]:
    """Deal single batches, always ``world_size`` of one size; what is left stays in ``rest``, by size."""
    for item in turn:
        for b, size in enumerate(item.sizes):
            rest[size].append((item, b))
            if len(rest[size]) == world_size:
                yield rest.pop(size)[rank]


def _padded(over: list[Batch], first: Planned, world_size: int) -> list[Batch]:
    """Batches as large as the first one, or the largest, and as many as make whole rounds."""
    full = max(first.sizes[0], *(item.sizes[b] for item, b in over))
    n_missing = -len(over) % world_size
    batches = [*over, *((first, i % len(first.sizes)) for i in range(n_missing))]
    return [(item, b) if item.sizes[b] == full else (item.fill(b, full, first), 0) for item, b in batches]


def _collect(batches: Iterable[Batch]) -> Iterator[Planned]:
    """Neighbouring batches of one request as one request."""
    for _, group in groupby(batches, key=lambda batch: id(batch[0])):
        members = list(group)
        yield members[0][0].pick([b for _, b in members])
