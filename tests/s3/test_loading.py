"""A Loader over a collection on an S3 server: the same batches, few requests, many at once."""

from concurrent.futures import ThreadPoolExecutor

import anndata as ad
import dask
import numpy as np
import pytest
import zarr

from annbatch_dask import DatasetCollection, Loader
from annbatch_dask.chunks import reader as ranges
from annbatch_dask.errors import CollectionChangedError, CollectionError, IntegrityError
from tests.s3.server import counts
from tests.s3.tools import build, epoch

pytestmark = pytest.mark.s3
DELAY_S, N_AT_ONCE = 0.5, 16


@pytest.fixture(scope="module")
def url(atlas, server):
    """A collection of 13 shards of 40 rows in each array."""
    url = "s3://atlas/loading/o.zarr"
    with dask.config.set(scheduler="synchronous"):
        build(url, atlas, server, n_obs_per_chunk=10, shard_size=40)
    return url


@pytest.fixture
def collection(url, server):
    """The collection, newly opened."""
    options = server.options | {"config_kwargs": {"max_pool_connections": 32}}
    return DatasetCollection(url, mode="r", storage_options=options)


def rows_of(loader):
    return np.concatenate([batch["X"].toarray() for batch in loader])


def loader_of(collection):
    loader = Loader(batch_size=50, chunk_size=10, preload_nchunks=25, shuffle=True, seed=3)
    return loader.use_collection(collection)


def test_an_epoch_asks_for_each_coalesced_range_once(collection, server, local, monkeypatch):
    expected = np.concatenate(epoch(local[0]))
    read, run = [], ranges.place_read
    monkeypatch.setattr(ranges, "place_read", lambda *args: read.append(args) or run(*args))
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
        with server.slow(DELAY_S, N_AT_ONCE):
            assert len(rows_of(loader)) == 500
        assert server.n_at_once >= N_AT_ONCE


def test_requests_of_several_windows_are_under_way_together(collection, server):
    """A window here asks for ten ranges at most."""
    loader = Loader(batch_size=50, chunk_size=10, preload_nchunks=5, shuffle=True, seed=3, max_requests=64)
    loader.use_collection(collection)
    rows_of(loader)
    with server.slow(DELAY_S, 20):
        assert len(rows_of(loader)) == 500
    assert server.n_at_once >= 20


def test_a_slow_answer_delays_nobody_else(collection, server):
    """The windows behind the one that waits for it, of ten ranges at most, are read meanwhile."""
    loader = Loader(batch_size=50, chunk_size=10, preload_nchunks=5, shuffle=True, seed=3)
    loader.use_collection(collection)
    expected = rows_of(loader)
    loader = Loader(batch_size=50, chunk_size=10, preload_nchunks=5, shuffle=True, seed=3)
    batches = iter(loader.use_collection(collection))
    with server.one_held(n_others=20) as held, ThreadPoolExecutor(1) as pool:
        first = pool.submit(next, batches)
        assert held.wait_for_others(30)
        held.answer()
        found = [first.result(), *batches]
    np.testing.assert_array_equal(np.concatenate([batch["X"].toarray() for batch in found]), expected)


def test_an_object_that_is_replaced_under_a_loader_is_not_read(bucket, atlas, server):
    url = f"{bucket}/o.zarr"
    build(url, atlas, server, zarr_compressor=())
    loader = loader_of(DatasetCollection(url, mode="r", storage_options=server.options))
    batches = iter(loader)
    next(batches)
    key = next(path for path in atlas.fs.find(url) if "/dataset_0/X/data/c/" in path)
    content = atlas.fs.cat_file(key)
    atlas.fs.pipe_file(key, content[::-1])
    with pytest.raises(CollectionChangedError, match="/X/data/c/0 was replaced since it was opened"):
        list(loader)
    atlas.fs.rm_file(key)
    with pytest.raises(CollectionChangedError, match="/X/data/c/0 was removed since it was opened"):
        list(loader)
    atlas.fs.pipe_file(key, content)  # the same content has the same entity tag
    assert len(rows_of(loader)) == 500


def test_a_collection_is_checked_with_few_requests_at_once(collection, server):
    n_datasets = len(collection)
    collection.check()
    with server.recorded() as whole, server.slow(DELAY_S, N_AT_ONCE):
        collection.check()
    assert server.n_at_once >= N_AT_ONCE
    with server.recorded() as some:
        collection.check(["cell_type"])
    names = {r.key.split("/", 3)[-1] for r in some if r.kind == "GET" and "dataset_" in r.key}
    columns = {f"obs/cell_type/{part}/c/0" for part in ("codes", "categories")}
    assert names == columns | {"zarr.json", "obs/_index/c/0", "var/_index/c/0"}
    assert counts(some)["LIST"] == counts(whole)["LIST"] == n_datasets
    assert counts(some)["GET"] < counts(whole)["GET"] / 3


@pytest.fixture(scope="module")
def expected(url, server):
    """Two epochs' rows."""
    plain = loader_of(DatasetCollection(url, mode="r", storage_options=server.options))
    return [rows_of(plain) for _ in range(2)]


