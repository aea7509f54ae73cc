"""The work of reading, dealt out to threads: many chunks of local files in each call of compiled code."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.chunks import native
from annbatch_dask.chunks.files import Held, scratch
from annbatch_dask.chunks.layout import Ints
from annbatch_dask.chunks.placing import ColumnPlan, opened, place_read

__all__ = ["MIN_PART_NBYTES", "Divisible", "Fill", "Task", "deal"]

Task = Callable[[], object]
MIN_PART_NBYTES = 512 * 1024
"""Less is not worth a thread's waking up."""


class Divisible(ABC):
    """Work that is done as a whole, or in parts by several threads."""

    def __call__(self) -> None:
        """Do all of it."""
        for task in self.cut(1):
            task()

    @abstractmethod
    def cut(self, n_parts: int) -> list[Task]:
        """Split the work into at most a number of calls of about equal size; fewer if splitting does not pay."""


@dataclass(frozen=True)
class Fill:
    """Reads of local files that one call can make, or several about equal ones."""

    plan: ColumnPlan
    how: list[int]

    def __call__(self) -> None:
        """Make all of them."""
        _Fills.of([self]).run(0, len(self.plan.reads))


def deal(tasks: Sequence[Task], n_parts: int) -> list[Task]:
    """Split the work into at most ``n_parts`` calls of about equal size, and tasks that cannot be split."""
    fills = [task for task in tasks if isinstance(task, Fill)]
    others = [task for task in tasks if not isinstance(task, Fill)]
    dealt = [part for task in others for part in (task.cut(n_parts) if isinstance(task, Divisible) else [task])]
    if not fills:
        return dealt
    whole = _Fills.of(fills)
    return [*dealt, *(partial(whole.run, first, stop) for first, stop in whole.cut(n_parts))]


@dataclass(frozen=True)
class _Fills:
    """The arguments of :func:`native.fill` for several plans; ``held`` keeps the files open."""

    fills: Sequence[Fill]
    held: Sequence[Held]
    reads: Ints
    chunks: Ints
    pieces: Ints
    hows: Ints
    is_done: NDArray[np.bool_]
    chunk_nbytes: int

    @classmethod
    def of(cls, fills: Sequence[Fill]) -> _Fills:
        held: list[Held] = []
        reads, hows, n_chunks, n_pieces = [], [], 0, 0
        for number, fill in enumerate(fills):
            plan = fill.plan
            reads.append(opened(plan, number, held))
            hows.append([*fill.how, n_chunks, n_pieces])
            n_chunks, n_pieces = n_chunks + len(plan.chunks), n_pieces + len(plan.pieces)
        chunks = np.concatenate([fill.plan.chunks for fill in fills])
        pieces = np.concatenate([fill.plan.pieces for fill in fills])
        largest = max(fill.plan.layout.chunk_nbytes for fill in fills)
        is_done = np.zeros(n_chunks, np.bool_)
        return cls(fills, held, np.concatenate(reads), chunks, pieces, np.array(hows), is_done, largest)

    def cut(self, n_parts: int) -> Iterator[tuple[int, int]]:
        """Runs of reads of about as many bytes."""
        so_far = np.cumsum(self.reads[:, 4])
        n_parts = max(1, min(n_parts, int(so_far[-1]) // MIN_PART_NBYTES))
        bounds = np.searchsorted(so_far, so_far[-1] * np.arange(1, n_parts) / n_parts).tolist()
        bounds = [0, *bounds, len(self.reads)]
        return ((first, stop) for first, stop in itertools.pairwise(bounds) if first < stop)

    def run(self, first: int, stop: int) -> None:
        """Make some of the reads; what could not be placed is read again, to go well or to say what is wrong."""
        raw = scratch("raw", int(self.reads[first:stop, 4].max()))
        spare = scratch("chunk", self.chunk_nbytes)
        given = (self.reads, self.chunks, self.pieces, self.hows, first, stop)
        if not native.fill(*given, native.functions(), raw, spare, self.is_done):
            return
        firsts = np.cumsum([0, *(len(fill.plan.reads) for fill in self.fills)])
        for number in range(first, stop):
            begin, end, which = self.reads[number, 5:].tolist()
            base = int(self.hows[which, 7])
            left = [k for k in range(begin, end) if not self.is_done[base + k]]
            if left:
                place_read(self.fills[which].plan, None, number - int(firsts[which]), left)
