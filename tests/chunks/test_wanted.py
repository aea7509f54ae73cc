"""Entries of wanted columns: the call that picks them while it decodes gives what the plain way gives, and no more."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import zarr
from hypothesis import example, given, settings
from hypothesis import strategies as st

from annbatch_dask.chunks import native, wanted
from annbatch_dask.chunks.dealing import deal
from annbatch_dask.chunks.wanted import WantedEntries
from annbatch_dask.errors import CollectionChangedError, IntegrityError
from annbatch_dask.kernels.wanted import OUTSIDE, find_wanted
from annbatch_dask.loader.backing import ZarrCsrSource
from annbatch_dask.loader.blocks import PickedBlock, SparseBlock
from annbatch_dask.storage.packed import PackedCodec
from tests.chunks.codecs import CODECS, NATIVE, SERIALIZERS

UNTOUCHED = 0xA5

pytestmark = pytest.mark.skipif(not native.functions().all(), reason="C functions are missing here")


class Canaries:
    """Hands out arrays in which every byte is known."""

    def empty(self, shape, dtype):
        return np.full(shape * np.dtype(dtype).itemsize, UNTOUCHED, np.uint8).view(dtype)


def write(path, made):
    """A CSR group; columns ascend in no row but by chance where ``is_sorted`` is not set."""
    rng = np.random.default_rng(made.seed)
    lengths = np.array(made.lengths)
    columns = rng.integers(0, made.n_columns, int(lengths.sum()))
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    if made.is_sorted:
        for a, b in zip(indptr[:-1], indptr[1:], strict=True):
            columns[a:b].sort()
    group = zarr.open_group(path, mode="w")
    group.attrs.update({"encoding-type": "csr_matrix", "shape": [len(lengths), made.n_columns]})
    values = rng.integers(0, 200, len(columns)).astype(made.value_dtype)
    if made.value_dtype in {"float32", "float64"}:  # a sum of them depends on its order
        values += rng.normal(size=len(values)).astype(made.value_dtype)
    for name, array, codec in (("data", values, made.codecs[0]), ("indices", columns, made.codecs[1])):
        array = array.astype(made.column_dtype) if name == "indices" else array  # noqa: PLW2901
        serializer = SERIALIZERS.get(codec, "auto")
        shape = {"chunks": (made.chunk,), "shards": None if made.shard is None else (made.chunk * made.shard,)}
        made_array = group.create_array(
            name,
            shape=array.shape,
            dtype=array.dtype,
            compressors=CODECS[codec],
            serializer=serializer,
            config={"write_empty_chunks": True},
            **shape,
        )
        made_array[...] = array
    group.create_array("indptr", data=indptr)
    return group


def read_all(source, rows):
    """Columns and values of each row."""
    block, tasks = source.open(source.locate(rows), Canaries())
    for task in tasks:
        task()
    return rows_of(block)


def rows_of(block):
    ends = block.starts + block.lengths
    return [(block.columns[a:b], block.values[a:b]) for a, b in zip(block.starts, ends, strict=True)]


def filtered(rows, is_wanted):
    return [(c[is_wanted[c] > 0], v[is_wanted[c] > 0]) for c, v in rows]


def read_wanted(source, rows, is_wanted, n_parts=1, order=1, *, with_totals=False):
    """The same of the wanted entries; what lies behind them was not touched."""
    block, tasks = source.open_wanted(source.locate(rows), Canaries(), is_wanted, with_totals=with_totals)
    for task in deal(tasks, n_parts)[::order]:
        task()
    if isinstance(block, PickedBlock):
        n = int(block.n_used[0])
        for array in (block.columns, block.values):
            assert (array[n:].view(np.uint8) == UNTOUCHED).all()
    return (rows_of(block), block.totals) if with_totals else rows_of(block)


def assert_same(found, expected):
    assert len(found) == len(expected)
    for (columns, values), (its_columns, its_values) in zip(found, expected, strict=True):
        assert columns.dtype == its_columns.dtype
        assert values.dtype == its_values.dtype
        np.testing.assert_array_equal(columns, its_columns)
        np.testing.assert_array_equal(values, its_values)


@contextmanager
def plainly():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wanted, "pick", lambda *_: False)
        yield


@contextmanager
def natively():
    def refuse(*_):
        msg = "entries were not picked natively"
        raise AssertionError(msg)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WantedEntries, "pick_plainly", refuse)
        yield


def simple(codec="packed-crc", **other):
    made = {"seed": 0, "lengths": [40, 0, 100, 3, 70], "n_columns": 50, "column_dtype": "uint16"}
    made |= {"value_dtype": "uint16", "codecs": (codec, codec), "chunk": 60, "shard": 2, "is_sorted": True}
    return SimpleNamespace(**made | other)


@st.composite
def matrices(draw):
    """Rows of many lengths, empty ones and some that are longer than a chunk, and a step, among them."""
    length = st.one_of(st.just(0), st.integers(0, 30), st.integers(0, 9000))
    n_columns = draw(st.sampled_from([1, 7, 255, 3000]))
    column_dtypes = ["int32", "int64", "uint16", "uint32", *(["uint8"] if n_columns < 256 else [])]
    packs = st.sampled_from([name for name in NATIVE if name != "blosc-zstd"])
    value_dtype = draw(st.sampled_from(["uint8", "uint16", "int32", "uint64", "float32", "float64", "complex64"]))
    is_float = np.dtype(value_dtype).kind not in "iu"
    codecs = draw(packs.filter(lambda name: not (is_float and name in SERIALIZERS))), draw(packs)
    return SimpleNamespace(
        seed=draw(st.integers(0, 99)),
        lengths=draw(st.lists(length, min_size=1, max_size=25)),
        n_columns=n_columns,
        column_dtype=draw(st.sampled_from(column_dtypes)),
        value_dtype=value_dtype,
        codecs=codecs,
        chunk=draw(st.sampled_from([11, 300, 1024, 5000, 20_000])),
        shard=draw(st.sampled_from([None, 1, 3])),
        is_sorted=draw(st.booleans()),
    )


@st.composite
def questions(draw):
    """A matrix, rows in any order and twice, and what is wanted of its columns: all, none, one or some."""
    made = draw(matrices().filter(lambda made: 0 < sum(made.lengths) < 60_000))
    rows = draw(st.lists(st.integers(0, len(made.lengths) - 1), min_size=1, max_size=40))
    is_wanted = np.zeros(made.n_columns, np.uint8)
    kind = draw(st.sampled_from(["all", "none", "one", "some"]))
    rng = np.random.default_rng(made.seed)
    if kind == "one":
        is_wanted[rng.integers(made.n_columns)] = 1
    elif kind != "none":
        is_wanted[:] = 1 if kind == "all" else rng.random(made.n_columns) < rng.random()
    return made, np.array(rows), is_wanted


@settings(max_examples=60, deadline=None)
@given(question=questions(), n_parts=st.integers(1, 5), order=st.sampled_from([1, -1]))
@example(question=(simple(n_columns=1), np.arange(5), np.zeros(1, np.uint8)), n_parts=1, order=1)  # chunks of zeros
def test_what_is_picked_is_what_the_plain_ways_leave(tmp_path_factory, question, n_parts, order):
    made, rows, is_wanted = question
    source = ZarrCsrSource(write(tmp_path_factory.mktemp("w") / "x", made))
    expected = filtered(read_all(source, rows), is_wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wanted, "MIN_PART_NBYTES", 1)
        with natively():
            assert_same(read_wanted(source, rows, is_wanted, n_parts, order), expected)
        with plainly():
            assert_same(read_wanted(source, rows, is_wanted, n_parts, order), expected)


@settings(max_examples=40, deadline=None)
@given(question=questions(), n_parts=st.integers(1, 5))
def test_totals_are_those_of_whole_rows(tmp_path_factory, question, n_parts):
    made, rows, is_wanted = question
    source = ZarrCsrSource(write(tmp_path_factory.mktemp("w") / "x", made))
    whole = read_all(source, rows)
    # One by one, in float64: what the pass over a whole row does, to the last bit.
    sums = [np.cumsum(np.concatenate([[0], values.astype(np.complex128)]).real)[-1] for _, values in whole]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wanted, "MIN_PART_NBYTES", 1)
        for way in (natively, plainly):
            with way():
                found, totals = read_wanted(source, rows, is_wanted, n_parts, with_totals=True)
            if totals is None:  # of complex numbers: all entries are there
                assert_same(found, whole)
                continue
            assert_same(found, filtered(whole, is_wanted))
            np.testing.assert_array_equal(totals, sums)
            assert made.value_dtype != "complex64"


ROWS = np.array([4, 2, 2, 0, 1])
FEW = (np.arange(50) % 7 == 0).astype(np.uint8)


def test_it_is_the_way_of_what_we_write(tmp_path):
    source = ZarrCsrSource(write(tmp_path / "x", simple()))
    block, tasks = source.open_wanted(source.locate(ROWS), Canaries(), FEW, with_totals=False)
    assert isinstance(block, PickedBlock)
    assert isinstance(tasks[0], WantedEntries)
    tasks[0]()
    n_left_out = len(block.values) - int(block.n_used[0])
    assert n_left_out > 100
    assert block.spare_nbytes == 4 * n_left_out


@pytest.mark.parametrize(
    "other",
    [{"codecs": ("gzip", "gzip")}, {"value_dtype": "complex128", "codecs": ("none", "none")}],
    ids=["another codec", "16 bytes"],
)
def test_what_it_does_not_know_is_read_whole(tmp_path, other):
    source = ZarrCsrSource(write(tmp_path / "x", simple(**other)))
    block, _ = source.open_wanted(source.locate(ROWS), Canaries(), FEW, with_totals=False)
    assert type(block) is SparseBlock
    assert_same(read_wanted(source, ROWS, FEW), read_all(source, ROWS))


def test_chunks_of_other_entries_are_read_whole(tmp_path):
    group = write(tmp_path / "x", simple())
    values = group["data"][:]
    group.create_array("data", data=values, chunks=(50,), overwrite=True, serializer=PackedCodec(), compressors=None)
    source = ZarrCsrSource(zarr.open_group(tmp_path / "x", mode="r"))
    assert_same(read_wanted(source, ROWS, FEW), read_all(source, ROWS))


def test_a_chunk_that_was_not_written_is_read_whole(tmp_path):
    group = write(tmp_path / "x", simple(codecs=("crc", "crc")))
    values = group["data"][:]
    values[60:120] = 0
    group["data"][:] = values  # zarr writes no chunk of fill values
    source = ZarrCsrSource(zarr.open_group(tmp_path / "x", mode="r"))
    assert_same(read_wanted(source, ROWS, FEW), read_all(source, ROWS))


def outcome(source, ways=FEW):
    try:
        return [(c.tolist(), v.tolist()) for c, v in read_wanted(source, ROWS, ways)]
    except (IntegrityError, CollectionChangedError, RuntimeError) as error:
        return type(error), str(error)


@pytest.mark.parametrize("codec", [name for name in NATIVE if name != "blosc-zstd"])
@pytest.mark.parametrize("name", ["data", "indices"])
def test_damaged_bytes_are_the_same_error_or_the_same_entries(tmp_path, codec, name):
    """Each byte of the first chunks in turn; nothing is written or read beside, whatever they say."""
    source = ZarrCsrSource(write(tmp_path / "x", simple(codec, shard=4)))
    assert source.locate(ROWS).nbytes
    shard, rng = tmp_path / f"x/{name}/c/0", np.random.default_rng(1)
    sound = shard.read_bytes()
    everything = np.ones(50, np.uint8)
    for at in range(min(len(sound) - 68, 200)):
        damaged = bytearray(sound)
        damaged[at] ^= int(rng.integers(1, 256))
        shard.write_bytes(damaged)
        source = ZarrCsrSource(zarr.open_group(tmp_path / "x", mode="r"))
        found = outcome(source, everything)
        with plainly():
            assert found == outcome(source, everything)
        if "crc" in codec:
            assert found[0] is IntegrityError


def test_a_column_that_does_not_exist_is_named(tmp_path):
    group = write(tmp_path / "x", simple())
    columns = group["indices"][:]
    columns[[50, 51]] = 50, 65_535
    group["indices"][:] = columns
    source = ZarrCsrSource(zarr.open_group(tmp_path / "x", mode="r"))
    with pytest.raises(IntegrityError, match="2 entries name a column beyond the 50 the data has"):
        read_wanted(source, ROWS, FEW)


def test_a_file_that_was_replaced_is_noticed(tmp_path):
    source = ZarrCsrSource(write(tmp_path / "x", simple()))
    shard = tmp_path / "x/data/c/0"
    raw = shard.read_bytes()
    shard.write_bytes(raw + b"x")
    with pytest.raises(CollectionChangedError, match="data/c/0 was replaced"):
        read_wanted(source, ROWS, FEW)


def test_of_values_nothing_is_read_where_nothing_is_wanted(tmp_path):
    source = ZarrCsrSource(write(tmp_path / "x", simple()))
    raw = bytearray((tmp_path / "x/data/c/0").read_bytes())
    none = np.zeros(50, np.uint8)
    block, tasks = source.open_wanted(source.locate(ROWS), Canaries(), none, with_totals=False)
    raw[20] ^= 1
    (tmp_path / "x/data/c/0").write_bytes(raw)
    for task in tasks:
        task()
    assert not block.lengths.any()
    assert not block.n_used[0]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64"])
def test_the_kernel_refuses_columns_beyond(dtype):
    kept = np.zeros(3, np.uint32)
    is_wanted = np.array([0, 1], np.uint8)
    assert find_wanted(np.array([1, 0, 1], dtype), is_wanted, 5, kept) == 2
    assert kept[:2].tolist() == [5, 7]
    assert find_wanted(np.array([1, 2], dtype), is_wanted, 0, kept) == OUTSIDE
    assert find_wanted(np.array([np.iinfo(dtype).max], dtype), is_wanted, 0, kept) == OUTSIDE
    assert find_wanted(np.zeros(0, dtype), is_wanted, 0, kept) == 0


def test_threads_share_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(wanted, "MIN_PART_NBYTES", 1)
    source = ZarrCsrSource(write(tmp_path / "x", simple(lengths=[30] * 40)))
    rows = np.arange(40)
    _, tasks = source.open_wanted(source.locate(rows), Canaries(), FEW, with_totals=False)
    assert len(deal(tasks, 4)) == 12
    assert_same(read_wanted(source, rows, FEW, 4), filtered(read_all(source, rows), FEW))
    monkeypatch.setattr(wanted, "MIN_PART_NBYTES", 10**9)
    assert len(deal(tasks, 4)) == 1
