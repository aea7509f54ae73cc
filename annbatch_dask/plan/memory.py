"""Peak bytes of a task, from the plan. The same figures are printed, checked against workers, and measured in tests."""

from __future__ import annotations

from dataclasses import dataclass

from annbatch_dask.errors import MemoryBudgetError
from annbatch_dask.formatting import format_bytes

__all__ = [
    "BLOCK_NBYTES",
    "IN_FLIGHT_NBYTES",
    "MIB",
    "SMALL_NBYTES",
    "Budget",
    "gather_peak_nbytes",
    "scatter_peak_nbytes",
]

MIB = 2**20
RESERVED_NBYTES = 420 * MIB
"""A worker process before its first task: interpreter, imports, compiled kernels (measured 330-400 MiB)."""
IN_FLIGHT_NBYTES = 24 * MIB
"""Of chunks on their way from a file, that every task is taken to hold."""
SMALL_NBYTES = 48 * MIB
"""Of a task beside its rows: chunks on their way, what is copied at a time, what is encoded."""

BLOCK_NBYTES = 128 * MIB
"""Default size of a row block: far above the cost of a task, small beside a worker's memory."""


@dataclass(frozen=True)
class Budget:
    """Memory of one worker process and the threads that share it.

    Parameters
    ----------
    worker_nbytes
        Memory limit of a worker process, bytes.
    n_threads
        Tasks that run in it at once.
    block_nbytes
        Size of a row block, which is the work of one scatter task, where memory allows it.
    upload_nbytes
        What each array that is written holds on its way to a store; 0 where it is written to a disk.
    """

    worker_nbytes: int
    n_threads: int = 1
    block_nbytes: int = BLOCK_NBYTES
    upload_nbytes: int = 0

    @property
    def task_nbytes(self) -> int:
        """Peak memory available to one task."""
        return max(0, self.worker_nbytes - RESERVED_NBYTES) // max(1, self.n_threads)

    def worker_nbytes_for(self, peak_nbytes: int) -> int:
        """Memory of a worker of as many threads whose tasks may have this peak."""
        return RESERVED_NBYTES + peak_nbytes * max(1, self.n_threads)

    def check(self, what: str, peak_nbytes: int, remedy: str) -> None:
        """Refuse a task whose peak does not fit.

        Raises
        ------
        MemoryBudgetError
            With both numbers and the remedy.
        """
        if peak_nbytes > self.task_nbytes:
            msg = (
                f"{what} needs {format_bytes(peak_nbytes)} and a worker thread has "
                f"{format_bytes(self.task_nbytes)} ({format_bytes(self.worker_nbytes)} a worker, less "
                f"{format_bytes(RESERVED_NBYTES)} for the process, over {self.n_threads} threads); {remedy}"
            )
            raise MemoryBudgetError(msg)


def scatter_peak_nbytes(held_nbytes: float, fixed_nbytes: int = 0) -> int:
    """Peak of a scatter task: what it read, and at most as much again while rows are put in order.

    Parameters
    ----------
    held_nbytes
        Its rows, see :func:`annbatch_dask.plan.costs.held_weight`.
    fixed_nbytes
        Bytes that the source needs for any rows.
    """
    return int(2 * held_nbytes) + fixed_nbytes + SMALL_NBYTES


def gather_peak_nbytes(
    *,
    part_nbytes: int,
    segment_nbytes: int,
    obs_nbytes: int,
    frame_nbytes: int = 0,
    chunk_nbytes: int = 0,
    stats_nbytes: int = 0,
    upload_nbytes: int = 0,
) -> int:
    """Peak of a gather task: while it puts parts in order, or when it writes obs, which follows.

    Parameters
    ----------
    part_nbytes
        A part, which is held as it was read; of its matrices a slice is encoded while the next is put in order, and its
        strings are put in order at once.
    segment_nbytes
        The largest piece of a spill file read at once.
    obs_nbytes
        obs of the whole dataset, held until it is written.
    frame_nbytes
        The same at the time when it is written.
    chunk_nbytes
        Bytes of one chunk of each array, waiting to be filled, and three times the largest, being encoded.
    stats_nbytes
        Statistics of genes, held until they are written.
    upload_nbytes
        Of arrays on their way to a store.
    """
    chunks = max(0, chunk_nbytes - IN_FLIGHT_NBYTES)
    at_work = max(int(2.2 * part_nbytes) + segment_nbytes + obs_nbytes, frame_nbytes)
    return at_work + stats_nbytes + upload_nbytes + chunks + SMALL_NBYTES
