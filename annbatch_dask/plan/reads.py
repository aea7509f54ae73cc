"""How a gather task reads the spill files of all blocks: as many parts at a time as memory is left for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from annbatch_dask.plan.costs import bounds_of

if TYPE_CHECKING:
    from annbatch_dask.plan.plan import Plan

__all__ = ["MAX_OPEN", "expected_reads", "read_ahead_nbytes", "windows"]

MAX_OPEN = 128
"""Spill files a task keeps open; with more of them, each read opens its file."""
_AHEAD_NBYTES = 512 * 2**20
"""What is read ahead at most, of the memory that is left to a task."""
_LARGE_NBYTES = 2**20
"""Reads of so many bytes need not be larger."""
_N_OPENING = 2
"""Reads to open a file: what it says of itself, and its lines of the task's parts."""


def read_ahead_nbytes(plan: Plan) -> int:
    """Bytes of a worker that are a task's, and that the plan has no use for, as far as reading ahead has."""
    return max(0, min(_AHEAD_NBYTES, plan.budget.task_nbytes - plan.peak_nbytes[1]))


def windows(nbytes: Sequence[int], room: int, *, n_files: int, is_far: bool = False) -> Iterator[tuple[range, bool]]:
    """Cut parts into runs that are read together, and tell whether each is read whole, in one go from every file.

    Parameters
    ----------
    nbytes
        Bytes of each part in all files.
    room
        Bytes that may be held of them.
    n_files
        Files that each part is in.
    is_far
        Whether every read is a request to a store, so that fewer are better however large.
    """
    at = 0
    while at < len(nbytes):
        end, total = at, 0
        while end < len(nbytes) and total + nbytes[end] <= room:
            total += nbytes[end]
            end += 1
        is_whole = end > at and (is_far or nbytes[at] < _LARGE_NBYTES * n_files)
        run = range(at, end if is_whole else at + 1)
        yield run, is_whole
        at = run.stop


def expected_reads(plan: Plan) -> tuple[int, float]:
    """About how many reads the largest gather task makes of spill files on a disk, and bytes of one, opening apart."""
    n_files = len(plan.blocks)
    largest = int(np.argmax(plan.layout.sizes))
    rows = np.diff(plan.layout.part_starts)[list(plan.layout.parts_of(largest))]
    spilled = bounds_of([plan.sources[k] for k in sorted({b.source for b in plan.blocks})], 0).spill_nbytes
    nbytes = (rows * (spilled / plan.n_obs)).astype(np.int64).tolist()
    if n_files > MAX_OPEN:
        runs = list(windows(nbytes, read_ahead_nbytes(plan), n_files=n_files))
        n_each = sum(1 if is_whole else 2 for _, is_whole in runs)
    else:
        n_each = 2 * len(nbytes)
    return n_files * (_N_OPENING + n_each), sum(nbytes) / (n_files * n_each)
