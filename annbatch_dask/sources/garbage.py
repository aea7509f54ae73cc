"""No collection of garbage while HDF5 is read from a remote store.

h5py holds one lock of the process while a file-like object reads for it, and frees its objects under the same lock.
fsspec reads on a thread of its own. If that thread happens to collect garbage with an h5py object in it, it waits for
the lock, and the holder of the lock waits for that thread, for ever (h5py issue 2019). h5py's documentation names the
remedy: collect nothing meanwhile.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

__all__ = ["no_garbage_collection"]


_STEP_S = 0.001
_PATIENCE_S = 10.0
"""For a collection that was under way before anybody watched, and is hardly ever one."""


class _Collector:
    """State of the garbage collector of this process.

    It is watched from the first pause on: an interrupt of the keyboard that arrives while Python's collector calls a
    function is lost, and most processes read no HDF5 from a store.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a finalizer may leave a pause in the thread that is entering one
        self.pauses = 0
        self.was_enabled = False
        self.is_watched = False
        self.thread: int | None = None  # that collects now
        self.last: int | None = None  # that began to collect last

    def note(self, phase: str, _: dict[str, Any]) -> None:
        """Called by the collector when it begins and ends."""
        self.thread = threading.get_ident() if phase == "start" else None
        self.last = self.thread or self.last

    def wait(self) -> None:
        """Wait until no other thread collects."""
        own, until = threading.get_ident(), time.monotonic() + _PATIENCE_S
        while not self.is_watched and time.monotonic() < until:
            gc.collect(0)  # does nothing while another thread collects
            self.is_watched = self.last == own
            if not self.is_watched:
                time.sleep(_STEP_S)
        while self.thread not in (None, own):
            time.sleep(_STEP_S)

    def pause(self) -> None:
        with self.lock:
            if self.pauses == 0:
                if self.note not in gc.callbacks:
                    gc.callbacks.append(self.note)
                self.was_enabled = gc.isenabled()
                gc.disable()
            self.pauses += 1

    def resume(self) -> bool:
        """True if no pause is left."""
        with self.lock:
            self.pauses -= 1
            if self.pauses == 0 and self.was_enabled:
                gc.enable()
            return self.pauses == 0


_collector = _Collector()


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Pause the automatic collection of garbage; pauses of several threads may overlap.

    A collection that has begun is waited for, which is safe while this thread does not hold h5py's lock. Who leaves
    while others continue collects in its own thread, which blocks no other, so that garbage stays bounded.
    """
    _collector.pause()
    try:
        _collector.wait()
        yield
    finally:
        if not _collector.resume():
            gc.collect()
