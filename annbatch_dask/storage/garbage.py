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

_lock = threading.RLock()  # a finalizer may leave a pause in the thread that is entering one
_pauses = 0
_resume = False
_collector: int | None = None  # the thread that collects now


def _note(phase: str, _: dict[str, Any]) -> None:
    global _collector
    _collector = threading.get_ident() if phase == "start" else None


gc.callbacks.append(_note)


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Pause the automatic collection of garbage; pauses of several threads may overlap.

    A collection that has begun is waited for, which is safe while this thread does not hold h5py's lock. Who leaves
    while others go on collects in its own thread, which nobody waits for, so that garbage stays bounded.
    """
    global _pauses, _resume
    with _lock:
        if _pauses == 0:
            _resume = gc.isenabled()
            gc.disable()
        _pauses += 1
    try:
        while _collector not in (None, threading.get_ident()):
            time.sleep(0.001)
        yield
    finally:
        with _lock:
            _pauses -= 1
            others = _pauses > 0
            if not others and _resume:
                gc.enable()
        if others:
            gc.collect()
