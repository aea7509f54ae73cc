"""Ranges of remote files, kept on a local disk up to a number of bytes.

A remote file has two local ones: ``NAME.bytes``, sparse, with what was read where it is in the file, and
``NAME.spans``, a log of what is there. A range is logged once its bytes are on the disk, so a log never claims what a
crash or a power cut has taken. Names hold a random part and are never used twice: a process that remembers spans of
files that another one has removed finds nothing under them, rather than somebody else's holes.

Processes that run at the same time share it as well: before anything is fetched, a log that has grown is read on.

A copy may rot like any other bytes. Who finds that it did calls :meth:`RangeCache.forget` and asks the store again.

What is kept may be private. Files are for their owner alone, as is a folder that is made here; one that others own, or
may write to, is refused.

What came first stays: an epoch reads everything once, in another order each time, so what came last is no likelier
than anything else to be read next. Only files unused for an hour are evicted.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import threading
import time
import uuid
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from annbatch_dask.errors import StorageError

__all__ = ["RangeCache", "RemoteFile"]

logger = logging.getLogger(__name__)

Fetch = Callable[[int, memoryview], int]
"""Fills a buffer from a byte of the remote file on; returns the bytes there were."""

_GRANT_NBYTES = 64 * 2**20
"""A process asks for this much room at a time, and logs what it has written when it has written as much."""
_BLOCK_NBYTES = 4096
_UNUSED_S = 3600
_LOG, _BYTES, _LOCK = ".spans", ".bytes", ".lock"
_RECORD = np.dtype([("start", "<u8"), ("stop", "<u8"), ("check", "<u4")])


@dataclass(frozen=True)
class RemoteFile:
    """One content of a remote file."""

    url: str
    version: str
    nbytes: int

    @property
    def digest(self) -> str:
        """A name for it: credentials and slashes stay out of file names."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class RangeCache:
    """Reads remote files by way of a folder on a local disk. Any number of threads and processes may.

    Parameters
    ----------
    folder
        Made where it does not exist.
    limit_nbytes
        Room on the disk that all files in it may take. Processes ask for it in grants of 64 MiB (less of a small
        limit), so that others may each pass it by one.
    """

    folder: Path
    limit_nbytes: int
    _states: dict[int, _CacheState] = field(default_factory=dict, repr=False, compare=False)

    def __reduce__(self) -> tuple[object, ...]:
        return RangeCache, (self.folder, self.limit_nbytes)

    @property
    def _state(self) -> _CacheState:
        """Each process has its own: a forked one would share neither locks nor what is still to be logged."""
        return self._states.setdefault(os.getpid(), _CacheState())

    def read_into(self, file: RemoteFile, start: int, out: memoryview, fetch: Fetch) -> int:
        """Fill ``out`` from byte ``start`` of a file on; returns the bytes there were.

        What is kept comes from the disk; one call of ``fetch`` gets the rest. Errors of ``fetch`` are the caller's,
        errors of the disk are logged, and end the use of the cache in this process.
        """
        state = self._state
        if not file.version or state.is_broken:
            return fetch(start, out)
        stop = max(start, min(start + len(out), file.nbytes))
        missing: tuple[int, int] | None = (start, stop)
        with self._giving_up(state):
            missing = self._read_kept(state, file, start, out[: stop - start])
        if missing is None:
            return stop - start
        first, last = missing
        n = fetch(first, out[first - start : last - start])
        if n < last - first:
            return first - start + n
        with self._giving_up(state):
            self._keep(state, file, first, out[first - start : last - start])
        return stop - start

    def check_private(self) -> None:
        """Make the folder where it is not there yet.

        Raises
        ------
        StorageError
            If others may write to it: they could put anything into what is read.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = self.folder.stat()
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            msg = (
                f"the cache folder {self.folder} belongs to user {found.st_uid} (this is {os.geteuid()}) and has mode "
                f"{found.st_mode & 0o777:o}, so that others could change what is read from it; give a folder of your "
                "own, with mode 700"
            )
            raise StorageError(msg)

    def forget(self, file: RemoteFile) -> None:
        """Remove what is kept of a file, as it is damaged; it may be kept again."""
        state = self._state
        with self._giving_up(state), state.lock:
            kept = state.files.pop(file, None) or self._open(file)
            logger.warning("%s is damaged: what it holds of %s is read again", kept.name, file.url)
            _remove(kept.name)

    def flush(self) -> None:
        """Log what this process has kept, for others and for later. Takes locks: nothing a finalizer may call."""
        state = self._state
        with self._giving_up(state):
            self._log(state)
        with state.lock:
            state.is_full = False  # others may have made room by the next epoch

    def _read_kept(self, state: _CacheState, file: RemoteFile, start: int, out: memoryview) -> tuple[int, int] | None:
        """Fill in what is kept; returns the run that is still missing."""
        kept: _Kept | None = None
        for _ in range(2):  # once more if another process has removed what is remembered, and perhaps made it again
            with state.lock:
                if state.files.get(file) in (None, kept):
                    state.files[file] = self._open(file)
                kept = state.files[file]
                missing = kept.spans.missing(start, start + len(out))
                if missing is not None and kept.read_log(file.nbytes):
                    missing = kept.spans.missing(start, start + len(out))
            if kept.read(start, out, missing):
                return missing
        return start, start + len(out)

    def _open(self, file: RemoteFile) -> _Kept:
        self.check_private()
        with self._locked():
            logs = sorted(self.folder.glob(f"{file.digest}-*.spans"))
            if logs:
                return _Kept.load(logs[0].with_suffix(""), file.nbytes)
            return _Kept.create(self.folder / f"{file.digest}-{uuid.uuid4().hex[:8]}")

    def _keep(self, state: _CacheState, file: RemoteFile, start: int, payload: memoryview) -> None:
        with state.lock:
            kept = state.files.get(file)
            if kept is None:
                return
            n_blocks = len(payload) // _BLOCK_NBYTES + 2 + 2 * kept.is_new  # the first of the log, and of the extents
            cost = n_blocks * _BLOCK_NBYTES + 2 * _RECORD.itemsize
            if not self._reserve(state, cost):
                return
            kept.is_new = False
        is_there = kept.write(start, payload)
        with state.lock:
            if not is_there:  # removed by another process
                state.files.pop(file, None)
                state.n_pending -= cost
                return
            kept.spans.add(start, start + len(payload))
            state.unlogged.setdefault(kept, []).append((start, start + len(payload)))
            state.n_unlogged += cost
            is_due = state.n_unlogged >= self._grant
        if is_due:
            self._log(state)

    @property
    def _grant(self) -> int:
        return min(_GRANT_NBYTES, self.limit_nbytes // 8)

    def _reserve(self, state: _CacheState, nbytes: int) -> bool:
        """True if there is room for so much."""
        if nbytes > state.room and not state.is_full:
            asked = state.n_pending + max(self._grant, nbytes)
            used = self._make_room(state, asked)
            if used + asked <= self.limit_nbytes:
                state.room = asked - state.n_pending
            else:
                state.is_full = True
                logger.info("%s has %d of %d bytes; nothing more is kept", self.folder, used, self.limit_nbytes)
        if nbytes > state.room:
            return False
        state.room -= nbytes
        state.n_pending += nbytes
        return True

    def _make_room(self, state: _CacheState, nbytes: int) -> int:
        """Evict unused files, the oldest first, until enough space is free; returns the bytes in use."""
        own = {kept.name for kept in state.files.values()}
        with self._locked():
            used: dict[Path, float] = {}
            total = 0
            for path in self.folder.iterdir():
                try:
                    found = path.stat()
                except FileNotFoundError:  # forgotten by another process, which takes no turns for that
                    continue
                total += found.st_blocks * 512
                name = path.with_suffix("")
                if path.suffix in (_LOG, _BYTES) and name not in own:
                    used[name] = max(found.st_mtime, used.get(name, 0))
            for name in sorted(used, key=used.__getitem__):
                if total + nbytes <= self.limit_nbytes or used[name] > time.time() - _UNUSED_S:
                    break
                total -= _remove(name)
        return total

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        fd = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _log(self, state: _CacheState) -> None:
        with state.lock:
            unlogged, n_unlogged = state.unlogged, state.n_unlogged
            state.unlogged, state.n_unlogged = {}, 0
        for kept, spans in unlogged.items():
            kept.log(spans)
        with state.lock:
            state.n_pending -= n_unlogged

    @contextlib.contextmanager
    def _giving_up(self, state: _CacheState) -> Iterator[None]:
        """A full or failing disk must not end a training."""
        try:
            yield
        except OSError as error:
            with state.lock:
                is_first, state.is_broken = not state.is_broken, True
            if is_first:
                logger.warning("%s is not used as a cache any more, the store is read instead: %s", self.folder, error)


class _CacheState:
    """State of a cache in one process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.files: dict[RemoteFile, _Kept] = {}
        self.unlogged: dict[_Kept, list[tuple[int, int]]] = {}
        self.n_unlogged = 0  # bytes
        self.n_pending = 0  # bytes granted to writes and logs that the disk may not show yet
        self.room = 0
        self.is_full = False
        self.is_broken = False


