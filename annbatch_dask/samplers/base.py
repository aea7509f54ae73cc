"""Base of the samplers: a seed, windows of chunks, and epochs as functions of position."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.flags import check_flag
from annbatch_dask.order.epoch import Epoch
from annbatch_dask.order.keys import Key, permutation
from annbatch_dask.order.planned import Planned
from annbatch_dask.samplers.sampler import Sampler, check_mask
from annbatch_dask.seeds import Seed, check_number, check_rng, check_seed, draw_seed, only_one
from annbatch_dask.sizes import check_positive
from annbatch_dask.types import LoadRequest

__all__ = ["DRAW", "MIX", "ORDER", "RunSampler", "SeededSampler", "cyclic_run", "mixed", "resolve_mask"]

Ints = NDArray[np.int64]

MIX, DRAW, ORDER = range(3)
"""What a generator is for: the first number of its position in an epoch."""


class SeededSampler(Sampler):
    """A sampler whose k-th load request is a function of (seed, epoch, k).

    A seed is drawn from ``rng`` once, when it is set; a pass takes nothing from it.
    """

    _seed: int = 0
    _seed_is_given: bool = False
    _seed_is_number: bool = False
    _drop_last: bool = False

    @property
    def rng(self) -> np.random.Generator | None:
        """Generator from which the seed was drawn; setting it draws a new seed and restarts at epoch 0."""
        return self._rng

    @rng.setter
    def rng(self, value: np.random.Generator | None) -> None:
        given = check_rng(value)
        self._rng = np.random.default_rng() if given is None else given
        self.seed = draw_seed(self._rng)
        self._seed_is_given, self._seed_is_number = given is not None, False
        self.set_epoch(0)

    def take_seed(self, seed: Seed | None, rng: np.random.Generator | None) -> None:
        """Set the seed from what a constructor was given, of which one is None.

        A number is what :func:`numpy.random.default_rng` makes a generator from.
        """
        only_one(seed, rng)
        given = check_seed(seed)
        if given is None or isinstance(given, np.random.Generator):
            self.rng = rng if given is None else given
        else:
            self.rng = np.random.default_rng(given)
            self._seed_is_number = True

    @property
    def seed(self) -> int:
        """A non-negative integer that, with the number of an epoch, fixes its order."""
        restored = self.epoch_counter.seed
        return self._seed if restored is None else restored

    @seed.setter
    def seed(self, value: int) -> None:
        self._seed, self.epoch_counter.seed = check_number(value), None
        self._seed_is_given = self._seed_is_number = True

    def restore_seed(self, seed: int) -> None:
        """Go on with the seed of a saved state, in the workers of a DataLoader that are started later too."""
        if seed != self.seed:
            self.epoch_counter.seed = seed

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_seed": self.seed}

    @property
    def seed_is_given(self) -> bool:
        """True if the seed was given, or comes from an ``rng`` that was passed in."""
        return self._seed_is_given

    @property
    def seed_is_number(self) -> bool:
        """True if the seed was given as a number, which whoever writes it sees to be the same on all ranks."""
        return self._seed_is_number

    @property
    def drops_last(self) -> bool:
        """True if a last batch that is not full is left out."""
        return self._drop_last

    @abstractmethod
    def epoch(self, n_obs: int, key: Key) -> Epoch:
        """The pass with this key over ``n_obs`` rows."""

    def plan_requests(self, n_obs: int, epoch: int) -> Iterator[Planned]:
        """The load requests of one epoch, all workers' together."""
        if type(self)._sample is not SeededSampler._sample:  # somebody's own, derived from one of these
            return super().plan_requests(n_obs, epoch)
        return self.epoch(n_obs, (self.seed, epoch)).planned()

    def _sample(self, n_obs: int) -> Iterator[LoadRequest]:
        number = self.epoch_counter.start(None)
        is_ours = type(self)._sample is SeededSampler._sample
        stream = self.plan_requests(n_obs, number) if is_ours else self.epoch(n_obs, (self.seed, number)).planned()
        for planned in stream:
            yield planned.make()


