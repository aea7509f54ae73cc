"""Shards go to a store behind what is encoded: the same bytes, and whole or not at all."""

import contextlib
import threading

import numpy as np
import pytest

from annbatch_dask.storage import folder as folder_module
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
    """Let a function be called before each write of a store's file."""
    upload = folder_module._upload

    def use(write):
        @contextlib.contextmanager
        def watched(fs, path):
            with upload(fs, path) as file:
                yield Upload(file, write)

        monkeypatch.setattr(folder_module, "_upload", watched)

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


def test_a_store_gets_the_bytes_of_a_disk(remote, tmp_path):
    local = Folder(str(tmp_path / "o.zarr"))
    found = []
    for folder in (local, remote):
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
