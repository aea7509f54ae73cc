"""A pool of reusable buffers: page faults on freshly allocated memory cost as much as decoding into it.

An array from the pool is an ordinary numpy array. Its memory returns to the pool when the last array, view or
tensor on it is gone, wherever that happens; nothing is returned explicitly, so what a user keeps is never
overwritten.

Between two passes of a loader the memory is kept, but lent to the kernel, which takes it wherever some is short.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from annbatch_dask.kernels.shared import address_of

__all__ = ["BufferPool", "SparePool", "spare_pool"]

logger = logging.getLogger(__name__)

_ALIGNMENT = 64
_MIN_POOLED_NBYTES = 256 * 1024
_MIN_HUGE_NBYTES = 4 * 1024 * 1024  # as numpy does
_MAX_IDLE_TAKES = 32


class _Memory(NamedTuple):
    """Bytes, their address, which numpy takes its time to say, and the pages, where they can be lent to the kernel."""

    array: NDArray[np.uint8]
    address: int
    pages: mmap.mmap | None


@cache
def _typestr(dtype: np.dtype[Any]) -> str:
    return dtype.str


class _Home:
    """Queue of returned memory. Appending to a deque needs no lock, so this may run during garbage collection."""

    def __init__(self) -> None:
        self.returned: deque[_Memory] = deque()
        self.is_open = True

    def welcome(self, memory: _Memory) -> None:
        if self.is_open:
            self.returned.append(memory)


class _Loan:
    """Owns memory on behalf of the array made from it, which keeps it alive as its base.

    It describes the array itself, not the bytes: scipy copies an array that looks like a small part of its base.
    """

    __slots__ = ("__array_interface__", "_home", "_memory")

    def __init__(self, memory: _Memory, shape: tuple[int, ...], dtype: np.dtype[Any], home: _Home) -> None:
        self._memory = memory
        self._home = home
        self.__array_interface__ = {
            "version": 3,
            "data": (memory.address, False),
            "shape": shape,
            "typestr": _typestr(dtype),
        }

    def __del__(self) -> None:
        self._home.welcome(self._memory)


class BufferPool:
    """Hands out uninitialised arrays on memory that was used before, where any fits.

    Memory that was of no use for the last few requests is let go. Safe to use from several threads.

    Parameters
    ----------
    allocate
        Makes memory of so many bytes, aligned to 64; by default ordinary memory.
    """

    def __init__(self, allocate: Callable[[int], NDArray[np.uint8]] | None = None) -> None:
        self._allocate = allocate
        self._home = _Home()
        self._lock = threading.Lock()
        self._idle: list[tuple[int, int, _Memory]] = []  # when it came back, its bytes
        self._n_takes = 0
        self._pid = os.getpid()

    @property
    def is_own(self) -> bool:
        """False in a process that was forked since: a thread of its parent may hold the lock, and pages be copied."""
        return self._pid == os.getpid()

    def empty(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An uninitialised array, C-contiguous."""
        kind = np.dtype(dtype)
        shape = (shape,) if isinstance(shape, int) else shape
        nbytes = math.prod(shape) * kind.itemsize
        if nbytes < _MIN_POOLED_NBYTES:
            return np.empty(shape, kind)
        return np.asarray(_Loan(self._take(nbytes), shape, kind, self._home))

    def close(self) -> None:
        """Keep no memory from now on; what is idle goes with the pool. Takes no lock."""
        self._home.is_open = False
        self._home.returned.clear()

    def rest(self, limit_nbytes: int) -> None:
        """Keep some idle memory until :meth:`resume`, as long as the kernel leaves it; what comes back later is let go.

        Only where no thread asks for memory any more. At most ``limit_nbytes`` are kept, those that came back last.
        """
        with self._lock:
            self._collect()
            self._home.is_open = False
            kept, self._idle = self._idle, []
            for there in reversed(kept):
                limit_nbytes -= there[1]
                if limit_nbytes < 0 or not _lend(there[2]):
                    break
                self._idle.insert(0, (0, *there[1:]))
            self._n_takes = 0

    def resume(self) -> None:
        """Hand out memory again."""
        self._home.is_open = True

    @property
    def idle_nbytes(self) -> int:
        """Memory waiting to be used again."""
        with self._lock:
            self._collect()
            return sum(nbytes for _, nbytes, _ in self._idle)

    def _take(self, nbytes: int) -> _Memory:
        with self._lock:
            self._n_takes += 1
            self._collect()
            best, least = -1, 2 * nbytes + 1
            for i, (_, there, _) in enumerate(self._idle):
                if nbytes <= there < least:
                    best, least = i, there
            if best >= 0:
                return self._idle.pop(best)[2]
        if self._allocate is None:
            return _map(_capacity(nbytes))
        memory = self._allocate(_capacity(nbytes))
        return _Memory(memory, address_of(memory), None)

    def _collect(self) -> None:
        """Count what came back as idle, and forget what has been idle for long."""
        while self._home.returned:
            memory = self._home.returned.popleft()
            self._idle.append((self._n_takes, memory.array.nbytes, memory))
        while self._idle and self._n_takes - self._idle[0][0] > _MAX_IDLE_TAKES:  # what came back first is the first
            del self._idle[0]


