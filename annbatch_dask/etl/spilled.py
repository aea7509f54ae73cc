"""A dataset's rows as they lie in the spill files of all blocks: opened, added up and read in few requests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from annbatch_dask.etl.job import GatherTask, Job
from annbatch_dask.etl.rows import array_name
from annbatch_dask.plan.reads import MAX_OPEN, read_ahead_nbytes, windows
from annbatch_dask.storage.spill import SpillReader

__all__ = ["Spilled"]

_N_REQUESTS, _N_READS = 32, 8
"""Reads at the same time: from an object store, and from a disk, where there are many; it may be across a network."""


@dataclass(frozen=True)
class Spilled(contextlib.AbstractContextManager["Spilled"]):
    """A dataset's parts in the spill files of all blocks.

    Attributes
    ----------
    readers
        One a block.
    parts
        The dataset's.
    nnz, fingerprint
        Stored values of each sparse matrix, and fingerprint, of the rows that stay.
    room
        Bytes of the files that may be held.
    n_at_once
        Reads at the same time.
    """

    readers: Sequence[SpillReader]
    parts: range
    nnz: dict[str, int]
    fingerprint: int
    room: int
    n_at_once: int

    @classmethod
    def open(cls, job: Job, task: GatherTask) -> Spilled:
        """Open the files of all blocks, and add up what they say of the dataset.

        Raises
        ------
        SpillError
            If one is missing or damaged.
        """
        plan, parts = job.plan, job.plan.layout.parts_of(task.dataset)
        is_many = len(plan.blocks) > MAX_OPEN
        n_at_once = _N_REQUESTS if not job.scratch.is_local else _N_READS if is_many else 1
        readers: list[SpillReader | None] = [None] * len(plan.blocks)

        def open_one(block: int) -> None:
            readers[block] = SpillReader(job.scratch, block, parts, keep_open=not is_many)

        try:
            _at_once(open_one, range(len(readers)), n_at_once)
        except BaseException:
            _close(readers)
            raise
        opened = [r for r in readers if r is not None]
        nnz = {
            m.name: sum(r.n_entries(array_name(m.name, "indices")) for r in opened) - task.left_out_nnz.get(m.name, 0)
            for m in plan.matrices
            if m.kind == "csr"
        }
        fingerprint = sum(int(r.marks.sum()) for r in opened) - task.left_out_fingerprint
        return cls(opened, parts, nnz, fingerprint % 2**64, read_ahead_nbytes(plan), n_at_once)

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        _close(self.readers)

    def each_part(self) -> Iterator[int]:
        """The parts in their order, each with its bytes at hand where many small reads become fewer by that.

        As many parts at a time are read from every file, in one go, as memory is left for.
        """
        if self.n_at_once == 1:  # few files of a disk: array by array
            yield from self.parts
            return
        nbytes = np.sum([r.part_nbytes for r in self.readers], axis=0).tolist()
        is_far = self.n_at_once == _N_REQUESTS
        for run, is_whole in windows(nbytes, self.room, n_files=len(self.readers), is_far=is_far):
            parts = self.parts[run.start : run.stop]
            if is_whole:
                _at_once(partial(_hold, parts), self.readers, self.n_at_once)
            yield from parts


def _hold(parts: range, reader: SpillReader) -> None:
    reader.hold(parts)


def _close(readers: Sequence[SpillReader | None]) -> None:
    for reader in readers:
        if reader is not None:
            reader.close()


def _at_once(work: Callable[[Any], None], items: Sequence[Any], n_threads: int) -> None:
    """Call for each, in some threads; the first error ends it."""
    if n_threads == 1:
        for item in items:
            work(item)
        return
    with ThreadPoolExecutor(n_threads, thread_name_prefix="spilled") as pool:
        runs = [items[k::n_threads] for k in range(n_threads)]  # a call to a pool costs as much as a cached read
        list(pool.map(lambda run: _at_once(work, run, 1), runs))
