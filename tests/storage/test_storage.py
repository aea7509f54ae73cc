"""Each fast path equals the plain one; what is written is what is read."""

import itertools
import os
import tempfile
import threading
import zlib
from unittest import mock

import h5py
import numpy as np
import pytest
import zarr
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from annbatch_dask.errors import IntegrityError, LayoutError, MissingPackageError
from annbatch_dask.sources.hdf5 import read_h5_rows, visit_h5
from annbatch_dask.storage import spill
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.shards import ShardWriter, compressor_json
from annbatch_dask.storage.spill import SpillReader, write_spill
from annbatch_dask.storage.threads import map_ordered

FILTERS = [
    {"compression": "gzip"},
    {"compression": "gzip", "shuffle": True},
    {"compression": "gzip", "fletcher32": True},
    {"compression": "lzf"},
    {"shuffle": True},
    {},
    {"chunks": None},
]


def _brain_float():
    """float32 without its lower half: h5py gives it as float32."""
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(15, 7, 8, 0, 7)
    kind.set_size(2)
    kind.set_ebias(127)
    return kind


def _twelve_bits():
    """The upper twelve of sixteen bits: h5py gives them as uint16."""
    kind = h5py.h5t.STD_U16LE.copy()
    kind.set_precision(12)
    kind.set_offset(4)
    return kind


@pytest.mark.parametrize(("kind", "dtype"), [(_brain_float(), np.float32), (_twelve_bits(), np.uint16)])
def test_hdf5_values_that_are_not_stored_as_numpy_has_them_equal_h5py(tmp_path, kind, dtype):
    values = np.arange(200, dtype=dtype)
    with h5py.File(tmp_path / "x.h5", "w") as f:
        options = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        options.set_chunk((64,))
        options.set_deflate(4)
        stored = h5py.h5d.create(f.id, b"x", kind, h5py.h5s.create_simple((200,)), options)
        stored.write(h5py.h5s.ALL, h5py.h5s.ALL, values)
        np.testing.assert_array_equal(f["x"][:], values)
        np.testing.assert_array_equal(read_h5_rows(f["x"], 0, 200), values)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<i8", "u1", "bool"])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_hdf5_rows_equal_h5py(tmp_path, filters, dtype, chunk):
    values = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 200, 500).astype(dtype)
    grid = values[:480].reshape(40, 12)
    with h5py.File(tmp_path / "x.h5", "w") as f:
        one = f.create_dataset("one", data=values, **({"chunks": (min(chunk, 500),)} | filters))
        two = f.create_dataset("two", data=grid, **({"chunks": (min(chunk, 40), 5)} | filters))
        for start, stop in [(0, 500), (0, 0), (3, 4), (60, 201), (499, 500)]:
            out = np.zeros(stop - start, one.dtype)

            def visit(first, piece, out=out):
                out[first : first + len(piece)] = piece

            visit_h5(one, start, stop, visit)
            np.testing.assert_array_equal(out, one[start:stop])
        for start, stop in [(0, 40), (5, 5), (3, 29), (39, 40)]:
            got = read_h5_rows(two, start, stop)
            np.testing.assert_array_equal(got, two[start:stop])
            assert got.dtype == two.dtype


