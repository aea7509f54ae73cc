"""What one call reads and decodes is what the plain way gives: the same values, the same errors, nothing beside them."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from annbatch_dask.chunks import dealing, native, placing
from annbatch_dask.chunks import reader as ranges
from annbatch_dask.chunks.dealing import deal
from annbatch_dask.chunks.reader import RangeReader
from annbatch_dask.errors import CollectionChangedError, IntegrityError
from tests.chunks.codecs import CODECS, NATIVE, SERIALIZERS

N_CANARY = 64

pytestmark = pytest.mark.skipif(not native.functions().all(), reason="C functions are missing here")


@contextmanager
def plainly():
    """No chunk is placed natively."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "can_fill", lambda **_: False)
        yield


@contextmanager
def natively():
    """No chunk is placed plainly."""

    def refuse(*_):
        msg = "a chunk was not placed natively"
        raise AssertionError(msg)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placing, "_place", refuse)
        yield


def outcome(array, spans, n_parts=3):
    """Values, or the type and text of the error; nothing is ever written beside the destination."""
    reader = RangeReader(array)
    assert reader.is_fast
    spans = np.array(spans, np.int64).reshape(-1, 2)
    shape = (int((spans[:, 1] - spans[:, 0]).sum()), *array.shape[1:])
    nbytes = int(np.prod(shape)) * array.dtype.itemsize
    memory = np.full(nbytes + 2 * N_CANARY, 0xA5, np.uint8)
    out = memory[N_CANARY : N_CANARY + nbytes].view(array.dtype).reshape(shape)
    try:
        for task in deal(reader.tasks(spans, out), n_parts):
            task()
    except (IntegrityError, CollectionChangedError, RuntimeError) as error:
        return type(error), str(error)
    finally:
        assert (memory[:N_CANARY] == 0xA5).all()
        assert (memory[-N_CANARY:] == 0xA5).all()
    return out.tobytes()


@st.composite
def arrays(draw):
    """An array in memory, and how zarr is to keep it."""
    n_dim = draw(st.sampled_from([1, 2, 2, 3]))
    shape = tuple(draw(st.integers(1, 40 if k == 0 else 7)) for k in range(n_dim))
    chunks = tuple(draw(st.integers(1, n)) for n in shape)
    shards = tuple(c * draw(st.integers(1, 3)) for c in chunks) if draw(st.booleans()) else None
    codec = draw(st.sampled_from(sorted(CODECS)))
    dtypes = ["uint8", "uint16", "int32", "uint64", *([] if codec in SERIALIZERS else ["float64", "bool", "complex64"])]
    cuts = sorted(draw(st.sets(st.integers(0, shape[0]), max_size=8)))
    written = draw(st.one_of(st.just((0, shape[0])), st.tuples(st.integers(0, shape[0]), st.integers(0, shape[0]))))
    return SimpleNamespace(
        shape=shape,
        chunks=chunks,
        shards=shards,
        dtype=draw(st.sampled_from(dtypes)),
        codec=codec,
        written=slice(*sorted(written)),
        spans=list(zip(cuts[::2], cuts[1::2], strict=False)),
    )


def write(path, made):
    array = zarr.create_array(
        path,
        shape=made.shape,
        chunks=made.chunks,
        shards=made.shards,
        dtype=made.dtype,
        compressors=CODECS[made.codec],
        serializer=SERIALIZERS.get(made.codec, "auto"),
        fill_value=1,
        overwrite=True,
    )
    values = np.random.default_rng(0).integers(0, 100, made.shape).astype(made.dtype)
    array[made.written] = values[made.written]
    return zarr.open_array(path, mode="r")


@settings(max_examples=150, deadline=None)
@given(made=arrays(), n_parts=st.integers(1, 4))
def test_any_array_is_as_zarr_and_the_plain_way_have_it(tmp_path_factory, made, n_parts):
    array = write(tmp_path_factory.mktemp("n") / "a", made)
    expected = np.concatenate([array[a:b] for a, b in made.spans] or [array[:0]]).tobytes()
    with plainly():
        assert outcome(array, made.spans, n_parts) == expected
    assert outcome(array, made.spans, n_parts) == expected
    if made.codec in NATIVE and len(made.shape) < (2 if made.codec in SERIALIZERS else 3):
        with natively():
            assert outcome(array, made.spans, n_parts) == expected


