"""The direct reader gives what zarr gives, over everything it claims to know, and leaves the rest to zarr."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, ZstdCodec

from annbatch_dask.errors import IntegrityError
from annbatch_dask.storage import ranges
from annbatch_dask.storage.ranges import RangeReader
from tests.leaks import open_files

CODECS = {
    "blosc-lz4": [BloscCodec(cname="lz4", shuffle="shuffle")],
    "blosc-zstd": [BloscCodec(cname="zstd", shuffle="bitshuffle")],
    "zstd": [ZstdCodec(level=1)],
    "gzip": [GzipCodec(level=1)],
    "none": None,
    "crc": [BloscCodec(cname="lz4"), Crc32cCodec()],
    "crc-alone": [Crc32cCodec()],
}
# shape, chunks, shards
LAYOUTS = {
    "sharded": ((1000,), (30,), (120,)),
    "one-chunk-shards": ((1000,), (30,), (30,)),
    "unsharded": ((1000,), (64,), None),
    "one-row": ((1,), (30,), (60,)),
    "2d": ((100, 7), (8, 7), (32, 7)),
    "2d-grid": ((100, 7), (8, 3), (32, 6)),
    "2d-unsharded": ((50, 7), (8, 7), None),
    "4d": ((40, 3, 4, 5), (4, 3, 2, 5), (8, 3, 4, 5)),
}
DTYPES = ["uint8", "uint16", "int32", "float32", "float64", "bool", "complex64"]


def create(path, layout="sharded", codec="blosc-lz4", dtype="uint16", **kwargs):
    shape, chunks, shards = LAYOUTS[layout]
    array = zarr.create_array(
        path, shape=shape, chunks=chunks, shards=shards, dtype=dtype, compressors=CODECS[codec], **kwargs
    )
    array[...] = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    return zarr.open_array(path, mode="r")


def read(array, spans, *, fast=True):
    reader = RangeReader(array, fast=fast)
    assert reader.is_fast == fast
    spans = np.array(spans, dtype=np.int64).reshape(-1, 2)
    out = np.empty((int((spans[:, 1] - spans[:, 0]).sum()), *array.shape[1:]), array.dtype)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda task: task(), reader.tasks(spans, out)))
    return out


def check(array, spans):
    expected = np.concatenate([array[a:b] for a, b in spans] or [array[:0]])
    for fast in (True, False):
        np.testing.assert_array_equal(read(array, spans, fast=fast), expected, strict=True)


def some_spans(n_rows):
    """Everything; nothing; single rows; runs that start and end within chunks; empty runs."""
    yield [(0, n_rows)]
    yield []
    yield [(n_rows - 1, n_rows)]
    if n_rows > 30:
        yield [(0, 1), (3, 5), (5, 5), (7, n_rows // 2), (n_rows // 2 + 1, n_rows - 3)]
        yield [(8, 16), (24, 32)]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("layout", ["sharded", "2d", "2d-unsharded"])
def test_codecs(tmp_path, codec, layout):
    array = create(tmp_path / "a", layout, codec)
    for spans in some_spans(array.shape[0]):
        check(array, spans)
    assert not open_files(tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    array = create(tmp_path / "a", layout)
    for spans in some_spans(array.shape[0]):
        check(array, spans)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(tmp_path, dtype):
    array = create(tmp_path / "a", "sharded", "blosc-lz4", dtype)
    check(array, [(3, 500), (700, 1000)])


@pytest.fixture(scope="module")
def random_access(tmp_path_factory):
    return create(tmp_path_factory.mktemp("r") / "a", "sharded", "zstd", "uint16")


@settings(max_examples=40)
@given(st.sets(st.integers(0, 1000), max_size=12))
def test_any_runs(random_access, cuts):
    cuts = sorted(cuts)
    check(random_access, list(zip(cuts[::2], cuts[1::2], strict=False)))


def test_chunks_never_written_hold_the_fill_value(tmp_path):
    array = zarr.create_array(
        tmp_path / "a", shape=(400,), chunks=(10,), shards=(100,), dtype="float32", fill_value=7.5
    )
    array[5:8] = 1.0  # one chunk of one shard
    array[130:140] = 2.0
    check(zarr.open_array(tmp_path / "a", mode="r"), [(0, 150), (250, 400)])


@pytest.mark.parametrize("index_location", ["start", "end"])
def test_index_at_either_end(tmp_path, index_location):
    sharding = ShardingCodec(chunk_shape=(10,), codecs=[BytesCodec()], index_location=index_location)
    array = zarr.create_array(
        tmp_path / "a", shape=(95,), chunks=(40,), dtype="int32", serializer=sharding, compressors=None, filters=None
    )
    array[...] = np.arange(95)
    check(zarr.open_array(tmp_path / "a", mode="r"), [(3, 50), (60, 95)])


def slow_arrays(path):
    """Arrays the direct reader does not know."""
    yield zarr.create_array({}, shape=(20,), chunks=(5,), dtype="int32")  # not a local store
    yield zarr.create_array(path / "v2", shape=(20,), chunks=(5,), dtype="int32", zarr_format=2)
    yield zarr.create_array(path / "big", shape=(20,), chunks=(5,), dtype="int32", serializer=BytesCodec(endian="big"))
    yield zarr.create_array(
        path / "two", shape=(20,), chunks=(5,), dtype="int32", compressors=[GzipCodec(), ZstdCodec()]
    )


def test_anything_else_goes_through_zarr(tmp_path):
    for array in slow_arrays(tmp_path):
        array[...] = np.arange(20)
        reader = RangeReader(array)
        assert not reader.is_fast
        out = np.empty(8, reader.dtype)
        reader.read(np.array([[1, 4], [10, 15]]), out)
        assert out.tolist() == [1, 2, 3, 10, 11, 12, 13, 14]


def test_out_must_fit(random_access):
    with pytest.raises(ValueError, match="needed: 5 rows of uint16"):
        RangeReader(random_access).tasks(np.array([[0, 5]]), np.empty(4, np.uint16))


def shard(path):
    return path / "c" / "0"


def test_damaged_index(tmp_path):
    array = create(tmp_path / "a")
    raw = bytearray(shard(tmp_path / "a").read_bytes())
    raw[-10] ^= 1
    shard(tmp_path / "a").write_bytes(raw)
    with pytest.raises(IntegrityError, match="shard index of .* is damaged"):
        read(array, [(0, 10)])


def test_truncated_shard(tmp_path):
    array = create(tmp_path / "a")
    shard(tmp_path / "a").write_bytes(b"12345")
    with pytest.raises(IntegrityError, match="truncated"):
        read(array, [(0, 10)])


@pytest.mark.parametrize("codec", ["blosc-lz4", "blosc-zstd", "zstd", "gzip", "none"])
def test_chunk_of_the_wrong_size(tmp_path, codec):
    array = create(tmp_path / "a", "unsharded", codec)
    other = zarr.create_array(tmp_path / "c", shape=(10,), chunks=(10,), dtype="uint16", compressors=CODECS[codec])
    other[...] = np.arange(10)
    shard(tmp_path / "a").write_bytes(shard(tmp_path / "c").read_bytes())
    with pytest.raises(IntegrityError, match="expected 128") as caught:
        read(array, [(0, 64)])
    assert "while decoding" in caught.value.__notes__[0]
    assert not open_files(tmp_path)


def test_damaged_chunk_with_checksum(tmp_path):
    array = create(tmp_path / "a", "unsharded", "crc-alone")
    raw = bytearray(shard(tmp_path / "a").read_bytes())
    raw[3] ^= 1
    shard(tmp_path / "a").write_bytes(raw)
    with pytest.raises(IntegrityError, match="the chunk at byte 0 of .*/c/0 is damaged"):
        read(array, [(0, 64)])


def test_a_chunk_is_checked_once_for_each_version_of_its_file(tmp_path, monkeypatch):
    array = create(tmp_path / "a", "sharded", "crc")
    reader, spans, checked = RangeReader(array), np.array([[0, 45]]), []
    original = ranges._checked
    monkeypatch.setattr(ranges, "_checked", lambda raw, what: checked.append(what) or original(raw, what))
    for _ in range(2):
        reader.read(spans, np.empty(45, np.uint16))
    assert len(checked) == 3  # the shard's index and two chunks
    RangeReader(array).read(spans, np.empty(45, np.uint16))
    assert len(checked) == 4  # the index alone
    (tmp_path / "a/c/0").touch()
    reader.read(spans, np.empty(45, np.uint16))
    assert len(checked) == 7


def test_a_file_that_was_written_and_is_missing_is_no_fill_value(tmp_path):
    array = create(tmp_path / "a", attributes={ranges.ALL_WRITTEN: True})
    shard(tmp_path / "a").unlink()
    with pytest.raises(IntegrityError, match="/c/0 is missing, and it was written"):
        read(array, [(0, 10)])
    read(array, [(120, 130)])


def test_a_replaced_file_is_noticed(tmp_path):
    array = create(tmp_path / "a")
    reader = RangeReader(array)
    out = np.empty(10, np.uint16)
    reader.read(np.array([[0, 10]]), out)
    tasks = reader.tasks(np.array([[0, 10]]), out)
    writable = zarr.open_array(tmp_path / "a", mode="r+")
    writable[0:120] = 9
    with pytest.raises(IntegrityError, match="replaced while"):
        tasks[0]()
    reader.read(np.array([[0, 10]]), out)  # the index is read anew
    assert out.tolist() == [9] * 10


def test_neighbouring_chunks_come_in_one_read(random_access):
    reader = RangeReader(random_access)
    out = np.empty(120, np.uint16)
    assert len(reader.tasks(np.array([[0, 120]]), out)) == 1


def test_pickles(random_access):
    reader = RangeReader(random_access)
    out, again = np.empty(50, np.uint16), np.empty(50, np.uint16)
    reader.read(np.array([[10, 60]]), out)
    pickle.loads(pickle.dumps(reader)).read(np.array([[10, 60]]), again)
    assert (out == again).all()
