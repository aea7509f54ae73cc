"""One build at a time on a collection, and no dataset removed under its readers."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import uuid
from collections.abc import Iterator

from annbatch_dask.errors import CollectionBusyError
from annbatch_dask.storage.metadata import METADATA
from annbatch_dask.storage.publish import Folder

__all__ = [
    "Lease",
    "check_unchanged",
    "claim_numbers",
    "exclusive",
    "held_generations",
    "is_claim",
    "keep_generation",
    "release_numbers",
]

logger = logging.getLogger(__name__)

LOCK_SUFFIX = ".lock"


@contextlib.contextmanager
def exclusive(folder: Folder) -> Iterator[None]:
    """Hold a local folder's lock, a file beside it, which the system releases when the process dies, however it dies.

    On an object store there is no such lock, and nothing is held: two builds write datasets of other names
    (:func:`claim_numbers`), and the second one's commit is refused.

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


# --- names on an object store ---------------------------------------------------------------------------------------

_CLAIM = ".claim-"


def is_claim(name: str) -> bool:
    """Whether a file of a collection's folder is a build's claim of dataset numbers."""
    return name.startswith(_CLAIM)


def claim_numbers(folder: Folder, key: str, first: int, n: int) -> int:
    """First of ``n`` dataset numbers that no other build of an object store's collection writes, ``first`` or above.

    A local folder's lock keeps others away. Here each build leaves a file that says which numbers are its own, until
    it is done; one that was interrupted finds its file again by its work's ``key``.
    """
    if folder.is_local:
        return first
    claim = json.dumps({"key": key, "n": n}).encode()
    while True:
        name = f"{_CLAIM}{first}"
        try:
            folder.replace(name, claim, version=None)
        except CollectionBusyError:
            taken = folder.find(name)
            first += json.loads(taken)["n"] if taken else 0  # or it is gone again
        else:
            return first


def check_unchanged(folder: Folder, version: str | None) -> None:
    """Refuse to go on where another build has published something since the root document had this version.

    Raises
    ------
    CollectionBusyError
        Then.
    """
    if not folder.is_local and folder.version(METADATA) != version:
        msg = f"{folder.url} was changed by another build since this one began, and stays; call again to add to it"
        raise CollectionBusyError(msg)


def release_numbers(folder: Folder, first: int) -> None:
    """Give up what :func:`claim_numbers` gave."""
    if not folder.is_local:
        folder.remove_files([f"{_CLAIM}{first}"])


# --- readers -------------------------------------------------------------------------------------------------------

_GENERATION = ".generation-"
"""Second name of a root document that a reader may still hold, once a commit has replaced it."""


class Lease:
    """Keeps a local collection's datasets, as they are now, from being removed, until it is dropped.

    A shared lock on the root document: a commit puts a new one in its place, and whoever then removes old datasets
    tries for the old one's exclusive lock. The system releases a dead reader's. Other stores have no locks, and nothing
    is held there. A copy (of a pickle, in a worker process) holds its own.

    Parameters
    ----------
    folder
        Of the collection; None where it lives in memory.
    """

    def __init__(self, folder: Folder | None) -> None:
        self._folder, self._fd = folder, -1
        if folder is not None and folder.is_local:
            with contextlib.suppress(OSError):  # no such file, or no locks there
                self._fd = os.open(f"{folder.path}/{METADATA}", os.O_RDONLY)
                fcntl.flock(self._fd, fcntl.LOCK_SH)

    def __reduce__(self) -> tuple[type[Lease], tuple[Folder | None]]:
        """Pickle as one to be taken anew."""
        return Lease, (self._folder,)

    def document(self) -> bytes:
        """The root document that is held; empty where there is none."""
        return os.pread(self._fd, os.fstat(self._fd).st_size, 0) if self._fd >= 0 else b""

    def close(self) -> None:
        """Let go."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    __del__ = close


def keep_generation(folder: Folder) -> None:
    """Give the root document a second name before it is replaced, so that its readers can be asked for."""
    if folder.is_local:
        with contextlib.suppress(OSError):  # no root yet, or no hard links there: then nobody is waited for
            os.link(f"{folder.path}/{METADATA}", f"{folder.path}/{_GENERATION}{uuid.uuid4().hex[:8]}")


def held_generations(folder: Folder) -> dict[str, bytes]:
    """Name and content of the replaced root documents that readers hold; those that nobody holds are removed."""
    held = {}
    for name in folder.names() if folder.is_local else ():
        if name.startswith(_GENERATION):
            path = f"{folder.path}/{name}"
            with open(path, "rb") as f:
                try:
                    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    held[name] = f.read()
                else:
                    os.unlink(path)
    return held
