"""One build at a time on a collection, and no dataset removed under its readers."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import socket
import uuid
from collections.abc import Iterator

from annbatch_dask.errors import CollectionBusyError, CollectionError
from annbatch_dask.storage.conditions import check_takes_files
from annbatch_dask.storage.filesystems import explain_refusals
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.metadata import METADATA

__all__ = [
    "GENERATION_NAME",
    "Lease",
    "check_unchanged",
    "exclusive",
    "holder_of",
    "is_held",
    "keep_generation",
    "unlink_unheld",
]

logger = logging.getLogger(__name__)

LOCK_SUFFIX = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What file systems say that have no locks."""


@contextlib.contextmanager
def exclusive(folder: Folder) -> Iterator[None]:
    """Hold a local folder's lock, a file beside it, which the system releases when the process dies, however it dies.

    On an object store there is no such lock, and nothing is held: two builds write datasets of other names (see
    :mod:`annbatch_dask.storage.claims`), and the second one's commit is refused.

    Raises
    ------
    CollectionBusyError
        If another process, or another call in this one, holds it.
    CollectionError
        If a file of that name is there that is no lock of ours: it stays as it is. Or if no build can work there.
    StorageError
        If it may not be written.
    """
    if not folder.is_local:
        check_takes_files(folder.fs, folder.url)
        yield
        return
    path = folder.path.rstrip("/") + LOCK_SUFFIX
    with explain_refusals(path, ", the lock of what is built there,"):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        fd, was_empty = _acquire(path, folder.url)
    try:
        yield
    finally:
        _release(fd, path, stays=was_empty)


def _release(fd: int, path: str, *, stays: bool) -> None:
    """Let go of a lock, whatever becomes of its file: where that cannot be removed, it is left empty."""
    try:
        if not stays:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
    except OSError as e:  # what went wrong before is what is raised
        logger.warning("%s cannot be removed (%s): nobody holds it, and it does no harm", path, e)
        stays = True
    finally:
        with contextlib.suppress(OSError):
            if stays:
                os.ftruncate(fd, 0)
        os.close(fd)


_HOLDER = re.compile(r"process \d+ on \S+")
"""What a lock's file says."""


def _acquire(path: str, url: str) -> tuple[int, bool]:
    """A descriptor that holds the lock, and whether the file was there, empty, and so may be somebody's."""
    while True:
        is_new, fd = _open_lock(path)
        try:
            was_empty = _take_lock(fd, path, url, is_new=is_new)
        except BaseException:
            os.close(fd)  # and with it what was locked
            raise
        if was_empty is not None:
            return fd, was_empty
        os.close(fd)


def _take_lock(fd: int, path: str, url: str, *, is_new: bool) -> bool | None:
    """Lock an open file, and say in it whose it is; True if it was there, empty; None if it is no longer there."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        msg = f"{url} is being built by {_holder(fd, path) or 'another process'}; wait until it ends, or stop it"
        raise CollectionBusyError(msg) from None
    except OSError as e:  # a file system without locks
        logger.warning("%s cannot be locked (%s): make sure that only one build works on it", url, e)
    if not _is_still_there(fd, path):  # its last holder removes it, perhaps after it was opened here
        return None
    was_empty = not is_new and not _holder(fd, path)
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return was_empty


def _open_lock(path: str) -> tuple[bool, int]:
    with contextlib.suppress(FileExistsError):
        return True, os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    return False, os.open(path, os.O_RDWR | os.O_CREAT, 0o666)


def _holder(fd: int, path: str) -> str:
    """Content of a lock's file; empty if its holder has not written yet."""
    text = os.pread(fd, 1000, 0).decode(errors="replace")
    if text and not _HOLDER.fullmatch(text):
        msg = f"{path} would be the lock of a build and is another file; move it, or give another output"
        raise CollectionError(msg)
    return text


