"""Shards go to a store behind what is encoded: the same bytes, and whole or not at all."""

import asyncio
import contextlib
import threading

import numpy as np
import pytest

from annbatch_dask.storage import folder as folder_module
from annbatch_dask.storage import shards, uploads
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.shards import ShardWriter

pytestmark = pytest.mark.s3


class Upload:
    """A file of a store, that is written as a test lets it be."""

    def __init__(self, file, write):
        self.file, self._write = file, write

    def write(self, payload):
        self._write(payload)
        return self.file.write(payload)


@pytest.fixture
def uploading(monkeypatch):
    """Send files as to stores other than S3, and let a function be called before each write of one."""
    for module in (shards, uploads):
        monkeypatch.setattr(module, "is_s3", lambda _: False)
    upload = folder_module.upload

    def use(write):
        @contextlib.contextmanager
        def watched(fs, path, room):
            with upload(fs, path, room) as file:
                yield Upload(file, write)

        monkeypatch.setattr(folder_module, "upload", watched)

    return use


@pytest.fixture
def remote(bucket, server):
    """A folder of a store that shows no file before it is whole."""
    return Folder(f"{bucket}/o.zarr", server.options)


def writer_of(folder):
    layout = {"shape": (40,), "dtype": np.dtype("u1"), "chunk_rows": 4, "shard_rows": 8}
    return ShardWriter(folder, folder.zarr_store(), "a", **layout, compressor=None, attributes={})


def names(folder):
    return [name for name in folder.files() if "/c/" in name]


def test_chunks_are_encoded_while_others_are_sent(remote, uploading):
    """With the file that waits for what comes after it, one that is written at once would wait forever."""
    is_encoded = threading.Event()

    def wait(_):
        assert is_encoded.wait(20)

    uploading(wait)
    with writer_of(remote) as w:
        w.append(np.arange(40, dtype=np.uint8))
        is_encoded.set()
    assert len(names(remote)) == 5


@pytest.mark.parametrize("is_parted", [True, False])
def test_a_store_gets_the_bytes_of_a_disk(remote, tmp_path, monkeypatch, is_parted):
    for module in (shards, uploads):
        monkeypatch.setattr(module, "is_s3", lambda _: is_parted)
    found = []
    for folder in (Folder(str(tmp_path / "o.zarr")), remote):
        with writer_of(folder) as w:
            w.append(np.arange(40, dtype=np.uint8))
        found.append((w.files, {name: folder.read(name) for name in names(folder)}))
    assert found[0] == found[1]


@pytest.mark.parametrize("n_before", [0, 4, 7])
def test_an_upload_that_fails_is_said_and_leaves_nothing_after_it(remote, uploading, n_before):
    left = [n_before]

    def fail(_):
        if not left[0]:
            raise OSError(5, "the store is gone")
        left[0] -= 1

    uploading(fail)
    with pytest.raises(OSError, match="the store is gone"), writer_of(remote) as w:
        w.append(np.arange(40, dtype=np.uint8))
    assert len(names(remote)) == n_before // 3  # two chunks and an index each
    assert not [t for t in threading.enumerate() if t.name.startswith("shuffle-upload")]


def test_what_was_begun_is_dropped_with_the_block(remote, uploading):
    """What waits is not written any more, and no half of a shard appears."""
    began, go = threading.Event(), threading.Event()

    def wait(_):
        began.set()
        assert go.wait(20)

    uploading(wait)
    with pytest.raises(KeyError), writer_of(remote) as w:
        w.append(np.arange(30, dtype=np.uint8))
        assert began.wait(20)
        go.set()
        raise KeyError
    assert len(names(remote)) <= 3
    assert all(len(remote.read(name)) == 8 + 2 * 4 + 2 * 16 + 4 for name in names(remote))
    assert not [t for t in threading.enumerate() if t.name.startswith("shuffle-upload")]


PART = uploads._S3_PART_NBYTES


@pytest.fixture
def calling(remote, monkeypatch):
    """Let a coroutine be awaited before each call of S3's client, with its method and arguments."""
    kind = type(remote.fs)
    call = kind._call_s3

    def use(before):
        async def watched(self, method, *args, **kwargs):
            await before(method, kwargs)
            return await call(self, method, *args, **kwargs)

        monkeypatch.setattr(kind, "_call_s3", watched)

    return use


