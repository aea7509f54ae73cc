"""The direct reader gives what zarr gives, over everything it claims to know, and leaves the rest to zarr."""

from __future__ import annotations

import os
import pickle
import shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BytesCodec, GzipCodec, ShardingCodec, ZstdCodec

from annbatch_dask.chunks import files as chunk_files
from annbatch_dask.chunks.reader import RangeReader
from annbatch_dask.errors import CollectionChangedError, IntegrityError
from annbatch_dask.manifest import ALL_WRITTEN
from tests.leaks import open_files
from tests.loader.data import CODECS

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


@pytest.mark.parametrize("entry", [(2**63 - 1, 2**63 - 1), (2**64 - 2, 3), (2**62, 1), (1, 2**64 - 1), (0, 2**63)])
def test_an_index_without_a_checksum_that_points_far_beyond_its_file(tmp_path, entry):
    sharding = ShardingCodec(chunk_shape=(10,), codecs=[BytesCodec()], index_codecs=[BytesCodec()])
    array = zarr.create_array(
        tmp_path / "a", shape=(20,), chunks=(20,), dtype="uint16", serializer=sharding, compressors=None
    )
    array[...] = np.arange(20)
    raw = shard(tmp_path / "a").read_bytes()
    shard(tmp_path / "a").write_bytes(raw[:-32] + np.array(entry, "<u8").tobytes() + raw[-16:])
    with pytest.raises(IntegrityError, match="the shard index of .* points beyond the file's 72 bytes"):
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
    del caught  # its traceback refers to the reader, which has the file open
    assert not open_files(tmp_path)


def test_damaged_chunk_with_checksum(tmp_path):
    array = create(tmp_path / "a", "unsharded", "crc-alone")
    raw = bytearray(shard(tmp_path / "a").read_bytes())
    raw[3] ^= 1
    shard(tmp_path / "a").write_bytes(raw)
    with pytest.raises(IntegrityError, match="the chunk at byte 0 of .*/c/0 is damaged"):
        read(array, [(0, 64)])


def rot(path):
    """Flip a bit of the first chunk, and leave the file's time as it is."""
    found = path.stat()
    raw = bytearray(path.read_bytes())
    raw[3] ^= 1
    with path.open("r+b") as f:
        f.write(raw)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


@pytest.mark.parametrize("codec", ["crc", "crc-alone"])
@pytest.mark.parametrize("layout", ["sharded", "2d", "2d-unsharded"])
def test_bytes_that_rot_after_they_were_read_are_noticed(tmp_path, codec, layout):
    array = create(tmp_path / "a", layout, codec)
    reader, out = RangeReader(array), np.empty((8, *array.shape[1:]), np.uint16)
    for _ in range(2):
        reader.read(np.array([[0, 8]]), out)
    rot(tmp_path / "a/c/0" if layout == "sharded" else tmp_path / "a/c/0/0")
    for again in (reader, RangeReader(array)):
        with pytest.raises(IntegrityError, match="the chunk at byte 0 of .* is damaged"):
            again.read(np.array([[0, 8]]), out)


def test_a_file_that_was_written_and_is_missing_is_no_fill_value(tmp_path):
    array = create(tmp_path / "a", attributes={ALL_WRITTEN: True})
    shard(tmp_path / "a").unlink()
    with pytest.raises(IntegrityError, match="/c/0 is missing, and it was written"):
        read(array, [(0, 10)])
    read(array, [(120, 130)])


SPANS = np.array([[0, 10]])


@pytest.fixture
def opened(tmp_path):
    """A reader of an array, and what the array holds."""
    array = create(tmp_path / "a")
    opened = SimpleNamespace(
        reader=RangeReader(array), path=tmp_path / "a", rows=array[:10], out=np.empty(10, np.uint16)
    )
    yield opened
    del opened.reader  # which has a file open


def replace(path):
    """Other values, in a file of its own, as zarr writes them."""
    zarr.open_array(path, mode="r+")[0:120] = 9
    later = shard(path).stat().st_mtime_ns + 10**9  # than the clock that stamps files can tell apart
    os.utime(shard(path), ns=(later, later))


@pytest.mark.parametrize("is_read_before", [True, False])
@pytest.mark.parametrize("how", ["replaced", "overwritten", "removed"])
def test_what_is_read_is_what_was_opened_or_an_error(opened, how, is_read_before):
    if is_read_before:
        opened.reader.read(SPANS, opened.out)
    if how == "overwritten":
        with shard(opened.path).open("r+b") as f:  # the same inode, and an index of the same size
            f.write(b"\0" * 8)
        os.utime(shard(opened.path), ns=(1, 1))
    elif how == "removed":
        shard(opened.path).unlink()
    else:
        replace(opened.path)
    if is_read_before and how != "overwritten":  # the file is still open
        opened.reader.read(SPANS, opened.out)
        np.testing.assert_array_equal(opened.out, opened.rows)
        return
    with pytest.raises(CollectionChangedError, match=r"/a/c/0 was (replaced|removed) since it was opened"):
        opened.reader.read(SPANS, opened.out)


