"""One sampler of every kind over 95 rows, each made anew with the same seed."""

from __future__ import annotations

import numpy as np
import pandas as pd

from annbatch_dask.loader import Loader
from annbatch_dask.samplers import (
    CellSets,
    ClassSampler,
    DistributedSampler,
    MatchedControlSampler,
    RandomSampler,
    SequentialSampler,
    WeightedClassSampler,
)
from annbatch_dask.scdataset import BlockShuffling, BlockWeightedSampling, StrategySampler
from tests.loader.data import matrix
from tests.samplers.tools import Minimal, rng

N_OBS = 95
X = matrix(N_OBS)
CLASSES = pd.Categorical.from_codes(np.repeat([0, 1, 2], [30, 40, 25]), list("ABC"))


class Drawn(Minimal):
    """A sampler of a user's, which asks its generator as it goes."""

    def n_batches(self, n_obs):
        return 10

    def _sample(self, n_obs):
        for _ in range(5):
            yield {"requests": self.rng.integers(0, n_obs, 10), "splits": np.array_split(self.rng.permutation(10), 2)}


def drawn():
    sampler = Drawn([])
    sampler.rng = np.random.default_rng(5)
    return sampler


SAMPLERS = {
    "sequential": lambda: SequentialSampler(5, 4, 4),
    "random": lambda: RandomSampler(5, 4, 4, rng=rng()),
    "unseeded": lambda: RandomSampler(5, 4, 4),
    "replacement": lambda: RandomSampler(5, 4, 4, replacement=True, num_samples=70, rng=rng()),
    "class": lambda: ClassSampler(5, 4, 4, classes=CLASSES, num_samples=90, rng=rng()),
    "weighted class": lambda: WeightedClassSampler(5, 4, 4, classes=CLASSES, num_samples=90, rng=rng()),
    "rank": lambda: DistributedSampler(RandomSampler(5, 2, 2, rng=rng()), dist_info=(1, 3)),
    "global": lambda: DistributedSampler(RandomSampler(5, 4, 4, rng=rng()), dist_info=(1, 2), global_batches=True),
    "matched": lambda: MatchedControlSampler(
        5, 4, 4, is_control=np.arange(N_OBS) % 4 > 0, match=np.arange(N_OBS) % 3, rng=rng()
    ),
    "sets": lambda: CellSets(
        4, 2, groups=CLASSES, is_control=np.arange(N_OBS) % 4 > 2, match=CLASSES, preload_nsets=4, rng=rng()
    ),
    "blocks": lambda: StrategySampler(BlockShuffling(4), 4, 5, rng=rng()),
    "rounds": lambda: StrategySampler(
        BlockWeightedSampling(4, weights=1.0 + np.arange(N_OBS), replace=False, sampling_size=30), 4, 5, rng=rng()
    ),
    "user": drawn,
}
QUIET = {"return_index": True, "preload_to_gpu": False}


def make(name, **kwargs):
    return Loader(batch_sampler=SAMPLERS[name](), **QUIET, **kwargs).add_dataset(X)
