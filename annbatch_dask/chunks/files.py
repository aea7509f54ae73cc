"""The files of one zarr array, to read ranges of them: on a local disk, or in any fsspec store.

They are those that were there when the array was opened, in the version they had: each read compares it, and fails
rather than give bytes of another one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import zarr
import zarr.storage
from numpy.typing import NDArray

from annbatch_dask.chunks.cache import RangeCache, RemoteFile
from annbatch_dask.errors import CollectionError, IntegrityError
from annbatch_dask.storage.filesystems import RemoteRanges
from annbatch_dask.storage.folder import Folder, folder_of
from annbatch_dask.storage.stores import CheckedRangesStore, WholeFileStore
from annbatch_dask.storage.threads import unlocked_property
from annbatch_dask.storage.versions import Listing, Version, changed, list_files, version_on_disk

if TYPE_CHECKING:
    import fsspec

__all__ = ["ChunkFiles", "Held", "OpenFiles", "chunk_files", "scratch"]

_MAX_OPEN = 4096


def _n_permits() -> int:
    """A fourth of the files that the process may have open."""
    try:
        import resource
    except ImportError:  # not on this system
        return 128
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _MAX_OPEN if allowed == resource.RLIM_INFINITY else min(allowed // 4, _MAX_OPEN)


_to_keep = deque(range(_n_permits()))
"""Permits to keep a file open, of the whole process. Its ends may change in any thread or finalizer, without a lock."""
_to_use = deque(range(_n_permits()))
"""Those to have a file open for a single use, once the others are given out."""


class ChunkFiles(Protocol):
    """The files of one array as it was opened, by their keys; any number of threads may read.

    ``is_remote`` says whether each read is a request to a store, ``is_cached`` whether a local copy may stand for it.
    """

    is_remote: ClassVar[bool]

    @property
    def is_cached(self) -> bool:
        """True if bytes may come from a copy."""

    def name(self, key: str) -> str:
        """Readable name of a file."""

    def version(self, key: str) -> Version | None:
        """Version of a file when the array was opened; None if there was no file."""

    def check(self, key: str) -> None:
        """Refuse a file that is not as it was when the array was opened.

        Raises
        ------
        CollectionChangedError
            If the file was replaced, overwritten or removed since.
        """

    def read(self, key: str, start: int, stop: int, *, anew: bool = False) -> memoryview:
        """Bytes [start, stop) of a file that was there, good until this thread reads again.

        Parameters
        ----------
        key
            Identity of the file.
        start, stop
            Half-open.
        anew
            Not from a copy, which is damaged and forgotten.

        Raises
        ------
        IntegrityError
            If it ends before.
        CollectionChangedError
            If it is not that file any more.
        """

    def hold(self, key: str) -> Held:
        """A local file that was there, open for who has it.

        Raises
        ------
        CollectionChangedError
            If it is there no more. Whether it is as it was is to be compared after reading.
        """

    def close(self) -> None:
        """Keep no file open; reading opens them again. Takes no lock."""


def chunk_files(
    array: zarr.Array[Any], cache: RangeCache | None = None, listing: Listing | None = None
) -> ChunkFiles | None:
    """The files of an array, remote ones by way of a cache; None where only its store knows them.

    They are as in the ``listing`` of a folder above, or else as they are now.
    """
    is_local = type(array.store) is zarr.storage.LocalStore and hasattr(os, "preadv")
    if not is_local and type(array.store) not in (zarr.storage.FsspecStore, CheckedRangesStore, WholeFileStore):
        return None
    try:
        folder = folder_of(array)
    except CollectionError:  # fsspec's own local file system, and the like
        return None
    versions = None if listing is None else listing.below(folder.url)
    if versions is None and (now := list_files(folder)) is not None:
        versions = dict(now.versions)
    if is_local:
        return _LocalFiles(folder.path, versions or {})
    return _RemoteFiles(folder, versions or {}, cache, is_listed=versions is not None)


class Held:
    """A file that is open until no reference is left; ``fd`` is its descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._permit: int | None = None
        for self._pool in (_to_keep, _to_use):
            with contextlib.suppress(IndexError):
                self._permit = self._pool.popleft()
                break

    @property
    def is_permitted(self) -> bool:
        """True if it may be open while others are opened."""
        return self._permit is not None

    @property
    def is_kept(self) -> bool:
        """True if it may stay open."""
        return self._permit is not None and self._pool is _to_keep

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # the module may be gone by then
        close(self.fd)
        if self._permit is not None:
            self._pool.append(self._permit)


class OpenFiles:
    """Local files that are open as long as this is referred to, by number.

    Attributes
    ----------
    table
        (n_files, 3) descriptor, and version: time and bytes; -1 of a file that is not open.
    """

    def __init__(self, n_files: int) -> None:
        self.table = np.full((n_files, 3), -1, np.int64)
        self._held: list[Held] = []

    def having(self, files: ChunkFiles, keys: Mapping[int, str]) -> OpenFiles | None:
        """These, and some more by their numbers; another object, for a single use, where they may not stay open.

        None where too many are open: these are to be read one after the other.
        """
        mine = self
        for number, key in keys.items():
            file, version = files.hold(key), files.version(key)
            assert version is not None  # nothing is read of a file that was not there
            if not file.is_permitted:
                return None
            if mine is self and not file.is_kept:
                mine = OpenFiles(0)
                mine.table, mine._held = self.table.copy(), [*self._held]
            mine._held.append(file)
            mine.table[number] = file.fd, *version
        return mine


