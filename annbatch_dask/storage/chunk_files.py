"""The files of one zarr array, to read ranges of them: on a local disk, or in any fsspec store.

A file is known by its identity: what tells one version of it from another, and at its end its bytes.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import zarr
import zarr.storage
from numpy.typing import NDArray

from annbatch_dask.errors import CollectionError, IntegrityError
from annbatch_dask.storage.publish import Folder, RemoteRanges, folder_of
from annbatch_dask.storage.range_cache import RangeCache, RemoteFile

if TYPE_CHECKING:
    import fsspec

__all__ = ["ChunkFiles", "Identity", "chunk_files", "scratch"]

Identity = tuple[Any, ...]


class ChunkFiles(Protocol):
    """The files of one array, by their keys; any number of threads may read.

    ``is_remote`` says whether each read is a request to a store; an identity then does not tell all versions apart.
    """

    is_remote: ClassVar[bool]

    def name(self, key: str) -> str:
        """Of a file, for people."""

    def identity(self, key: str) -> Identity | None:
        """Of a file as it is now; None where there is none."""

    def is_current(self, key: str, identity: Identity | None) -> bool:
        """Whether a file may be taken to be what it was."""

    def read(self, key: str, start: int, stop: int, identity: Identity) -> memoryview:
        """Bytes [start, stop) of a file, good until this thread reads again.

        Raises
        ------
        IntegrityError
            If it ends before, or is not that file any more.
        """


def chunk_files(array: zarr.Array[Any], cache: RangeCache | None = None) -> ChunkFiles | None:
    """The files of an array, remote ones by way of a cache; None where only its store knows them."""
    if type(array.store) is zarr.storage.LocalStore and hasattr(os, "preadv"):
        return _LocalFiles(Path(array.store.root) / array.path)
    if type(array.store) is zarr.storage.FsspecStore:
        try:
            return _RemoteFiles(folder_of(array), cache)
        except CollectionError:  # fsspec's own local file system, and the like
            return None
    return None


@dataclass(frozen=True)
class _LocalFiles:
    is_remote: ClassVar = False

    root: Path

    def name(self, key: str) -> str:
        return str(self.root / key)

    def identity(self, key: str) -> Identity | None:
        try:
            return _identity(os.stat(self.root / key))
        except FileNotFoundError:
            return None

    def is_current(self, key: str, identity: Identity | None) -> bool:
        return self.identity(key) == identity

    def read(self, key: str, start: int, stop: int, identity: Identity) -> memoryview:
        raw = memoryview(scratch("raw", stop - start))
        descriptor = os.open(self.root / key, os.O_RDONLY)
        try:
            if _identity(os.fstat(descriptor)) != identity:
                msg = f"{self.name(key)} was replaced while it was being read; start the iteration anew"
                raise IntegrityError(msg)
            done = 0
            while done < len(raw):
                n = os.preadv(descriptor, [raw[done:]], start + done)
                if n == 0:
                    msg = f"{self.name(key)} ends at byte {start + done}, expected {stop}"
                    raise IntegrityError(msg)
                done += n
        finally:
            os.close(descriptor)
        return raw


def _identity(found: os.stat_result) -> Identity:
    return (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)


@dataclass(frozen=True)
class _RemoteFiles:
    """Files of a store, which are asked after once: a dataset's name is never used twice."""

    is_remote: ClassVar = True

    folder: Folder
    cache: RangeCache | None = None
    _systems: dict[int, fsspec.AbstractFileSystem] = field(default_factory=dict, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return _RemoteFiles, (self.folder, self.cache)

    def _ranges(self, key: str) -> RemoteRanges:
        """A file. All threads of a process share a file system: fsspec would make one, with connections, for each."""
        fs = self._systems.setdefault(os.getpid(), self.folder.fs)
        return RemoteRanges(fs, f"{self.folder.path}/{key}")

    def name(self, key: str) -> str:
        return f"{self.folder.url}/{key}"

    def identity(self, key: str) -> Identity | None:
        return self._ranges(key).identity()

    def is_current(self, key: str, identity: Identity | None) -> bool:  # noqa: ARG002
        return True

    def read(self, key: str, start: int, stop: int, identity: Identity) -> memoryview:
        raw = memoryview(scratch("raw", stop - start))
        fetch = self._ranges(key).read_into
        try:
            if self.cache is None:
                n = fetch(start, raw)
            else:
                n = self.cache.read_into(RemoteFile(self.name(key), *identity), start, raw, fetch)
        except FileNotFoundError as e:
            msg = f"{self.name(key)} was removed while it was being read; open the collection again"
            raise IntegrityError(msg) from e
        if n < len(raw):
            msg = f"{self.name(key)} ends at byte {start + n}, expected {stop}"
            raise IntegrityError(msg)
        return raw


_local = threading.local()


def scratch(name: str, nbytes: int) -> NDArray[np.uint8]:
    """A buffer of this thread's own, kept from call to call; freed with the thread."""
    buffer: NDArray[np.uint8] | None = getattr(_local, name, None)
    if buffer is None or buffer.nbytes < nbytes:
        buffer = np.empty(max(nbytes, 4096), np.uint8)
        setattr(_local, name, buffer)
    return buffer[:nbytes]
