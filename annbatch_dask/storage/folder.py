"""A folder at a path or URL, and the one way files appear in it: whole, or not at all."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import IO, TYPE_CHECKING, Any

import fsspec
import fsspec.asyn
import zarr
import zarr.storage
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.utils import get_protocol

from annbatch_dask.errors import CollectionBusyError, CollectionError, MissingPackageError
from annbatch_dask.storage.ahead import AheadFile
from annbatch_dask.storage.conditions import put_if, warn_plain
from annbatch_dask.storage.filesystems import (
    LocalRanges,
    RangeFile,
    RemoteRanges,
    cat_range,
    explain_refusals,
    file_info,
    is_refused,
    name_errors,
    name_refusals,
    protocols,
    version_of,
)
from annbatch_dask.storage.paths import located
from annbatch_dask.storage.secrets import shown
from annbatch_dask.storage.stores import store_class
from annbatch_dask.storage.uploads import upload

if TYPE_CHECKING:
    from threading import Semaphore

    from zarr.abc.store import Store

__all__ = ["UNFINISHED", "Folder", "StorageOptions", "absolute", "anchored", "folder_at", "folder_of", "sync_path"]

logger = logging.getLogger(__name__)
_TMP = ".tmp-"
UNFINISHED = re.compile(rf"{re.escape(_TMP)}[0-9a-f]{{8}}-(?P<name>.+)")
"""Name of a file that is being written, or was when its writer died."""
_BLOCK_NBYTES = 4 * 2**20
_N_BLOCKS = 8
"""A remote file read here and there keeps this many blocks, read whole and once as long as they stay."""
_OF_MANY_THREADS = {"s3", "gs", "abfs", "http"}
"""Their clients take requests of many threads."""
_N_REMOVALS = 10
"""How often a folder is removed into which somebody still writes."""
_N_REQUESTS = 16
"""Files whose sizes are asked for at the same time."""
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "http": "http", "https": "http"}
_EXTRAS |= dict.fromkeys(("abfs", "abfss", "az", "adl"), "az") | {"hf": "hf"}
"""Extra of ours that brings what fsspec needs for a protocol."""


class StorageOptions(dict[str, Any]):
    """fsspec's ``storage_options``. They may hold credentials: no repr shows them, and no file gets them."""

    def __repr__(self) -> str:
        """Show the number of options, not their values."""
        return f"<{len(self)} storage options>"


