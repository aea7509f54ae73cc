"""Counter of epochs that a process shares with the DataLoader workers it starts.

A DataLoader with worker processes starts new ones for each epoch, from copies of what the parent has: a count
in the copies would be lost, and every epoch would be the first. So the count is in memory they all share, and so does
a seed that a worker was told to continue with.

A ``multiprocessing.Value`` would not do: it may be neither pickled nor copied but as a process starts, which samplers
are at any time, and a worker that is killed would keep its lock, while the system lets go of a file's.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import context, reduction
from operator import index
from typing import Any

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.order.share import Worker

__all__ = ["EpochCounter"]

_N_PASSES = 64
_NEXT, _FOREIGN, _SEED, _FIRST = 0, 1, 2, 3  # of the seed its bytes, which are behind all cells
_N_CELLS = _FIRST + 2 * _N_PASSES  # of each of the latest passes, who makes it: an id, and the number of a process
_N_BYTES = 8 * _N_CELLS
_NOBODY = -1


class EpochCounter:
    """Numbers the passes over some data from 0 on.

    Pickling and copying give an independent counter; handing it to a process that multiprocessing starts gives
    one and the same.
    """

    def __init__(self, epoch: int = 0) -> None:
        cells = np.full(_N_CELLS, _NOBODY, np.int64)
        cells[_NEXT], cells[_FOREIGN] = epoch, 0
        self._adopt(_shared_file())
        os.pwrite(self._fd, cells.tobytes(), 0)

    def _adopt(self, fd: int) -> None:
        self._fd = fd
        self._who, self._n_passes = (_NOBODY, 0), 0
        weakref.finalize(self, os.close, fd).atexit = False

    def __reduce__(self) -> tuple[Any, ...]:
        if context.get_spawning_popen() is None:
            return EpochCounter, (self.peek(None),)
        return _rebuild, (reduction.DupFd(self._fd),)

    def share(self) -> EpochCounter:
        """Return the counter for a copy of the owner: this one for a process being started, else an independent one."""
        return EpochCounter(self.peek(None)) if context.get_spawning_popen() is None else self

    def peek(self, worker: Worker | None) -> int:
        """The epoch the next pass in this process will have."""
        with self._cells() as cells:
            return _epoch_of(cells, self._next_pass(worker), worker)

    def start(self, worker: Worker | None, epoch: int | None = None) -> int:
        """The epoch of a pass that begins now: ``epoch`` if given, else the next one."""
        who = self._next_pass(worker)
        if worker is not None:
            me = (worker.pass_id, worker.first_process)
            self._n_passes = self._n_passes + 1 if me == self._who else 1
            self._who = me
        with self._cells() as cells:
            if epoch is None:
                epoch = _epoch_of(cells, who, worker)
            at = _FIRST + 2 * (epoch % _N_PASSES)
            if cells[at] != who[0] or not _is_near(cells[at + 1], who, worker):
                cells[at : at + 2] = who
            cells[_NEXT] = epoch + 1 if worker is None else max(epoch + 1, cells[_NEXT])
            cells[_FOREIGN] = worker is not None
        return epoch

    def set(self, epoch: int) -> None:
        """Let the next pass have this epoch."""
        if index(epoch) < 0:
            msg = f"epoch is {epoch}; it must be 0 or more"
            raise ValueError(msg)
        with self._cells() as cells:
            cells[_FIRST:] = _NOBODY
            cells[_NEXT], cells[_FOREIGN] = epoch, 0

    @property
    def is_elsewhere(self) -> bool:
        """True if the latest pass was begun by a DataLoader's worker."""
        with self._cells() as cells:
            return bool(cells[_FOREIGN])

    @property
    def seed(self) -> int | None:
        """The seed to continue with, whichever process was told; None where none was."""
        with self._cells() as cells:
            n_bytes = int(cells[_SEED])
            return None if n_bytes == _NOBODY else int.from_bytes(os.pread(self._fd, n_bytes, _N_BYTES), "little")

    @seed.setter
    def seed(self, value: int | None) -> None:
        with self._cells() as cells:
            cells[_SEED] = _NOBODY
            if value is not None:
                raw = int(value).to_bytes(int(value).bit_length() // 8 + 1, "little")
                cells[_SEED] = os.pwrite(self._fd, raw, _N_BYTES)

    def _next_pass(self, worker: Worker | None) -> tuple[int, int]:
        """Identify the next pass. Persistent workers make several under one seed, all equally many."""
        if worker is None:
            return _NOBODY, 0
        n_passes = self._n_passes if (worker.pass_id, worker.first_process) == self._who else 0
        return (worker.pass_id + n_passes + (worker.n_workers << 40)) % 2**62, worker.first_process

    @contextmanager
    def _cells(self) -> Iterator[NDArray[np.int64]]:
        """The shared numbers, to be read and changed by one process at a time."""
        fcntl.lockf(self._fd, fcntl.LOCK_EX)
        try:
            before = os.pread(self._fd, _N_BYTES, 0)
            cells = np.frombuffer(before, np.int64).copy()
            yield cells
            if cells.tobytes() != before:
                os.pwrite(self._fd, cells.tobytes(), 0)
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN)


def _epoch_of(cells: NDArray[np.int64], who: tuple[int, int], worker: Worker | None) -> int:
    """The epoch another worker of the same pass has begun already, or the next."""
    if worker is not None:
        for epoch in range(int(cells[_NEXT]) - 1, max(int(cells[_NEXT]) - _N_PASSES, 0) - 1, -1):
            pass_id, first_process = cells[_FIRST + 2 * (epoch % _N_PASSES) :][:2]
            if pass_id == who[0] and _is_near(first_process, who, worker):
                return epoch
    return int(cells[_NEXT])


def _is_near(first_process: np.int64, who: tuple[int, int], worker: Worker | None) -> bool:
    """True if these are workers of one pass: those of two have at least as many processes between them as there are."""
    return worker is not None and abs(int(first_process) - who[1]) < worker.n_workers


def _shared_file() -> int:
    """A file without a name, gone with its last descriptor."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("annbatch-dask-epochs")
    fd, path = tempfile.mkstemp()
    os.unlink(path)
    return fd


def _rebuild(fd: Any) -> EpochCounter:
    counter = EpochCounter.__new__(EpochCounter)
    counter._adopt(fd.detach())  # noqa: SLF001
    return counter
