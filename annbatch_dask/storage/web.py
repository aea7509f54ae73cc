"""Ranges of files of a web server. fsspec takes whatever it sends for the range, be it the whole file, or a page."""

from __future__ import annotations

import errno
import re
from typing import Any

import fsspec
import fsspec.asyn

from annbatch_dask.errors import StorageError
from annbatch_dask.storage.secrets import shown

__all__ = ["get_web_range", "is_web", "web_range"]

_PART, _BEYOND = 206, 416
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


def is_web(fs: fsspec.AbstractFileSystem) -> bool:
    """True for a file system that speaks HTTP to any server."""
    return "http" in fs.protocol


def web_range(fs: Any, url: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file, those there are.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    StorageError
        If the server sends another part of it, or fewer bytes than there are, which may pass: its errno says so.
    """
    found: bytes = fsspec.asyn.sync(fs.loop, get_web_range, fs, url, start, stop)
    return found


async def get_web_range(fs: Any, url: str, start: int, stop: int) -> bytes:
    """The same as :func:`web_range`, in the event loop of its file system."""
    session = await fs.set_session()
    headers = {**fs.kwargs.get("headers", {}), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    async with session.get(fs.encode_url(url), **{**fs.kwargs, "headers": headers}) as answer:
        if answer.status == _BEYOND:  # the file ends before
            return b""
        fs._raise_not_found_for_status(answer, url)
        said = _CONTENT_RANGE.match(answer.headers.get("Content-Range", ""))
        first = int(said[1]) if said else start if answer.status == _PART else 0
        if first != start:
            msg = (
                f"{shown(url)}: the web server sends bytes from {first:,} on where it was asked for those from "
                f"{start:,} on, as servers do that know no ranges; download the file, and give that"
            )
            raise StorageError(msg)
        found = bytearray()
        async for part in answer.content.iter_any():
            found += part
            if len(found) >= stop - start:  # of a server that sends more, the rest is left
                break
    if said and said[2] != "*":
        _check_length(url, len(found), min(stop, int(said[2])) - start)
    return bytes(found[: stop - start])


def _check_length(url: str, n_bytes: int, n_asked: int) -> None:
    if n_bytes < n_asked:
        msg = f"the web server sent {n_bytes:,} of {n_asked:,} bytes"
        raise StorageError(errno.EIO, msg, shown(url))
