"""A folder at a path or URL, and the one way files appear in it: whole, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, Protocol

import fsspec
import zarr
import zarr.storage
from fsspec.implementations.local import LocalFileSystem

from annbatch_dask.errors import AnnbatchDaskError, CollectionError, StorageError

if TYPE_CHECKING:
    from zarr.abc.store import Store

__all__ = ["Folder", "RangeFile", "folder_of", "name_errors"]

_TMP = ".tmp-"


@dataclass(frozen=True)
class Folder:
    """A folder on a local disk or any fsspec file system. Small to pickle; opens nothing until used.

    Parameters
    ----------
    url
        Path or URL.
    options
        fsspec's ``storage_options``.
    """

    url: str
    options: dict[str, Any] = field(default_factory=dict, repr=False)

    def __truediv__(self, name: str) -> Folder:
        """A folder inside."""
        return Folder(f"{self.url.rstrip('/')}/{name}", self.options)

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        """Its file system; fsspec keeps one instance per process."""
        return fsspec.core.url_to_fs(self.url, **self.options)[0]

    @property
    def path(self) -> str:
        """Its path within the file system."""
        return str(fsspec.core.url_to_fs(self.url, **self.options)[1])

    @property
    def is_local(self) -> bool:
        """On a disk that this process can address by path."""
        return isinstance(self.fs, LocalFileSystem)

    def zarr_store(self, *, read_only: bool = False) -> Store:
        """The folder as a zarr store."""
        if self.is_local:
            return zarr.storage.LocalStore(self.path, read_only=read_only)
        return zarr.storage.FsspecStore.from_url(self.url, storage_options=self.options or None, read_only=read_only)

    def exists(self, name: str) -> bool:
        """Whether a file of this name is there."""
        return bool(self.fs.isfile(f"{self.path}/{name}"))

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        try:
            return int(self.fs.size(f"{self.path}/{name}"))
        except FileNotFoundError:
            return None

    def unlink(self, name: str) -> None:
        """Remove a file; no error where there is none."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(f"{self.path}/{name}")

    def read(self, name: str) -> bytes:
        """All bytes of a file."""
        return bytes(self.fs.cat_file(f"{self.path}/{name}"))

    def ranges(self, name: str, *, keep_open: bool = True) -> RangeFile:
        """A file to read ranges of."""
        path = f"{self.path}/{name}"
        if self.is_local:
            return _LocalRanges(path, os.open(path, os.O_RDONLY) if keep_open else None)
        return _RemoteRanges(self.fs, path)

    def names(self) -> list[str]:
        """Names in the folder; none if it does not exist."""
        self.fs.invalidate_cache(self.path)
        try:
            return sorted(p.rstrip("/").rsplit("/", 1)[-1] for p in self.fs.ls(self.path, detail=False))
        except FileNotFoundError:
            return []

    def sizes(self) -> dict[str, int]:
        """Bytes of every file below, by path within the folder, sorted."""
        root = self.path.rstrip("/")
        self.fs.invalidate_cache(root)
        found = self.fs.find(root, detail=True)
        return dict(sorted((p[p.rindex(root) + len(root) :].lstrip("/"), info["size"]) for p, info in found.items()))

    def files(self) -> list[str]:
        """Paths of all files below, within the folder, sorted."""
        return list(self.sizes())

    def is_unfinished(self, name: str) -> bool:
        """Whether a name is that of a file that was being written."""
        return name.startswith(_TMP)

    def remove(self) -> None:
        """Remove the folder and all in it; no error where it does not exist."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm(self.path, recursive=True)

    @contextlib.contextmanager
    def create(self, name: str, *, durable: bool = True) -> Iterator[IO[bytes]]:
        """A file to write, which appears under its name, whole, when the block ends without an error.

        On a local disk it is written beside its place and renamed, after it was synced where ``durable``, so that
        it outlasts a power cut; an object store publishes at close by itself.

        Raises
        ------
        StorageError
            If the disk is full. Other errors of the system name the file.
        """
        with name_errors(f"{self.url}/{name}"), self._create(name, durable=durable) as f:
            yield f

    @contextlib.contextmanager
    def _create(self, name: str, *, durable: bool) -> Iterator[IO[bytes]]:
        path = f"{self.path}/{name}"
        if not self.is_local:
            with self.fs.transaction, self.fs.open(path, "wb") as f:
                yield f
            return
        folder, base = os.path.split(path)
        os.makedirs(folder, exist_ok=True)
        tmp = os.path.join(folder, f"{_TMP}{uuid.uuid4().hex[:8]}-{base}")
        try:
            with open(tmp, "wb", buffering=2**20) as f:
                yield f
                f.flush()
                if durable:
                    os.fsync(f.fileno())
            os.replace(tmp, path)
            if durable:
                _sync(folder)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(tmp)
            raise

    def sync(self) -> None:
        """Make all files below outlast a power cut; an object store's do already."""
        if not self.is_local:
            return
        for folder, _, files in os.walk(self.path):
            for name in files:
                _sync(os.path.join(folder, name))
            _sync(folder)

    def write(self, name: str, payload: bytes, *, durable: bool = True) -> None:
        """Write a whole file, atomically."""
        with self.create(name, durable=durable) as f:
            f.write(payload)


