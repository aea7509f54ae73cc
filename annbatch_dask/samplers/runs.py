"""Random and sequential passes over runs of rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from annbatch_dask.flags import check_flag
from annbatch_dask.order.epoch import Epoch
from annbatch_dask.order.keys import Key, Shuffled, generator
from annbatch_dask.samplers.base import DRAW, ORDER, RunSampler, cyclic_run, mixed
from annbatch_dask.seeds import Seed, check_rng, check_seed, only_one
from annbatch_dask.sizes import check_positive

__all__ = ["RandomSampler", "SequentialSampler", "default_sampler", "shuffled_runs"]

_CHUNK_SIZE = 512
_PRELOAD_NCHUNKS = 32
_MAX_DEFAULT_PRELOAD = 4 * _PRELOAD_NCHUNKS


class RandomSampler(RunSampler):
    """Runs of rows in random order, rows mixed within each load window.

    Every row is drawn equally often on average, those at the ends of the range too.

    Parameters
    ----------
    chunk_size
        Rows read together.
    preload_nchunks
        Runs in one load window; its rows are mixed before they are cut into batches.
    batch_size
        Rows in a batch; must divide ``chunk_size * preload_nchunks``.
    replacement
        Draw runs that start anywhere, independently, instead of each once. One that reaches the end of the range
        continues at its start.
    num_samples
        Rows in a pass; by default as many as the range has.
    drop_last
        Leave out the last batch if it is not full.
    mask
        Range of rows to draw from; by default all.
    seed
        Fixes the order: a non-negative integer, or a generator to draw one from; by default one is
        drawn from the system.
    rng
        annbatch's name of ``seed``: a generator.

    Examples
    --------
    >>> sampler = samplers.RandomSampler(16, 8, 64, seed=0)
    >>> len(list(Loader(batch_sampler=sampler).use_collection(collection)))
    8
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
        seed: Seed | None = None,
    ) -> None:
        super().__init__(chunk_size, preload_nchunks, batch_size, drop_last=drop_last, mask=mask)
        check_positive("num_samples", num_samples)
        self.take_seed(seed, rng)
        self._replacement = check_flag("replacement", replacement)
        self._num_samples = None if num_samples is None else int(num_samples)

    @property
    def shuffle(self) -> bool:
        """Always True."""
        return True

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

    def state_identity(self) -> tuple[object, ...]:
        """Identity that a saved state and the sampler that resumes from it must share."""
        return (*super().state_identity(), self._replacement, self._num_samples)

    def _n_rows(self, n_obs: int) -> int:
        return super()._n_rows(n_obs) if self._num_samples is None else self._num_samples

    def epoch(self, n_obs: int, key: Key) -> Epoch:
        """The pass with this key over ``n_obs`` rows."""
        start, stop = self._range(n_obs)
        n_rows = self._n_rows(n_obs)
        take: Callable[[int, int, int], list[slice]]
        if self._replacement:
            take = partial(_draw_runs, key, start, stop, min(self._chunk_size, stop - start))
        else:
            take = shuffled_runs(start, stop, self._chunk_size, n_rows, key)
        return Epoch(n_rows, self.window, self._batch_size, self._drop_last, take, partial(mixed, key))


class SequentialSampler(RunSampler):
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

    Examples
    --------
    >>> sampler = samplers.SequentialSampler(16, 8, 64, mask=slice(0, 128))
    >>> loader = Loader(batch_sampler=sampler, return_index=True).use_collection(collection)
    >>> [batch["index"][0].item() for batch in loader]
    [0, 64]
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

    def epoch(self, n_obs: int, key: Key) -> Epoch:  # noqa: ARG002 - there is one order
        """The rows of the mask in their order."""
        first, _ = self._range(n_obs)
        take = partial(_take_in_order, first, self._chunk_size)
        return Epoch(self._n_rows(n_obs), self.window, self._batch_size, self._drop_last, take, _as_they_come)


def _as_they_come(_: int, n_rows: int) -> np.ndarray:
    return np.arange(n_rows)


def _take_in_order(first: int, chunk_size: int, _: int, start: int, stop: int) -> list[slice]:
    return [slice(first + at, first + min(at + chunk_size, stop)) for at in range(start, stop, chunk_size)]


