"""Writes on the condition that a file is as it was: S3 compares and writes in one step, where its store knows how.

Not all stores that speak S3's language do. One that refuses says so; one that ignores the condition is found out by a
write that should be refused, before a build does any work.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from annbatch_dask.errors import CollectionError
from annbatch_dask.storage.filesystems import is_refused, knows_no_conditions, protocols
from annbatch_dask.storage.secrets import shown

__all__ = ["check_conditions", "check_takes_files", "put_if", "warn_plain"]

logger = logging.getLogger(__name__)
_MAX_PUT_NBYTES = 2**32
"""S3 takes 5 GB in one request, and compares versions for that alone."""
_NO_VERSION = f'"{"0" * 32}"'
"""An entity tag that no file has."""
_plain: set[tuple[Any, str]] = set()
"""Buckets of S3 whose store refused or ignored a condition."""


def check_takes_files(fs: Any, url: str) -> None:
    """Refuse places that a build cannot work in.

    Raises
    ------
    CollectionError
        For Hugging Face's Hub, where each file would be a commit, and for web servers, which take nothing.
    """
    if "hf" in protocols(fs):
        msg = (
            f"{shown(url)} takes whole commits, and a build writes files one by one, none that another build wrote: "
            "build on a disk or an object store, and publish the collection with huggingface_hub's upload_folder"
        )
        raise CollectionError(msg)
    if not {"http", "https"}.isdisjoint(protocols(fs)):
        msg = f"{shown(url)} is on a web server, which is read only: give a local path, or the URL of an object store"
        raise CollectionError(msg)


def put_if(fs: Any, path: str, payload: bytes, version: str | None) -> bool:
    """Write a whole file in the place of a version of it, None for no file; False where the store cannot compare.

    Raises
    ------
    OSError
        That ``is_refused`` knows, if the file has another version.
    """
    if "s3" not in protocols(fs) or (fs, _bucket(path)) in _plain:
        return False
    condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
    try:
        fs.pipe_file(path, payload, chunksize=_MAX_PUT_NBYTES, **condition)
    except (OSError, NotImplementedError) as e:
        if not knows_no_conditions(e):
            raise
        _plain.add((fs, _bucket(path)))
        return False
    return True


def check_conditions(fs: Any, path: str, payload: bytes) -> None:
    """Warn where a store minds no conditions, by a write that should be refused of what a file holds."""
    try:
        was_written = put_if(fs, path, payload, _NO_VERSION)
    except OSError as e:
        if not is_refused(e):
            raise
        return
    if was_written:
        _plain.add((fs, _bucket(path)))
    warn_plain(fs, path)


def warn_plain(fs: Any, path: str) -> None:
    """Say, once a process, that nothing but the user keeps two builds apart."""
    _warn(f"{protocols(fs)[0]}://{_bucket(path)}")


def _bucket(path: str) -> str:
    return path.lstrip("/").partition("/")[0]


@lru_cache
def _warn(bucket: str) -> None:
    logger.warning(
        "%s does not write on the condition that a file is as it was (If-Match): of two builds there at once one may "
        "undo the other's; make sure that only one works there",
        bucket,
    )