class RangeFile(Protocol):
    """A file to read ranges of; any number of threads may."""

    def read_into(self, start: int, out: memoryview) -> int:
        """Fill ``out`` from byte ``start`` on; returns the bytes there were."""

    def close(self) -> None:
        """Let go of it."""


@dataclass
class _LocalRanges:
    path: str
    fd: int | None

    def read_into(self, start: int, out: memoryview) -> int:
        with name_errors(self.path):
            return self._read_into(start, out)

    def _read_into(self, start: int, out: memoryview) -> int:
        fd = os.open(self.path, os.O_RDONLY) if self.fd is None else self.fd
        try:
            at = 0
            while at < len(out) and (n := os.preadv(fd, [out[at:]], start + at)):
                at += n
        finally:
            if self.fd is None:
                os.close(fd)
        return at

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)


@dataclass
class _RemoteRanges:
    fs: fsspec.AbstractFileSystem
    path: str

    def read_into(self, start: int, out: memoryview) -> int:
        found = self.fs.cat_file(self.path, start=start, end=start + len(out)) if len(out) else b""
        out[: len(found)] = found
        return len(found)

    def close(self) -> None:
        pass


def _sync(path: str) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def name_errors(path: str) -> Iterator[None]:
    """Errors of the system in the block say which file they are about, and how much room there is if that is short.

    Raises
    ------
    StorageError
        For a full disk.
    """
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT) and not isinstance(e, AnnbatchDaskError):
            msg = f"{path} cannot be written: {_room(path)}; make room, or give another scratch folder, and call again"
            raise StorageError(f"{msg} to go on") from e
        if e.errno is None or e.filename is not None:  # no error of the system, or it says where
            raise
        raise OSError(e.errno, e.strerror, path) from e


def _room(path: str) -> str:
    """What is short, in numbers where the system tells."""
    folder = os.path.dirname(path)
    while folder and not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isabs(folder):
        return "no space is left on the store"
    found = shutil.disk_usage(folder)
    return f"{found.free:,} of {found.total:,} bytes are free on the disk of {folder}"


def folder_of(group: zarr.Group) -> Folder:
    """The folder of a zarr group, for stores that other processes can open by path or URL.

    Raises
    ------
    CollectionError
        For stores that live in this process alone.
    """
    store, path = group.store, group.path
    if isinstance(store, zarr.storage.LocalStore):
        folder = Folder(str(store.root))
    elif isinstance(store, zarr.storage.FsspecStore) and not isinstance(store.fs, LocalFileSystem):
        folder = Folder(store.fs.unstrip_protocol(store.path), dict(store.fs.storage_options))
    else:
        msg = f"a build needs a path or URL that workers can open, and {type(store).__name__} has none; give a path"
        raise CollectionError(msg)
    return folder / path if path else folder
