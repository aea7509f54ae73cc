"""Differences between file systems: versions and ranges of files, and the meaning of errors."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

import fsspec
import fsspec.asyn
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from annbatch_dask.errors import AccessError, AnnbatchDaskError, StorageError
from annbatch_dask.storage.objects import is_s3, object_ranges
from annbatch_dask.storage.secrets import shown
from annbatch_dask.storage.transient import NEVER_ANSWERED, is_unanswered, status_of
from annbatch_dask.storage.web import is_web, web_range

__all__ = [
    "LocalRanges",
    "RangeFile",
    "RemoteRanges",
    "account_of",
    "cat_range",
    "check_parent",
    "explain_refusals",
    "file_info",
    "is_refused",
    "knows_no_conditions",
    "name_errors",
    "name_refusals",
    "protocols",
    "version_of",
]

_VERSION_KEYS = ("ETag", "etag", "generation", "blob_id", "mtime", "LastModified", "Last-Modified", "created", "CRC")
"""Where file systems say which content a file has, the surest first."""
_REFUSALS = (401, 403, 407)
"""What a web server answers to who may not read a file."""
_BAD_REQUEST = "400"
"""All that S3 says to a request for a file's size with credentials that have expired, or in another region."""


def version_of(info: Mapping[str, Any]) -> str:
    """Version of a file's content, from its file system; empty if it has none."""
    found = next(filter(None, map(info.get, _VERSION_KEYS)), "")
    return str(found.timestamp() if isinstance(found, datetime) else found)  # a listing may have either


def file_info(fs: Any, path: str) -> dict[str, Any]:
    """What a file system says of a file now; of S3 in one request, where s3fs would look for a folder of the name too.

    Raises
    ------
    FileNotFoundError
        If there is no file; on S3 also where there is a folder.
    AccessError
        If the store refuses to say.
    """
    with name_refusals(fs, path):
        if is_s3(fs):
            bucket, key, version = fs.split_path(path)
            if key and version is None:
                found = fs.call_s3("head_object", fs.kwargs, Bucket=bucket, Key=key)
                return {"type": "file", "size": found["ContentLength"]} | {
                    k: found.get(k) for k in ("ETag", "LastModified")
                }
        fs.invalidate_cache(path)  # or a listing of old would be asked
        info: dict[str, Any] = fs.info(path)
        return info


def protocols(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    """Names of a file system's protocol."""
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def account_of(fs: fsspec.AbstractFileSystem) -> str:
    """The account of Azure that a file system is for: its paths begin with a container, and do not say whose."""
    return str(getattr(fs, "account_name", None) or "")


def is_refused(error: OSError) -> bool:
    """True if a store said that the file is not the version it should replace."""
    refusals = ("PreconditionFailed", "ConditionalRequestConflict", "412")
    return isinstance(error, FileExistsError) or _error_code(error) in refusals


def knows_no_conditions(error: Exception) -> bool:
    """True if a store said that it cannot write on a condition."""
    return isinstance(error, NotImplementedError) or _error_code(error) in ("NotImplemented", "501")


def _error_code(error: Exception) -> str | None:
    """S3's, where s3fs made the error of one."""
    response = getattr(error.__cause__, "response", None)
    if not isinstance(response, dict):  # an error of Azure's or of an HTTP client carries its answer under this name
        return None
    code: str | None = response.get("Error", {}).get("Code")
    return code


class RangeFile(Protocol):
    """A file to read ranges of; any number of threads may."""

    def read_into(self, start: int, out: memoryview) -> int:
        """Fill ``out`` from byte ``start`` on; returns the bytes there were."""

    def close(self) -> None:
        """Let go of it."""


@dataclass
class LocalRanges:
    """Ranges of a local file, which is already open if ``fd`` is given."""

    path: str
    fd: int | None

    def read_into(self, start: int, out: memoryview) -> int:
        """Fill ``out`` from byte ``start`` on; returns the bytes there were."""
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
        """Let go of it."""
        if self.fd is not None:
            os.close(self.fd)


@dataclass
class RemoteRanges:
    """A file of any fsspec file system."""

    fs: fsspec.AbstractFileSystem
    path: str

    def get(self, start: int, stop: int, version: tuple[str, int] | None = None) -> memoryview:
        """Bytes [start, stop), those there are; of the version that :meth:`identity` returned, and no other, if given.

        S3 compares in the same request. Elsewhere the file is asked for its version after it was read.

        Raises
        ------
        FileExistsError
            If it has another version by now.
        """
        if stop <= start:
            return memoryview(b"")
        tag = version[0] if version is not None and "s3" in protocols(self.fs) else ""
        if tag.startswith('"'):  # an entity tag
            if (object_ := object_ranges(self.fs, self.path)) is not None:
                return object_.get(start, stop, tag)
            return memoryview(_get_version(self.fs, self.path, start, stop, tag))
        found = self._get(start, stop)
        if version is not None and self.identity() != version:
            raise FileExistsError(self.path)
        return found

    def _get(self, start: int, stop: int) -> memoryview:
        if isinstance(self.fs, MemoryFileSystem):  # its cat_file moves a position that all threads share
            file = self.fs.store.get(self.path)
            if file is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.path)
            return memoryview(bytes(file.getbuffer()[start:stop]))  # a view of all would keep it from growing
        if (object_ := object_ranges(self.fs, self.path)) is not None:
            return object_.get(start, stop)
        return memoryview(cat_range(self.fs, self.path, start, stop))

    def identity(self) -> tuple[str, int] | None:
        """Its version, as in :meth:`Folder.version`, and its bytes; None where there is no such file."""
        try:
            info = file_info(self.fs, self.path)
        except FileNotFoundError:
            return None
        if info["size"] is None:
            msg = f"{shown(self.path)}: the web server does not say how large it is; download it, and give that file"
            raise StorageError(msg)
        return version_of(info), int(info["size"])

    def read_into(self, start: int, out: memoryview) -> int:
        """Fill ``out`` from byte ``start`` on; returns the bytes there were."""
        found = self.get(start, start + len(out))
        out[: len(found)] = found
        return len(found)

    def close(self) -> None:
        """Nothing is held."""


