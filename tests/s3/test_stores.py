"""Whole files of S3 as zarr reads them: in one request, or in several at once."""

import anndata as ad
import pytest
import zarr
from zarr.core.buffer import default_buffer_prototype

from annbatch_dask.storage import stores
from annbatch_dask.storage.folder import Folder
from tests.s3.server import counts
from tests.s3.tools import build

pytestmark = pytest.mark.s3


def get(store, key):
    async def read():
        return await store.get(key, default_buffer_prototype())

    found = zarr.core.sync.sync(read())
    return None if found is None else found.to_bytes()


@pytest.fixture
def folder(bucket, server):
    return Folder(bucket, server.options)


@pytest.mark.parametrize("n", [0, 1, 9, 10, 11, 20, 35])
def test_a_file_is_read_whole(folder, server, monkeypatch, n):
    monkeypatch.setattr(stores, "_FIRST_NBYTES", 10)
    payload = bytes(range(n))
    folder.write("a", payload)
    store = folder.zarr_store(read_only=True)
    with server.recorded() as asked:
        assert get(store, "a") == payload
    assert counts(asked) == ({"GET": 1} if n < 10 else {"GET": max(1, -(-n // 10)), "HEAD": 1})


def test_a_file_that_is_not_there_is_asked_for_once(folder, server):
    store = folder.zarr_store(read_only=True)
    get(store, "b")
    with server.recorded() as asked:
        assert get(store, "a") is None
    assert counts(asked) == {"GET": 1}


def test_a_file_that_is_replaced_meanwhile_is_no_mixture(folder, monkeypatch):
    monkeypatch.setattr(stores, "_FIRST_NBYTES", 10)
    folder.write("a", bytes(25))
    store = folder.zarr_store(read_only=True)
    asked = store.fs._size

    async def grown(path):
        return await asked(path) + 1

    monkeypatch.setattr(store.fs, "_size", grown)
    with pytest.raises(OSError, match="has 26 bytes, and 25 came"):
        get(store, "a")


def test_obs_is_read_without_asking_for_sizes(bucket, atlas, server):
    built = build(f"{bucket}/o.zarr", atlas, server)
    group = next(iter(built))
    with server.recorded() as asked:
        obs = ad.io.read_elem(group["obs"])
    assert len(obs)
    assert not counts(asked)["HEAD"]
    assert not counts(asked)["LIST"]


def test_a_check_of_a_dataset_waits_for_half_as_many_answers(bucket, atlas, server):
    built = build(f"{bucket}/o.zarr", atlas, server)
    with server.recorded() as asked:
        assert built.verify().ok
    assert counts(asked)["HEAD"] <= 3 * len(built) + 3