@pytest.mark.parametrize("codec", SERIALIZERS)
@pytest.mark.parametrize("length", [3, 700, 4000])
def test_of_packed_chunks_the_blocks_that_are_wanted(tmp_path, codec, length):
    """Of chunks of five blocks: a piece at a time, or the whole chunk where its pieces are many."""
    made = SimpleNamespace(
        shape=(30_000,), chunks=(5000,), shards=(10_000,), dtype="uint16", codec=codec, written=slice(None)
    )
    array, rng = write(tmp_path / "a", made), np.random.default_rng(0)
    starts = np.arange(0, 30_000 - length, length + 50)
    spans = [(a, a + int(rng.integers(1, length + 1))) for a in starts.tolist()]
    with natively():
        assert outcome(array, spans) == np.concatenate([array[a:b] for a, b in spans]).tobytes()


def simple(codec, shards=(120,)):
    return SimpleNamespace(
        shape=(300,), chunks=(30,), shards=shards, dtype="uint16", codec=codec, written=slice(0, 300)
    )


@pytest.mark.parametrize("codec", NATIVE)
def test_damaged_bytes_are_the_same_error_or_the_same_values(tmp_path, codec):
    """Each byte of the first chunks in turn, its headers among them, also where no checksum is."""
    array = write(tmp_path / "a", simple(codec))
    shard = tmp_path / "a/c/0"
    sound = shard.read_bytes()
    rng = np.random.default_rng(0)
    for at in range(min(len(sound) - 68, 160)):
        damaged = bytearray(sound)
        damaged[at] ^= int(rng.integers(1, 256))
        shard.write_bytes(damaged)
        found = outcome(array, [(0, 20), (25, 120)])
        with plainly():
            assert found == outcome(array, [(0, 20), (25, 120)])
        if "crc" in codec or codec == "blosc-zstd":
            assert found[0] is IntegrityError


@pytest.mark.parametrize("codec", NATIVE)
@pytest.mark.parametrize("n_left", [0, 3, 15, 40])
def test_a_chunk_that_ends_early_is_the_same_error(tmp_path, codec, n_left):
    array = write(tmp_path / "a", simple(codec, shards=None))
    chunk = tmp_path / "a/c/1"
    chunk.write_bytes(chunk.read_bytes()[:n_left])
    found = outcome(array, [(0, 90)])
    with plainly():
        assert found == outcome(array, [(0, 90)])
    assert found[0] is IntegrityError


def test_a_size_in_a_header_that_is_too_large_writes_nothing_beside(tmp_path):
    array = write(tmp_path / "a", simple("blosc", shards=None))
    chunk = tmp_path / "a/c/1"
    for place, size in ((4, 61), (4, 2**20), (4, 2**31), (8, 2**20), (12, 2**20), (12, 17)):
        raw = bytearray(chunk.read_bytes())
        raw[place : place + 4] = size.to_bytes(4, "little")
        chunk.write_bytes(raw)
        found = outcome(array, [(30, 60)])
        with plainly():
            assert found == outcome(array, [(30, 60)])
        assert found[0] in (IntegrityError, RuntimeError)
        write(tmp_path / "a", simple("blosc", shards=None))
        array = zarr.open_array(tmp_path / "a", mode="r")


@pytest.mark.parametrize("how", ["touched", "longer", "shorter"])
def test_a_file_that_is_not_as_it_was_is_noticed_after_it_was_read(tmp_path, how):
    array = write(tmp_path / "a", simple("blosc"))
    reader, out = RangeReader(array), np.empty(300, np.uint16)
    reader.read(np.array([[0, 300]]), out)
    shard = tmp_path / "a/c/1"
    with shard.open("r+b") as f:
        f.truncate(shard.stat().st_size + {"touched": 0, "longer": 1, "shorter": -1}[how])
    os.utime(shard, ns=(1, 1))
    with pytest.raises(CollectionChangedError, match=r"/a/c/1 was replaced since it was opened"):
        reader.read(np.array([[0, 300]]), out)
    reader.read(np.array([[0, 120]]), out[:120])


