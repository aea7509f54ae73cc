"""Ranges of objects of S3, read by obstore's client: many at once, without the GIL.

fsspec's own client is one thread of Python, which makes some hundred requests a second however many wait for an answer;
this one makes thousands, at an eighth of the processor's time. Where a store is and who may read it is said to fsspec,
as everywhere: what is read here is asked with the address, the region and the credentials that s3fs has found.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from weakref import WeakKeyDictionary

import fsspec.asyn

from annbatch_dask.errors import MissingPackageError

__all__ = ["ObjectRanges", "is_s3", "object_ranges"]

_KNOWN = {
    "client_kwargs": {"endpoint_url", "region_name"},
    "config_kwargs": {"max_pool_connections", "retries", "connect_timeout", "read_timeout"},
}
"""Options of s3fs that are said to this client too, or mean nothing to it; with others fsspec reads."""
_IDLE_CONNECTIONS = "1024"
"""Kept open while they are not used: as many as were."""
_CREDENTIALS_LAST = timedelta(minutes=5)
"""Then s3fs is asked again for those it has not been given as they are; it renews them in time."""
_RETRIES = {
    "max_retries": 10,
    "retry_timeout": timedelta(minutes=2),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=10), "base": 2},
}
"""Of a request that was answered by 5xx or not at all."""
_PATIENCE = timedelta(seconds=2)
"""So long no byte may come before a request is given up and made again, once; stores answer one in thousands late."""
_STATUS = re.compile(r"status code: (\d{3})")
_BEYOND, _REFUSED = 416, (401, 403)


class _StatusError(Exception):
    """The answer of a store, as those who look for its status find it."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class ObjectRanges:
    """One object, to read ranges of it; any number of threads may."""

    stores: tuple[Any, ...]
    key: str
    path: str

    def get(self, start: int, stop: int, tag: str | None = None) -> memoryview:
        """Bytes [start, stop), those there are, of the version with an entity tag if one is given: as they came.

        Raises
        ------
        FileExistsError
            If the object has another tag.
        FileNotFoundError
            If there is none.
        OSError
            If the store did not answer, after some tries over two minutes, or said no.
        """
        import obstore

        options: Any = {"range": (start, stop)}
        if tag is not None:
            options["if_match"] = tag
        impatient, patient = self.stores
        try:
            try:
                return memoryview(obstore.get(impatient, self.key, options=options).bytes())
            except obstore.exceptions.GenericError as e:
                if _status_of(e) == _BEYOND:
                    return memoryview(b"")
                return memoryview(obstore.get(patient, self.key, options=options).bytes())
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.path) from None
        except obstore.exceptions.PreconditionError as e:
            raise FileExistsError(self.path) from e
        except (obstore.exceptions.BaseError, OSError) as e:
            said, status = str(e).partition("\n\nDebug source")[0], _status_of(e)
            if status == _BEYOND:  # the object ends before
                return memoryview(b"")
            if status is None:  # no answer
                raise ConnectionError(errno.ECONNABORTED, said, self.path) from None
            number = errno.EACCES if status in _REFUSED else errno.EIO
            raise OSError(number, said, self.path) from _StatusError(said, status)


def _status_of(error: Exception) -> int | None:
    return int(match[1]) if (match := _STATUS.search(str(error))) else None


def is_s3(fs: Any) -> bool:
    """True of s3fs's file systems, but for those of coroutines."""
    return type(fs).__module__ == "s3fs.core" and not fs.asynchronous


def object_ranges(fs: Any, path: str) -> ObjectRanges | None:
    """An object of S3; None where fsspec's file system is of another kind, or has options that only it knows."""
    if _forked or not is_s3(fs):
        return None
    bucket, key, version = fs.split_path(path)
    if version is not None or not key:
        return None
    stores = _stores.setdefault(fs, {})
    if bucket not in stores:
        stores[bucket] = _make(fs, bucket)
    found = stores[bucket]
    return None if found is None else ObjectRanges(found, key, path)


_stores: WeakKeyDictionary[Any, dict[str, tuple[Any, ...] | None]] = WeakKeyDictionary()
_forked = False


def _after_fork() -> None:
    """A forked process has none of the threads that obstore waits for: it would wait forever."""
    global _forked  # noqa: PLW0603 - of the process
    _forked = _forked or "obstore" in sys.modules


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _make(fs: Any, bucket: str) -> tuple[Any, ...] | None:
    """Stores of obstore for a bucket, an impatient one and a patient one; or None."""
    is_plain = all(set(getattr(fs, name)) <= known for name, known in _KNOWN.items())
    if not is_plain or fs.s3_additional_kwargs or fs.version_aware or fs.kwargs:
        return None
    try:
        from obstore.store import S3Store
    except ImportError as e:
        msg = f's3://{bucket} is read by obstore, which is not installed ({e}): pip install "annbatch-dask[s3]"'
        raise MissingPackageError(msg) from e
    fs.connect()
    client = fs.s3
    endpoint, region = client.meta.endpoint_url, client.meta.region_name
    if endpoint.startswith("https:") and "AWS_CA_BUNDLE" in os.environ:
        return None
    if (client.meta.config.s3 or {}).get("addressing_style") not in (None, "auto", "path"):
        return None
    options: dict[str, Any] = {
        "endpoint": endpoint,
        "region": _region_of(fs, bucket, region) if ".amazonaws.com" in endpoint else region or "us-east-1",
        "request_payer": fs.requester_pays,
    }
    if options["region"] is None:
        return None
    if fs.anon:
        options["skip_signature"] = True
    elif fs.key and fs.secret:
        options |= {"access_key_id": fs.key, "secret_access_key": fs.secret}
        options |= {"session_token": fs.token} if fs.token else {}
    else:
        options["credential_provider"] = _credentials_of(fs)
    if ".amazonaws.com" in endpoint:  # the client knows it, and that of another region would not answer
        del options["endpoint"]
    client_options = {"allow_http": endpoint.startswith("http:"), "pool_max_idle_per_host": _IDLE_CONNECTIONS}
    once: dict[str, Any] = {
        "client_options": client_options | {"read_timeout": _PATIENCE},
        "retry_config": _RETRIES | {"max_retries": 0},
    }
    often: dict[str, Any] = {"client_options": client_options, "retry_config": _RETRIES}
    return S3Store(bucket, **options, **once), S3Store(bucket, **options, **often)


def _region_of(fs: Any, bucket: str, region: str | None) -> str | None:
    """The region of a bucket of AWS: s3fs is told it by the first answer, this client is not."""
    try:
        headers = fs.call_s3("head_bucket", Bucket=bucket)["ResponseMetadata"]["HTTPHeaders"]
    except OSError:  # who may read objects need not be allowed to ask that
        return None
    found: str | None = headers.get("x-amz-bucket-region", region)
    return found


def _credentials_of(fs: Any) -> Callable[[], Any]:
    """What gives the credentials that s3fs has found: of a profile, the environment, or the machine."""

    async def ask() -> Any:
        credentials = await fs.session.get_credentials()
        return None if credentials is None else await credentials.get_frozen_credentials()

    def provide() -> dict[str, Any]:
        found = fsspec.asyn.sync(fs.loop, ask)
        if found is None:
            msg = "no credentials for S3 were found; give them in storage_options or the environment"
            raise PermissionError(msg)
        return {
            "access_key_id": found.access_key,
            "secret_access_key": found.secret_key,
            "token": found.token,
            "expires_at": datetime.now(UTC) + _CREDENTIALS_LAST,
        }

    return provide
