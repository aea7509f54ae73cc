"""Errors that pass: a file server that restarts, a connection that is reset, a store that answers 503. Others last."""

from __future__ import annotations

import contextlib
import errno
import logging
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

from annbatch_dask.errors import AnnbatchDaskError, StorageError

__all__ = [
    "NEVER_ANSWERED",
    "PAUSES_S",
    "causes",
    "is_transient",
    "is_unanswered",
    "patiently",
    "raise_not_found",
    "seen_before",
    "status_of",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")
PAUSES_S = tuple(2.0**k for k in range(7))
"""Between tries, seconds: together two minutes, in which a file server that failed has an heir."""
sleep = time.sleep

_PASSING = frozenset(
    getattr(errno, name)
    for name in (
        *("ESTALE", "EIO", "EREMOTEIO", "EAGAIN", "EBUSY", "EINTR", "ETIMEDOUT", "ENOLCK"),
        *("ECONNRESET", "ECONNABORTED", "ECONNREFUSED", "EPIPE", "ENOTCONN", "ESHUTDOWN"),
        *("ENETDOWN", "ENETUNREACH", "ENETRESET", "EHOSTDOWN", "EHOSTUNREACH"),
    )
    if hasattr(errno, name)
) | {socket.EAI_AGAIN}
_PASSING_STATUS = (408, 425, 429)
_SERVER_ERROR = 500
_NUMBER = re.compile(r"(?:\berrno = |\bos error )(\d+)")
"""How HDF5 and Rust say an errno in the text of an error."""
_CLIENTS = (
    *("aiohttp.ClientConnectionError", "aiohttp.ClientPayloadError"),
    *("botocore.exceptions.ConnectionError", "botocore.exceptions.HTTPClientError"),
    *("requests.exceptions.ConnectionError", "requests.exceptions.Timeout"),
    *("httpx.TransportError", "httpx2.TransportError"),
    *("azure.core.exceptions.ServiceRequestError", "azure.core.exceptions.ServiceResponseError"),
    "google.auth.exceptions.TransportError",
)
"""Errors of connections that are none of Python's, or have no errno."""
_CONNECTING = (
    *("aiohttp.ClientConnectorError", "httpx.ConnectError", "httpx2.ConnectError"),
    *("botocore.exceptions.EndpointConnectionError", "botocore.exceptions.ConnectTimeoutError"),
    "azure.core.exceptions.ServiceRequestError",
)
"""Those of connections that did not come to be."""
NEVER_ANSWERED = errno.EHOSTUNREACH
"""Errno of an error about a store that has not answered this process before: its address may be wrong."""
_NEVER_ANSWERED_S = 5.0


def is_transient(error: BaseException) -> bool:
    """True if an error, or what caused it, may be gone at the next try. A full disk and a damaged file stay."""
    chain = list(causes(error))
    for e in chain:  # a store's status says more than the errno that fsspec made of it
        if _is_of(e, _CLIENTS) and getattr(e, "errno", None) is None:  # aiohttp has a status for a cut body, too
            return True
        if (status := status_of(e)) is not None:
            return status in _PASSING_STATUS or status >= _SERVER_ERROR
    return any(map(_is_passing, chain))


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what caused it, to the first."""
    while error is not None:
        yield error
        error = error.__cause__


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error of aiohttp, botocore, gcsfs or requests carries."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found: Any = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = getattr(error, "status", None) or getattr(response, "status_code", None) or getattr(error, "code", None)
    return found if isinstance(found, int) and found >= 400 else None  # noqa: PLR2004 - the first that is an error


def _is_passing(error: BaseException) -> bool:
    if isinstance(error, AnnbatchDaskError) and getattr(error, "errno", None) is None:  # what caused it may be
        return False
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _PASSING
    if isinstance(error, ConnectionError | TimeoutError) or _is_of(error, _CLIENTS):
        return True
    return any(int(n) in _PASSING for n in _NUMBER.findall(str(error)))


def is_unanswered(error: BaseException) -> bool:
    """True if there was no connection: the address is wrong, or nobody is there."""
    return any(isinstance(e, ConnectionRefusedError) or _is_of(e, _CONNECTING) for e in causes(error))


def _is_of(error: BaseException, names: Sequence[str]) -> bool:
    for name in names:
        module, _, cls = name.rpartition(".")
        if (kind := getattr(sys.modules.get(module), cls, None)) is not None and isinstance(error, kind):
            return True
    return False


def patiently(fn: Callable[..., T], *args: Any, is_first: bool = False) -> T:
    """Call a function that may be called again, after a pause, while it fails for a reason that passes.

    ``is_first``: nothing is lost if it is given up after some seconds because a store has never answered.

    Raises
    ------
    StorageError
        If it failed so for two minutes. Whatever else it raised comes through at once.
    """
    pauses, since = iter(PAUSES_S), time.monotonic()
    while True:
        try:
            return fn(*args)
        except Exception as e:
            is_lost = is_first and getattr(e, "errno", None) == NEVER_ANSWERED
            if not is_transient(e) or (is_lost and time.monotonic() - since > _NEVER_ANSWERED_S):
                raise
            if (pause := next(pauses, None)) is None:
                raise _given_up(e) from e
            first, notes = _first(e)
            logger.warning("%s; tried again in %.0f s", ", ".join([first, *notes]), pause)
        sleep(pause)


def _given_up(error: Exception) -> StorageError:
    first, notes = _first(error)
    given_up = StorageError(
        f"{first}: so it was in {len(PAUSES_S) + 1} tries over {sum(PAUSES_S):.0f} s; call again when the file system "
        "or store answers, and what is finished is kept"
    )
    for note in notes:
        given_up.add_note(note)
    return given_up


def _first(error: BaseException) -> tuple[str, list[str]]:
    """The cause in its own words, not what an error above it took it for; and where it was met."""
    first = next(e for e in causes(error) if status_of(e) is not None or _is_passing(e))
    notes = [note for e in causes(error) for note in getattr(e, "__notes__", ())]
    return " ".join(f"{type(first).__name__}: {first}".split()), notes


@contextlib.contextmanager
def seen_before(what: str) -> Iterator[None]:
    """A file that is missing in the block was there before; see :func:`raise_not_found`."""
    try:
        yield
    except FileNotFoundError:
        raise_not_found(what)


def raise_not_found(what: str) -> NoReturn:
    """Raise what tells of a file that was there before: NFS may lose sight of one for a while, which passes.

    Raises
    ------
    StorageError
        With the errno of a stale handle.
    """
    raise StorageError(errno.ESTALE, "was there before, and is not found now", what)
