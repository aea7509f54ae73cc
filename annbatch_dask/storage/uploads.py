"""Calls that a thread makes behind the one that hands them in: who encodes waits for no store."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

__all__ = ["PART_NBYTES", "UPLOAD_NBYTES", "Behind"]

PART_NBYTES = 8 * 2**20
"""Bytes of an upload that go out at once, and are held until then: S3 wants 5 MiB or more, and at most 10,000 parts."""
_WAITING_NBYTES = PART_NBYTES // 2
UPLOAD_NBYTES = 3 * PART_NBYTES + _WAITING_NBYTES
"""What a file on its way holds: what waits, a part that is filled, the same as it is sent, and the client's copy."""


class Behind:
    """Makes calls one after another in a thread, whose caller waits only while too many bytes are on their way.

    After one that failed none is made; its error is raised by the next :meth:`call`, or by :meth:`wait`. To be ended by
    :meth:`wait` or :meth:`abandon`.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shuffle-upload")
        self._made: deque[tuple[Future[None], int]] = deque()
        self._nbytes, self._has_failed = 0, False

    def call(self, fn: Callable[..., object], *args: Any, nbytes: int = 0) -> None:
        """Let a call be made, which holds so many bytes until then."""
        while self._made and (self._made[0][0].done() or self._nbytes + nbytes > _WAITING_NBYTES):
            self._settle()
        self._made.append((self._thread.submit(self._make, fn, *args), nbytes))
        self._nbytes += nbytes

    def wait(self) -> None:
        """Wait until all were made, and end the thread."""
        while self._made:
            self._settle()
        self._thread.shutdown()

    def abandon(self) -> None:
        """Make none that has not begun, wait for the one that has, and end the thread."""
        self._has_failed = True
        self._thread.shutdown(cancel_futures=True)
        self._made.clear()

    def _make(self, fn: Callable[..., object], *args: Any) -> None:
        if self._has_failed:  # what follows on half a file would be taken for all of it
            return
        try:
            fn(*args)
        except BaseException:
            self._has_failed = True
            raise

    def _settle(self) -> None:
        future, nbytes = self._made.popleft()
        self._nbytes -= nbytes
        future.result()
