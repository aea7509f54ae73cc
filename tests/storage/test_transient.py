"""Which errors pass, and what is done about them."""

import errno
import os
import socket

import aiohttp
import pytest
import requests
from aiohttp.client_reqrep import ConnectionKey
from botocore.exceptions import ClientError, ConnectTimeoutError, EndpointConnectionError, ReadTimeoutError
from s3fs.errors import translate_boto_error
from yarl import URL

from annbatch_dask.errors import IntegrityError, SourceError, SourceNotFoundError, StorageError
from annbatch_dask.storage import transient
from annbatch_dask.storage.transient import PAUSES_S, is_transient, patiently, seen_before


def os_error(number, name="/data/a.h5ad"):
    return OSError(number, os.strerror(number), name)


def of_s3(code, status):
    answer = {"Error": {"Code": code, "Message": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(ClientError(answer, "GetObject"))


def of_http(status):
    about = aiohttp.RequestInfo(URL("http://here/a"), "GET", {}, URL("http://here/a"))
    return aiohttp.ClientResponseError(about, (), status=status)


def no_name(number):
    about = ConnectionKey("here", 80, is_ssl=False, ssl=False, proxy=None, proxy_auth=None, proxy_headers_hash=None)
    return aiohttp.ClientConnectorDNSError(about, socket.gaierror(number, "in name resolution"))


def caused(error, by):
    error.__cause__ = by
    return error


@pytest.mark.parametrize(
    "error",
    [
        *map(os_error, (errno.ESTALE, errno.EIO, errno.ECONNRESET, errno.ETIMEDOUT, errno.ECONNREFUSED)),
        ConnectionResetError("by peer"),
        TimeoutError(),
        OSError("Can't synchronously read data (file read failed: time = now, errno = 5, error message = 'Input')"),
        RuntimeError("an error occurred with a store: Input/output error (os error 5)"),
        of_s3("InternalError", 500),
        of_s3("SlowDown", 503),
        of_s3("SomethingNew", 502),
        of_http(503),
        of_http(429),
        aiohttp.ServerDisconnectedError(),
        aiohttp.ClientPayloadError(),
        caused(aiohttp.ClientPayloadError("cut"), aiohttp.http_exceptions.ContentLengthError("4 of 8 bytes")),
        no_name(socket.EAI_AGAIN),
        *(error(endpoint_url="http://here/a", error="") for error in (EndpointConnectionError, ConnectTimeoutError)),
        ReadTimeoutError(endpoint_url="http://here/a", error=""),
        requests.exceptions.ConnectionError("refused"),
        requests.exceptions.ReadTimeout("late"),
        caused(SourceError("a.h5ad is not a whole HDF5 file"), os_error(errno.ESTALE)),
        caused(IntegrityError("entries 0 to 9 are damaged"), RuntimeError("Stale file handle (os error 116)")),
        caused(FileNotFoundError("http://here/a.h5ad"), of_http(500)),
    ],
    ids=repr,
)
def test_it_passes(error):
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        *map(os_error, (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOENT, errno.EISDIR)),
        OSError("Unable to synchronously open file (truncated file: eof = 96, sblock->base_addr = 0, stored_eof = 9)"),
        OSError("Can't synchronously read data (inflate() failed)"),
        RuntimeError("the checksum is invalid"),
        ValueError("5"),
        KeyError("obs"),
        of_s3("AccessDenied", 403),
        of_s3("PreconditionFailed", 412),
        of_s3("SomethingNew", 400),
        of_http(404),
        no_name(socket.EAI_NONAME),
        SourceNotFoundError("a.h5ad does not exist"),
        caused(StorageError("a.h5ad cannot be written: 0 bytes are free"), os_error(errno.ENOSPC)),
    ],
    ids=repr,
)
def test_it_lasts(error):
    assert not is_transient(error)


@pytest.fixture
def pauses(monkeypatch):
    """A clock that only writes down how long it was to be waited."""
    slept = []
    monkeypatch.setattr(transient, "sleep", slept.append)
    return slept


class Fails:
    """Raises an error some times, and then returns."""

    def __init__(self, error, times):
        self.error, self.times = error, times

    def __call__(self, value):
        self.times -= 1
        if self.times >= 0:
            raise self.error
        return value


def test_what_passes_is_tried_again_with_longer_pauses(pauses, caplog):
    assert patiently(Fails(os_error(errno.ESTALE), 3), 7) == 7
    assert pauses == [1, 2, 4]
    assert "Stale file handle" in caplog.text
    assert "/data/a.h5ad" in caplog.text


def test_it_ends(pauses):
    error = caused(SourceError("a.h5ad is not a whole HDF5 file: copy it again"), os_error(errno.ESTALE))
    error.add_note("while reading a.h5ad, rows 0 to 9")
    with pytest.raises(StorageError, match=r"Stale file handle.*8 tries over 127 s; call again") as caught:
        patiently(Fails(error, 99), 7)
    assert "copy" not in str(caught.value)
    assert caught.value.__notes__ == ["while reading a.h5ad, rows 0 to 9"]
    assert pauses == list(PAUSES_S)
    assert is_transient(caught.value)  # for another machine, that may be well


def test_what_lasts_comes_through_at_once(pauses):
    with pytest.raises(OSError, match="No space left"):
        patiently(Fails(os_error(errno.ENOSPC), 1), 7)
    assert pauses == []


def test_a_file_that_was_seen_before_is_looked_for_again(pauses):
    def read():
        with seen_before("a.h5ad"):
            return missing(0)

    missing = Fails(SourceNotFoundError("a.h5ad does not exist; check the path"), 2)
    assert patiently(read) == 0
    assert pauses == [1, 2]
    missing = Fails(FileNotFoundError("a.h5ad"), 99)
    with pytest.raises(StorageError, match=r"was there before, and is not found now: 'a.h5ad'") as caught:
        patiently(read)
    assert "check the path" not in str(caught.value)
