"""The compiled permutation is numpy's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from annbatch_dask.kernels.shuffle import permute
from annbatch_dask.order import keys


@settings(deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 5000))
def test_it_is_numpys(first, second, n):
    key = np.array([first, second], np.uint64)
    found = permute(key, n)
    expected = np.random.Generator(np.random.Philox(key=key)).permutation(n)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 16383, 16384, 16385, 300_000])
def test_orders_are_those_of_the_generator_of_a_position(n, monkeypatch):
    expected = keys.generator((3, 5), 0, 7).permutation(n)
    np.testing.assert_array_equal(keys.permutation(n, (3, 5), 0, 7), expected)
    monkeypatch.setattr(keys, "MAX_PERMUTED", -1)
    np.testing.assert_array_equal(keys.permutation(n, (3, 5), 0, 7), expected)
