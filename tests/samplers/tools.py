"""What tests of samplers share: rows of batches, the smallest sampler, runs of classes."""

from __future__ import annotations

import numpy as np
import pandas as pd

from annbatch_dask.abc import Sampler
from annbatch_dask.order.planned import expand


def rows(request):
    return expand(request["requests"])


def batches(sampler, n_obs):
    """The rows of each batch of a pass."""
    return [rows(request)[split] for request in sampler.sample(n_obs) for split in request["splits"]]


def rng(seed=0):
    return np.random.default_rng(seed)


class Minimal(Sampler):
    """Overrides what it must, and does not call super().__init__()."""

    def __init__(self, requests, batch_size=None, shuffle=None):
        self.requests, self._size, self._mixed, self.events = requests, batch_size, shuffle, []

    batch_size = property(lambda self: self._size)
    shuffle = property(lambda self: self._mixed)

    def n_batches(self, n_obs):
        return len(self.requests)

    def validate(self, n_obs):
        self.events.append("validate")

    def _sample(self, n_obs):
        try:
            self.events.append("start")
            yield from self.requests
        finally:
            self.events.append("end")


def classes_in_runs(lengths, labels="ABC"):
    """Uneven runs of classes: A B C A B C ..."""
    codes = np.repeat(np.arange(len(lengths)) % len(labels), lengths)
    return pd.Categorical.from_codes(codes, list(labels))


RUNS = (20, 35, 50, 90, 21, 40, 33)
N_CLASSED = sum(RUNS)