@dataclass(eq=False)
class _Kept:
    """Cached ranges of one remote file: two files that begin with ``name``, created and removed together."""

    name: Path
    spans: Spans
    is_new: bool = False
    n_read: int = 0  # bytes of the log

    @classmethod
    def create(cls, name: Path) -> _Kept:
        for suffix in (_LOG, _BYTES):
            os.close(os.open(name.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        return cls(name, Spans(), is_new=True)

    @classmethod
    def load(cls, name: Path, nbytes: int) -> _Kept:
        with contextlib.suppress(FileNotFoundError):  # forgotten by another process since it was listed
            for suffix in (_LOG, _BYTES):
                name.with_suffix(suffix).chmod(0o600)  # of a release that left it to the umask
            os.utime(name.with_suffix(_LOG))  # in use
        kept = cls(name, Spans())
        kept.read_log(nbytes)
        return kept

    def read_log(self, nbytes: int) -> bool:
        """Learn what the log says that was not read yet, by other processes too; returns whether it said anything."""
        try:
            with open(self.name.with_suffix(_LOG), "rb", buffering=0) as f:
                n_new = (os.fstat(f.fileno()).st_size - self.n_read) // _RECORD.itemsize * _RECORD.itemsize
                if n_new <= 0:
                    return False
                raw = os.pread(f.fileno(), n_new, self.n_read)
        except FileNotFoundError:  # removed by another process
            return False
        records = np.frombuffer(raw[: len(raw) // _RECORD.itemsize * _RECORD.itemsize], _RECORD)
        self.n_read += records.nbytes
        records = records[records["check"] == _checks(records)]  # a full disk may have cut one short
        for start, stop, _ in records[records["stop"] <= nbytes].tolist():
            self.spans.add(start, stop)
        return True

    def read(self, start: int, out: memoryview, missing: tuple[int, int] | None) -> bool:
        """Fill in all but what is missing; False if the file is gone or short, and nothing is left of it."""
        first, last = (len(out), len(out)) if missing is None else (missing[0] - start, missing[1] - start)
        parts = [(at, part) for at, part in ((start, out[:first]), (start + last, out[last:])) if len(part)]
        if not parts:
            return True
        with self._opened(os.O_RDONLY) as fd:
            if fd is not None and all(os.preadv(fd, [part], at) == len(part) for at, part in parts):
                return True
        _remove(self.name)
        return False

    def write(self, start: int, payload: memoryview) -> bool:
        """Write; False if the file is gone: only :meth:`create` makes one."""
        with self._opened(os.O_WRONLY) as fd:
            done = 0
            while fd is not None and done < len(payload):
                done += os.pwrite(fd, payload[done:], start + done)
        return fd is not None

    def log(self, spans: list[tuple[int, int]]) -> None:
        """Say that spans are there, once they are."""
        with self._opened(os.O_RDONLY) as fd:
            if fd is None:
                return
            os.fsync(fd)
        records = np.zeros(len(spans), _RECORD)
        records["start"], records["stop"] = np.array(spans, np.uint64).T
        records["check"] = _checks(records)
        with open(self.name.with_suffix(_LOG), "ab", buffering=0) as f:  # one write: other processes append too
            f.write(records.tobytes())

    @contextlib.contextmanager
    def _opened(self, flags: int) -> Iterator[int | None]:
        fd = None
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(self.name.with_suffix(_BYTES), flags)
        try:
            yield fd
        finally:
            if fd is not None:
                os.close(fd)


def _checks(records: NDArray[np.void]) -> NDArray[np.uint32]:
    spans = [start.to_bytes(8, "little") + stop.to_bytes(8, "little") for start, stop, _ in records.tolist()]
    return np.array([google_crc32c.value(span) for span in spans], np.uint32)


def _remove(name: Path) -> int:
    """Remove what is kept of one remote file; returns the room it took."""
    nbytes = 0
    for path in (name.with_suffix(_LOG), name.with_suffix(_BYTES)):  # first the claim, then what it claims
        with contextlib.suppress(FileNotFoundError):
            nbytes += path.stat().st_blocks * 512
            path.unlink()
    return nbytes


class Spans:
    """Half-open runs of integers: ascending, and apart from each other."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def add(self, start: int, stop: int) -> None:
        """Join a run with those it overlaps or touches."""
        first, last = bisect_left(self._stops, start), bisect_right(self._starts, stop)
        if first < last:
            start, stop = min(start, self._starts[first]), max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]

    def missing(self, start: int, stop: int) -> tuple[int, int] | None:
        """The shortest run that holds all of [start, stop) that is not there; None if all of it is."""
        while start < stop and (at := bisect_right(self._starts, start) - 1) >= 0 and self._stops[at] > start:
            start = min(self._stops[at], stop)
        while start < stop and (at := bisect_left(self._starts, stop) - 1) >= 0 and self._stops[at] >= stop:
            stop = max(self._starts[at], start)
        return (start, stop) if start < stop else None
