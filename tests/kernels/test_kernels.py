"""The kernels against the obvious numpy."""

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from annbatch_dask.kernels import assemble
from annbatch_dask.kernels.assemble import SparseRows, copy_rows, scatter_rows
from annbatch_dask.kernels.fingerprint import add_dense, add_sparse, add_strings, field_salt, finish_rows
from annbatch_dask.kernels.rows import copy_runs, map_indices, names_twice, sort_rows
from annbatch_dask.kernels.values import narrow_counts, range_of

SALT = field_salt("X")
CYCLE = np.array([1, 2, 0])  # not its own inverse


def sparse_hashes(m, salt=SALT):
    hashes = np.zeros(m.shape[0], np.uint64)
    add_sparse(hashes, m.indptr.astype(np.int64), m.indices, m.data, salt)
    return hashes


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "float64", "int64", "bool"])
def test_copy_runs_gathers_rows_in_a_cycle(dtype):
    src = np.array([0, 1, 1, 0, 1, 1, 1], dtype)
    start, length = np.array([0, 2, 2]), np.array([2, 0, 5])
    new_length = length[CYCLE]
    dst_start = np.concatenate([[0], np.cumsum(new_length)[:-1]])
    out = np.empty_like(src)
    copy_runs(src, start[CYCLE], out, dst_start, new_length)
    want = np.concatenate([src[start[r] : start[r] + length[r]] for r in CYCLE])
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("source_dtype", ["uint8", "int8", "uint16", "int16", "int32", "uint32", "float32"])
@pytest.mark.parametrize("dtype", ["int32", "uint32", "float32"])
def test_rows_are_the_same_past_the_cache(monkeypatch, source_dtype, dtype):
    rng = np.random.default_rng(0)
    lengths = rng.choice([0, 1, 15, 16, 17, 33, 400], 60)
    ends = np.cumsum(lengths)
    order = rng.permutation(60)
    starts, lengths = (ends - lengths)[order], lengths[order]
    if np.dtype(source_dtype).kind == "f":
        source = rng.integers(0, 2**31, ends[-1]).astype(source_dtype)
        dtype = source_dtype  # no other is written so
    else:
        source = rng.integers(-(2**31), 2**32, ends[-1]).astype(source_dtype)
    found = {}
    for least in (0, 2**60):
        monkeypatch.setattr(assemble, "_MIN_STREAM_NBYTES", least)
        for shift in (0, 3):  # not at the beginning of a cache line
            out = np.full(ends[-1] + 40, 7, dtype)[shift:]
            copy_rows(source, starts, lengths, out, np.cumsum(lengths) - lengths + 5)
            found[least, shift] = out[: ends[-1] + 37]
    for out in list(found.values())[1:]:
        np.testing.assert_array_equal(out, found[0, 0])
    whole = np.concatenate([source[a : a + n] for a, n in zip(starts, lengths, strict=True)])
    np.testing.assert_array_equal(found[0, 0][5 : 5 + ends[-1]], whole.astype(dtype))
    assert (found[0, 0][:5] == 7).all()
    assert (found[0, 0][5 + ends[-1] :] == 7).all()


@pytest.mark.parametrize("dtype", ["uint16", "float32", "complex64"])
@pytest.mark.parametrize("n_columns", [1, 5, 16, 200, 211])
def test_dense_rows_are_the_same_past_the_cache(monkeypatch, dtype, n_columns):
    rng = np.random.default_rng(n_columns)
    rows = [np.flatnonzero(rng.random(n_columns) < 0.3) for _ in range(30)]
    rows += [rng.integers(-1, n_columns + 1, 20) for _ in range(10)]  # repeated, unordered, outside
    lengths = np.array([len(row) for row in rows])
    columns = np.concatenate(rows).astype(np.int32)
    sparse = SparseRows(rng.integers(1, 9, len(columns)).astype(np.uint16), columns)
    to, found = rng.permutation(42)[:40], {}
    for least in (0, 2**60):
        monkeypatch.setattr(assemble, "_MIN_STREAM_NBYTES", least)
        for shift in (0, 3):  # not at the beginning of a cache line
            flat = np.full(42 * n_columns + 20, 7, dtype)
            dense = flat[shift : shift + 42 * n_columns].reshape(42, n_columns)
            counts = scatter_rows(sparse, np.cumsum(lengths) - lengths, lengths, dense, to)
            assert (flat[:shift] == 7).all()
            assert (flat[shift + 42 * n_columns :] == 7).all()
            found[least, shift] = dense, counts
    dense, counts = found[2**60, 0]
    assert counts[0] > 0
    assert (np.delete(dense, to, axis=0) == 7).all()
    for other, its_counts in found.values():
        np.testing.assert_array_equal(other, dense)
        assert its_counts == counts


