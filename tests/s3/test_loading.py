"""A Loader over a collection on an S3 server: the same batches, few requests, many at once."""

import numpy as np
import pytest

from annbatch_dask import DatasetCollection, Loader
from annbatch_dask.storage import ranges
from tests.s3.server import counts
from tests.s3.tools import build, epoch

pytestmark = pytest.mark.s3
DELAY_S = 0.05


@pytest.fixture
def collection(bucket, atlas, server):
    """13 shards of 40 rows in each array."""
    build(f"{bucket}/o.zarr", atlas, server, n_obs_per_chunk=10, shard_size=40)
    options = server.options | {"config_kwargs": {"max_pool_connections": 32}}
    return DatasetCollection(f"{bucket}/o.zarr", mode="r", storage_options=options)


def rows_of(loader):
    return np.concatenate([batch["X"].toarray() for batch in loader])


def loader_of(collection):
    loader = Loader(batch_size=50, chunk_size=10, preload_nchunks=25, shuffle=True, rng=3)
    return loader.use_collection(collection)


def test_an_epoch_asks_for_each_coalesced_range_once(collection, server, local, monkeypatch):
    expected = np.concatenate(epoch(local[0]))
    read, run = [], ranges._run
    monkeypatch.setattr(ranges, "_run", lambda *args: read.append(args) or run(*args))
    loader = loader_of(collection)
    with server.recorded() as first:
        found = rows_of(loader)
    n_first = len(read)
    with server.recorded() as second:
        rows_of(loader)
    np.testing.assert_array_equal(np.sort(found, axis=0), np.sort(expected, axis=0))
    n_files = len({r.key for r in first})
    assert counts(first) == {"GET": n_first + n_files}  # each shard's index as well
    assert counts(second) == {"GET": len(read) - n_first}


def test_many_requests_are_under_way_to_a_slow_server(collection, server):
    loader = loader_of(collection)
    for _ in range(2):  # indexes of shards, then chunks alone
        with server.slow(DELAY_S):
            assert len(rows_of(loader)) == 500
        assert server.n_at_once >= 16