def test_a_pickled_reader_reads_what_was_opened_or_nothing(opened):
    pickled = pickle.dumps(opened.reader)
    pickle.loads(pickled).read(SPANS, opened.out)
    np.testing.assert_array_equal(opened.out, opened.rows)
    replace(opened.path)
    with pytest.raises(CollectionChangedError, match="was replaced since it was opened"):
        pickle.loads(pickled).read(SPANS, opened.out)


def test_zarrs_own_reading_is_compared_too(tmp_path):
    array = create(tmp_path / "a")
    reader, out = RangeReader(array, fast=False), np.empty(10, np.uint16)
    reader.read(SPANS, out)
    replace(tmp_path / "a")
    with pytest.raises(CollectionChangedError, match="was replaced since it was opened"):
        reader.read(SPANS, out)
    reader.read(np.array([[200, 210]]), out)  # of a file that is as it was


@pytest.mark.parametrize("lists", [True, False])
def test_a_store_that_takes_no_conditions_is_asked_after_each_read(monkeypatch, lists):
    fs = fsspec.filesystem("memory")
    store = zarr.storage.FsspecStore.from_url("memory://ranges.zarr")
    zarr.create_array(store, shape=(60,), chunks=(20,), dtype="int32", overwrite=True)[...] = np.arange(60)
    if not lists:
        monkeypatch.setattr(chunk_files, "list_files", lambda _: None)
    reader, out = RangeReader(zarr.open_array(store, mode="r")), np.empty(10, np.int32)
    assert reader.is_fast
    for _ in range(2):
        reader.read(np.array([[15, 25]]), out)
    assert out.tolist() == list(range(15, 25))
    pickled = pickle.dumps(reader)
    fs.pipe_file("ranges.zarr/c/1", fs.cat_file("ranges.zarr/c/2"))
    for again in (reader, pickle.loads(pickled)):
        with pytest.raises(CollectionChangedError, match="/c/1 was replaced since it was opened"):
            again.read(np.array([[15, 25]]), out)
    again.read(np.array([[0, 10]]), out)
    fs.rm("ranges.zarr", recursive=True)
    with pytest.raises(CollectionChangedError, match="/c/0 was removed since it was opened"):
        again.read(np.array([[0, 10]]), out)


def test_a_file_that_was_put_back_is_the_same(opened, tmp_path):
    shutil.copytree(opened.path, tmp_path / "kept", copy_function=shutil.copy2)
    shutil.rmtree(opened.path)
    with pytest.raises(CollectionChangedError, match="was removed"):
        opened.reader.read(SPANS, opened.out)
    shutil.copytree(tmp_path / "kept", opened.path, copy_function=shutil.copy2)
    opened.reader.read(SPANS, opened.out)
    np.testing.assert_array_equal(opened.out, opened.rows)


def test_a_file_is_opened_once(opened, monkeypatch):
    calls = []
    original = os.open
    monkeypatch.setattr(os, "open", lambda *args: calls.append(args) or original(*args))
    for _ in range(3):
        opened.reader.read(SPANS, opened.out)
    assert len(calls) == 1


def test_a_reader_that_was_closed_opens_its_files_again(opened):
    for _ in range(2):
        opened.reader.read(SPANS, opened.out)
        assert len(open_files(opened.path)) == 1
        opened.reader.close()
        assert not open_files(opened.path)


@pytest.mark.parametrize("n_to_use", [20, 3, 0])
def test_files_are_closed_with_their_reader_and_when_there_are_too_many(n_to_use, tmp_path, monkeypatch):
    """Those that may not stay open are read together, or one after the other where so many may not be open at all."""
    monkeypatch.setattr(chunk_files, "_to_keep", deque([0, 1]))
    monkeypatch.setattr(chunk_files, "_to_use", deque(range(n_to_use)))
    array = create(tmp_path / "a")  # of nine shards
    most = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: most.append(len(open_files(tmp_path))) or preadv(*args))
    reader, out = RangeReader(array), np.empty(1000, np.uint16)
    reader.read(np.array([[0, 1000]]), out)
    np.testing.assert_array_equal(out, array[:])
    assert max(most) <= 2 + n_to_use + 1
    assert len(open_files(tmp_path)) == 2
    del reader
    assert not open_files(tmp_path)
    assert (len(chunk_files._to_keep), len(chunk_files._to_use)) == (2, n_to_use)


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
