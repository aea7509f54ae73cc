"""One build at a time on a collection."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Iterator

from annbatch_dask.errors import CollectionBusyError
from annbatch_dask.storage.publish import Folder

__all__ = ["exclusive"]

logger = logging.getLogger(__name__)

LOCK_SUFFIX = ".lock"


@contextlib.contextmanager
def exclusive(folder: Folder) -> Iterator[None]:
    """Hold a local folder's lock, a file beside it, which the system releases when the process dies, however it dies.

    On an object store there is no such lock, and nothing is held: what is published there is whole all the same, as a
    commit is one write, and of two builds the later one counts.

    Raises
    ------
    CollectionBusyError
        If another process, or another call in this one, holds it.
    """
    if not folder.is_local:
        yield
        return
    path = folder.path.rstrip("/") + LOCK_SUFFIX
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    fd = _acquire(path, folder.url)
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        os.close(fd)


def _acquire(path: str, url: str) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 1000, 0).decode(errors="replace") or "another process"
            os.close(fd)
            msg = f"{url} is being built by {holder}; wait until it ends, or stop it"
            raise CollectionBusyError(msg) from None
        except OSError as e:  # a file system without locks
            logger.warning("%s cannot be locked (%s): make sure that only one build works on it", url, e)
        if _is_still_there(fd, path):  # its last holder removes it, perhaps after it was opened here
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            return fd
        os.close(fd)


def _is_still_there(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
