"""URLs and errors as they may be shown: without users, passwords and queries."""

from __future__ import annotations

import contextlib
import errno
import re
import sys
import traceback
from collections.abc import Iterator

from annbatch_dask.errors import AnnbatchDaskError, StorageError
from annbatch_dask.storage.transient import is_transient

__all__ = ["hiding_secrets", "no_text", "shown", "without_secrets"]


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
_ANY_NAMES = ("file", "local", "memory", "s3", "s3a", "gs", "gcs", "hf", "zip", "tar", "simplecache", "filecache")
"""Schemes without queries: files may be called what one looks like."""


def no_text(path: str) -> str:
    """Why a path cannot be named in a document, in words; empty where it can."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return (
            f"{path!a} is no text in this process's encoding, {sys.getfilesystemencoding()}: set LC_ALL=C.UTF-8, or "
            "where it is no UTF-8 either, rename it"
        )
    return ""


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