def cat_range(fs: fsspec.AbstractFileSystem, path: str, start: int, stop: int | None) -> bytes:
    """Bytes [start, stop) of a file, those there are."""
    options = {"cache_type": "none"} if "hf" in protocols(fs) else {}  # which would read some megabytes more
    try:
        with name_refusals(fs, path):
            if stop is not None and is_web(fs):
                return web_range(fs, path, start, stop)
            return bytes(fs.cat_file(path, start=start, end=stop, **options))
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
        if is_refused(e):
            raise FileExistsError(path) from e
        if _error_code(e) in ("InvalidRange", "416"):  # the file ends before
            return b""
        raise
    return found


_answered: WeakKeyDictionary[fsspec.AbstractFileSystem, set[str]] = WeakKeyDictionary()
"""Hosts that have answered this process: of file systems of web servers, and "" of others."""


@contextlib.contextmanager
def name_refusals(fs: fsspec.AbstractFileSystem, path: str) -> Iterator[None]:
    """Where a store refuses access in the block, or nobody answers, say to what, and what to do: it says neither.

    Raises
    ------
    AccessError
        With the URL.
    StorageError
        With the URL, if nobody answers.
    """
    host, answered = urlsplit(path).netloc if is_web(fs) else "", _answered.setdefault(fs, set())
    try:
        yield
        answered.add(host)
    except Exception as e:
        if is_unanswered(e) and not isinstance(e, AnnbatchDaskError):
            number = errno.ECONNREFUSED if host in answered else NEVER_ANSWERED
            msg = f"nobody answers ({e}): check the address, also of an endpoint, and the network, and call again"
            raise StorageError(number, msg, shown(fs.unstrip_protocol(path))) from e
        answered.add(host)
        is_refusal = isinstance(e, PermissionError) or _error_code(e) == _BAD_REQUEST or status_of(e) in _REFUSALS
        if not is_refusal or isinstance(e, AnnbatchDaskError) or isinstance(fs, LocalFileSystem):
            raise
        msg = (
            f"{shown(fs.unstrip_protocol(path))}: the store refuses access ({e}); check the credentials, whether they "
            "have expired, and the region, and call again: what is finished is kept"
        )
        raise AccessError(msg) from e


@contextlib.contextmanager
def name_errors(path: str) -> Iterator[None]:
    """Errors of the system in the block say which file they are about, and how much room there is if that is short.

    Raises
    ------
    StorageError
        For a disk that is full, or takes no writes or no file so large.
    """
    try:
        yield
    except OSError as e:
        if e.errno in _NO_WRITES and not isinstance(e, AnnbatchDaskError):
            why, remedy = _NO_WRITES[e.errno]
            msg = f"{path} cannot be written: {why or _room(path)}; {remedy}, and call again to go on"
            raise StorageError(msg) from e
        if e.errno is None or e.filename is not None:  # no error of the system, or it says where
            raise
        raise OSError(e.errno, e.strerror, path) from e


_FULL = "", "make room, or give another folder"
_NO_WRITES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EROFS: ("the file system is read-only", "have it mounted for writing, or give another folder"),
    errno.EFBIG: ("no file may be so large", "raise the limit (ulimit -f), or give a folder on another file system"),
}
"""Why a file cannot be written, "" where its disk is to be asked, and what to do."""


def _room(path: str) -> str:
    """Describe what is missing (bytes, inodes, quota), with numbers if the system reports them."""
    folder = os.path.dirname(path)
    while folder and not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isabs(folder):
        return "no space is left on the store"
    found = shutil.disk_usage(folder)
    return f"{found.free:,} of {found.total:,} bytes are free on the disk of {folder}"


@contextlib.contextmanager
def explain_refusals(path: str, what: str = "") -> Iterator[None]:
    """What the system says of a local file that may not be written, with whose place it is, and what to do.

    Raises
    ------
    StorageError
        With the file, and ``what`` it is for.
    """
    try:
        yield
    except OSError as e:
        if e.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        msg = (
            f"{path}{what} cannot be written: {e.strerror}{_whose(path)}; give a path where this process may write, or "
            "run as a user who may write there"
        )
        raise StorageError(msg) from e


def _whose(path: str) -> str:
    """Whose a local file is, or the folder that it would be in."""
    while not os.path.lexists(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    try:
        found = os.stat(path)
    except OSError:
        return ""
    mode = stat.S_IMODE(found.st_mode)
    return f" ({path} belongs to user {found.st_uid} and has mode {mode:o}, and this process runs as {os.geteuid()})"


def check_parent(path: str) -> None:
    """Refuse a local file to write, before what is to be in it is worked out, if it is a folder or in none.

    Raises
    ------
    StorageError
        With the folder.
    """
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        msg = f"{path} cannot be written: there is no folder {folder}; make it, or give another path"
        raise StorageError(msg)
    if os.path.isdir(path):
        msg = f"{path} cannot be written: it is a folder; give the path of a file"
        raise StorageError(msg)
