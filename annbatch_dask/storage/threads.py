"""One small thread pool a process, for work that releases the GIL: inflate, encode, decode.

The generators here wait for threads when they end. Users close them on every way out (``contextlib.closing``): one that
is left to the garbage collector would wait in whatever thread that runs in, perhaps for itself.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypeVar

from annbatch_dask.storage.machine import n_cpus

__all__ = ["MAX_THREADS", "codec_pool", "map_ordered", "one_ahead", "unlocked_property"]

T = TypeVar("T")
R = TypeVar("R")

_pools: dict[int, ThreadPoolExecutor] = {}
MAX_THREADS = 4


def codec_pool() -> ThreadPoolExecutor:
    """The pool of this process; made at first use, and again after a fork."""
    pid = os.getpid()
    if pid not in _pools:  # no lock, which a fork might copy while it is held: a pool too many has no threads yet
        _pools.setdefault(pid, ThreadPoolExecutor(min(MAX_THREADS, n_cpus()), thread_name_prefix="shuffle-codec"))
    return _pools[pid]


def map_ordered(fn: Callable[[T], R], items: Iterable[T], *, in_flight: int = 2 * MAX_THREADS) -> Generator[R]:
    """``map`` in the pool: results in order, ``items`` drawn only ``in_flight`` ahead, so memory stays bounded.

    ``items`` is advanced in the calling thread. The first error is raised in its turn; what was in flight is awaited.
    """
    pool = codec_pool()
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(fn, item))
            if len(waiting) >= in_flight:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            if not future.cancel():
                future.exception()


def one_ahead(items: Iterator[T]) -> Generator[T]:
    """Iterate with each next item drawn in a thread while the caller works on the current one."""
    done = object()
    with ThreadPoolExecutor(1, thread_name_prefix="shuffle-ahead") as ahead:
        future = ahead.submit(next, items, done)
        while (item := future.result()) is not done:
            future = ahead.submit(next, items, done)
            yield item  # type: ignore[misc]


class unlocked_property(cached_property[T]):  # noqa: N801 - named as functools' own
    """A ``functools.cached_property`` without the lock that it has in Python 3.11, one for all objects.

    A process that is forked while a thread computes the value, or waits there for a compiler, would inherit the lock in
    a locked state. Two threads may both compute the value; one of the two stays.
    """

    def __init__(self, func: Callable[[Any], T]) -> None:
        super().__init__(func)
        self.lock = contextlib.nullcontext()