class RunSampler(SeededSampler):
    """Reads runs of ``chunk_size`` rows, ``preload_nchunks`` of them at a time."""

    def __init__(
        self, chunk_size: int, preload_nchunks: int, batch_size: int, *, drop_last: bool, mask: slice | None
    ) -> None:
        for name, size in (
            ("chunk_size", chunk_size),
            ("preload_nchunks", preload_nchunks),
            ("batch_size", batch_size),
        ):
            check_positive(name, size)
        # Of numpy's integers some overflow, and saved states spell them otherwise.
        self._chunk_size, self._preload_nchunks, self._batch_size = map(int, (chunk_size, preload_nchunks, batch_size))
        _check_batch_size(self._batch_size, self.window)
        self._drop_last = check_flag("drop_last", drop_last)
        self._mask = check_mask(slice(0, None) if mask is None else mask)
        self._epochs = self.epoch_counter  # before any worker is started

    @property
    def batch_size(self) -> int:
        """Rows in a batch."""
        return self._batch_size

    @property
    def preload_nchunks(self) -> int:
        """Runs loaded together."""
        return self._preload_nchunks

    @property
    def window(self) -> int:
        """Rows loaded together."""
        return self._chunk_size * self._preload_nchunks

    def n_batches(self, n_obs: int) -> int:
        """Batches of one pass over ``n_obs`` rows."""
        n_rows = self._n_rows(n_obs)
        return n_rows // self._batch_size if self._drop_last else -(-n_rows // self._batch_size)

    def validate(self, n_obs: int) -> None:
        """ValueError where the mask does not fit ``n_obs`` rows."""
        self._range(n_obs)

    def state_identity(self) -> tuple[object, ...]:
        """Identity that a saved state and the sampler that resumes from it must share."""
        return (*super().state_identity(), self._chunk_size, self._preload_nchunks, self._drop_last)

    def _range(self, n_obs: int) -> tuple[int, int]:
        return resolve_mask(self._mask, n_obs)

    def _n_rows(self, n_obs: int) -> int:
        start, stop = self._range(n_obs)
        return stop - start


def mixed(key: Key, k: int, n_rows: int) -> Ints:
    """All rows of load request ``k`` in random order."""
    return permutation(n_rows, key, MIX, k)


def cyclic_run(first: int, length: int, start: int, stop: int) -> list[slice]:
    """``length`` rows of ``start:stop`` from ``first`` on, continuing from ``start`` after ``stop``.

    A run that begins anywhere and wraps around has every row of the range equally often.
    """
    end = first + length
    if end <= stop:
        return [slice(first, end)]
    return [slice(first, stop), slice(start, start + end - stop)]


def resolve_mask(mask: slice, n_obs: int) -> tuple[int, int]:
    """Start and stop of a mask over ``n_obs`` rows; ValueError where it does not fit them."""
    start, stop = mask.start or 0, n_obs if mask.stop is None else mask.stop
    if stop > n_obs:
        msg = f"Sampler mask.stop ({stop}) exceeds loader n_obs ({n_obs})"
        raise ValueError(msg)
    if start >= stop:
        msg = f"Sampler mask.start ({start}) must be < mask.stop ({stop})"
        raise ValueError(msg)
    return start, stop


def _check_batch_size(batch_size: int, window: int) -> None:
    """ValueError unless a window is a whole number of batches."""
    if batch_size > window:
        msg = f"batch_size cannot exceed chunk_size * preload_nchunks: {batch_size} > {window}; raise preload_nchunks"
        raise ValueError(msg)
    if window % batch_size:
        msg = (
            f"chunk_size * preload_nchunks must be divisible by batch_size: "
            f"{window} % {batch_size} = {window % batch_size}"
        )
        raise ValueError(msg)
