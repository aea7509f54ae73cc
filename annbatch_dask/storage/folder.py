"""A folder at a path or URL, and the one way files appear in it: whole, or not at all."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import shutil
import traceback
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from typing import IO, TYPE_CHECKING, Any, Protocol

import fsspec
import fsspec.asyn
import zarr
import zarr.storage
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile

from annbatch_dask.errors import (
    AnnbatchDaskError,
    CollectionBusyError,
    CollectionError,
    MissingPackageError,
    StorageError,
)
from annbatch_dask.storage.transient import is_transient

if TYPE_CHECKING:
    from zarr.abc.store import Store

__all__ = [
    "UNFINISHED",
    "Folder",
    "RangeFile",
    "RemoteRanges",
    "StorageOptions",
    "folder_of",
    "hiding_secrets",
    "name_errors",
    "shown",
    "sync_path",
    "version_of",
    "without_secrets",
]

logger = logging.getLogger(__name__)

_TMP = ".tmp-"
UNFINISHED = re.compile(rf"{re.escape(_TMP)}[0-9a-f]{{8}}-(?P<name>.+)")
"""Name of a file that is being written, or was when its writer died."""
_PART_NBYTES = 8 * 2**20
"""Bytes of an upload that go out at once, and are held until then: S3 wants 5 MiB or more, and at most 10,000 parts."""
_BLOCK_NBYTES = 4 * 2**20
_N_BLOCKS = 8
"""A remote file read here and there keeps this many blocks, read whole and once as long as they stay."""


_N_REMOVALS = 10
"""How often a folder is removed into which somebody still writes."""
_VERSION_KEYS = ("ETag", "etag", "generation", "mtime", "LastModified", "Last-Modified", "created", "CRC")
"""Where file systems say which content a file has, the surest first."""


def version_of(info: Mapping[str, Any]) -> str:
    """What tells one content of a file from another, as its file system says; empty where it says nothing."""
    found = next(filter(None, map(info.get, _VERSION_KEYS)), "")
    return str(found.timestamp() if isinstance(found, datetime) else found)  # a listing may have either


_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "http": "http", "https": "http"}
"""Extra of ours that brings what fsspec needs for a protocol."""


class StorageOptions(dict[str, Any]):
    """fsspec's ``storage_options``. They may hold credentials: no repr shows them, and no file gets them."""

    def __repr__(self) -> str:
        """How many."""
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
        return fs, str(path)

    @property
    def is_local(self) -> bool:
        """On a disk that this process can address by path."""
        return isinstance(self.fs, LocalFileSystem)

    def zarr_store(self, *, read_only: bool = False) -> Store:
        """The folder as a zarr store."""
        if self.is_local:
            return zarr.storage.LocalStore(self.path, read_only=read_only)
        return zarr.storage.FsspecStore.from_url(self.url, storage_options=self.options or None, read_only=read_only)

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
        return _cat_range(self.fs, f"{self.path}/{name}", 0, None)  # without a start, s3fs asks for the size first

    def find(self, name: str) -> bytes | None:
        """All bytes of a file, or None where there is none."""
        try:
            return self.read(name)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def version(self, name: str) -> str | None:
        """What tells one content of a file from another: the store's entity tag, or a time; None without a file."""
        try:
            info = self.fs.info(f"{self.path}/{name}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        return version_of(info)

    def first_bytes(self, n: int) -> bytes:
        """The first ``n`` bytes of the file at this path, or as many as it has."""
        return _cat_range(self.fs, self.path, 0, n)

    def open(self) -> IO[bytes]:
        """The file at this path, for reads anywhere in it; a remote one is read in blocks."""
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
            return _LocalRanges(path, os.open(path, os.O_RDONLY) if keep_open else None)
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
        found = self.fs.find(root, detail=True)
        return dict(sorted((p[p.rindex(root) + len(root) :].lstrip("/"), info["size"]) for p, info in found.items()))

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
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm(paths)

    @contextlib.contextmanager
    def create(self, name: str, *, durable: bool = True, parents: bool = True) -> Iterator[IO[bytes]]:
        """A file to write, which appears under its name, whole, when the block ends without an error.

        On a local disk it is written beside its place and renamed, after it was synced where ``durable``, so that
        it outlasts a power cut; an object store publishes at close by itself. Without ``parents`` a local folder is
        not made anew: who removed it wants no more of it.

        Raises
        ------
        StorageError
            If the disk is full. Other errors of the system name the file.
        """
        with name_errors(f"{self.url}/{name}"), self._create(name, durable=durable, parents=parents) as f:
            yield f

    @contextlib.contextmanager
    def _create(self, name: str, *, durable: bool, parents: bool) -> Iterator[IO[bytes]]:
        path = f"{self.path}/{name}"
        if not self.is_local:
            with _upload(self.fs, path) as f:
                yield f
            return
        folder, base = os.path.split(path)
        if parents:
            os.makedirs(folder, 0o700 if self.is_private else 0o777, exist_ok=True)
        else:
            _make_below(self.path, folder)
        tmp = os.path.join(folder, f"{_TMP}{uuid.uuid4().hex[:8]}-{base}")
        try:
            with open(tmp, "xb", buffering=2**20, opener=_private_opener if self.is_private else None) as f:
                yield f
                f.flush()
                if durable:
                    os.fsync(f.fileno())
            os.replace(tmp, path)
            if durable:
                sync_path(folder)
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
                sync_path(os.path.join(folder, name))
            sync_path(folder)

    def write(self, name: str, payload: bytes, *, durable: bool = True, parents: bool = True) -> None:
        """Write a whole file, atomically."""
        if not self.is_local:
            self.fs.pipe_file(f"{self.path}/{name}", payload)
            return
        with self.create(name, durable=durable, parents=parents) as f:
            f.write(payload)

    def write_all(self, files: Mapping[str, bytes]) -> None:
        """Write whole files into a folder that is there; many at a time where each costs a round trip."""
        if not self.is_local:
            self.fs.pipe({f"{self.path}/{name}": payload for name, payload in files.items()})
            return
        for name, payload in files.items():
            self.write(name, payload, durable=False, parents=False)

    def replace(self, name: str, payload: bytes, *, version: str | None) -> None:
        """Write a whole file in the place of a :meth:`version` of it, and of no other; None stands for no file.

        S3 compares and writes in one step. Elsewhere another writer may come between the two.

        Raises
        ------
        CollectionBusyError
            If another writer was first.
        """
        path = f"{self.path}/{name}"
        try:
            if self.is_local:
                self.write(name, payload)
            elif "s3" in _protocols(self.fs):
                condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
                self.fs.pipe_file(path, payload, chunksize=_MAX_PUT_NBYTES, **condition)
            elif self.version(name) != version:
                raise FileExistsError(path)
            else:
                _warn_plain(_protocols(self.fs)[0])
                self.write(name, payload)
        except OSError as e:
            if not _is_refused(e):
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


_MAX_PUT_NBYTES = 2**32
"""S3 takes 5 GB in one request, and compares versions for that alone."""


def _protocols(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


@lru_cache
def _warn_plain(protocol: str) -> None:
    """Once a process."""
    logger.warning("%s cannot compare and write in one step: make sure that only one build works there", protocol)


def _is_refused(error: OSError) -> bool:
    """Whether a store said that the file is not the version it should replace."""
    refusals = ("PreconditionFailed", "ConditionalRequestConflict", "412")
    return isinstance(error, FileExistsError) or _error_code(error) in refusals


def _error_code(error: OSError) -> str | None:
    """S3's, where s3fs made the error of one."""
    response = getattr(error.__cause__, "response", None) or {}
    code: str | None = response.get("Error", {}).get("Code")
    return code


@contextlib.contextmanager
def _upload(fs: fsspec.AbstractFileSystem, path: str) -> Iterator[IO[bytes]]:
    """A file on an object store, which appears when the block ends without an error.

    fsspec's own ``transaction`` belongs to the file system, so to all threads at once.
    """
    file: Any = fs.open(path, "wb", block_size=_PART_NBYTES)
    try:
        yield file
    except BaseException:
        if isinstance(file, AbstractBufferedFile):
            file.closed = True  # or its finalizer would publish half of it
            with contextlib.suppress(Exception):  # the error that brought us here says more
                file.discard()
        raise
    file.close()


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
class RemoteRanges:
    """A file of any fsspec file system."""

    fs: fsspec.AbstractFileSystem
    path: str

    def read_version(self, start: int, out: memoryview, version: tuple[str, int]) -> int:
        """The same of one version of the file, as :meth:`identity` gives it, and of no other.

        S3 compares in the same request. Elsewhere the file is asked for its version after it was read.

        Raises
        ------
        FileExistsError
            If it has another version by now.
        """
        if "s3" in _protocols(self.fs) and version[0].startswith('"'):  # an entity tag
            found = _get_version(self.fs, self.path, start, start + len(out), version[0]) if len(out) else b""
            out[: len(found)] = found
            return len(found)
        n = self.read_into(start, out)
        if self.identity() != version:
            raise FileExistsError(self.path)
        return n

    def identity(self) -> tuple[str, int] | None:
        """Its version, as in :meth:`Folder.version`, and its bytes; None where there is no such file."""
        self.fs.invalidate_cache(self.path)  # or a listing of old would be asked
        try:
            info = self.fs.info(self.path)
        except FileNotFoundError:
            return None
        return version_of(info), int(info["size"])

    def read_into(self, start: int, out: memoryview) -> int:
        """Fill ``out`` from byte ``start`` on; returns the bytes there were."""
        if isinstance(self.fs, MemoryFileSystem):  # its cat_file moves a position that all threads share
            file = self.fs.store.get(self.path)
            if file is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.path)
            found = file.getbuffer()[start : start + len(out)]
        else:
            found = _cat_range(self.fs, self.path, start, start + len(out)) if len(out) else b""
        out[: len(found)] = found
        return len(found)

    def close(self) -> None:
        """Nothing is held."""


def _cat_range(fs: fsspec.AbstractFileSystem, path: str, start: int, stop: int | None) -> bytes:
    """Bytes [start, stop) of a file, those there are."""
    try:
        return bytes(fs.cat_file(path, start=start, end=stop))
    except OSError as e:
        if _error_code(e) in ("InvalidRange", "416"):  # the file ends before
            return b""
        raise


def _get_version(fs: Any, path: str, start: int, stop: int, tag: str) -> bytes:
    """Bytes [start, stop) of an object of S3, if it has an entity tag. s3fs's own ``cat_file`` takes no condition."""
    from s3fs.core import _error_wrapper  # tries again what s3fs tries again, as its own reads do

    bucket, key, _ = fs.split_path(path)
    asked = {"Bucket": bucket, "Key": key, "Range": f"bytes={start}-{stop - 1}", "IfMatch": tag}

    async def get() -> bytes:
        answer = await fs._call_s3("get_object", **asked)
        async with answer["Body"] as body:
            payload: bytes = await body.read()
        return payload

    try:
        found: bytes = fsspec.asyn.sync(fs.loop, _error_wrapper, get, retries=fs.retries)
    except OSError as e:
        if _is_refused(e):
            raise FileExistsError(path) from e
        if _error_code(e) in ("InvalidRange", "416"):  # the file ends before
            return b""
        raise
    return found


def sync_path(path: str) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _private_opener(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


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


def shown(url: str) -> str:
    """A path or URL as others may see it: without users' names and passwords, or a query, which may be a signature.

    Each part of a chain is looked at, as in ``zip://a.h5ad::s3://bucket/all.zip``. The container of an Azure URL stays.
    """
    return "::".join(map(_shown_part, url.split("::")))


def _shown_part(url: str) -> str:
    scheme, sign, rest = url.partition("://")
    if not sign:
        return url
    if scheme not in _ANY_NAMES:
        rest = re.split("[?#]", rest, maxsplit=1)[0]
    host, slash, path = rest.partition("/")
    user, at, name = host.rpartition("@")
    keeps_user = scheme in _AZURE and ":" not in user
    return f"{scheme}://{user + at if keeps_user else ''}{name}{slash}{path}"


_AZURE = ("abfs", "abfss", "wasb", "wasbs", "az")
"""Schemes with a container where others have a user."""
_ANY_NAMES = ("file", "local", "memory", "s3", "s3a", "gs", "gcs", "zip", "tar", "simplecache", "filecache")
"""Schemes without queries: files may be called what one looks like."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>)\]]+")


def without_secrets(text: str) -> str:
    """A text with each URL in it as others may see it."""
    return _URL.sub(lambda found: shown(found[0]), text)


@contextlib.contextmanager
def hiding_secrets(url: str) -> Iterator[None]:
    """Errors in the block that tell what :func:`shown` leaves out of a URL are raised without it."""
    try:
        yield
    except Exception as e:
        said = "".join(traceback.format_exception(e))
        hidden = without_secrets(said.replace(url, shown(url)))
        if shown(url) == url or hidden == said:
            raise
        text = without_secrets(str(e).replace(url, shown(url)))
        if is_transient(e):  # as it stays, to who tries again
            raise StorageError(errno.EIO, f"{type(e).__name__}: {text}", shown(url)) from None
        if isinstance(e, AnnbatchDaskError | FileNotFoundError):
            raise type(e)(text).with_traceback(e.__traceback__) from None
        msg = f"{shown(url)}: {type(e).__name__}: {text}"
        raise StorageError(msg).with_traceback(e.__traceback__) from None


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
