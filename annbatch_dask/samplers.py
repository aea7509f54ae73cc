"""Which rows, in which order: random and sequential passes over runs of rows.

A pass draws one key from the sampler's generator when it starts. Everything after that is a function of that
key and of a position, never of the generator's state: two passes that are open at once, and threads that read
ahead, cannot disturb each other.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.abc import Sampler, check_mask, check_rng, cut
from annbatch_dask.types import LoadRequest

__all__ = ["RandomSampler", "SequentialSampler"]


class _Worker(NamedTuple):
    """Where this process stands among the workers of a torch DataLoader."""

    id: int
    n_workers: int
    base_seed: int


def _worker() -> _Worker | None:
    torch: Any = sys.modules.get("torch")
    if torch is None:  # then no DataLoader can have started this process
        return None
    info = torch.utils.data.get_worker_info()
    return None if info is None else _Worker(info.id, info.num_workers, info.seed - info.id)


def check_window(chunk_size: int, preload_nchunks: int, batch_size: int) -> None:
    """ValueError unless a window of ``preload_nchunks`` chunks is a whole number of batches."""
    for name, value in (("chunk_size", chunk_size), ("preload_nchunks", preload_nchunks), ("batch_size", batch_size)):
        if value < 1:
            msg = f"{name} must be greater than 1, got {value}"
            raise ValueError(msg)
    window = chunk_size * preload_nchunks
    if batch_size > window:
        msg = f"batch_size cannot exceed chunk_size * preload_nchunks: {batch_size} > {window}; raise preload_nchunks"
        raise ValueError(msg)
    if window % batch_size:
        msg = (
            f"chunk_size * preload_nchunks must be divisible by batch_size: "
            f"{window} % {batch_size} = {window % batch_size}"
        )
        raise ValueError(msg)


class _Runs(NamedTuple):
    """Runs of rows in reading order: starts and stops. Only the last may be shorter than a chunk."""

    starts: NDArray[np.int64]
    stops: NDArray[np.int64]


class _RunSampler(Sampler):
    """Reads runs of ``chunk_size`` rows, ``preload_nchunks`` of them at a time."""

    def __init__(
        self, chunk_size: int, preload_nchunks: int, batch_size: int, *, drop_last: bool, mask: slice | None
    ) -> None:
        check_window(chunk_size, preload_nchunks, batch_size)
        self._chunk_size = chunk_size
        self._preload_nchunks = preload_nchunks
        self._batch_size = batch_size
        self._drop_last = drop_last
        self._mask = check_mask(slice(0, None) if mask is None else mask)

    @property
    def batch_size(self) -> int:
        """Rows in a batch."""
        return self._batch_size

    def n_batches(self, n_obs: int) -> int:
        """Batches of one pass over ``n_obs`` rows."""
        n_rows = self._n_rows(n_obs)
        return n_rows // self._batch_size if self._drop_last else -(-n_rows // self._batch_size)

    def validate(self, n_obs: int) -> None:
        """ValueError where the mask does not fit ``n_obs`` rows, or torch workers cannot share the pass."""
        self._range(n_obs)
        worker = _worker()
        if worker is not None and worker.n_workers > 1:
            self._validate_workers()

    def _range(self, n_obs: int) -> tuple[int, int]:
        start, stop = self._mask.start or 0, self._mask.stop
        if stop is None:
            stop = n_obs
        if stop > n_obs:
            msg = f"Sampler mask.stop ({stop}) exceeds loader n_obs ({n_obs})"
            raise ValueError(msg)
        if start >= stop:
            msg = f"Sampler mask.start ({start}) must be < mask.stop ({stop})"
            raise ValueError(msg)
        return start, stop

    def _n_rows(self, n_obs: int) -> int:
        start, stop = self._range(n_obs)
        return stop - start

    @abstractmethod
    def _validate_workers(self) -> None:
        """Raise where several torch workers cannot share a pass."""

    def _grid(self, start: int, stop: int) -> _Runs:
        """The range cut into runs from its start; the short one, if any, is last."""
        starts = np.arange(start, stop, self._chunk_size, dtype=np.int64)
        return _Runs(starts, np.minimum(starts + self._chunk_size, stop))

    def _windows(self, runs: _Runs) -> Iterator[tuple[int, list[slice], int]]:
        """Position, slices and number of rows of each load window."""
        for position, first in enumerate(range(0, len(runs.starts), self._preload_nchunks)):
            part = slice(first, first + self._preload_nchunks)
            bounds = zip(runs.starts[part].tolist(), runs.stops[part].tolist(), strict=True)
            slices = [slice(start, stop) for start, stop in bounds]
            yield position, slices, sum(run.stop - run.start for run in slices)

    def _request(self, slices: list[slice], order: NDArray[np.int64]) -> LoadRequest | None:
        """The request for one window; None where dropping the partial batch leaves nothing."""
        if self._drop_last:
            order = order[: len(order) - len(order) % self._batch_size]
        if not len(order):
            return None
        return {"requests": slices, "splits": cut(order, self._batch_size)}


class RandomSampler(_RunSampler):
    """Runs of rows in random order, rows mixed within each load window.

    Parameters
    ----------
    chunk_size
        Rows read together.
    preload_nchunks
        Runs in one load window; its rows are mixed before they are cut into batches.
    batch_size
        Rows in a batch; must divide ``chunk_size * preload_nchunks``.
    replacement
        Draw runs that start anywhere, independently, instead of each once.
    num_samples
        Rows in a pass; by default as many as the range has.
    drop_last
        Leave out the last batch if it is not full.
    mask
        Range of rows to draw from; by default all.
    rng
        Source of randomness; by default a fresh one. Every pass takes one key from it.
    """

    def __init__(  # noqa: PLR0913 - annbatch's interface
        self,
        chunk_size: int,
        preload_nchunks: int,
        batch_size: int,
        *,
        replacement: bool = False,
        num_samples: int | None = None,
        drop_last: bool = False,
        mask: slice | None = None,
        rng: np.random.Generator | None = None,
    ) -> None:
        super().__init__(chunk_size, preload_nchunks, batch_size, drop_last=drop_last, mask=mask)
        if num_samples is not None and num_samples < 1:
            msg = f"num_samples must be greater than 1, got {num_samples}"
            raise ValueError(msg)
        given = check_rng(rng)
        self._rng: np.random.Generator = np.random.default_rng() if given is None else given
        self._rng_is_given = given is not None
        self._replacement = replacement
        self._num_samples = num_samples

    @property
    def shuffle(self) -> bool:
        """Always True."""
        return True

    @property
    def rng(self) -> np.random.Generator | None:
        """Source of randomness."""
        return self._rng

    @rng.setter
    def rng(self, value: np.random.Generator | None) -> None:
        given = check_rng(value)
        self._rng = np.random.default_rng() if given is None else given
        self._rng_is_given = given is not None

    def validate(self, n_obs: int) -> None:
        """ValueError where mask or num_samples do not fit ``n_obs`` rows."""
        super().validate(n_obs)
        n_range = super()._n_rows(n_obs)
        n_rows = self._n_rows(n_obs)
        if not self._replacement and n_rows > n_range:
            msg = f"num_samples ({n_rows}) cannot exceed the observation range ({n_range}) without replacement"
            raise ValueError(msg)
        if self._replacement and n_range < self._chunk_size and n_rows > n_range:
            msg = (
                f"Observation range ({n_range}) is smaller than chunk_size ({self._chunk_size}) and num_samples "
                f"({n_rows}) exceeds it; lower chunk_size, widen the mask or lower num_samples"
            )
            raise ValueError(msg)

    def _validate_workers(self) -> None:
        if self._replacement:
            msg = (
                "Multiple workers are not supported with replacement sampling. "
                "See https://github.com/scverse/annbatch/issues/173"
            )
            raise NotImplementedError(msg)
        if not self._drop_last and self._batch_size > 1:
            msg = "drop_last=False is not supported with several DataLoader workers and batch_size > 1"
            raise ValueError(msg)

    def _n_rows(self, n_obs: int) -> int:
        return super()._n_rows(n_obs) if self._num_samples is None else self._num_samples

    def _sample(self, n_obs: int) -> Iterator[LoadRequest]:
        worker = _worker()
        key = self._key(worker)
        runs = self._runs(n_obs, _generator(key, 0))
        worker_id = 0
        if worker is not None and worker.n_workers > 1:
            # Every worker orders all runs alike and takes its own stretch of that order.
            worker_id = worker.id
            mine = np.array_split(np.arange(len(runs.starts)), worker.n_workers)[worker_id]
            runs = _Runs(runs.starts[mine], runs.stops[mine])
        for position, slices, n_rows in self._windows(runs):
            order = _generator(key, 1, worker_id, position).permutation(n_rows)
            request = self._request(slices, order)
            if request is not None:
                yield request

    def _key(self, worker: _Worker | None) -> tuple[int, ...]:
        key = int.from_bytes(self._rng.bytes(16), "little")
        if worker is None or self._rng_is_given:
            return (key,)
        # Workers hold copies of one generator that nobody seeded, and a DataLoader starts them anew for each
        # epoch: without its seed, which differs from epoch to epoch, all epochs would be the same.
        return (key, worker.base_seed)

    def _runs(self, n_obs: int, rng: np.random.Generator) -> _Runs:
        start, stop = self._range(n_obs)
        n_rows = self._n_rows(n_obs)
        if self._replacement:
            return self._drawn_runs(start, stop, n_rows, rng)
        runs = _shuffled(self._grid(start, stop), rng)
        return runs if n_rows == stop - start else self._shortened(runs, n_rows, rng)

    def _drawn_runs(self, start: int, stop: int, n_rows: int, rng: np.random.Generator) -> _Runs:
        length = min(self._chunk_size, n_rows)
        n_runs = -(-n_rows // length)
        starts = rng.integers(start, stop - length + 1, size=n_runs)
        stops = starts + length
        stops[-1] -= n_runs * length - n_rows
        return _Runs(starts, stops)

    def _shortened(self, runs: _Runs, n_rows: int, rng: np.random.Generator) -> _Runs:
        """A random part of the runs that holds ``n_rows`` rows, the short run, if any, last."""
        order = rng.permutation(len(runs.starts))
        lengths = (runs.stops - runs.starts)[order]
        n_runs = int(np.searchsorted(np.cumsum(lengths), n_rows)) + 1
        order, lengths = order[:n_runs], lengths[:n_runs]
        excess = int(lengths.sum()) - n_rows
        is_short = lengths < self._chunk_size
        if is_short.any() and excess >= lengths[is_short][0]:
            # Two short runs would leave a partial batch in mid-pass: the shorter one goes.
            excess -= int(lengths[is_short][0])
            order, lengths, is_short = order[~is_short], lengths[~is_short], is_short[~is_short]
        order = np.concatenate([order[~is_short], order[is_short]])
        starts, stops = runs.starts[order], runs.stops[order].copy()
        stops[-1] -= excess
        return _Runs(starts, stops)


class SequentialSampler(_RunSampler):
    """Rows in their order.

    Parameters
    ----------
    chunk_size
        Rows read together.
    preload_nchunks
        Runs in one load window.
    batch_size
        Rows in a batch; must divide ``chunk_size * preload_nchunks``.
    drop_last
        Leave out the last batch if it is not full.
    mask
        Range of rows; by default all.
    """

    def __init__(
        self,
        chunk_size: int,
        preload_nchunks: int,
        batch_size: int,
        *,
        drop_last: bool = False,
        mask: slice | None = None,
    ) -> None:
        super().__init__(chunk_size, preload_nchunks, batch_size, drop_last=drop_last, mask=mask)

    @property
    def shuffle(self) -> bool:
        """Always False."""
        return False

    def _validate_workers(self) -> None:
        msg = "Multiple workers are not supported with sequential sampling"
        raise ValueError(msg)

    def _sample(self, n_obs: int) -> Iterator[LoadRequest]:
        for _, slices, n_rows in self._windows(self._grid(*self._range(n_obs))):
            request = self._request(slices, np.arange(n_rows))
            if request is not None:
                yield request


def _generator(key: tuple[int, ...], *position: int) -> np.random.Generator:
    """The generator that belongs to one position of the pass with this key."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key, spawn_key=position)))


def _shuffled(runs: _Runs, rng: np.random.Generator) -> _Runs:
    """The runs in random order; a short last run stays last, so that only the last batch can be partial."""
    lengths = runs.stops - runs.starts
    n_full = len(lengths) - int(lengths[-1] < lengths[0])
    order = np.concatenate([rng.permutation(n_full), np.arange(n_full, len(lengths))])
    return _Runs(runs.starts[order], runs.stops[order])
