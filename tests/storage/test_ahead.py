"""Files of object stores as h5py reads them: the same bytes, several requests at a time, and few of them."""

import threading

import h5py
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from annbatch_dask.errors import StorageError
from annbatch_dask.sources.files import GroupSource
from annbatch_dask.sources.hdf5 import read_h5_rows, visit_h5
from annbatch_dask.storage import ahead
from annbatch_dask.storage.ahead import AheadFile
from annbatch_dask.storage.filesystems import RemoteRanges

BLOCK = 4096


class Ranges(RemoteRanges):
    """Bytes that are there, and the blocks that were asked for; may wait until so many are asked for at once."""

    def __init__(self, payload):
        super().__init__(MemoryFileSystem(), "/f")
        self.payload, self.asked, self.together = payload, [], None

    def get(self, start, stop, version=None):
        self.asked.append(start // BLOCK)
        if self.together is not None and start // BLOCK in self.waiting:
            self.together.wait(20)
        return memoryview(self.payload[start:stop])

    def wait_for(self, *blocks):
        self.waiting, self.together = blocks, threading.Barrier(len(blocks))


@pytest.fixture
def opened(monkeypatch):
    monkeypatch.setattr(ahead, "_BLOCK_NBYTES", BLOCK)
    files = []

    def make(payload):
        ranges = Ranges(payload)
        files.append(AheadFile(ranges, ("v", len(payload))))
        return files[-1], ranges

    yield make
    for file in files:
        file.close()


def test_reads_are_those_of_the_bytes(opened):
    rng = np.random.default_rng(0)
    payload = rng.bytes(40 * BLOCK + 123)
    file, _ = opened(payload)
    for start, n in zip(rng.integers(0, len(payload) + 10, 200), rng.integers(0, 5 * BLOCK, 200), strict=True):
        if start % 3 == 0:
            file.expect(start, start + 10 * BLOCK)
        file.seek(int(start))
        assert file.read(int(n)) == payload[start : start + n]
        assert file.tell() == max(start, min(start + n, len(payload)))
    assert file.seek(-5, 2) == len(payload) - 5
    assert len(file._blocks) <= ahead._N_BLOCKS


def test_what_is_expected_is_asked_for_at_once_and_once(opened):
    file, ranges = opened(bytes(20 * BLOCK))
    ranges.wait_for(2, 3, 4, 5, 6)
    file.expect(2 * BLOCK, 7 * BLOCK)
    file.seek(2 * BLOCK)
    assert len(file.read(5 * BLOCK)) == 5 * BLOCK
    assert sorted(ranges.asked) == [2, 3, 4, 5, 6]


def test_blocks_to_come_stay_while_others_are_read(opened):
    """HDF5 looks for places of chunks elsewhere in the file, between the chunks."""
    file, ranges = opened(bytes(200 * BLOCK))
    file.expect(0, 60 * BLOCK)
    for k in range(60):
        for at in (k, 199 - k):
            file.seek(at * BLOCK)
            file.read(10)
    assert len(ranges.asked) == len(set(ranges.asked)) == 120


def test_a_block_that_failed_is_asked_for_again(opened):
    file, ranges = opened(bytes(2 * BLOCK))
    whole, ranges.payload = ranges.payload, None
    with pytest.raises(TypeError):
        file.read(10)
    ranges.payload = whole
    assert file.read(10) == bytes(10)


def test_a_file_that_became_shorter_is_an_error(opened):
    """What h5py asked for and did not get would be what its buffer held before."""
    file, ranges = opened(bytes(2 * BLOCK))
    ranges.payload = bytes(10)
    with pytest.raises(StorageError, match="/f ends at byte 10, and had 8,192 bytes when it was opened"):
        file.read(100)


FORMS = [{"chunks": (500,)}, {"chunks": (500,), "compression": "gzip"}, {"chunks": None}]


@pytest.mark.parametrize("options", FORMS, ids=["chunks", "gzip", "contiguous"])
def test_rows_of_hdf5_come_at_once(opened, tmp_path, options):
    """Its chunks lie in order: those of some rows are known by the first and the last of them."""
    values = np.random.default_rng(0).integers(0, 2**60, 50_000)
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f.create_dataset("x", data=values, **options)
    file, ranges = opened((tmp_path / "a.h5").read_bytes())
    with h5py.File(file, "r") as f:
        x = f["x"]
        np.testing.assert_array_equal(read_h5_rows(x, 10, 20), values[10:20])
        ranges.asked.clear()
        ranges.wait_for(42, 43, 44, 45)  # of rows that take blocks 40 to 60, about
        out = np.empty(20_000, values.dtype)
        visit_h5(x, 20_000, 40_000, lambda first, rows: out.__setitem__(slice(first, first + len(rows)), rows))
    np.testing.assert_array_equal(out, values[20_000:40_000])
    assert not ranges.together.broken
    assert len(ranges.asked) < 70


def test_dense_rows_of_hdf5_come_at_once(opened, tmp_path):
    values = np.random.default_rng(0).normal(size=(2000, 60))
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f.create_dataset("x", data=values, chunks=(50, 20), compression="gzip")
    file, ranges = opened((tmp_path / "a.h5").read_bytes())
    with h5py.File(file, "r") as f:
        ranges.wait_for(60, 61, 62)
        np.testing.assert_array_equal(read_h5_rows(f["x"], 420, 1300), values[420:1300])
    assert not ranges.together.broken


def test_chunks_that_were_never_written_and_rows_without_columns(opened, tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f.create_dataset("sparse", (100, 3), chunks=(10, 3), dtype="f4")[50:60] = 1
        f.create_dataset("narrow", (100, 0), chunks=(10, 1), maxshape=(None, None), dtype="f4")
        f.create_dataset("empty", (100,), dtype="f4")
    file, _ = opened((tmp_path / "a.h5").read_bytes())
    with h5py.File(file, "r") as f:
        assert read_h5_rows(f["sparse"], 45, 65).sum() == 30
        assert read_h5_rows(f["narrow"], 5, 15).shape == (10, 0)
        assert not read_h5_rows(f["empty"], 5, 15).any()


def test_a_large_matrix_is_described_without_reading_the_file(opened, tmp_path):
    """Places of chunks are all over the file: to ask how many bytes they take in all would read it."""
    n = 2 * 10**6
    with h5py.File(tmp_path / "a.h5ad", "w") as f:
        x = f.create_group("X")
        x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [1000, 3000]})
        x.create_dataset("data", data=np.ones(n, np.float32), chunks=(2000,))
        x.create_dataset("indices", data=np.tile(np.arange(2000, dtype=np.int32), 1000), chunks=(2000,))
        x.create_dataset("indptr", data=np.arange(1001) * 2000)
        for frame, rows in (("obs", 1000), ("var", 3000)):
            group = f.create_group(frame)
            group.attrs.update({"_index": "_index", "column-order": [], "encoding-type": "dataframe"})
            group.create_dataset("_index", data=[f"{i}" for i in range(rows)])
    payload = (tmp_path / "a.h5ad").read_bytes()
    file, ranges = opened(payload)
    with h5py.File(file, "r") as f:
        (x,) = GroupSource("a", f).schema().matrices
    assert x.nnz[-1] == n
    assert len(ranges.asked) * BLOCK < len(payload) / 10
