"""Tests that every sampler passes which a Loader can use, resume and share among processes."""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.abc import Sampler
from annbatch_dask.order.planned import expand
from annbatch_dask.order.share import Worker, by_worker
from annbatch_dask.types import LoadRequest

__all__ = ["SamplerTests", "batch_rows"]

Ints = NDArray[np.int64]


def batch_rows(requests: Iterable[LoadRequest]) -> list[Ints]:
    """Return the rows of each batch of load requests that have splits.

    Examples
    --------
    >>> sampler = samplers.SequentialSampler(chunk_size=2, preload_nchunks=2, batch_size=4)
    >>> [rows.tolist() for rows in testing.batch_rows(sampler.sample(6))]
    [[0, 1, 2, 3], [4, 5]]
    """
    return [expand(request["requests"])[split] for request in requests for split in request["splits"]]


class SamplerTests(ABC):
    """Tests for pytest of one sampler: subclass it, name it ``Test...`` and say how the sampler is made.

    Attributes
    ----------
    n_obs
        Rows of the loader that the sampler is asked to draw from.
    repeats_rows
        Whether one pass may draw a row twice.

    Examples
    --------
    >>> class TestMine(testing.SamplerTests):
    ...     n_obs = 500
    ...
    ...     def make_sampler(self):
    ...         return samplers.RandomSampler(10, 4, 20, rng=np.random.default_rng(0))
    >>> TestMine().test_what_is_left_of_an_epoch()
    """

    n_obs: int = 1000
    repeats_rows: bool = False

    @abstractmethod
    def make_sampler(self) -> Sampler:
        """Make a sampler; each call makes an equal one, of the same seed."""

    def draw(self, sampler: Sampler, epoch: int = 0) -> list[Ints]:
        """Return the rows of each batch of an epoch."""
        sampler.set_epoch(epoch)
        return batch_rows(sampler.sample(self.n_obs))

    def test_rows_are_those_that_may_be_drawn(self) -> None:
        """Every row is one of the loader, and is within the mask."""
        sampler = self.make_sampler()
        rows = np.concatenate(self.draw(sampler))
        start, stop, _ = sampler.mask.indices(self.n_obs)
        assert rows.min() >= start
        assert rows.max() < stop
        assert self.repeats_rows or len(np.unique(rows)) == len(rows)

    def test_as_many_batches_as_announced(self) -> None:
        """``n_batches`` is the number of batches; none is empty or larger than ``batch_size``."""
        sampler = self.make_sampler()
        batches = self.draw(sampler)
        assert len(batches) == sampler.n_batches(self.n_obs)
        assert all(map(len, batches))
        assert sampler.batch_size is None or max(map(len, batches)) <= sampler.batch_size

    def test_an_epoch_is_a_function_of_seed_and_number(self) -> None:
        """Equal samplers draw the same in the same epoch, whatever was drawn before."""
        one, two = self.make_sampler(), self.make_sampler()
        first = self.draw(one, 0)
        _assert_equal(self.draw(one, 2), self.draw(two, 2))
        _assert_equal(first, self.draw(two, 0))

    def test_passes_count_epochs(self) -> None:
        """Passes one after another are epochs 0, 1, 2."""
        one, two = self.make_sampler(), self.make_sampler()
        for epoch in range(3):
            _assert_equal(batch_rows(one.sample(self.n_obs)), self.draw(two, epoch))

    def test_what_is_left_of_an_epoch(self) -> None:
        """An epoch that continues after some batches gives exactly the others."""
        whole = self.draw(self.make_sampler(), 1)
        for n_batches in {0, 1, len(whole) // 2, len(whole) - 1, len(whole)}:
            rest = self.make_sampler().resume_requests(self.n_obs, 1, n_batches)
            _assert_equal(batch_rows(rest), whole[n_batches:])

    def test_workers_share_an_epoch(self) -> None:
        """The workers of a DataLoader draw each batch once, together."""
        whole = self.draw(self.make_sampler(), 0)
        found: list[Ints] = []
        for number in range(3):
            sampler = self.make_sampler()
            stream = sampler.plan_requests(self.n_obs, 0)
            part = by_worker(stream, Worker(number, 3, 0), in_order=not sampler.shuffle)
            found += batch_rows(planned.make() for planned in part)
        assert sorted(map(bytes, found)) == sorted(map(bytes, whole))

    def test_a_pickled_sampler_draws_the_same(self) -> None:
        """A sampler can be sent to another process."""
        sampler = pickle.loads(pickle.dumps(self.make_sampler()))
        _assert_equal(self.draw(sampler, 1), self.draw(self.make_sampler(), 1))


def _assert_equal(found: list[Ints], expected: list[Ints]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