@dataclass(frozen=True)
class Folder:
    """A folder on a local disk or any fsspec file system. Small to pickle; opens nothing until used.

    Parameters
    ----------
    url
        Path or URL.
    options
        fsspec's ``storage_options``.
    is_private
        Whether what is written there, on a local disk, is for this user alone.
    """

    url: str
    options: StorageOptions = field(default_factory=StorageOptions, repr=False)
    is_private: bool = False

    def __truediv__(self, name: str) -> Folder:
        """A folder inside."""
        return replace(self, url=f"{self.url.rstrip('/')}/{name}")

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        """Its file system; fsspec keeps one instance per process."""
        return self._located[0]

    @property
    def path(self) -> str:
        """Its path within the file system."""
        return self._located[1]

    @property
    def _located(self) -> tuple[fsspec.AbstractFileSystem, str]:
        try:
            fs, path = fsspec.core.url_to_fs(self.url, **self.options)
        except ImportError as e:
            extra = _EXTRAS.get(self.url.partition("://")[0])
            remedy = "install it" if extra is None else f'pip install "annbatch-dask[{extra}]"'
            msg = f"{shown(self.url)} needs a package that is not installed ({e}): {remedy}"
            raise MissingPackageError(msg) from e
        except ValueError as e:
            if (protocol := get_protocol(self.url)) in fsspec.available_protocols():
                raise
            msg = f"{shown(self.url)}: fsspec knows no {protocol}://; correct the path, or install what brings it"
            raise MissingPackageError(msg) from e
        return fs, str(path)

    @property
    def is_local(self) -> bool:
        """True if the folder is on a disk that this process can address by path."""
        return isinstance(self.fs, LocalFileSystem)

    def zarr_store(self, *, read_only: bool = False) -> Store:
        """The folder as a zarr store."""
        if self.is_local:
            return zarr.storage.LocalStore(self.path, read_only=read_only)
        return store_class(self.fs).from_url(self.url, storage_options=self.options or None, read_only=read_only)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        try:
            return int(file_info(self.fs, f"{self.path}/{name}")["size"])
        except FileNotFoundError:
            return None

    def unlink(self, name: str) -> None:
        """Remove a file; no error where there is none."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), name_refusals(self.fs, f"{self.path}/{name}"):
            self.fs.rm_file(f"{self.path}/{name}")

    def read(self, name: str) -> bytes:
        """All bytes of a file."""
        return cat_range(self.fs, f"{self.path}/{name}", 0, None)  # without a start, s3fs asks for the size first

    def find(self, name: str) -> bytes | None:
        """All bytes of a file, or None where there is none."""
        try:
            return self.read(name)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def version(self, name: str) -> str | None:
        """Version of a file's content: the store's entity tag, or a time; None if there is no file."""
        try:
            info = file_info(self.fs, f"{self.path}/{name}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        return version_of(info)

    def first_bytes(self, n: int) -> bytes:
        """The first ``n`` bytes of the file at this path, or as many as it has."""
        return cat_range(self.fs, self.path, 0, n)

    def open(self) -> IO[bytes] | AheadFile:
        """The file at this path, for reads anywhere in it; a remote one is read in blocks."""
        if not _OF_MANY_THREADS.isdisjoint(protocols(self.fs)):
            if (version := (ranges := RemoteRanges(self.fs, self.path)).identity()) is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.url)
            return AheadFile(ranges, version)
        if isinstance(self.fs, MemoryFileSystem):  # what it hands out is one object, with one position, for everybody
            return io.BytesIO(self.fs.cat_file(self.path))
        file: IO[bytes] = self.fs.open(
            self.path, "rb", block_size=_BLOCK_NBYTES, cache_type="blockcache", cache_options={"maxblocks": _N_BLOCKS}
        )
        return file

    def ranges(self, name: str, *, keep_open: bool = True) -> RangeFile:
        """A file to read ranges of."""
        path = f"{self.path}/{name}"
        if self.is_local:
            return LocalRanges(path, os.open(path, os.O_RDONLY) if keep_open else None)
        return RemoteRanges(self.fs, path)

    def names(self) -> list[str]:
        """Names in the folder; none if it does not exist, or is a file."""
        if not self.is_local:  # s3fs would look through the folder above for a file of this name
            return sorted({path.split("/")[0] for path in self.sizes()})
        try:
            return sorted(os.listdir(self.path))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def sizes(self) -> dict[str, int]:
        """Bytes of every file below, by path within the folder, sorted."""
        root = self.path.rstrip("/")
        self.fs.invalidate_cache(root)
        with name_refusals(self.fs, root):
            found = self.fs.find(root, detail=True)
        if found.get(root, {}).get("type") == "directory":  # s3fs: its first file appeared while it was listed
            del found[root]
        sizes = {p[p.rindex(root) + len(root) :].lstrip("/"): info["size"] for p, info in found.items()}
        # A web server's page of names has no sizes.
        sizes |= self.sizes_of(name for name, size in sizes.items() if size is None)
        return dict(sorted(sizes.items()))

    def sizes_of(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes of files, asked for one by one, where no listing has them; those that are not there are left out."""

        def size_of(name: str) -> tuple[str, int] | None:
            with contextlib.suppress(FileNotFoundError):
                return name, self.fs.info(f"{self.path.rstrip('/')}/{name}")["size"]
            return None

        with ThreadPoolExecutor(_N_REQUESTS, thread_name_prefix="sizes") as pool:
            return dict(filter(None, pool.map(size_of, names)))

    def files(self) -> list[str]:
        """Paths of all files below, within the folder, sorted."""
        return list(self.sizes())

    def remove(self, *, last: str = "") -> None:
        """Remove the folder and all in it, the file ``last`` at last; no error where it does not exist.

        That file says whose the folder is: a removal that is interrupted can be taken up again. A link is removed, and
        what it points to stays. A worker that lost its scheduler ends its task first: files may come and go meanwhile.
        """
        if not self.is_local:
            names = self.files()
            self.remove_files(name for name in names if name != last)
            self.remove_files([last] if last in names else [])
            return
        for tries_left in reversed(range(_N_REMOVALS)):
            try:
                _remove_tree(self.path, last)
            except OSError as e:
                if e.errno not in (errno.ENOENT, errno.ENOTEMPTY) or not tries_left:
                    raise
            else:
                return

    def remove_files(self, names: Iterable[str]) -> None:
        """Remove files, in few requests; none of them need be there."""
        paths = [f"{self.path}/{name}".rstrip("/") for name in names]
        if paths:
            with contextlib.suppress(FileNotFoundError), name_refusals(self.fs, self.path):
                self.fs.rm(paths)

    @contextlib.contextmanager
    def create(
        self, name: str, *, durable: bool = True, parents: bool = True, room: Semaphore | None = None
    ) -> Iterator[IO[bytes]]:
        """A file to write, which appears under its name, whole, when the block ends without an error.

        On a local disk it is written beside its place and renamed, after it was synced where ``durable``, so that
        it outlasts a power cut; an object store publishes at close by itself. Without ``parents`` a local folder is
        not made again: who removed it wants no more of it. ``room`` is for buffers of an upload to S3.

        Raises
        ------
        StorageError
            If the disk is full, or the folder may not be written. Other errors of the system name the file.
        """
        with name_errors(f"{self.url}/{name}"), name_refusals(self.fs, f"{self.path}/{name}"):
            if self.is_local:
                created = self._create(name, durable=durable, parents=parents)
            else:
                created = upload(self.fs, f"{self.path}/{name}", room)
            with created as f:
                yield f

    @contextlib.contextmanager
    def _create(self, name: str, *, durable: bool, parents: bool) -> Iterator[IO[bytes]]:
        path = f"{self.path}/{name}"
        folder, base = os.path.split(path)
        tmp = os.path.join(folder, f"{_TMP}{uuid.uuid4().hex[:8]}-{base}")
        try:
            with explain_refusals(path):
                if parents:
                    os.makedirs(folder, 0o700 if self.is_private else 0o777, exist_ok=True)
                else:
                    _make_below(self.path, folder)
                file = open(tmp, "xb", buffering=2**20, opener=_private_opener if self.is_private else None)  # noqa: SIM115
            with file as f:
                yield f
                f.flush()
                if durable:
                    os.fsync(f.fileno())
            with explain_refusals(path):
                os.replace(tmp, path)
            if durable:
                sync_path(folder)
        except BaseException:
            with contextlib.suppress(OSError):  # the error that brought us here says more
                os.unlink(tmp)
            raise

    def sync(self) -> None:
        """Make all files below outlast a power cut; an object store's do already."""
        if not self.is_local:
            return
        for folder, _, files in os.walk(self.path):
            for name in files:
                sync_path(os.path.join(folder, name))
            sync_path(folder)

    def write(self, name: str, payload: bytes, *, durable: bool = True, parents: bool = True) -> None:
        """Write a whole file, atomically."""
        if not self.is_local:
            with name_refusals(self.fs, f"{self.path}/{name}"):
                self.fs.pipe_file(f"{self.path}/{name}", payload)
            return
        with self.create(name, durable=durable, parents=parents) as f:
            f.write(payload)

    def write_all(self, files: Mapping[str, bytes]) -> None:
        """Write whole files into a folder that is there; many at a time where each costs a round trip."""
        if not self.is_local:
            with name_refusals(self.fs, self.path):
                self.fs.pipe({f"{self.path}/{name}": payload for name, payload in files.items()})
            return
        for name, payload in files.items():
            self.write(name, payload, durable=False, parents=False)

    def replace(self, name: str, payload: bytes, *, version: str | None) -> None:
        """Write a whole file in the place of a :meth:`version` of it, and of no other; None stands for no file.

        S3 compares and writes in one step. Elsewhere another writer may come between the two, of which a warning tells.

        Raises
        ------
        CollectionBusyError
            If another writer was first.
        """
        path = f"{self.path}/{name}"
        try:
            with name_refusals(self.fs, path):
                if self.is_local:
                    self.write(name, payload)
                elif not put_if(self.fs, path, payload, version):
                    if self.version(name) != version:
                        raise FileExistsError(path)
                    warn_plain(self.fs, path)
                    self.write(name, payload)
        except OSError as e:
            if not is_refused(e):
                raise
            if self.find(name) == payload:  # a write whose answer was lost was tried again
                return
            msg = f"{self.url}/{name} was written by another build meanwhile, and stays; call again to add to it"
            raise CollectionBusyError(msg) from e