@given(
    st.lists(st.lists(st.integers(-1, 8), max_size=9) | st.sets(st.integers(0, 7)).map(sorted), min_size=1, max_size=5),
    st.sampled_from([None, [3, -1, 0, 2, -1, -1, 1, -1]]),
    st.randoms(use_true_random=False),
)
def test_rows_become_dense_whatever_the_order_of_their_columns(rows, places, random):
    """Rows that ascend and exist are stored, others are added up; -1 and 8 are columns that the data lacks."""
    lengths = np.array([len(r) for r in rows])
    columns = np.array([c for r in rows for c in r], np.int32)
    values = np.arange(1, len(columns) + 1, dtype=np.uint16)
    to = np.array(random.sample(range(len(rows)), len(rows)))
    selected = None if places is None else np.array(places, np.int32)
    dense = np.full((len(rows), 8 if places is None else 4), 99, np.float32)
    want, n_outside = np.zeros_like(dense), 0
    for row, column, value in zip(np.repeat(to, lengths), columns, values, strict=True):
        is_inside = 0 <= column < 8
        n_outside += not is_inside
        place = column if places is None or not is_inside else places[column]
        if is_inside and place >= 0:
            want[row, place] += value
    starts = np.cumsum(lengths) - lengths
    found = scatter_rows(SparseRows(values, columns), starts, lengths, dense, to, selected)
    np.testing.assert_array_equal(dense, want)
    assert found[0] == n_outside


def test_copy_runs_refuses_a_cast():
    with pytest.raises(TypeError, match="float32 and uint8"):
        copy_runs(np.zeros(1, "f4"), np.zeros(1, "i8"), np.zeros(1, "u1"), np.zeros(1, "i8"), np.ones(1, "i8"))


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint16"])
def test_map_indices(dtype):
    gene_map = np.array([5, 3, 9], np.uint16)
    out = np.empty(4, np.uint16)
    assert map_indices(np.array([2, 0, 1, 2], dtype), gene_map, out)
    assert out.tolist() == [9, 5, 3, 9]
    assert not map_indices(np.array([0, 3], dtype), gene_map, np.empty(2, np.uint16))
    assert map_indices(np.array([], dtype), gene_map[:0], out[:0])


def test_map_indices_refuses_negative_ones():
    assert not map_indices(np.array([0, -1], np.int32), np.zeros(3, np.uint16), np.empty(2, np.uint16))


def test_sort_rows_is_stable_within_rows():
    keys = np.array([3, 1, 1, 2, 0], np.uint16)
    order = np.empty(5, np.int64)
    sort_rows(np.array([0, 3, 3, 5]), keys, order)
    assert order.tolist() == [1, 2, 0, 4, 3]


@pytest.mark.parametrize(("dtype", "highest"), [(np.uint16, 2**16 - 1), (np.int32, 2**31 - 1)])
@given(rows=st.lists(st.integers(0, 70), max_size=5), width=st.integers(1, 32), seed=st.integers(0, 99))
def test_sort_rows_is_numpys_stable_sort(dtype, highest, rows, width, seed):
    offsets = np.cumsum([0, *rows])
    keys = np.random.default_rng(seed).integers(0, min(highest, 2**width), offsets[-1], endpoint=True).astype(dtype)
    order = np.empty(len(keys), np.int64)
    sort_rows(offsets, keys, order)
    want = [a + np.argsort(keys[a:b], kind="stable") for a, b in zip(offsets, offsets[1:], strict=False)]
    assert order.tolist() == [*np.concatenate([*want, []])]


@given(
    hnp.arrays(
        np.float32,
        st.integers(0, 40),
        elements=st.sampled_from([0.0, 1.0, 300.0, -0.0, 0.5, np.nan, np.inf, -7.0, 2.0**25]),
    )
)
def test_range_of_floats(values):
    integral, low, high, single, n_nan, n_inf, *_ = range_of(values)
    finite_whole = all(np.isfinite(v) and v == int(v) and not (v == 0 and np.signbit(v)) for v in values)
    assert integral == finite_whole
    assert (n_nan, n_inf) == (np.isnan(values).sum(), np.isinf(values).sum())
    assert single
    finite = [0, *values[np.isfinite(values)].tolist()]
    assert (low, high) == (min(finite), max(finite))
    assert not integral or (type(low), type(high)) == (int, int)


@given(
    hnp.arrays(
        np.float64, st.integers(1, 20), elements=st.sampled_from([0.0, 1.0, 0.1, 1e300, 2.0**53 + 2, 2.0**70, np.nan])
    )
)
def test_range_of_doubles_knows_what_single_precision_loses(values):
    with np.errstate(over="ignore"):
        want = all(np.isnan(v) or np.float64(np.float32(v)) == v for v in values)
    assert range_of(values)[3] == want


@pytest.mark.parametrize("dtype", ["int64", "uint64", "int8"])
def test_range_of_integers_is_exact(dtype):
    info = np.iinfo(dtype)
    integral, low, high, *_ = range_of(np.array([info.min, info.max], dtype))
    assert (integral, low, high) == (True, min(0, int(info.min)), int(info.max))


