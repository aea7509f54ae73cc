"""Runs and places of rows are what numpy finds in more steps."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from annbatch_dask.kernels.row_runs import (
    deal_batches,
    deal_rows,
    find_runs,
    lay_out,
    lie_within,
    locate_rows,
    place_entries,
)

N_ROWS = 60
parts = st.tuples(st.integers(0, N_ROWS - 1), st.integers(1, 12), st.sampled_from([1, 1, 1, 2]))


def rows_of(drawn):
    """Slices of rows one after the other: in any order, that overlap, touch or repeat."""
    made = [np.arange(start, min(start + n * step, N_ROWS), step) for start, n, step in drawn]
    return np.concatenate(made) if made else np.zeros(0, np.int64)


@given(st.lists(parts, max_size=8))
def test_runs_cover_the_rows_and_no_others(drawn):
    rows = rows_of(drawn)
    spans, span, position = find_runs(rows)
    read = np.concatenate([np.arange(a, b) for a, b in spans] or [np.zeros(0, np.int64)])
    np.testing.assert_array_equal(read, np.unique(rows))
    assert (spans[1:, 0] > spans[:-1, 1]).all()
    np.testing.assert_array_equal(read[position], rows)
    assert ((spans[span, 0] <= rows) & (rows < spans[span, 1])).all()


@given(st.lists(parts, max_size=8), st.integers(0, 2**32 - 1))
def test_entries_are_those_of_the_rows(drawn, seed):
    rows = rows_of(drawn)
    indptr = np.concatenate([[0], np.cumsum(np.random.default_rng(seed).integers(0, 5, N_ROWS))])
    row_spans, span, _ = find_runs(rows)
    spans, starts, lengths = place_entries(indptr, rows, row_spans, span)
    read = np.concatenate([np.arange(a, b) for a, b in spans] or [np.zeros(0, np.int64)])
    for row, start, length in zip(rows, starts, lengths, strict=True):
        np.testing.assert_array_equal(read[start : start + length], np.arange(indptr[row], indptr[row + 1]))


@given(st.lists(parts, max_size=8), st.integers(0, 2**32 - 1))
def test_rows_are_located_as_in_two_steps(drawn, seed):
    rows = rows_of(drawn)
    indptr = np.concatenate([[0], np.cumsum(np.random.default_rng(seed).integers(0, 5, N_ROWS))])
    row_spans, span, position = find_runs(rows)
    placed = place_entries(indptr, rows, row_spans, span)
    *found, n_entries = locate_rows(indptr, rows)
    for got, expected in zip(found, (row_spans, position, *placed), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert n_entries == np.diff(placed[0]).sum()


@given(st.lists(st.integers(-2, 9), max_size=8), st.integers(0, 8))
def test_rows_lie_within_what_there_is(rows, n_rows):
    assert lie_within(np.array(rows, np.int64), n_rows) == all(0 <= row < n_rows for row in rows)


@given(st.lists(st.integers(-2, N_ROWS + 2), max_size=8), st.lists(st.integers(0, N_ROWS), max_size=5))
def test_rows_that_no_part_has_are_told(rows, cuts):
    firsts, *_ = deal_rows(np.array(rows, np.int64), np.array([0, *sorted(cuts), N_ROWS]))
    assert (firsts[0] < 0) == (not all(0 <= row < N_ROWS for row in rows))


@given(st.lists(parts, max_size=8), st.lists(st.integers(0, N_ROWS), max_size=5))
def test_rows_are_dealt_to_the_parts_that_hold_them(drawn, cuts):
    rows, offsets = rows_of(drawn), np.array([0, *sorted(cuts), N_ROWS])
    firsts, places, local, number, position = deal_rows(rows, offsets)
    part = np.searchsorted(offsets, rows, side="right") - 1
    for k in range(len(offsets) - 1):
        own = slice(firsts[k], firsts[k + 1])
        np.testing.assert_array_equal(places[own], np.flatnonzero(part == k))
        np.testing.assert_array_equal(local[own] + offsets[k], rows[part == k])
    _, expected = np.unique(part, return_inverse=True)
    np.testing.assert_array_equal(number, expected)
    for i in range(len(rows)):
        assert places[firsts[part[i]] + position[i]] == i


@given(st.lists(st.tuples(st.integers(-3, 40), st.integers(-3, 40), st.integers(1, 4)), max_size=6))
def test_runs_are_laid_out_as_numpy_does(runs):
    expected = np.concatenate([np.zeros(0, np.int64), *(np.arange(*run) for run in runs)])
    np.testing.assert_array_equal(lay_out(np.array(runs, np.int64).reshape(-1, 3)), expected)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(0, 2**32 - 1), st.integers(0, 5))
def test_batches_have_their_rows_by_part(parts, seed, n_batches):
    rng = np.random.default_rng(seed)
    _, number = np.unique(parts, return_inverse=True)
    n_each = np.bincount(number)
    firsts = np.cumsum(n_each) - n_each
    position = np.array([np.sum(number[:i] == k) for i, k in enumerate(number)])
    splits = [rng.integers(0, len(parts), rng.integers(0, 20)) for _ in range(n_batches)]
    dealt = np.concatenate([np.zeros(0, np.int64), *splits])
    slots, rows, cuts = deal_batches(
        dealt, np.cumsum([len(s) for s in splits], dtype=np.int64), number, position, firsts
    )
    for split, cut in zip(splits, cuts, strict=True):
        for k in range(len(n_each)):
            own = slice(cut[k], cut[k + 1])
            np.testing.assert_array_equal(slots[own], np.flatnonzero(number[split] == k))
            np.testing.assert_array_equal(rows[own], firsts[k] + position[split[slots[own]]])
    assert len(slots) == len(dealt)
