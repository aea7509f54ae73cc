"""The work of reading, dealt out to threads: many chunks of local files in each call of compiled code."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.chunks import native
from annbatch_dask.chunks.files import scratch
from annbatch_dask.chunks.layout import Ints
from annbatch_dask.chunks.placing import ColumnPlan, Opened, place_read

__all__ = ["MIN_PART_NBYTES", "Divisible", "Fill", "Task", "deal"]

Task = Callable[[], object]
MIN_PART_NBYTES = 512 * 1024
"""Less is not worth a thread's waking up."""
_PARTS_PER_THREAD = 3  # where parts are fixed: threads that are held up do fewer of them


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
        for task in deal([self], 1):
            task()

    def one_by_one(self) -> None:
        """Make all of them with one file open at a time."""
        for number in range(len(self.plan.reads)):
            place_read(self.plan, self.how, number)


def deal(tasks: Sequence[Task], n_threads: int) -> list[Task]:
    """Split the work among threads: reads into calls that each take the next ones, until none is left."""
    fills = [task for task in tasks if isinstance(task, Fill)]
    others = [task for task in tasks if not isinstance(task, Fill)]
    n_parts = _PARTS_PER_THREAD * n_threads
    dealt = [part for task in others for part in (task.cut(n_parts) if isinstance(task, Divisible) else [task])]
    opened = [(fill, Opened.of(fill.plan.index, fill.plan.planned)) for fill in fills]
    dealt += [fill.one_by_one for fill, files in opened if files is None]
    together = [(fill, files) for fill, files in opened if files is not None]
    return [*dealt, *_Fills.of(together, n_threads).tasks] if together else dealt


@dataclass(frozen=True)
class _Fills:
    """The arguments of :func:`native.fill_next` for several plans, whose files ``opened`` keeps open."""

    fills: Sequence[Fill]
    opened: Sequence[Opened]
    reads: Ints
    chunks: Ints
    pieces: Ints
    hows: Ints
    is_done: NDArray[np.bool_]
    state: Ints
    room: tuple[int, int]

    @classmethod
    def of(cls, together: Sequence[tuple[Fill, Opened]], n_threads: int) -> _Fills:
        fills, found = [fill for fill, _ in together], [opened for _, opened in together]
        plans = [fill.plan.planned for fill in fills]
        reads = np.concatenate([part.reads for part in found])
        hows, n_reads, n_chunks, n_pieces = [], 0, 0, 0
        for number, (fill, plan) in enumerate(zip(fills, plans, strict=True)):
            hows.append([*fill.how, n_chunks, n_pieces])
            reads[n_reads : n_reads + len(plan.reads), 7] = number
            n_reads += len(plan.reads)
            n_chunks, n_pieces = n_chunks + len(plan.chunks), n_pieces + len(plan.pieces)
        n_bytes = sum(part.n_bytes for part in found)
        n_calls = max(1, min(n_threads, n_bytes // MIN_PART_NBYTES))
        return cls(
            fills,
            found,
            reads,
            np.concatenate([plan.chunks for plan in plans]),
            np.concatenate([plan.pieces for plan in plans]),
            np.array(hows),
            np.zeros(n_chunks, np.bool_),
            np.array([0, 0, 0, n_calls]),
            (max(part.largest for part in found), max(fill.plan.layout.chunk_nbytes for fill in fills)),
        )

    @property
    def tasks(self) -> list[Task]:
        """Calls that make all the reads together, in any threads."""
        return [self.work] * int(self.state[3])

    def work(self) -> None:
        """Make reads until none is left; what could not be placed is read again, to go well or to say what is wrong."""
        raw, spare = scratch("raw", self.room[0]), scratch("chunk", self.room[1])
        given = (self.reads, self.chunks, self.pieces, self.hows, native.functions(), raw, spare)
        if not native.fill_next(*given, self.is_done, self.state):
            return
        firsts = np.cumsum([0, *(len(fill.plan.reads) for fill in self.fills)])
        for number in range(len(self.reads)):
            begin, end, which = self.reads[number, 5:].tolist()
            base = int(self.hows[which, 7])
            left = [k for k in range(begin, end) if not self.is_done[base + k]]
            if left:
                place_read(self.fills[which].plan, None, number - int(firsts[which]), left)