def _make_below(root: str, folder: str) -> None:
    """Make the folders on the way from one that is there to another."""
    path = root
    for part in os.path.relpath(folder, root).split(os.sep):
        if part != os.curdir:
            path = os.path.join(path, part)
            with contextlib.suppress(FileExistsError):
                os.mkdir(path)


def _remove_tree(path: str, last: str) -> None:
    """Remove a local folder, or a link to one; see :meth:`Folder.remove`."""
    if os.path.islink(path):
        os.unlink(path)
        return
    try:
        entries = list(os.scandir(path))
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.name == last:
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)
    if last:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(path, last))
    os.rmdir(path)


def sync_path(path: str) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _private_opener(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def folder_of(group: zarr.Group | zarr.Array[Any]) -> Folder:
    """The folder of a zarr group or array, for stores that other processes can open by path or URL.

    Raises
    ------
    CollectionError
        For stores that live in this process alone.
    """
    store, path = group.store, group.path
    if isinstance(store, zarr.storage.LocalStore):
        folder = Folder(str(store.root))
    elif isinstance(store, zarr.storage.FsspecStore) and not isinstance(store.fs, LocalFileSystem):
        fs = getattr(store.fs, "sync_fs", store.fs)  # zarr wraps those that are not asynchronous
        options = {k: v for k, v in fs.storage_options.items() if k not in ("asynchronous", "loop")}
        folder = Folder(fs.unstrip_protocol(store.path), StorageOptions(options))
    else:
        msg = f"builds, verify and gc need a path or URL that workers can open, and {type(store).__name__} has none"
        raise CollectionError(msg)
    return folder / path if path else folder


def folder_at(path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None) -> Folder:
    """The folder at a path or URL, which must hold no credentials."""
    url, options = located(path, storage_options)
    if not url:
        msg = "the path is empty, which would be the current folder; give a path, or '.'"
        raise CollectionError(msg)
    if shown(url) != url:
        msg = f"{shown(url)} was given with a user, a password or a query; give credentials in storage_options"
        raise CollectionError(msg)
    return Folder(url, StorageOptions(options))


def anchored(folder: Folder) -> Folder:
    """A folder by a path that means the same after a change of the working directory."""
    return replace(folder, url=folder.path) if folder.is_local else folder


def absolute(folder: Folder) -> Folder:
    """A folder by a path that other processes can open; a local one's only one, so that its lock is only one."""
    return Folder(os.path.realpath(folder.path)) if folder.is_local else folder
