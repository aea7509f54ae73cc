"""A pool of reusable buffers: page faults on freshly allocated memory cost as much as decoding into it.

An array from the pool is an ordinary numpy array. Its memory returns to the pool when the last array, view or
tensor on it is gone, wherever that happens; nothing is returned explicitly, so what a user keeps is never
overwritten.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from annbatch_dask.kernels.shared import address_of

__all__ = ["BufferPool"]

_ALIGNMENT = 64
_MIN_POOLED_NBYTES = 256 * 1024
_MAX_IDLE_TAKES = 32


_Memory = tuple[NDArray[np.uint8], int]
"""Bytes, and their address, which numpy takes its time to say."""


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
            "data": (memory[1], False),
            "shape": shape,
            "typestr": dtype.str,
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
        self._allocate = allocate or _allocate
        self._home = _Home()
        self._lock = threading.Lock()
        self._idle: list[tuple[int, int, _Memory]] = []  # when it came back, its bytes
        self._n_takes = 0

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
        memory = self._allocate(_capacity(nbytes))
        return memory, address_of(memory)

    def _collect(self) -> None:
        """Count what came back as idle, and forget what has been idle for long."""
        while self._home.returned:
            memory = self._home.returned.popleft()
            self._idle.append((self._n_takes, memory[0].nbytes, memory))
        while self._idle and self._n_takes - self._idle[0][0] > _MAX_IDLE_TAKES:  # what came back first is the first
            del self._idle[0]


def _capacity(nbytes: int) -> int:
    """``nbytes`` and some slack, so that the next, slightly larger request fits as well."""
    step = max(1 << (nbytes.bit_length() - 4), _ALIGNMENT)
    return (nbytes // step + 1) * step


def _allocate(nbytes: int) -> NDArray[np.uint8]:
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + nbytes]