def test_what_was_not_placed_natively_is_read_again(tmp_path, monkeypatch):
    """As after an interrupted read: a chunk that is sound comes all the same."""
    array = write(tmp_path / "a", simple("blosc-crc"))
    whole = native.fill_next
    calls = []

    def fill_next(*args):
        left = whole(*args)
        args[-2][2::3] = False
        calls.append(left)
        return left + 1

    monkeypatch.setattr(native, "fill_next", fill_next)
    assert outcome(array, [(0, 300)]) == array[:].tobytes()
    assert set(calls) == {0}


def test_work_is_dealt_out_in_about_equal_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(dealing, "MIN_PART_NBYTES", 1)
    monkeypatch.setattr(ranges, "_MAX_FILL_NBYTES", 1)
    array = write(tmp_path / "a", simple("none"))
    readers = [RangeReader(array) for _ in range(3)]
    outs = [np.empty(300, np.uint16) for _ in readers]
    tasks = [
        task for reader, out in zip(readers, outs, strict=True) for task in reader.tasks(np.array([[0, 300]]), out)
    ]
    parts = deal(tasks, 4)
    assert len(tasks) == 3
    assert len(parts) == 4
    for part in parts[::-1]:
        part()
    for out in outs:
        np.testing.assert_array_equal(out, array[:])
    monkeypatch.setattr(dealing, "MIN_PART_NBYTES", 10**9)
    assert len(deal(tasks, 4)) == 1


def test_threads_take_reads_until_none_is_left(tmp_path, monkeypatch):
    """Of several that are damaged the first is named, whichever thread had it."""
    monkeypatch.setattr(dealing, "MIN_PART_NBYTES", 1)
    monkeypatch.setattr(ranges, "_MAX_FILL_NBYTES", 1)
    array = write(tmp_path / "a", simple("blosc-crc"))
    reader, out = RangeReader(array), np.empty(300, np.uint16)
    with ThreadPoolExecutor(4) as pool:
        tasks = deal(reader.tasks(np.array([[0, 300]]), out), 4)
        for done in [pool.submit(task) for task in tasks]:
            done.result()
    assert len(tasks) == 4
    np.testing.assert_array_equal(out, array[:])
    one_by_one = outcome(array, [(0, 300)], 1)
    for path in (tmp_path / "a").rglob("c/*"):
        if path.is_file():
            path.write_bytes(bytes(byte ^ 0x55 if k < 40 else byte for k, byte in enumerate(path.read_bytes())))
    array = zarr.open_array(tmp_path / "a", mode="r")
    expected = outcome(array, [(0, 300)], 1)
    assert expected != one_by_one
    for _ in range(5):
        reader = RangeReader(array)
        with ThreadPoolExecutor(4) as pool:
            errors = [pool.submit(task).exception() for task in deal(reader.tasks(np.array([[0, 300]]), out), 4)]
        (error,) = [error for error in errors if error is not None]
        assert (type(error), str(error)) == expected


def test_without_the_c_functions_chunks_are_decoded_one_by_one(tmp_path, monkeypatch):
    array = write(tmp_path / "a", simple("blosc-crc"))
    monkeypatch.setattr(native, "functions", lambda: np.zeros(8, np.int64))
    assert outcome(array, [(5, 280)]) == array[5:280].tobytes()


def test_runs_beyond_the_array_are_refused(tmp_path):
    reader = RangeReader(write(tmp_path / "a", simple("blosc")))
    for spans in ([[0, 301]], [[-1, 5]], [[5, 9], [8, 12]], [[9, 5]]):
        with pytest.raises(ValueError, match="runs must ascend from 0 to 300"):
            reader.tasks(np.array(spans), np.empty(3, np.uint16))
