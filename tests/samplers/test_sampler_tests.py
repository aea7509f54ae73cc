"""SamplerTests on every sampler of the package, and on samplers that do wrong."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from annbatch_dask.abc import Sampler
from annbatch_dask.samplers import (
    CellSets,
    ClassSampler,
    DistributedSampler,
    MatchedControlSampler,
    RandomSampler,
    SequentialSampler,
    WeightedClassSampler,
)
from annbatch_dask.testing import SamplerTests

CLASSES = pd.Categorical(np.repeat(["a", "b", "c"], [300, 500, 200]))


def rng():
    return np.random.default_rng(3)


class TestSequential(SamplerTests):
    def make_sampler(self):
        return SequentialSampler(10, 4, 8, mask=slice(3, 951))


class TestRandom(SamplerTests):
    def make_sampler(self):
        return RandomSampler(10, 4, 8, mask=slice(3, 951), rng=rng())


class TestReplacement(SamplerTests):
    repeats_rows = True

    def make_sampler(self):
        return RandomSampler(10, 4, 8, replacement=True, num_samples=333, rng=rng())


class TestClasses(SamplerTests):
    repeats_rows = True

    def make_sampler(self):
        return ClassSampler(10, 4, 20, classes=CLASSES, num_samples=400, rng=rng())


class TestWeightedClasses(SamplerTests):
    repeats_rows = True

    def make_sampler(self):
        return WeightedClassSampler(
            10, 4, 20, classes=CLASSES, class_weights=np.array([1.0, 2.0, 3.0]), num_samples=400, rng=rng()
        )


class TestMatchedControls(SamplerTests):
    repeats_rows = True

    def make_sampler(self):
        is_control = np.arange(self.n_obs) % 4 == 0
        return MatchedControlSampler(10, 4, 8, is_control=is_control, match=CLASSES, n_controls=1, rng=rng())


class TestSets(SamplerTests):
    repeats_rows = True

    def make_sampler(self):
        is_control = np.arange(self.n_obs) % 4 == 0
        return CellSets(8, 3, groups=CLASSES, is_control=is_control, match=CLASSES, preload_nsets=9, rng=rng())


class TestOneOfTwoRanks(SamplerTests):
    def make_sampler(self):
        return DistributedSampler(RandomSampler(10, 4, 8), dist_info=lambda: (1, 2))


class TestSomebodysOwn(SamplerTests):
    class Backwards(Sampler):
        batch_size, shuffle = 100, False

        def n_batches(self, n_obs):
            return -(-n_obs // 100)

        def validate(self, n_obs):
            pass

        def _sample(self, n_obs):
            for stop in range(n_obs, 0, -100):
                yield {"requests": [slice(max(stop - 100, 0), stop)]}

    n_obs = 950

    def make_sampler(self):
        return self.Backwards()


# --- what they find


def failures(sampler_type, n_obs=100):
    """The tests that a sampler does not pass."""

    class Tests(SamplerTests):
        def make_sampler(self):
            return sampler_type()

    Tests.n_obs = n_obs
    found = set()
    for name in [name for name in dir(Tests) if name.startswith("test_")]:
        try:
            getattr(Tests(), name)()
        except AssertionError:
            found.add(name)
    return found


class Base(Sampler):
    batch_size, shuffle = 10, False

    def n_batches(self, n_obs):
        return n_obs // 10

    def validate(self, n_obs):
        pass

    def _sample(self, n_obs):
        for start in range(0, n_obs, 10):
            yield {"requests": [slice(start, start + 10)]}


class Miscounts(Base):
    def n_batches(self, n_obs):
        return n_obs // 10 + 1


class Repeats(Base):
    def _sample(self, n_obs):
        for _ in range(n_obs // 10):
            yield {"requests": [slice(0, 10)]}


class Forgets(Base):
    """Draws from a generator of its own, which no seed governs."""

    def _sample(self, n_obs):
        for request in np.random.default_rng().permutation(n_obs).reshape(-1, 10):
            yield {"requests": request}


class IgnoresItsMask(Base):
    _mask = slice(10, 50)


@pytest.mark.parametrize(
    ("sampler", "found"),
    [
        (Base, set()),
        (Miscounts, {"test_as_many_batches_as_announced"}),
        (Repeats, {"test_rows_are_those_that_may_be_drawn"}),
        (IgnoresItsMask, {"test_rows_are_those_that_may_be_drawn"}),
        (
            Forgets,
            {
                "test_a_pickled_sampler_draws_the_same",
                "test_an_epoch_is_a_function_of_seed_and_number",
                "test_passes_count_epochs",
                "test_what_is_left_of_an_epoch",
                "test_workers_share_an_epoch",
            },
        ),
    ],
)
def test_a_wrong_sampler_is_found_out(sampler, found):
    assert failures(sampler) == found
