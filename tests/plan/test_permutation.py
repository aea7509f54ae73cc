"""The shuffle is a bijection, and a uniform one; a shuffle by blocks of rows is caught by the same checks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from annbatch_dask.errors import LayoutError
from annbatch_dask.plan.permutation import IDENTITY, Permutation

BLOCK = 1000


class BlockShuffle:
    """What annbatch does: runs of rows are shuffled, dealt to datasets, and rows permuted within a dataset."""

    def __init__(self, n_obs, seed, block=BLOCK, dataset_rows=None):
        rng = np.random.default_rng(seed)
        runs = np.array_split(np.arange(n_obs), range(block, n_obs, block))
        order = np.concatenate([runs[i] for i in rng.permutation(len(runs))])
        size = dataset_rows or max(block, n_obs // 10 // block * block)
        for a in range(0, n_obs, size):
            rng.shuffle(order[a : a + size])
        self._place = np.empty(n_obs, np.int64)
        self._place[order] = np.arange(n_obs)

    def forward(self, rows):
        return self._place[rows]


def position_p_value(shuffle, n, n_seeds, n_cells):
    """Chi-square of (row, where it lands), rows and places counted in n_cells bins each, over many seeds."""
    counts = np.zeros((n_cells, n_cells))
    rows = np.arange(n)
    for seed in range(n_seeds):
        places = shuffle(n, seed).forward(rows)
        np.add.at(counts, (rows * n_cells // n, places * n_cells // n), 1)
    expected = np.outer(counts.sum(1), counts.sum(0)) / counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    # rows of one permutation exclude each other's places, which shrinks the variance a little
    return stats.chi2.sf(statistic, (n_cells - 1) ** 2)


def neighbour_p_value(shuffle, n, n_seeds, n_datasets):
    """Whether rows 2i and 2i + 1 share a dataset as often as two random rows do (z test over pairs and seeds)."""
    size = n // n_datasets
    first = np.arange(0, n - 1, 2)
    together = total = 0
    for seed in range(n_seeds):
        p = shuffle(n, seed)
        a, b = p.forward(first) // size, p.forward(first + 1) // size
        together += int((a == b).sum())
        total += len(first)
    sizes = np.bincount(np.minimum(np.arange(n) // size, n // size))
    chance = (sizes * (sizes - 1)).sum() / (n * (n - 1))
    return stats.binomtest(together, total, chance).pvalue


SIZES = [(8, 2000, 8), (64, 1000, 8), (1000, 200, 20), (20_000, 20, 50), (1_000_000, 3, 100)]
PAIRS = [(8, 2000, 2), (64, 1000, 4), (1000, 200, 5), (20_000, 20, 10), (1_000_000, 2, 10)]


@pytest.mark.parametrize(("n", "n_seeds", "n_cells"), SIZES)
def test_positions_are_uniform(n, n_seeds, n_cells):
    assert 1e-4 < position_p_value(Permutation, n, n_seeds, n_cells)


@pytest.mark.parametrize(("n", "n_seeds", "n_datasets"), PAIRS)
def test_neighbours_part_ways_like_strangers(n, n_seeds, n_datasets):
    assert 1e-4 < neighbour_p_value(Permutation, n, n_seeds, n_datasets)


def test_every_order_of_four_rows_comes_equally_often():
    seen = np.zeros(256)
    for seed in range(24 * 100):
        seen[int(Permutation(4, seed).forward(np.arange(4)) @ [64, 16, 4, 1])] += 1
    counts = seen[seen > 0]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-4


def test_the_checks_catch_a_shuffle_by_blocks():
    """The very calls of the tests above that pass for the permutation."""
    for n, n_seeds, n_cells in SIZES[3:]:
        assert position_p_value(BlockShuffle, n, n_seeds, n_cells) < 1e-12
    for n, n_seeds, n_datasets in PAIRS[3:]:
        assert neighbour_p_value(BlockShuffle, n, n_seeds, n_datasets) < 1e-12


def test_the_checks_catch_rows_that_stay_near_their_place():
    class Local:
        def __init__(self, n, seed):
            self.place = np.argsort(np.arange(n) + np.random.default_rng(seed).uniform(0, n / 10, n)).argsort()

        def forward(self, rows):
            return self.place[rows]

    assert position_p_value(Local, 1000, 20, 20) < 1e-12


@given(st.integers(1, 3000), st.integers(0, 2**63 - 1))
def test_is_a_bijection_with_its_inverse(n, seed):
    p = Permutation(n, seed)
    rows = np.arange(n)
    places = p.forward(rows)
    assert np.array_equal(np.sort(places), rows)
    assert np.array_equal(p.inverse(places), rows)
    assert np.array_equal(p.forward(p.inverse(rows)), rows)


@given(st.integers(2, 2**40), st.data())
def test_large_domains(n, data):
    rows = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=50, unique=True)))
    p = Permutation(n, 7)
    places = p.forward(rows)
    assert len(np.unique(places)) == len(rows)
    assert ((places >= 0) & (places < n)).all()
    assert np.array_equal(p.inverse(places), rows)


def test_is_not_its_own_inverse():
    p = Permutation(100, 0)
    rows = np.arange(100)
    assert not np.array_equal(p.forward(p.forward(rows)), rows)


def test_any_subset_of_rows_in_any_order():
    p = Permutation(1000, 3)
    whole = p.forward(np.arange(1000))
    some = np.array([999, 0, 500, 0])
    assert np.array_equal(p.forward(some), whole[some])


def test_values_are_fixed_by_name_and_version():
    """A change here makes resumed builds and old manifests wrong: raise the version instead."""
    assert Permutation(10, 0).forward(np.arange(10)).tolist() == FIXED_10
    assert Permutation(10**9, 1).forward(np.array([0, 1, 10**9 - 1])).tolist() == FIXED_1E9


FIXED_10 = [6, 1, 9, 0, 2, 5, 7, 8, 4, 3]
FIXED_1E9 = [684774935, 746952415, 703252148]


def test_identity():
    p = Permutation(10, 5, IDENTITY)
    assert np.array_equal(p.forward(np.arange(10)), np.arange(10))
    assert np.array_equal(p.inverse(np.arange(10)), np.arange(10))


def test_unknown_names_versions_and_seeds_are_refused():
    with pytest.raises(LayoutError, match="not known to this release"):
        Permutation(10, 0, "feistel")
    with pytest.raises(LayoutError, match="version 2"):
        Permutation(10, 0, version=2)
    with pytest.raises(LayoutError, match="seed is -1"):
        Permutation(10, -1)