def _draw_runs(key: Key, first: int, last: int, length: int, k: int, start: int, stop: int) -> list[slice]:  # noqa: PLR0913
    """Runs of ``first:last`` that begin anywhere, ``stop - start`` rows in all."""
    n_rows = stop - start
    starts = generator(key, DRAW, k).integers(first, last, size=-(-n_rows // length))
    return [
        part
        for i, begin in enumerate(starts.tolist())
        for part in cyclic_run(begin, min(length, n_rows - i * length), first, last)
    ]


def shuffled_runs(
    start: int, stop: int, chunk_size: int, n_rows: int, key: Key
) -> Callable[[int, int, int], list[slice]]:
    """The ``take`` of an epoch of ``n_rows`` rows of ``start:stop``, in runs of ``chunk_size`` in random order."""
    return _ShuffledRuns(start, stop, chunk_size, n_rows, key).take


class _ShuffledRuns:
    """Part of a range, in runs of ``chunk_size`` rows from its start on, in random order.

    The range ends with a short run, of ``n_short`` rows, and only the last batch of a pass may be partial: what comes
    last is short. In most epochs that is not the short run, but as many rows out of another one, in which the short
    run takes their place. So each row is at each position of the pass, and left out, with the same chance, while all
    runs but this one are read whole.
    """

    def __init__(self, start: int, stop: int, chunk_size: int, n_rows: int, key: Key) -> None:
        n_runs, n_short = divmod(stop - start, chunk_size)
        self._start, self._chunk_size = start, chunk_size
        self._order = Shuffled(n_runs, key)
        self._n_whole, n_last = divmod(n_rows, chunk_size)
        rng = generator(key, ORDER)
        number, first = divmod(int(rng.integers(stop - start)), chunk_size)
        last = [slice(start + n_runs * chunk_size, stop)]
        self._mended: tuple[int, list[slice]] = -1, []
        if number < n_runs and n_short:
            run = _turned(self._run(number), first, chunk_size)
            self._mended = number, last + _part(run, n_short, chunk_size)
            last = _part(run, 0, n_short)
        elif n_last < n_short:
            last = _turned(last, first, n_short)
        if n_last and self._n_whole < n_runs:
            run = self._run(int(self._order.at(np.array([self._n_whole]))[0]))
            last = _turned(run, int(rng.integers(chunk_size)), chunk_size)
        self._last = _part(last, 0, n_last)

    def _run(self, number: int) -> list[slice]:
        if number == self._mended[0]:
            return self._mended[1]
        first = self._start + number * self._chunk_size
        return [slice(first, first + self._chunk_size)]

    def take(self, _: int, start: int, stop: int) -> list[slice]:
        """The runs at these rows of the pass; ``start`` is where a run begins."""
        places = np.arange(start // self._chunk_size, min(-(-stop // self._chunk_size), self._n_whole))
        numbers, size = self._order.at(places), self._chunk_size
        if self._mended[0] in numbers:
            whole = [part for number in numbers.tolist() for part in self._run(number)]
        else:
            whole = [slice(first, first + size) for first in (self._start + numbers * size).tolist()]
        return whole + (self._last if stop > self._n_whole * self._chunk_size else [])


def _turned(runs: list[slice], first: int, n_rows: int) -> list[slice]:
    """Runs of ``n_rows`` rows in all laid end to end, from a row of them on, and the others behind."""
    return _part(runs, first, n_rows) + _part(runs, 0, first)


def _part(runs: list[slice], start: int, stop: int) -> list[slice]:
    """The rows ``start:stop`` of some runs laid end to end."""
    found, at = [], 0
    for run in runs:
        low, high = max(start - at, 0), min(stop - at, run.stop - run.start)
        if low < high:
            found.append(slice(run.start + low, run.start + high))
        at += run.stop - run.start
    return found


def default_sampler(
    chunk_size: int | None,
    preload_nchunks: int | None,
    batch_size: int,
    *,
    shuffle: bool,
    drop_last: bool,
    rng: np.random.Generator | None,
    seed: Seed | None,
) -> RandomSampler | SequentialSampler:
    """The sampler of a loader that was given none: chunks whose number makes whole batches."""
    chunk_size = chunk_size or _CHUNK_SIZE
    preload_nchunks = preload_nchunks or _fitting_preload(chunk_size, batch_size)
    if not shuffle:  # which draws nothing: a seed is checked all the same
        only_one(check_seed(seed), check_rng(rng))
        return SequentialSampler(chunk_size, preload_nchunks, batch_size, drop_last=drop_last)
    return RandomSampler(chunk_size, preload_nchunks, batch_size, drop_last=drop_last, rng=rng, seed=seed)


def _fitting_preload(chunk_size: int, batch_size: int) -> int:
    """The number of chunks near the default whose rows make whole batches, unless that needs far more."""
    step = batch_size // math.gcd(chunk_size, batch_size)
    if step > _MAX_DEFAULT_PRELOAD:
        return _PRELOAD_NCHUNKS
    return max(1, round(_PRELOAD_NCHUNKS / step)) * step