def unfinished(folder):
    """Keys of uploads that were begun, and neither ended nor abandoned."""
    found = folder.fs.call_s3("list_multipart_uploads", Bucket="atlas")
    return [upload["Key"] for upload in found.get("Uploads", [])]


@pytest.mark.parametrize("nbytes", [0, 1, PART - 1, PART, PART + 1, 3 * PART, 3 * PART + 7])
@pytest.mark.parametrize("step", [PART // 3, 2 * PART + 1])
def test_a_file_in_parts_has_the_bytes_that_were_written(remote, server, nbytes, step):
    payload = np.random.default_rng(0).bytes(nbytes)
    with server.recorded() as requests, remote.create("f") as f:
        assert [f.write(memoryview(payload)[a : a + step]) for a in range(0, nbytes, step)] == [
            min(step, nbytes - a) for a in range(0, nbytes, step)
        ]
        assert f.write(np.zeros(0, np.uint8).data) == 0
    assert remote.read("f") == payload
    parts = [r for r in requests if "partNumber" in r.query]
    assert len(parts) == (0 if nbytes <= PART else -(-nbytes // PART))
    assert len(requests) == (1 if nbytes <= PART else len(parts) + 2)


def test_parts_go_out_several_at_a_time_and_no_more_than_there_are_buffers(remote, calling):
    """One at a time would wait forever for the others."""
    n_sent, n_held, are_many = 0, 0, asyncio.Event()

    async def wait(method, kwargs):
        nonlocal n_sent, n_held
        if method == "upload_part":
            n_sent += 1
            assert n_sent - n_held <= uploads.N_BUFFERS
            if n_sent == uploads.N_BUFFERS:
                are_many.set()
            await asyncio.wait_for(are_many.wait(), 20)
            n_held += 1

    calling(wait)
    layout = {"shape": (8 * PART,), "dtype": np.dtype("u1"), "chunk_rows": PART, "shard_rows": 8 * PART}
    with ShardWriter(remote, remote.zarr_store(), "a", **layout, compressor=None, attributes={}) as w:
        w.append(np.arange(8 * PART, dtype=np.uint8))
    assert n_sent == 9  # the last has checksums and the index
    assert not unfinished(remote)


def test_a_shard_is_made_whole_while_the_next_is_sent(remote, calling):
    """One that waits for the end of another would wait forever."""
    is_next = asyncio.Event()

    async def wait(method, kwargs):
        if kwargs.get("Key", "").endswith("/c/0"):
            await asyncio.wait_for(is_next.wait(), 20)
        elif kwargs.get("Key", "").endswith("/c/2"):
            is_next.set()

    calling(wait)
    with writer_of(remote) as w:
        w.append(np.arange(40, dtype=np.uint8))
    assert len(names(remote)) == 5


@pytest.mark.parametrize("method", ["create_multipart_upload", "upload_part", "complete_multipart_upload"])
@pytest.mark.parametrize("number", [1, 5])
def test_of_an_upload_that_fails_nothing_stays(remote, calling, method, number):
    async def fail(called, kwargs):
        if called == method and kwargs.get("PartNumber", number) == number:
            raise OSError(5, "the store is gone")

    calling(fail)
    with pytest.raises(OSError, match="the store is gone"), remote.create("f") as f:
        for _ in range(7):
            f.write(bytes(PART))
    assert remote.find("f") is None
    assert not unfinished(remote)


def test_an_error_of_a_shard_in_one_request_is_raised(remote, calling):
    async def fail(method, kwargs):
        if kwargs.get("Key", "").endswith("/c/2"):
            raise OSError(5, "the store is gone")

    calling(fail)
    with pytest.raises(OSError, match="the store is gone"), writer_of(remote) as w:
        w.append(np.arange(40, dtype=np.uint8))
    assert "a/c/2" not in names(remote)


@pytest.mark.parametrize("n_parts", [0, 1, 6])
def test_a_file_that_is_given_up_leaves_nothing(remote, n_parts):
    with pytest.raises(KeyError), remote.create("f") as f:
        for _ in range(n_parts):
            f.write(bytes(PART))
        raise KeyError
    assert remote.find("f") is None
    assert not unfinished(remote)
