"""Packed integers: against the format's description, step by step, and with every kind of damage."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from annbatch_dask.kernels.packed import DAMAGED, bound_nbytes, unpack, unpack_runs
from annbatch_dask.kernels.packing import pack

DTYPES = [f"{kind}int{n}" for kind in ("u", "") for n in (8, 16, 32, 64)]
CANARY = 0xA5


def unsigned(values):
    return values.view(f"u{values.itemsize}")


def unpacked(raw, dtype, n, start=0, stop=None):
    out = np.empty((n if stop is None else stop) - start, dtype)
    assert unpack(raw, n, start, unsigned(out)) == 0
    return out


def number(raw):
    return int.from_bytes(bytes(raw), "little")


def plainly_unpacked(raw):
    """What the docstring of PackedCodec says, value by value, in Python's integers."""
    assert bytes(raw[:5]) == b"ABPK\x01"
    assert bytes(raw[-8:]) == bytes(8)
    n_bits, differences, n = int(raw[5]), int(raw[6]), number(raw[8:16])
    entry_nbytes = {8: 12, 16: 12, 32: 16, 64: 20}[n_bits]
    values = []
    for b in range(-(-n // 1024)):
        entry = raw[16 + b * entry_nbytes :][:entry_nbytes]
        block, w, h = raw[4 * number(entry[:4]) :], int(entry[8]), int(entry[9])
        counts, base = [int(c) for c in entry[4:8]], number(entry[entry_nbytes - n_bits // 8 :])
        n_lanes, n_patches = 1024 // n_bits, sum(counts)
        places = block[128 * w : 128 * w + n_patches]
        patches = number(block[128 * w + n_patches :][: -(-n_patches * h // 8)])
        words = [number(block[k : k + n_bits // 8]) for k in range(0, 128 * w, n_bits // 8)]
        u = []
        for i in range(1024):
            r, lane = divmod(i, n_lanes)
            bits = sum(words[k * n_lanes + lane] << (k * n_bits) for k in range(w))
            u.append((bits >> (r * w)) % 2**w)
        p = 0
        for q in range(4):
            for _ in range(counts[q]):
                u[256 * q + int(places[p])] += (patches >> (p * h)) % 2**h << w
                p += 1
        before = base
        for x in u[: n - 1024 * b]:
            before = (before + 1 + x if differences else base + x) % 2**n_bits
            values.append(before)
    return np.array(values, f"u{n_bits // 8}")


@st.composite
def arrays(draw, max_size=5000):
    """Integers of any dtype: mostly small, or ascending, or in rows, with some of all sizes among them."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    info = np.iinfo(dtype)
    n = draw(st.sampled_from([0, 1, 2, 255, 1023, 1024, 1025, 2048]) | st.integers(0, max_size))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n_bits = draw(st.integers(0, 8 * dtype.itemsize - 1))
    low = draw(st.sampled_from([0, 1, info.min, -1, info.max - 1]).filter(lambda x: info.min <= x <= info.max))
    values = rng.integers(low, min(info.max, low + 2**n_bits), n, dtype=dtype, endpoint=True)
    kind = draw(st.sampled_from(["any", "ascending", "rows"]))
    if kind == "ascending":
        values.sort()
    elif kind == "rows" and n:
        length = draw(st.integers(1, n))
        for a in range(0, n, length):
            values[a : a + length].sort()
    for share in draw(st.lists(st.sampled_from([0.001, 0.02, 0.3]), max_size=2)):
        at = rng.random(n) < share
        values[at] = rng.integers(info.min, info.max, int(at.sum()), dtype=dtype, endpoint=True)
    return values


@given(arrays(), st.booleans(), st.data())
@settings(max_examples=300)
@example(np.zeros(1024, np.uint8), False, None)
@example(np.full(3000, -1, np.int64), True, None)
def test_what_was_packed_comes_back(values, differences, data):
    raw = pack(values, differences=differences)
    assert len(raw) <= bound_nbytes(len(values), values.dtype)
    np.testing.assert_array_equal(unpacked(raw, values.dtype, len(values)), values)
    if data is not None:
        start = data.draw(st.integers(0, len(values)))
        stop = data.draw(st.integers(start, len(values)))
        part = unpacked(raw, values.dtype, len(values), start, stop)
        np.testing.assert_array_equal(part, values[start:stop])


@given(arrays(max_size=2000), st.booleans())
@settings(max_examples=25)
def test_the_bytes_are_as_described(values, differences):
    raw = pack(values, differences=differences)
    np.testing.assert_array_equal(plainly_unpacked(raw), unsigned(values))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("differences", [False, True])
def test_every_width_and_patch(dtype, differences):
    """A block for each number of bits that most values have, and each that a few others have; also 57 bits and more."""
    top = 8 * np.dtype(dtype).itemsize
    rng = np.random.default_rng(0)
    blocks = []
    for width in range(top + 1):
        for longest in {width, min(width + 3, top), top - 1, top}:
            block = rng.integers(0, 2**width - 1, 1024, dtype=np.uint64, endpoint=True)
            block[rng.choice(1024, 12, replace=False)] = 2**longest - 1
            blocks.append(block.astype(f"u{top // 8}").view(dtype))
    values = np.concatenate(blocks)
    if differences:
        values = np.cumsum(values + values.dtype.type(1), dtype=dtype)
    raw = pack(values, differences=differences)
    np.testing.assert_array_equal(unpacked(raw, values.dtype, len(values)), values)


def test_patches_fill_a_quarter_but_for_one():
    """A count of patches is a byte, so 256 of a quarter are no patches."""
    for n in (254, 255, 256):
        values = np.zeros(1024, np.uint16)
        values[256 : 256 + n] = 2**15
        np.testing.assert_array_equal(unpacked(pack(values, differences=False), values.dtype, 1024), values)


def test_small_numbers_become_small():
    rng = np.random.default_rng(0)
    columns = np.concatenate([np.sort(rng.choice(38_000, 2000, replace=False)) for _ in range(50)]).astype(np.uint16)
    counts = rng.geometric(0.5, 100_000).astype(np.uint16)
    assert len(pack(columns, differences=True)) < 0.85 * len(columns)
    assert len(pack(counts, differences=False)) < 0.4 * len(counts)
    assert len(pack(np.full(10**6, 7, np.int64), differences=False)) < 20_000


def padded(values):
    """A copy amid bytes that must stay as they are."""
    whole = np.full(values.nbytes + 512, CANARY, np.uint8)
    inner = whole[256:-256]
    inner[:] = values.view(np.uint8)
    return whole, inner


def decode_damaged(raw, n, dtype, start, stop):
    """Decode without a fault; whatever lies around the two buffers stays as it was."""
    around, inner = padded(raw)
    out = np.full((stop - start) * dtype.itemsize, CANARY, np.uint8)
    out_around, out_inner = padded(out)
    status = unpack(inner, n, start, out_inner.view(dtype))
    assert status == 0 or status in DAMAGED
    for whole in (around, out_around):
        assert (whole[:256] == CANARY).all()
        assert (whole[-256:] == CANARY).all()
    np.testing.assert_array_equal(inner, raw)
    return status


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64"])
def test_damaged_bytes_are_refused_or_decode_to_something(dtype):
    """Flipped bits and whole bytes, most of them in the header and the table, where they lead astray."""
    rng, dtype = np.random.default_rng(0), np.dtype(dtype)
    values = rng.integers(0, 50, 4500).astype(dtype)
    values[rng.choice(4500, 200)] = np.iinfo(dtype).max
    found = set()
    for differences in (False, True):
        whole = pack(values, differences=differences)
        for _ in range(3000):
            raw = whole.copy()
            for _ in range(rng.integers(1, 4)):
                at = rng.integers(0, 120 if rng.random() < 0.8 else len(raw))
                raw[at] = rng.integers(0, 256) if rng.random() < 0.5 else raw[at] ^ (1 << rng.integers(0, 8))
            start, stop = np.sort(rng.integers(0, len(values) + 1, 2))
            found.add(decode_damaged(raw, len(values), dtype, start, stop))
    assert found == {0, 2, 3, 4, 5, 6}


def test_truncated_chunks_are_refused():
    values = np.random.default_rng(0).integers(0, 700, 3000, np.uint16)
    whole = pack(values, differences=True)
    for n in [*range(100), *range(100, len(whole), 97), len(whole) - 1]:
        status = decode_damaged(whole[:n].copy(), len(values), values.dtype, 0, len(values))
        assert status in (1, 5)


@pytest.mark.parametrize(
    ("n", "start", "n_out", "dtype", "status"),
    [
        (2999, 0, 2999, "uint16", 4),
        (3001, 0, 3001, "uint16", 4),
        (3000, 1, 3000, "uint16", 4),
        (3000, -1, 10, "uint16", 4),
        (3000, 3001, 0, "uint16", 4),
        (3000, 0, 3000, "uint32", 3),
        (10**15, 0, 5, "uint16", 4),
    ],
)
def test_another_chunk_than_expected_is_refused(n, start, n_out, dtype, status):
    raw = pack(np.arange(3000, dtype=np.uint16), differences=True)
    assert unpack(raw, n, start, np.zeros(n_out, dtype)) == status


def test_random_bytes_behind_a_true_header_touch_nothing():
    rng = np.random.default_rng(1)
    head = pack(np.zeros(5000, np.uint32), differences=True)[:16]
    found = set()
    for _ in range(3000):
        raw = np.concatenate([head, rng.integers(0, 256, rng.integers(0, 3000), dtype=np.uint8)])
        if len(raw) > 100 and rng.random() < 0.5:  # places that are likely to be in the chunk
            raw[16:96].reshape(5, 16)[:, 1:4] = 0
        found.add(decode_damaged(raw, 5000, np.dtype(np.uint32), 0, 5000))
    assert {1, 5, 6} <= found


# ------------------------------------------------------------------------------------------ runs of several chunks


def chunks_of(values, edges, differences):
    """Packed chunks of some values, with bytes between them; and their table."""
    raw, table = [], []
    for a, b in pairwise(edges):
        packed = pack(values[a:b], differences=differences)
        table.append((a, b - a, sum(map(len, raw)) + 3, len(packed)))
        raw += [np.full(3, CANARY, np.uint8), packed]
    return np.concatenate([*raw, np.full(5, CANARY, np.uint8)]), np.array(table, np.int64).reshape(-1, 4)


@given(arrays(), st.booleans(), st.data())
@settings(max_examples=150)
def test_runs_go_to_their_places(values, differences, data):
    n = len(values)
    edges = sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=4))})
    cuts = np.array(sorted([*edges, *data.draw(st.lists(st.integers(0, n), max_size=20))]), np.int64)
    starts, lengths = cuts[:-1], np.diff(cuts)
    order = np.array(data.draw(st.permutations(range(len(starts)))), np.int64)
    if data.draw(st.booleans()):  # as they lie, and each block is decoded once
        order.sort()
    places = np.concatenate([[0], np.cumsum(lengths[order])]).astype(np.int64)
    raw, table = chunks_of(values, edges, differences)
    out = np.full(n + 2, 7, unsigned(values).dtype)
    assert unpack_runs(raw, table, starts[order], lengths[order], out[1:-1], places[:-1]) == 0
    want = [unsigned(values)[a : a + m] for a, m in zip(starts[order], lengths[order], strict=True)]
    np.testing.assert_array_equal(out[1:-1], np.concatenate([*want, out[:0]]))
    assert out[[0, -1]].tolist() == [7, 7]


@pytest.mark.parametrize(
    ("start", "length", "place", "status"),
    [
        *((0, 2001, 0, 4), (1999, 2, 0, 4), (3999, 2, 0, 4), (4000, 1, 0, 4), (-1, 2, 0, 5), (0, 1, -1, 4)),
        *((0, 2000, 1001, 4), (10, 5, 2996, 4), (10, 5, 2**62, 4), (2**62, 5, 0, 4), (10, 2**62, 0, 4)),
        *((1500, 0, -9, 0), (1500, -3, 0, 0), (10, 5, 2995, 0)),
    ],
)
def test_runs_outside_of_a_chunk_or_of_the_room_for_them_are_refused(start, length, place, status):
    values = np.arange(4000, dtype=np.uint16)
    raw, table = chunks_of(values, [0, 2000, 4000], differences=True)
    whole = np.full(5000, 7, np.uint16)
    found = unpack_runs(raw, table, *(np.array([x]) for x in (start, length)), whole[1000:4000], np.array([place]))
    assert found == status
    assert (whole[:1000] == 7).all()
    assert (whole[4000:] == 7).all()


@pytest.mark.parametrize("column", [1, 2, 3])
@pytest.mark.parametrize("value", [-1, 0, 5, 2**40, 2**62])
def test_a_table_that_leads_astray_is_refused(column, value):
    values = np.arange(4000, dtype=np.uint16)
    raw, table = chunks_of(values, [0, 2000, 4000], differences=True)
    table[1, column] = value
    assert unpack_runs(raw, table, np.array([2000]), np.array([2000]), np.zeros(2000, np.uint16), np.array([0])) > 0


def test_damaged_chunks_of_runs_touch_nothing_else():
    rng = np.random.default_rng(2)
    values = rng.integers(0, 50, 6000).astype(np.uint16)
    values[rng.choice(6000, 200)] = 2**16 - 1
    whole, table = chunks_of(values, [0, 3000, 6000], differences=False)
    starts = np.arange(0, 6000, 500)
    lengths, found = np.full(12, 500), set()
    for _ in range(3000):
        raw = whole.copy()
        for _ in range(rng.integers(1, 4)):
            at = table[rng.integers(0, 2), 2] + rng.integers(0, 70 if rng.random() < 0.8 else 3000)
            raw[min(at, len(raw) - 1)] = rng.integers(0, 256)
        out = np.full(6002, 7, np.uint16)
        found.add(unpack_runs(raw, table, starts, lengths, out[1:-1], starts))
        assert out[[0, -1]].tolist() == [7, 7]
    assert found == {0, 2, 3, 4, 5, 6}