class TestCache:
    """What is read once is kept on a local disk."""

    def loader_of(self, collection, folder, **options):
        loader = Loader(
            batch_size=50, chunk_size=10, preload_nchunks=25, shuffle=True, seed=3, cache_dir=folder, **options
        )
        return loader.use_collection(collection)

    def test_later_epochs_and_runs_ask_for_nothing(self, collection, server, tmp_path, expected):
        loader = self.loader_of(collection, tmp_path)
        with server.recorded() as first:
            np.testing.assert_array_equal(rows_of(loader), expected[0])
        with server.recorded() as second:
            np.testing.assert_array_equal(rows_of(loader), expected[1])
        later = self.loader_of(collection, tmp_path)
        with server.recorded() as third:
            for rows in expected:
                np.testing.assert_array_equal(rows_of(later), rows)
        assert set(counts(first)) == {"GET"}
        assert counts(second) == counts(third) == {}

    def test_what_does_not_fit_is_asked_for_each_time(self, collection, server, tmp_path, expected):
        with server.recorded() as whole:
            rows_of(loader_of(collection))
        loader = self.loader_of(collection, tmp_path, cache_bytes=200_000)
        for rows in expected:
            with server.recorded() as asked:
                np.testing.assert_array_equal(rows_of(loader), rows)
        assert 0 < len(asked) < 0.8 * len(whole)
        assert sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir()) <= 200_000

    def test_a_damaged_copy_is_read_from_the_store_again(self, collection, server, tmp_path, expected, caplog):
        rows_of(self.loader_of(collection, tmp_path))
        for path in tmp_path.glob("*.bytes"):
            raw = bytearray(path.read_bytes())
            for at in range(5, len(raw), 100):
                raw[at] ^= 1
            path.write_bytes(raw)
        np.testing.assert_array_equal(rows_of(self.loader_of(collection, tmp_path)), expected[0])
        assert "is damaged: what it holds of s3://" in caplog.text
        np.testing.assert_array_equal(rows_of(self.loader_of(collection, tmp_path)), expected[0])  # keeps it again
        later = self.loader_of(collection, tmp_path)
        with server.recorded() as asked:
            np.testing.assert_array_equal(rows_of(later), expected[0])
        assert not asked

    def test_a_damaged_store_is_blamed(self, bucket, atlas, server, tmp_path):
        url = f"{bucket}/o.zarr"
        build(url, atlas, server)
        key = next(path for path in atlas.fs.find(url) if "/dataset_0/X/data/c/" in path)
        raw = bytearray(atlas.fs.cat_file(key))
        raw[7] ^= 1
        atlas.fs.pipe_file(key, bytes(raw))
        collection = DatasetCollection(url, mode="r", storage_options=server.options)
        for _ in range(2):
            with pytest.raises(IntegrityError, match="chunk at byte 0 of s3://.*/X/data/c/0 is damaged"):
                rows_of(self.loader_of(collection, tmp_path))

    def test_workers_of_a_dataloader_share_it(self, collection, server, tmp_path):
        DataLoader = pytest.importorskip("torch.utils.data").DataLoader
        for n_workers in (2, 1):  # the second time, a new process
            workers = DataLoader(
                self.loader_of(collection, tmp_path),
                batch_size=None,
                num_workers=n_workers,
                multiprocessing_context="fork",
            )
            with server.recorded() as asked:
                assert sum(batch["X"].shape[0] for batch in workers) == 500
        assert counts(asked)["GET"] == 0

    @pytest.mark.parametrize(("limit", "message"), [("many", "many"), (0, "is 0")])
    def test_a_limit_that_is_no_size(self, tmp_path, limit, message):
        with pytest.raises(ValueError, match=message):
            Loader(batch_size=1, cache_dir=tmp_path, cache_bytes=limit)


@pytest.mark.filterwarnings("ignore:Adding dataset with dtype", "ignore:zarr v3 autosharding", "ignore:.*added again")
def test_a_dataset_that_its_owner_edited(atlas, server, bucket):
    built = build(f"{bucket}/o.zarr", atlas, server)
    group = next(iter(built))
    x = ad.io.read_elem(group["X"]).astype(np.float64) * 2
    before = rows_of(loader_of(DatasetCollection(built.path, mode="r", storage_options=server.options)))
    n = x.shape[0]
    del group["X"]
    ad.io.write_elem(group, "X", x)
    collection = DatasetCollection(built.path, mode="r", storage_options=server.options)
    assert collection.verify().edited == ("zarr.json", "dataset_0/X")
    found = rows_of(loader_of(collection))
    assert np.isclose(found.sum(), before.sum() + x.sum() / 2)
    view = collection.to_lazy()
    np.testing.assert_array_equal(view.X[:n].compute().toarray(), x.toarray())
    with pytest.raises(CollectionError, match="dataset_0/X: was written anew"):
        built.add_adatas(atlas.urls[:1], mode="reshuffle", storage_options=server.options)


def test_plain_readers_need_few_requests_by_way_of_the_root(url, server):
    def read(path, name):
        group = zarr.open_group(path, mode="r", zarr_format=3, storage_options=server.options)
        return ad.io.read_elem(group[name] if name else group)

    n_documents = {}
    for path, name in ((url, "dataset_0"), (f"{url}/dataset_0", "")):
        with server.recorded() as requests:
            read(path, name)
        n_documents[name] = sum(r.key.endswith("zarr.json") for r in requests)
    assert n_documents["dataset_0"] <= 2 < n_documents[""] / 5  # zarr asks for the root's once or twice
