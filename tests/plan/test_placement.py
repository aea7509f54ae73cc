"""New rows dealt into datasets: a bijection, in which each is equally likely to land anywhere it may."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from annbatch_dask.plan.permutation import IDENTITY
from annbatch_dask.plan.placement import ExtendPermutation, deal

sizes = st.lists(st.integers(1, 50), min_size=1, max_size=6).map(tuple)


@given(sizes, st.integers(0, 200))
def test_shares_are_in_proportion(old, n_new):
    shares = deal(old, n_new)
    assert sum(shares) == n_new
    assert all(abs(s - n_new * n / sum(old)) < 1 for s, n in zip(shares, old, strict=True))


@given(sizes, st.integers(0, 100), st.integers(0, 2**63), st.sampled_from(["swap-or-not", IDENTITY]))
def test_every_place_is_taken_once_and_old_rows_stay_in_their_dataset(old, n_new, seed, name):
    dealt = ExtendPermutation(old, deal(old, n_new), seed, name)
    places = dealt.forward(np.arange(dealt.n_obs))
    assert sorted(places.tolist()) == list(range(dealt.n_obs))
    sizes = np.add(dealt.old, dealt.new)
    dataset = np.searchsorted(np.cumsum(sizes), places, side="right")
    np.testing.assert_array_equal(dataset[: sum(old)], np.repeat(np.arange(len(old)), old))
    np.testing.assert_array_equal(np.bincount(dataset[sum(old) :], minlength=len(old)), dealt.new)
    some = np.arange(dealt.n_obs)[::-3]
    np.testing.assert_array_equal(dealt.forward(some), places[some])
    if name == IDENTITY:
        assert (np.diff(places[: sum(old)]) > 0).all()
        assert (np.diff(places[sum(old) :]) > 0).all()


def test_places_are_uniform_over_seeds():
    old, rows = (8, 4), np.array([0, 11, 12, 29])
    places = np.array([ExtendPermutation(old, deal(old, 18), seed).forward(rows) for seed in range(1500)])
    allowed = [range(20), range(20, 30), range(30), range(30)]
    for found, where in zip(places.T, allowed, strict=True):
        counts = np.bincount(found, minlength=30)[where]
        assert counts.sum() == 1500
        assert 1e-4 < stats.chisquare(counts).pvalue
