"""Strategies of the user's: what they are given, and which of their methods count."""

from __future__ import annotations

import pickle

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from annbatch_dask.scdataset import BlockShuffling, BlockWeightedSampling, SamplingStrategy, Streaming, scDataset

N = 90


class OfOneType(SamplingStrategy):
    """The rows of a cell type, which only the collection knows."""

    def get_indices(self, data_collection, seed=None, rng=None):
        return np.flatnonzero(data_collection.obs["cell_type"] == "B")


class WithLength(OfOneType):
    def get_len(self, data_collection):
        return int((data_collection.obs["cell_type"] == "B").sum())


@pytest.fixture
def cells():
    obs = pd.DataFrame({"cell_type": np.where(np.arange(N) % 3, "T", "B")}, index=[f"c{i}" for i in range(N)])
    x = sp.csr_matrix(np.arange(N, dtype=np.float32)[:, None] + 1)
    return ad.AnnData(x, obs=obs)


def rows_of(batches):
    return [int(row) - 1 for batch in batches for row in batch.X.toarray()[:, 0]]


@pytest.mark.parametrize("strategy", [OfOneType(), WithLength()])
@pytest.mark.parametrize("world_size", [1, 3])
def test_get_indices_is_given_the_collection(cells, strategy, world_size):
    found = []
    for rank in range(world_size):
        data = scDataset(cells, strategy, 4, 2, rank=rank, world_size=world_size, seed=0, even=None)
        batches = list(data)
        assert len(data) == len(batches)
        found += rows_of(batches)
    assert sorted(found) == list(range(0, N, 3))


def test_the_collection_is_pickled_once_and_may_be_exchanged(cells):
    data = scDataset(cells, OfOneType(), 4, seed=0)
    assert len(pickle.dumps(data)) < len(pickle.dumps(cells)) + 3000
    other = pickle.loads(pickle.dumps(data))
    assert rows_of(other) == list(range(0, N, 3))
    data.collection = cells[1:].copy()
    assert rows_of(data) == list(range(3, N, 3))
    assert len(data) == 8


def test_get_indices_of_a_derived_strategy_counts():
    class Ten(BlockShuffling):
        def get_indices(self, data_collection, seed=None, rng=None):
            return super().get_indices(data_collection, seed=seed, rng=rng)[:10]

    class Reversed(Streaming):
        def get_indices(self, data_collection, seed=None, rng=None):
            return np.arange(len(data_collection))[::-1]

    data = scDataset(np.arange(N), Ten(block_size=4), 4, 1, seed=3)
    first, second = list(data), list(data)
    assert len(data) == len(first) == 3
    assert len(np.unique(np.concatenate(first))) == 10
    assert np.concatenate(first).tolist() != np.concatenate(second).tolist()
    assert [batch.tolist() for batch in scDataset(np.arange(8), Reversed(), 4, 1, seed=0)] == [
        [4, 5, 6, 7],
        [0, 1, 2, 3],
    ]


def test_an_order_of_the_users_counts_more_than_get_indices_above_it():
    class Even(Streaming):
        def order(self, n_obs, key):
            return Streaming(np.arange(0, n_obs, 2)).order(n_obs, key)

    assert np.concatenate(list(scDataset(np.arange(N), Even(), 4, seed=0))).tolist() == list(range(0, N, 2))


@pytest.mark.parametrize("strategy", [BlockShuffling, BlockWeightedSampling])
def test_block_size_may_be_an_integer_of_numpys(strategy):
    data = [np.concatenate(list(scDataset(np.arange(N), strategy(size), 8, seed=0))) for size in (4, np.int64(4))]
    assert data[0].tolist() == data[1].tolist()