def _capacity(nbytes: int) -> int:
    """``nbytes`` and some slack, so that the next, slightly larger request fits as well."""
    step = max(1 << (nbytes.bit_length() - 4), _ALIGNMENT)
    return (nbytes // step + 1) * step


def _map(nbytes: int) -> _Memory:
    """Pages of ordinary memory; large ones for much of it."""
    try:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        msg = f"no memory for a buffer of {nbytes} bytes: {error}"
        raise MemoryError(msg) from error
    if nbytes >= _MIN_HUGE_NBYTES:
        _advise(pages, "MADV_HUGEPAGE")
    array = np.frombuffer(pages, np.uint8)
    return _Memory(array, address_of(array), pages)


def _lend(memory: _Memory) -> bool:
    """Let the kernel take pages whose contents nobody needs, where it is short of some; False if it does not know how.

    Those it has not taken by the time they are written to need no page fault.
    """
    return memory.pages is not None and _advise(memory.pages, "MADV_FREE")


def _advise(pages: mmap.mmap, name: str) -> bool:
    """Tell the kernel what pages are for; False if it does not know of that."""
    try:
        pages.madvise(getattr(mmap, name))
    except (AttributeError, OSError) as error:
        logger.debug("%s of a buffer: %s", name, error)
        return False
    return True


class SparePool:
    """Keeps the pool of a pass that has ended for the next one. Takes no lock; see :func:`spare_pool`."""

    def __init__(self) -> None:
        self._kept: deque[BufferPool] = deque(maxlen=1)

    def __reduce__(self) -> tuple[Any, ...]:
        return spare_pool, ()

    def take(self) -> BufferPool:
        """The pool that was kept, or another one; its memory is no other pass's."""
        try:
            pool = self._kept.pop()
        except IndexError:
            return BufferPool()
        if not pool.is_own:
            return BufferPool()
        pool.resume()
        return pool

    def keep(self, pool: BufferPool, limit_nbytes: int) -> None:
        """Keep a pool that no thread uses any more, in the place of one that was kept before."""
        if pool.is_own:
            pool.rest(limit_nbytes)
            self._kept.append(pool)


_shared: list[weakref.ref[SparePool]] = []


def spare_pool() -> SparePool:
    """What the loaders of a process share: of those that take turns, as for training and validation, one keeps memory.

    It lives as long as any of them.
    """
    spare = _shared[0]() if _shared else None
    if spare is None:
        spare = SparePool()
        _shared[:] = [weakref.ref(spare)]
    return spare