def _is_still_there(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def holder_of(folder: Folder) -> str | None:
    """Who holds a local folder's lock, by its file, as far as it can be known without touching it; None if nobody.

    Trying the lock would refuse it to a build that starts just then. Linux lists the locks of this machine; of a
    process on another one it is known only that it has not said that it ended.
    """
    path = folder.path.rstrip("/") + LOCK_SUFFIX
    try:
        with open(path, "rb") as f:
            text, inode = f.read(1000).decode(errors="replace"), os.fstat(f.fileno()).st_ino
    except OSError:
        return None
    if not _HOLDER.fullmatch(text):
        return None
    pid, host = text.removeprefix("process ").split(" on ")
    return text if host != socket.gethostname() or _is_locked(int(pid), inode) else None


def _is_locked(pid: int, inode: int) -> bool:
    """True if a process of this machine holds a file's lock; also where the system lists no locks."""
    try:
        with open("/proc/locks") as f:
            lines = [line.split() for line in f]
    except OSError:
        return True
    held = [(line[-4], line[-3].rpartition(":")[2]) for line in lines if "FLOCK" in line and "->" not in line]
    return (str(pid), str(inode)) in held


def check_unchanged(folder: Folder, version: str | None) -> None:
    """Refuse to continue where another build has published something since the root document had this version.

    Raises
    ------
    CollectionBusyError
        If another build has published since.
    """
    if not folder.is_local and folder.version(METADATA) != version:
        msg = f"{folder.url} was changed by another build since this one began, and stays; call again to add to it"
        raise CollectionBusyError(msg)


# --- readers -------------------------------------------------------------------------------------------------------

_GENERATION = ".generation-"
GENERATION_NAME = re.compile(rf"{re.escape(_GENERATION)}[0-9a-f]{{8}}")
"""Second name of a root document that a reader may still hold, once a commit has replaced it."""


class Lease:
    """Keeps a local collection's datasets, as they are now, from being removed, until it is dropped.

    A shared lock on the root document: a commit puts a new one in its place, and whoever then removes old datasets
    tries for the old one's exclusive lock. The system releases a dead reader's. Other stores have no locks, and nothing
    is held there. A copy (of a pickle, in a worker process) holds its own.

    Parameters
    ----------
    folder
        Folder of the collection; None if it is in memory.
    name
        Name of the root document in it: of a version that is kept, another one.
    """

    def __init__(self, folder: Folder | None, name: str = METADATA) -> None:
        self._folder, self._name, self._fd = folder, name, -1
        if folder is not None and folder.is_local:
            path = f"{folder.path}/{name}"
            with contextlib.suppress(OSError):  # no such file, or no locks there
                while not self._take(path):
                    self.close()

    def _take(self, path: str) -> bool:
        """Lock the root document; False if it was replaced meanwhile, so that the lock would protect nothing."""
        self._fd = os.open(path, os.O_RDONLY)
        fcntl.flock(self._fd, fcntl.LOCK_SH)
        return _is_still_there(self._fd, path)

    def __reduce__(self) -> tuple[type[Lease], tuple[Folder | None, str]]:
        """Pickle as one to be taken again."""
        return Lease, (self._folder, self._name)

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
        with contextlib.suppress(OSError):  # no root yet, or no hard links: then no reader is waited for
            os.link(f"{folder.path}/{METADATA}", f"{folder.path}/{_GENERATION}{uuid.uuid4().hex[:8]}")


def is_held(path: str) -> bool | None:
    """True if a process holds a file's lock; None where there are no locks.

    NFS grants an exclusive lock on a file that is open for writing alone. Where that is forbidden, the file counts as
    held.
    """
    try:
        fd = _open_to_lock(path)
    except FileNotFoundError:
        return False
    try:
        return _is_locked_by_others(fd, path)
    finally:
        os.close(fd)


def unlink_unheld(path: str) -> bool:
    """Remove a file unless a process holds its lock; whoever asks for that meanwhile waits, and then finds it gone.

    Returns
    -------
    True if it is not there any more.
    """
    try:
        fd = _open_to_lock(path)
    except FileNotFoundError:
        return True
    try:
        if _is_locked_by_others(fd, path):
            return False
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        return True
    finally:
        os.close(fd)


def _is_locked_by_others(fd: int, path: str) -> bool | None:
    """Try for a file's lock, which is kept until the file is closed."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as e:
        logger.warning("whether %s is in use cannot be known (%s)", path, e)
        return None if e.errno in _NO_LOCKS else True
    return False


def _open_to_lock(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR)
    except OSError as e:
        if e.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return os.open(path, os.O_RDONLY)