@dataclass(frozen=True)
class _LocalFiles:
    """Files on a disk.

    Each stays open from its first read to :meth:`close`, as long as there are permits: what was opened is read though
    its path leads elsewhere by now, and a read asks the file system for no path.
    """

    is_remote: ClassVar = False
    is_cached: ClassVar = False

    root: str
    versions: Mapping[str, Version | None] = field(repr=False)
    _held: dict[str, Held] = field(default_factory=dict, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return _LocalFiles, (self.root, self.versions)

    def name(self, key: str) -> str:
        return f"{self.root}/{key}"

    def version(self, key: str) -> Version | None:
        return self.versions.get(key)

    def check(self, key: str) -> None:
        try:
            found = version_on_disk(os.stat(self.name(key)))
        except FileNotFoundError:
            found = None
        if found != self.version(key):
            raise changed(self.name(key), self.version(key), found)

    def read(self, key: str, start: int, stop: int, *, anew: bool = False) -> memoryview:  # noqa: ARG002 - no copies
        raw = memoryview(scratch("raw", stop - start))
        file = self.hold(key)
        try:
            done = 0
            while done < len(raw) and (n := os.preadv(file.fd, [raw[done:]], start + done)):
                done += n
        except OSError as e:
            if e.errno != errno.ESTALE:  # NFS: removed on another machine
                raise
            raise changed(self.name(key), self.version(key), None) from e
        found = version_on_disk(os.fstat(file.fd))  # after it was read, as somebody may write to it
        if found != self.version(key):
            raise changed(self.name(key), self.version(key), found)
        if done < len(raw):
            msg = f"{self.name(key)} ends at byte {start + done}, expected {stop}"
            raise IntegrityError(msg)
        return raw

    def hold(self, key: str) -> Held:
        held = self._held.get(key)
        if held is not None:
            return held
        try:
            fd = os.open(self.name(key), os.O_RDONLY)
        except FileNotFoundError:
            raise changed(self.name(key), self.version(key), None) from None
        held = Held(fd)
        return self._held.setdefault(key, held) if held.is_kept else held

    def close(self) -> None:
        self._held.clear()  # who reads has a reference of its own


@dataclass(frozen=True)
class _RemoteFiles:
    """Files of a store; of one that does not list them, each is as it was when it was asked for first."""

    is_remote: ClassVar = True

    folder: Folder
    versions: dict[str, Version | None] = field(repr=False)
    cache: RangeCache | None = None
    is_listed: bool = True
    _systems: dict[int, fsspec.AbstractFileSystem] = field(default_factory=dict, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return _RemoteFiles, (self.folder, self.versions, self.cache, self.is_listed)

    @property
    def is_cached(self) -> bool:
        return self.cache is not None

    @unlocked_property
    def _path(self) -> str:
        return self.folder.path

    def _ranges(self, key: str) -> RemoteRanges:
        """A file. All threads share a file system: older fsspec would make one, with connections, for each."""
        fs = self._systems.get(os.getpid()) or self._systems.setdefault(os.getpid(), self.folder.fs)
        return RemoteRanges(fs, f"{self._path}/{key}")

    def name(self, key: str) -> str:
        return f"{self.folder.url}/{key}"

    def version(self, key: str) -> Version | None:
        if not self.is_listed and key not in self.versions:
            self.versions.setdefault(key, self._ranges(key).identity())
        return self.versions.get(key)

    def check(self, key: str) -> None:
        found = self._ranges(key).identity()
        if found != self.version(key):
            raise changed(self.name(key), self.version(key), found)

    def read(self, key: str, start: int, stop: int, *, anew: bool = False) -> memoryview:
        version = self.version(key)
        assert version is not None  # nothing is read of a file that was not there
        try:
            if self.cache is None:
                raw = self._ranges(key).get(start, stop, version)
            else:
                raw = self._read_kept(self.cache, key, start, stop, version, anew=anew)
        except (FileExistsError, FileNotFoundError) as e:
            raise changed(self.name(key), version, self._ranges(key).identity()) from e
        if len(raw) < stop - start:
            msg = f"{self.name(key)} ends at byte {start + len(raw)}, expected {stop}"
            raise IntegrityError(msg)
        return raw

    def _read_kept(  # noqa: PLR0913 - a read
        self, cache: RangeCache, key: str, start: int, stop: int, version: tuple[str, int], *, anew: bool
    ) -> memoryview:
        raw, file = memoryview(scratch("raw", stop - start)), RemoteFile(self.name(key), *version)

        def fetch(at: int, out: memoryview) -> int:
            found = self._ranges(key).get(at, at + len(out), version)
            out[: len(found)] = found
            return len(found)

        if anew:
            cache.forget(file)
        return raw[: fetch(start, raw) if anew else cache.read_into(file, start, raw, fetch)]

    def hold(self, key: str) -> Held:
        msg = f"{self.name(key)} is no local file"
        raise NotImplementedError(msg)

    def close(self) -> None:
        pass


_local = threading.local()


def scratch(name: str, nbytes: int) -> NDArray[np.uint8]:
    """A buffer of this thread's own, kept from call to call; freed with the thread."""
    buffer: NDArray[np.uint8] | None = getattr(_local, name, None)
    if buffer is None or buffer.nbytes < nbytes:
        buffer = np.empty(max(nbytes, 4096), np.uint8)
        setattr(_local, name, buffer)
    return buffer[:nbytes]
