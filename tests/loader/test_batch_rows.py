"""What is found for all batches of a window at once is what each batch would find for itself."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from annbatch_dask.kernels.row_runs import deal_rows
from annbatch_dask.loader.batch import CsrParts
from annbatch_dask.loader.blocks import DealtRows, Loaded, SparseBlock
from annbatch_dask.loader.output import make_deliver
from annbatch_dask.loader.requests import Resolved
from annbatch_dask.order.planned import expand


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_rows_of_all_batches_are_placed_as_those_of_each(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    bounds = np.cumsum([0, *data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))])
    rows = rng.integers(0, bounds[-1], data.draw(st.integers(0, 30)))
    sizes = data.draw(st.lists(st.integers(0, 8), max_size=4)) if len(rows) else []
    splits = [rng.integers(0, max(len(rows), 1), size) for size in sizes]
    asked = Resolved.of({"requests": rows, "splits": splits}, bounds)
    assignments, places = asked.assignments, asked.places
    lengths = rng.integers(0, 5, len(rows))
    blocks, flat, few = [], np.arange(1000), np.arange(1000, dtype=np.uint16)
    for assignment in assignments:
        starts = rng.integers(0, 900, len(assignment.rows))
        blocks.append(SparseBlock(flat, few, starts, lengths[assignment.places]))
    n_each = [len(assignment.rows) for assignment in assignments]
    dealt = np.concatenate([np.zeros(0, np.int64), *splits])
    batches = DealtRows.of(dealt, sizes, places, n_each)
    loaded = Loaded(blocks, *places, lengths, np.dtype("int64"), rows, batches)
    assert len(batches) == len(splits)
    assert (loaded.entries is None) == (not blocks)
    for number, split in enumerate(splits):
        batch = batches[number]
        run = loaded.sparse_rows.run(batch)
        np.testing.assert_array_equal(run.pointers, np.cumsum([0, *lengths[split]]))
        np.testing.assert_array_equal(np.sort(batch.slots), np.arange(len(split)))
        np.testing.assert_array_equal(run.lengths, lengths[split][batch.slots])
        np.testing.assert_array_equal(run.dest, run.pointers[batch.slots])
        if loaded.entries is not None:
            entries, starts = loaded.entries.of_batch(batch), np.zeros(len(split), np.int64)
            starts[batch.slots] = run.starts
            np.testing.assert_array_equal(entries.pointers, run.pointers)
            np.testing.assert_array_equal(entries.short, run.pointers)
            np.testing.assert_array_equal(entries.values, flat.ctypes.data + starts * flat.itemsize)
            np.testing.assert_array_equal(entries.columns, few.ctypes.data + starts * few.itemsize)
        for block, piece in batch.pieces(3):
            window_rows = split[batch.slots[piece]]
            assert set(places[0][window_rows].tolist()) <= {block}
            np.testing.assert_array_equal(run.starts[piece], blocks[block].starts[places[1][window_rows]])


@pytest.mark.parametrize("dtype", ["float32", "uint8", "int64"])
@pytest.mark.parametrize("shape", [(4, 7), (0, 7), (3, 1)])
def test_a_csr_matrix_is_what_scipy_makes_of_its_parts(shape, dtype):
    matrix = sp.random(*shape, density=0.4, format="csr", random_state=0).astype(dtype)
    plain = sp.csr_matrix((matrix.data, matrix.indices, matrix.indptr), shape=shape, copy=False)
    deliver = make_deliver(None, on_gpu=False)
    for _ in range(2):  # what scipy finds out about one is not known of the next
        made = deliver(CsrParts(matrix.data, matrix.indices, matrix.indptr, shape))
        assert type(made) is sp.csr_matrix
        assert vars(made).keys() == vars(plain).keys()
        for name, value in vars(plain).items():
            found = vars(made)[name]
            np.testing.assert_array_equal(found, value)
            assert getattr(found, "dtype", None) == getattr(value, "dtype", None)
        made.check_format(full_check=True)
        assert made.has_sorted_indices
        np.testing.assert_array_equal((made * 2 + made[::-1][::-1]).toarray(), matrix.toarray() * 3)
        assert (made.copy() != plain).nnz == 0
        assert made.dtype == dtype


@given(st.data())
def test_pieces_of_one_array_are_joined_as_any_others(data):
    whole = np.random.default_rng(0).permutation(20)
    cuts = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=5))
    pieces = st.tuples(st.sampled_from(cuts), st.sampled_from(cuts), st.sampled_from([1, 1, 1, 2, -1]))
    in_order = [whole[a:b] for a, b in pairwise(sorted({0, *cuts}))]
    anyhow = [whole[a:b:step] for a, b, step in data.draw(st.lists(pieces, max_size=4))]
    for splits in (in_order, anyhow, in_order[1:], [split.astype(np.int32) for split in in_order], [whole]):
        asked = Resolved.of({"requests": [slice(5, 25)], "splits": splits}, np.array([0, 30]))
        np.testing.assert_array_equal(asked.dealt, np.concatenate([np.zeros(0, np.int64), *splits]))
        np.testing.assert_array_equal(asked.taken, asked.dealt + 5)
        assert all((a == b).all() for a, b in zip(asked.splits, splits, strict=True))


SLICES = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12), st.sampled_from([None, 1, 3])), max_size=4)


@given(SLICES, st.booleans(), st.lists(st.integers(0, 30), max_size=9), st.lists(st.integers(1, 11), max_size=3))
def test_a_request_is_looked_up_as_in_single_steps(runs, as_array, split, cuts):
    bounds = np.array([0, *sorted(cuts), 11])
    requests = [slice(*run) for run in runs]
    rows = expand(requests)
    split = np.array(split, np.int64)
    request = {"requests": rows if as_array else requests, "splits": [split, split[:2]]}
    if rows.max(initial=0) >= bounds[-1] or split.max(initial=-1) >= len(rows):
        with pytest.raises(IndexError):
            Resolved.of(request, bounds)
        return
    asked = Resolved.of(request, bounds)
    np.testing.assert_array_equal(asked.rows, rows)
    np.testing.assert_array_equal(asked.taken, rows[np.concatenate([split, split[:2]])])
    firsts, places, local, *where = deal_rows(rows, bounds)
    parts = [(d, firsts[d], firsts[d + 1]) for d in range(len(bounds) - 1) if firsts[d] < firsts[d + 1]]
    for assignment, (d, first, stop) in zip(asked.assignments, parts, strict=True):
        assert assignment.dataset == d
        np.testing.assert_array_equal(assignment.places, places[first:stop])
        np.testing.assert_array_equal(assignment.rows, local[first:stop])
    for found, expected in zip(asked.places, where, strict=True):
        np.testing.assert_array_equal(found, expected)
