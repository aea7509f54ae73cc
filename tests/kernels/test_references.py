"""References to objects are taken as numpy takes them, and counted as often as they are there."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from annbatch_dask.kernels.references import take_references


def counts(objects):
    """How often each is referred to."""
    return np.array([sys.getrefcount(objects[k]) for k in range(len(objects))])


@given(st.data())
def test_references_are_taken_as_numpy_takes_them(data):
    n = data.draw(st.integers(1, 40))
    objects = np.array([f"cell-{k}-of-{n}" for k in range(n)], object)
    before = counts(objects)
    rows = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=30)), np.int64)
    shuffled = st.permutations(range(len(rows)))
    any_order = st.lists(st.integers(0, max(len(rows) - 1, 0)), max_size=40 if len(rows) else 0)
    order = np.array(data.draw(st.one_of(shuffled, any_order)), np.int64)
    taken = take_references(objects, rows, order)
    assert taken.dtype == object
    assert all(a is b for a, b in zip(taken, objects[rows[order]], strict=True))
    each = np.bincount(rows[order], minlength=n) if len(order) else np.zeros(n, int)
    assert (counts(objects) - before).tolist() == each.tolist()
    del taken
    assert counts(objects).tolist() == before.tolist()


def test_references_of_rows_that_are_not_there_are_refused():
    objects = np.array(["a", "b", "c"], object)
    for rows in ([0, 3], [10**12, 0]):
        with pytest.raises(IndexError):
            take_references(objects, np.array(rows), np.arange(2))
    assert take_references(objects[::2], np.array([0, 1]), np.array([1, 0])).tolist() == ["c", "a"]