@given(hnp.arrays(np.float32, st.integers(0, 40), elements=st.sampled_from([0.0, 1.0, 300.0, 65535.0])))
def test_counts_are_narrowed_exactly(values):
    out = np.empty(len(values), np.uint16)
    fits, greatest = narrow_counts(values, values.view(np.uint32), out)
    assert fits
    np.testing.assert_array_equal(out, values)
    assert greatest == max(values, default=0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("value", [-0.0, -1.0, 0.5, 65536.0, 1e30, np.nan, np.inf, -np.inf])
def test_what_is_no_count_is_not_narrowed(value, dtype):
    for place in (0, 7, 99):
        values = np.ones(100, dtype)
        values[place] = value
        fits, _ = narrow_counts(values, values.view(f"u{values.itemsize}"), np.empty(100, np.uint16))
        assert not fits


class TestFingerprint:
    """Equal content, equal sum; any change, another sum."""

    def matrix(self):
        return sp.random(50, 30, 0.3, "csr", np.float32, random_state=0)

    def test_does_not_depend_on_row_order_or_dtype(self):
        m = self.matrix()
        m.data = np.ceil(m.data * 10)
        whole = finish_rows(sparse_hashes(m))
        order = np.roll(np.arange(50), 7)
        assert finish_rows(sparse_hashes(m[order])) == whole
        assert finish_rows(sparse_hashes(m.astype(np.uint8))) == whole
        assert finish_rows(sparse_hashes(m.astype(np.float64))) == whole

    def test_does_not_depend_on_how_rows_fall_on_slabs(self, monkeypatch):
        m = self.matrix()
        whole = sparse_hashes(m)
        for slab in (1, 7, 64):
            monkeypatch.setattr("annbatch_dask.kernels.fingerprint._SLAB", slab)
            np.testing.assert_array_equal(sparse_hashes(m), whole)

    @pytest.mark.parametrize("dtype", ["uint8", "uint16"])
    def test_counts_take_a_fast_path_that_adds_the_same(self, dtype):
        m = self.matrix()
        m.data = np.ceil(m.data * 200)
        offsets, keys = m.indptr.astype(np.int64), m.indices.astype(np.uint16)
        fast, plain = np.zeros(50, np.uint64), np.zeros(50, np.uint64)
        add_sparse(fast, offsets, keys, m.data.astype(dtype), SALT)
        add_sparse(plain, offsets, m.indices, m.data.astype(np.float64), SALT)
        np.testing.assert_array_equal(fast, plain)

    @pytest.mark.parametrize("what", ["value", "column", "lost", "row"])
    def test_sees_one_change(self, what):
        m = self.matrix()
        other = m.copy()
        if what == "value":
            other.data[3] += 1
        elif what == "column":
            other.indices[3] = (other.indices[3] + 1) % 30
        elif what == "lost":
            other = other[1:]
        else:  # two rows trade one value each
            other.data[[0, -1]] = other.data[[-1, 0]]
        assert finish_rows(sparse_hashes(m)) != finish_rows(sparse_hashes(other))

    def test_two_nans_are_one(self):
        a = np.array([[np.nan]], np.float32)
        b = np.array([0x7FF8000000000001], np.uint64).view(np.float64).reshape(1, 1)
        for values in (a, b):
            dense = np.zeros(1, np.uint64)
            add_dense(dense, values, SALT)
            sparse = sparse_hashes(sp.csr_matrix((values.ravel(), [0], [0, 1])))
            if values is a:
                want = dense.copy(), sparse.copy()
        np.testing.assert_array_equal((dense, sparse), want)

    def test_strings(self):
        def of(*strings):
            raw = [s.encode() for s in strings]
            hashes = np.zeros(len(raw), np.uint64)
            offsets = np.cumsum([0, *map(len, raw)])
            add_strings(hashes, offsets, np.frombuffer(b"".join(raw), np.uint8), SALT)
            return hashes.tolist()

        assert of("a", "bc") == of("a") + of("bc")
        assert len(set(of("", "a", "b", "ab", "ba", "μ"))) == 6

    def test_fields_do_not_cancel(self):
        one, two = np.zeros(1, np.uint64), np.zeros(1, np.uint64)
        add_dense(one, np.array([[1.0]]), field_salt("a"))
        add_dense(one, np.array([[2.0]]), field_salt("b"))
        add_dense(two, np.array([[2.0]]), field_salt("a"))
        add_dense(two, np.array([[1.0]]), field_salt("b"))
        assert one != two


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
@pytest.mark.parametrize(
    ("rows", "is_so"),
    [
        ([], False),
        ([[]], False),
        ([[1, 2], [2, 3]], False),
        ([[5], [], [5], [1]], False),
        ([[3, 1], [2, 1]], False),
        ([[1, 1]], True),
        ([[], [4], [1, 3, 1]], True),
        ([[0, 2], [3, 3, 4]], True),
    ],
)
def test_rows_that_name_one_twice(rows, is_so, dtype):
    flat = np.array([k for row in rows for k in row], dtype)
    offsets = np.append(0, np.cumsum([len(row) for row in rows])).astype(np.int64)
    assert names_twice(offsets, flat, 6) is is_so
