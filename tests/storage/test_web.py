"""Inputs of web servers that fail, know no ranges, or send something else: the rows of the files, or an error."""

import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import dask
import fsspec
import numpy as np
import pytest
import zarr

from annbatch_dask import DatasetCollection
from annbatch_dask.errors import AccessError, StorageError
from annbatch_dask.storage import transient
from annbatch_dask.storage.filesystems import cat_range, name_refusals
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.transient import PAUSES_S, is_transient, patiently
from tests.tools import rows_of

CONTENT = bytes(range(200))


class Handler(BaseHTTPRequestHandler):
    """Its server's files, and in how they come what its ``fault`` says of the request's number."""

    disable_nagle_algorithm = True
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.n += 1
        fault, content = self.server.fault(self.server.n), self.server.files.get(self.path)
        if content is None or isinstance(fault, int):
            self.send(404 if content is None else fault, b"", {})
            return
        asked = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None or fault == "no ranges":
            self.send(200, content, {})
            return
        first, last = int(asked[1]), min(int(asked[2]), len(content) - 1)
        if first > last:
            self.send(416, b"", {})
            return
        if fault == "another":
            first, last = first - 1, last - 1
        body = content[first : last + 1]
        self.send(206, body, {"Content-Range": f"bytes {first}-{last}/{len(content)}"}, fault)

    def send(self, status, body, headers, fault=""):
        self.close_connection = fault in ("cut", "short")
        lengths = {} if fault == "short" else {"Content-Length": str(len(body))}
        self.send_response(status)
        for name, value in (headers | lengths | ({"Connection": "close"} if self.close_connection else {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if self.close_connection else body)


@pytest.fixture
def web():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.fault, server.files, server.n = (lambda _: ""), {"/f": CONTENT}, 0
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def get(web, start, stop):
    return cat_range(fsspec.filesystem("http"), f"{web.url}/f", start, stop)


@pytest.mark.parametrize(("start", "stop"), [(0, 8), (10, 20), (190, 300), (200, 210), (300, 310)])
def test_a_range_is_its_bytes_as_far_as_the_file_goes(web, start, stop):
    assert get(web, start, stop) == CONTENT[start:stop]


@pytest.mark.parametrize("fault", ["no ranges", "another"])
def test_what_is_not_the_range_is_refused(web, fault):
    web.fault = lambda _: fault
    with pytest.raises(StorageError, match="/f: the web server sends bytes from .* that know no ranges") as found:
        get(web, 10, 20)
    assert not is_transient(found.value)


def test_the_beginning_of_a_file_needs_no_ranges(web):
    web.fault = lambda _: "no ranges"
    assert get(web, 0, 8) == CONTENT[:8]


@pytest.mark.parametrize("fault", ["cut", "short", 500, 503])
def test_an_answer_that_is_cut_may_be_whole_at_the_next_try(web, fault):
    web.fault = lambda _: fault
    with pytest.raises(Exception, match=r"500|503|4 of 8") as found:
        get(web, 10, 18)
    assert is_transient(found.value)


@pytest.fixture
def sharded(web, tmp_path):
    """Values, and their array in a store on the server, without compression or checksums of chunks."""
    values = np.arange(96, dtype=np.int32)
    zarr.create_array(tmp_path / "x.zarr", data=values, chunks=(8,), shards=(48,), compressors=None)
    web.files |= {f"/{p.relative_to(tmp_path)}": p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    return values, zarr.open_array(Folder(f"{web.url}/x.zarr").zarr_store(read_only=True), mode="r")


def test_parts_of_shards_are_what_was_asked_for(web, sharded):
    values, array = sharded
    np.testing.assert_array_equal(array[:], values)
    np.testing.assert_array_equal(array[20:30], values[20:30])
    web.fault = lambda _: "another"
    with pytest.raises(
        StorageError, match=r"x.zarr/c/0: the web server sends bytes from 191 on where .* those from 192"
    ):
        array[20:30]
    web.fault = lambda _: "short"
    with pytest.raises(StorageError, match=r"the web server sent \d+ of \d+ bytes"):
        array[20:30]
    web.files.pop("/x.zarr/c/1")
    web.fault = lambda _: ""
    assert not array[50:60].any()  # as zarr's format has it


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_names_the_file(web, status):
    web.fault = lambda _: status
    with pytest.raises(AccessError, match=f"{web.url}/f: the store refuses access"):
        get(web, 0, 8)


def test_a_server_that_does_not_say_how_large_a_file_is(web, monkeypatch):
    folder = Folder(f"{web.url}/f")
    monkeypatch.setattr(folder.fs, "info", lambda _: {"name": "f", "size": None})
    with pytest.raises(StorageError, match="/f: the web server does not say how large it is"):
        folder.open()


@pytest.mark.parametrize("fault", ["cut", "short", 500, "no ranges"])
def test_a_build_has_the_rows_of_the_file(web, h5ad_pair, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(transient, "sleep", lambda _: None)
    web.fault = lambda n: fault if n % 2 and n < 12 or fault == "no ranges" else ""
    web.files |= {f"/{path.name}": path.read_bytes() for path in h5ad_pair}
    urls = [f"{web.url}/{path.name}" for path in h5ad_pair]
    with dask.config.set(scheduler="synchronous"):
        there = DatasetCollection(tmp_path / "web.zarr").add_adatas(urls, seed=0, elements=["-obs/src_path"])
        here = DatasetCollection(tmp_path / "disk.zarr").add_adatas(h5ad_pair, seed=0, elements=["-obs/src_path"])
    assert web.n > 12
    assert rows_of(there).keys() == rows_of(here).keys()
    assert [row[0] for row in rows_of(there).values()] == [row[0] for row in rows_of(here).values()]


@pytest.fixture
def nobody():
    """An address where nobody answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/a.h5ad"


def test_an_address_where_nobody_has_answered_is_given_up_soon(nobody, tmp_path, monkeypatch):
    """It may be misspelled, and nothing is lost."""
    monkeypatch.setattr(transient, "_NEVER_ANSWERED_S", 0)
    monkeypatch.setattr(transient, "sleep", lambda _: pytest.fail("it is waited for"))
    with (
        dask.config.set(scheduler="synchronous"),
        pytest.raises(StorageError, match=rf"nobody answers \(.*\): check the address, .*{nobody}") as found,
    ):
        DatasetCollection(tmp_path / "o.zarr").add_adatas([nobody])
    assert is_transient(found.value)  # for a task on a worker


def test_a_host_that_has_answered_is_waited_for(web, nobody, monkeypatch):
    tries = []
    monkeypatch.setattr(transient, "sleep", tries.append)
    monkeypatch.setattr(transient, "_NEVER_ANSWERED_S", 0)
    assert get(web, 0, 8) == CONTENT[:8]

    def refused(url):
        with name_refusals(fsspec.filesystem("http"), url):
            raise ConnectionRefusedError

    with pytest.raises(StorageError, match=f"nobody answers .*{web.url}/f': so it was in 8 tries over 127 s"):
        patiently(refused, f"{web.url}/f", is_first=True)
    assert tries == list(PAUSES_S)
    with pytest.raises(StorageError, match=f"nobody answers .*{nobody}'$"):
        patiently(refused, nobody, is_first=True)
    assert tries == list(PAUSES_S)


def test_an_input_that_is_refused_midway_says_which(web, h5ad_pair, tmp_path):
    web.files["/a.h5ad"] = h5ad_pair[0].read_bytes()
    web.fault = lambda n: 403 if n > 5 else ""
    with dask.config.set(scheduler="synchronous"), pytest.raises(AccessError, match="/a.h5ad: the store refuses"):
        DatasetCollection(tmp_path / "o.zarr").add_adatas([f"{web.url}/a.h5ad"], seed=0)


def test_a_lost_connection_is_told_with_the_input(web, tmp_path, monkeypatch):
    monkeypatch.setattr(transient, "sleep", lambda _: None)
    web.files["/a.h5ad"], web.fault = CONTENT, lambda _: 503
    with dask.config.set(scheduler="synchronous"), pytest.raises(StorageError, match="tries") as found:
        DatasetCollection(tmp_path / "o.zarr").add_adatas([f"{web.url}/a.h5ad"], seed=0)
    assert f"while looking at {web.url}/a.h5ad" in found.value.__notes__