def test_hdf5_chunks_never_written_and_chunks_without_filters(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as f:
        d = f.create_dataset("d", shape=(100,), dtype="i4", chunks=(10,), compression="gzip", fillvalue=7)
        d[20:40] = np.arange(20)
        d.id.write_direct_chunk((50,), np.arange(10, dtype="i4").tobytes(), filter_mask=1)
        np.testing.assert_array_equal(read_h5_rows(d, 0, 100), d[:])
        assert d[55] == 5
        assert d[0] == 7


def test_a_damaged_chunk_is_an_error(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as f:
        d = f.create_dataset("d", shape=(100,), dtype="i4", chunks=(10,), compression="gzip")
        d[:] = 1
        d.id.write_direct_chunk((50,), b"not deflate", filter_mask=0)
        with pytest.raises(Exception, match="(?i)decompress|deflate|data"):
            read_h5_rows(d, 0, 100)


@pytest.mark.parametrize(
    "compressor",
    [
        (),
        zarr.codecs.BloscCodec(cname="lz4", clevel=3, shuffle="shuffle"),
        zarr.codecs.BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle"),
        zarr.codecs.ZstdCodec(level=1),
        zarr.codecs.GzipCodec(level=1),
    ],
    ids=["none", "blosc-lz4", "blosc-zstd", "zstd", "gzip"],
)
@pytest.mark.parametrize(
    "dtype", ["uint16", "bool", *(pytest.param(t, marks=pytest.mark.chaos) for t in ("uint8", "float32", "int64"))]
)
def test_shards_equal_zarrs_own(tmp_path, compressor, dtype):
    rng = np.random.default_rng(0)
    folder = Folder(str(tmp_path / "o.zarr"))
    for shape, (chunk, shard) in itertools.product(
        [(0,), (1,), (64,), (100,), (70, 3)], [(8, 16), (7, 35), (200, 200)]
    ):
        values = rng.integers(0, 2 if dtype == "bool" else 100, shape).astype(dtype)
        options = {"shape": shape, "dtype": np.dtype(dtype), "chunk_rows": chunk, "shard_rows": shard}
        with ShardWriter(
            folder, folder.zarr_store(), "g/a", **options, compressor=compressor_json(compressor), attributes={"k": 1}
        ) as w:
            for piece in np.split(values, sorted(rng.integers(0, shape[0] + 1, 3))):
                w.append(piece)
        ours = zarr.open_array(folder.zarr_store(), path="g/a", mode="r")
        np.testing.assert_array_equal(ours[...], values)
        rest = shape[1:]
        theirs = zarr.create_array(
            zarr.storage.MemoryStore(),
            shape=shape,
            dtype=dtype,
            chunks=(chunk, *rest),
            shards=(shard, *rest),
            compressors=[*(compressor if isinstance(compressor, tuple) else [compressor]), zarr.codecs.Crc32cCodec()],
            fill_value=0,
            attributes={"k": 1},
        )
        assert ours.metadata.codecs == theirs.metadata.codecs
        (folder / "g").remove()


def _ten_bytes(folder, *, shard_rows):
    layout = {"shape": (10,), "dtype": np.dtype("u1"), "chunk_rows": 4, "shard_rows": shard_rows}
    return ShardWriter(folder, folder.zarr_store(), "a", **layout, compressor=None, attributes={})


def test_shards_that_fall_short_are_refused(tmp_path):
    folder = Folder(str(tmp_path / "o.zarr"))
    with (
        pytest.raises(LayoutError, match="has 10 rows and 4 were written"),
        _ten_bytes(folder, shard_rows=4) as w,
    ):
        w.append(np.zeros(4, "u1"))


def test_no_encoder_runs_on_behind_an_error(tmp_path, monkeypatch):
    started, ended, go = [], [], threading.Event()
    encode = ShardWriter._encode

    def slow(self, chunk):
        started.append(chunk)
        if len(started) > 1:
            go.wait(30)
            zlib.compress(bytes(2**24))
        ended.append(chunk)
        return encode(self, chunk)

    def full(self, encoded):
        go.set()
        message = "the disk is full"
        raise OSError(message)

    monkeypatch.setattr(ShardWriter, "_encode", slow)
    monkeypatch.setattr("annbatch_dask.storage.shards._Shard.append", full)
    writer = _ten_bytes(Folder(str(tmp_path / "o.zarr")), shard_rows=8)
    with pytest.raises(OSError, match="the disk is full"), writer as w:
        w.append(np.zeros(10, "u1"))
    assert len(started) == len(ended)


@pytest.mark.parametrize("what", ["comes", "goes"])
def test_a_folder_is_removed_while_another_process_ends_its_work_there(tmp_path, monkeypatch, what):
    inner = tmp_path / "o" / "X"
    inner.mkdir(parents=True)
    (inner / "first").touch()
    met, rmdir, unlink = [], os.rmdir, os.unlink

    def meet(original, path, **kwargs):
        if not met:
            met.append(path)
            (inner / "late").touch() if what == "comes" else unlink(inner / "first")
        return original(path, **kwargs)

    name, original = ("rmdir", rmdir) if what == "comes" else ("unlink", unlink)
    monkeypatch.setattr(os, name, lambda path, **kwargs: meet(original, path, **kwargs))
    Folder(str(tmp_path / "o")).remove()
    assert met
    assert not (tmp_path / "o").exists()
    Folder(str(tmp_path / "o")).remove()  # no error


def test_an_error_leaves_no_half_shard(tmp_path):
    folder = Folder(str(tmp_path / "o.zarr"))
    with (
        pytest.raises(KeyError),
        _ten_bytes(folder, shard_rows=8) as w,
    ):
        w.append(np.zeros(5, "u1"))
        raise KeyError
    assert {p.name for p in (tmp_path / "o.zarr").rglob("*") if p.is_file()} == {"zarr.json"}


@given(
    st.lists(st.lists(st.integers(0, 5), max_size=6), min_size=1, max_size=6),
    st.sampled_from(["u1", "<u2", "<f8"]),
    st.sampled_from([1, 40, 8 * 2**20]),
    st.sampled_from([None, False, True]),
    st.randoms(use_true_random=False),
)
def test_spill_files_give_back_what_they_took(parts, dtype, copy_nbytes, differences, random):
    """``parts``: the counts of each row of each part; ``copy_nbytes``: what is put in order at once."""
    counts = np.array([c for p in parts for c in p], np.int64)
    rows = np.concatenate([[0], np.cumsum([len(p) for p in parts])])
    order = np.array(random.sample(range(len(counts)), len(counts)), np.int64)
    at = np.argsort(order)  # where each row of the source goes
    offsets = np.concatenate([[0], np.cumsum(counts)])
    values = np.arange(offsets[-1]).astype(dtype)
    fixed = {"n": counts.astype(np.uint32), "grid": np.arange(2.0 * len(counts)).reshape(-1, 2)}
    stored = np.concatenate([[0], np.cumsum(counts[at])])
    shuffled = np.concatenate([*(values[offsets[i] : offsets[i + 1]] for i in at), np.empty(0, dtype)]).astype(dtype)
    given = {
        "order": order,
        "rows": rows,
        "fixed": {n: h[at] for n, h in fixed.items()},
        "ragged": {"v": (shuffled, stored), "w": (shuffled, stored)},
        "marks": np.array([2**64 - 1 - p for p in range(len(parts))], np.uint64),
        "packed": {} if differences is None or dtype == "<f8" else {"v": differences},
    }
    with tempfile.TemporaryDirectory() as tmp, mock.patch.object(spill, "_COPY_NBYTES", copy_nbytes):
        folder = Folder(tmp)
        assert write_spill(folder, 3, **given) == folder.fs.size(f"{tmp}/spill-000003.bin")
        for wanted in (range(len(parts)), range(len(parts) // 2, len(parts))):
            for keep_open in (True, False):
                with SpillReader(folder, 3, wanted, keep_open=keep_open) as reader:
                    check_spilled(reader, wanted, rows, fixed, values, offsets)
                    for some in (wanted, wanted[len(wanted) // 2 :]):  # read in one go, and from memory then
                        reader.hold(some)
                        with mock.patch.object(reader, "_fill", side_effect=AssertionError):
                            check_spilled(reader, some, rows, fixed, values, offsets)
                    assert reader.marks.tolist() == [2**64 - 1 - p for p in wanted]
                    assert reader.n_entries("v") == offsets[rows[wanted.stop]] - offsets[rows[wanted.start]]


def check_spilled(reader, wanted, rows, fixed, values, offsets):
    for p in wanted:
        a, b = rows[p], rows[p + 1]
        assert reader.n_rows(p) == b - a
        got = reader.read_fixed(p)
        for name, want in fixed.items():
            np.testing.assert_array_equal(got[name], want[a:b])
        ragged = reader.read_ragged(p, np.empty(reader.ragged_nbytes(p) + 5, np.uint8))
        for name in ("v", "w"):
            want = values[offsets[a] : offsets[b]]
            np.testing.assert_array_equal(ragged[name][:], want)
            np.testing.assert_array_equal(ragged[name][1:-1], want[1:-1])


def test_counts_take_two_bytes_of_a_spill_file_at_most(tmp_path):
    """An entry with its column: half of what they are in memory."""
    random, n_rows, n_values = np.random.default_rng(0), 500, 2_000
    columns = np.sort(random.choice(36_000, (n_rows, n_values)), axis=1).astype(np.uint16).reshape(-1)
    counts, offsets = random.geometric(0.5, n_rows * n_values).astype(np.uint16), np.arange(n_rows + 1) * n_values
    n_bytes = write_spill(
        Folder(str(tmp_path)),
        0,
        order=random.permutation(n_rows),
        rows=np.arange(0, n_rows + 1, 100),
        fixed={},
        ragged={"columns": (columns, offsets), "counts": (counts, offsets)},
        packed={"columns": True, "counts": False},
    )
    assert n_bytes <= 2 * len(columns)


def test_a_short_spill_file_is_an_error(tmp_path):
    folder = Folder(str(tmp_path))
    write_spill(folder, 0, order=np.arange(4), rows=np.array([0, 4]), fixed={"n": np.arange(4)}, ragged={})
    body = tmp_path / "spill-000000.bin"
    body.write_bytes(body.read_bytes()[:-8])
    with pytest.raises(IntegrityError, match="ends 8 bytes early"), SpillReader(folder, 0, range(1)) as reader:
        reader.read_fixed(0)


def test_map_ordered_keeps_order_and_stops_at_the_first_error():
    assert list(map_ordered(lambda x: x * x, range(100))) == [x * x for x in range(100)]
    drawn = []

    def numbers():
        for i in itertools.count():
            drawn.append(i)
            yield i

    with pytest.raises(ZeroDivisionError):
        list(map_ordered(lambda x: 1 / (5 - x), numbers()))
    assert len(drawn) < 30


def test_a_missing_file_is_none_whatever_the_client_says_of_it(monkeypatch):
    """Azure's errors have a ``response`` that is no dictionary."""

    def cat_file(self, path, **_):
        cause = ValueError("BlobNotFound")
        cause.response = object()
        raise FileNotFoundError(path) from cause

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    assert Folder("memory://nowhere").find("zarr.json") is None


@pytest.mark.parametrize(
    ("url", "extra"), [("abfs://c@account/o.zarr", "az"), ("gs://b/o.zarr", "gs"), ("s3://b/o", "s3")]
)
def test_a_store_whose_package_is_missing_says_which_extra_has_it(monkeypatch, url, extra):
    def missing(url, **options):
        raise ImportError("Install something")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(MissingPackageError, match=rf'pip install "annbatch-dask\[{extra}\]"'):
        _ = Folder(url).fs


def test_a_folder_whose_first_file_appears_while_it_is_listed_is_not_in_itself(monkeypatch):
    """s3fs finds nothing below it, asks again what it is, and calls it a folder that is all there is below."""
    folder = Folder("memory://appears/o.zarr")
    root = {"name": folder.path, "type": "directory", "size": 0}
    monkeypatch.setattr(MemoryFileSystem, "find", lambda *_, **__: {folder.path.rstrip("/"): root})
    assert folder.names() == []
    assert folder.sizes() == {}
