"""A sampler of a user's may shuffle one array in place for all of its requests, which are drawn ahead."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from annbatch_dask.abc import Sampler
from annbatch_dask.loader import Loader
from annbatch_dask.loader import fetch as fetch_module
from tests.loader.data import matrix

N_OBS, N_EACH = 40, 20


class InPlace:
    """Like annbatch's own samplers: not derived from ours."""

    batch_size, shuffle, mask, rng = 5, True, slice(0, None), None

    def __init__(self, *, of_arrays):
        self.of_arrays, self.is_over = of_arrays, threading.Event()

    def n_batches(self, n_obs):
        return n_obs // self.batch_size

    def validate(self, n_obs):
        assert n_obs == N_OBS

    def _sample(self, n_obs):
        rng, order, rows, slices = np.random.default_rng(0), np.arange(N_EACH), np.arange(N_EACH), [None]
        for start in range(0, n_obs, N_EACH):
            rng.shuffle(order)
            rows[:] = np.arange(start, start + N_EACH)
            slices[0] = slice(start, start + N_EACH)
            yield {"requests": rows if self.of_arrays else slices, "splits": np.split(order, 4)}
        order[:], rows[:], slices[0] = 0, 0, slice(0, N_EACH)
        self.is_over.set()

    sample = _sample


class InPlaceOfOurs(InPlace, Sampler):
    batch_size, shuffle, sample = 5, True, Sampler.sample


@pytest.mark.parametrize("of_arrays", [False, True])
@pytest.mark.parametrize("kind", [InPlace, InPlaceOfOurs])
def test_arrays_that_are_used_again_are_copied(monkeypatch, kind, of_arrays):
    sampler, look_up = kind(of_arrays=of_arrays), fetch_module.Resolved.of

    def wait_for_all(*args):
        assert sampler.is_over.wait(60)
        return look_up(*args)

    monkeypatch.setattr(fetch_module.Resolved, "of", wait_for_all)
    x = matrix(N_OBS)
    loader = Loader(batch_sampler=sampler, return_index=True, preload_to_gpu=False).add_dataset(x)
    seen = []
    for batch in loader:
        np.testing.assert_array_equal(batch["X"], x[batch["index"]])
        seen += batch["index"].tolist()
    assert sorted(seen) == list(range(N_OBS))
    assert seen != sorted(seen)
