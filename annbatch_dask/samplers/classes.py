"""Classes drawn by their weights, and runs of rows of the drawn class."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import blake2b
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annbatch_dask.order.epoch import Epoch
from annbatch_dask.order.keys import Key, generator
from annbatch_dask.order.planned import Planned
from annbatch_dask.samplers.base import DRAW, MIX, RunSampler, cyclic_run, mixed, resolve_mask
from annbatch_dask.samplers.sampler import check_mask
from annbatch_dask.seeds import Seed
from annbatch_dask.sizes import check_positive

__all__ = ["ClassSampler", "WeightedClassSampler"]

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class _ClassRuns:
    """Runs of rows of the drawable classes, sorted by class.

    Attributes
    ----------
    class_bounds
        (n_drawable + 1,) share of the draws that goes to the classes before each.
    first_row
        (n_drawable + 1,) how many rows the classes before each have.
    row_bounds
        (n_runs + 1,) how many rows the runs before each have.
    starts
        (n_runs,) first row of each run.
    """

    class_bounds: NDArray[np.float64]
    first_row: Ints
    row_bounds: Ints
    starts: Ints

    def draw_classes(self, rng: np.random.Generator, n: int) -> Ints:
        """(n,) drawable classes."""
        return np.searchsorted(self.class_bounds[1:-1], rng.random(n), side="right")

    def draw_chunks(self, rng: np.random.Generator, classes: Ints, chunk_size: int) -> Ints:
        """For each class the first row of a chunk in one of its runs, the runs in proportion to their rows.

        A run is laid out with as many chunks as it has room for, and the rows that are left over between any two of
        them, before or behind all. No other way to draw whole chunks comes as close to drawing all rows alike.
        """
        n_rows = self.first_row[classes + 1] - self.first_row[classes]
        place = self.first_row[classes] + rng.integers(n_rows)
        run = np.searchsorted(self.row_bounds, place, side="right") - 1
        n_chunks, n_over = np.divmod(np.diff(self.row_bounds)[run], chunk_size)
        chunk, gap = rng.integers(n_chunks), rng.integers(n_chunks + 1)
        return self.starts[run] + chunk * chunk_size + np.where(chunk >= gap, n_over, 0)


class ClassSampler(RunSampler):
    """Batches of one class each, the classes drawn by their weights.

    A class is drawn for every ``lcm(chunk_size, batch_size)`` rows. Each of its chunks is in one run of it and has
    ``chunk_size`` rows, but for the last of a pass. All rows of a class are drawn equally often on average where its
    runs are whole numbers of chunks; in one of ``q`` chunks and some rows over, these are ``q / (q + 1)`` times as
    often drawn as the others, which is as even as whole chunks can be.

    Parameters
    ----------
    chunk_size
        Rows read together.
    preload_nchunks
        Chunks in one load window.
    batch_size
        Rows in a batch; must divide ``chunk_size * preload_nchunks``.
    classes
        The class of every row.
    num_samples
        Rows in a pass.
    class_weights
        (n_categories,) how often each class is drawn, in proportion; 0 or less leaves it out. By default all alike.
    mask
        Range of rows to draw from; by default all.
    drop_last
        Leave out the last batch if it is not full.
    seed
        Fixes the order: a non-negative integer, or a generator to draw one from; by default one is
        drawn from the system.
    rng
        annbatch's name of ``seed``: a generator.

    Examples
    --------
    >>> classes = collection.obs(["cell_type"], names=False)["cell_type"].array
    >>> sampler = samplers.ClassSampler(1, 64, 16, classes=classes, num_samples=256)
    >>> batch = next(iter(Loader(batch_sampler=sampler).use_collection(collection)))
    >>> batch["obs"]["cell_type"].nunique()
    1
    """

    def __init__(  # noqa: PLR0913 - annbatch's interface
        self,
        chunk_size: int,
        preload_nchunks: int,
        batch_size: int,
        *,
        classes: pd.Categorical,
        num_samples: int,
        class_weights: NDArray[Any] | None = None,
        mask: slice | None = None,
        drop_last: bool = False,
        rng: np.random.Generator | None = None,
        seed: Seed | None = None,
    ) -> None:
        super().__init__(chunk_size, preload_nchunks, batch_size, drop_last=drop_last, mask=mask)
        check_positive("num_samples", num_samples)
        self._codes, self._labels = _check_classes(classes)
        self._weights = _check_weights(class_weights, len(self._labels))
        self._num_samples = int(num_samples)
        self._n_open = 0
        self._mask = self._resolved(self._mask)
        self._runs = self._find_runs()
        self.take_seed(seed, rng)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no pass open, whatever the original is doing.
        return super().__getstate__() | {"_n_open": 0}

    @property
    def shuffle(self) -> bool:
        """Always True."""
        return True

    @property
    def mask(self) -> slice:
        """The range of rows that may be drawn, with its stop."""
        return self._mask

    @mask.setter
    def mask(self, value: slice) -> None:
        mask = self._resolved(check_mask(value))
        if mask == self._mask:
            return
        if self._n_open:
            msg = "The mask cannot be changed while a pass is being iterated; finish or close the iterator first"
            raise ValueError(msg)
        before, self._mask = self._mask, mask
        try:
            self._runs = self._find_runs()
        except ValueError:
            self._mask = before
            raise

    def n_batches(self, n_obs: int) -> int:  # noqa: ARG002 - as many whatever there is to draw from
        """Batches of one pass."""
        return self._num_samples // self._batch_size if self._drop_last else -(-self._num_samples // self._batch_size)

    def validate(self, n_obs: int) -> None:
        """ValueError unless there are as many classes as rows."""
        if len(self._codes) != n_obs:
            msg = f"classes has {len(self._codes)} rows, which does not match loader n_obs ({n_obs})"
            raise ValueError(msg)

    def state_identity(self) -> tuple[object, ...]:
        """Identity that a saved state and the sampler that resumes from it must share."""
        return (*super().state_identity(), self._num_samples, self._digest)

    @cached_property
    def _digest(self) -> str:
        return blake2b(self._codes.tobytes() + self._weights.tobytes(), digest_size=8).hexdigest()

    def plan_requests(self, n_obs: int, epoch: int) -> Iterator[Planned]:
        """The load requests of one epoch, all workers' together."""
        with self._open():
            yield from super().plan_requests(n_obs, epoch)

    def epoch(self, n_obs: int, key: Key) -> Epoch:  # noqa: ARG002 - the classes say which rows there are
        """The pass with this key."""
        take = partial(_draw_chunks, key, self._runs, self._chunk_size, self._n_rows_of_a_draw)
        return Epoch(self._num_samples, self.window, self._batch_size, self._drop_last, take, self._mix(key))

    @property
    def _n_rows_of_a_draw(self) -> int:
        return math.lcm(self._chunk_size, self._batch_size)

    def _mix(self, key: Key) -> Any:
        return partial(_mixed_within, key, self._n_rows_of_a_draw)

    def _resolved(self, mask: slice) -> slice:
        return slice(*resolve_mask(mask, len(self._codes)))

    def _find_runs(self) -> _ClassRuns:
        """The runs of the drawable classes within the mask; ValueError where there is nothing to draw."""
        first = self._mask.start
        codes = self._codes[self._mask]
        borders = np.flatnonzero(np.diff(codes, prepend=-1))
        of_run, lengths = codes[borders], np.diff(borders, append=len(codes))
        drawable = np.flatnonzero((self._weights > 0) & (np.bincount(codes, minlength=len(self._labels)) > 0))
        if not len(drawable):
            msg = f"no class with a positive weight is present in rows {first} to {self._mask.stop - 1}"
            raise ValueError(msg)
        short = np.intersect1d(of_run[lengths < self._chunk_size], drawable)
        if len(short):
            names = [self._labels[code] for code in short.tolist()]
            msg = (
                f"every run of a class must have at least chunk_size ({self._chunk_size}) rows, classes {names} have "
                "shorter ones; group the collection by class, lower chunk_size or give them weight 0"
            )
            raise ValueError(msg)
        order = np.argsort(of_run, kind="stable")
        order = order[np.isin(of_run[order], drawable)]
        n_rows = np.bincount(codes, minlength=len(self._labels))[drawable]
        weights = self._weights[drawable]
        return _ClassRuns(
            _bounds(weights / weights.sum()), _bounds(n_rows), _bounds(lengths[order]), first + borders[order]
        )

    @contextmanager
    def _open(self) -> Iterator[None]:
        self._n_open += 1
        try:
            yield
        finally:
            self._n_open -= 1


class WeightedClassSampler(ClassSampler):
    """Batches of mixed classes: one is drawn by its weight for every chunk, and all rows of a window are mixed.

    Parameters are those of :class:`ClassSampler`.

    Examples
    --------
    >>> classes = collection.obs(["cell_type"], names=False)["cell_type"].array
    >>> weights = np.array([3, 1, 0, 0])
    >>> sampler = samplers.WeightedClassSampler(1, 256, 256, classes=classes, num_samples=256, class_weights=weights)
    >>> batch = next(iter(Loader(batch_sampler=sampler).use_collection(collection)))
    >>> batch["obs"]["cell_type"].nunique()
    2
    """

    @property
    def _n_rows_of_a_draw(self) -> int:
        return self._chunk_size

    def _mix(self, key: Key) -> Any:
        return partial(mixed, key)


def _mixed_within(key: Key, n_together: int, k: int, n_rows: int) -> Ints:
    """The rows of request ``k``, each ``n_together`` of them in random order among themselves."""
    rng = generator(key, MIX, k)
    return np.concatenate([s + rng.permutation(min(n_together, n_rows - s)) for s in range(0, n_rows, n_together)])


def _draw_chunks(  # noqa: PLR0913
    key: Key, runs: _ClassRuns, chunk_size: int, n_rows_of_a_draw: int, k: int, start: int, stop: int
) -> list[slice]:
    n_rows = stop - start
    rng = generator(key, DRAW, k)
    classes = runs.draw_classes(rng, -(-n_rows // n_rows_of_a_draw))
    n_chunks, n_last = divmod(n_rows, chunk_size)
    chunks = np.repeat(classes, n_rows_of_a_draw // chunk_size)[: n_chunks + bool(n_last)]
    firsts = runs.draw_chunks(rng, chunks, chunk_size).tolist()
    found = [slice(first, first + chunk_size) for first in firsts[:n_chunks]]
    if n_last:  # any rows of a chunk, not always its first
        begin = firsts[-1] + int(rng.integers(chunk_size))
        found += cyclic_run(begin, n_last, firsts[-1], firsts[-1] + chunk_size)
    return found


def _bounds(sizes: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([np.zeros(1, sizes.dtype), np.cumsum(sizes)])


def _check_classes(classes: Any) -> tuple[NDArray[np.integer[Any]], list[Any]]:
    if not isinstance(classes, pd.Categorical):
        msg = f"classes must be a pandas.Categorical, got {type(classes).__name__}; for a column: pd.Categorical(x)"
        raise TypeError(msg)
    codes = np.asarray(classes.codes)
    if (codes < 0).any():
        msg = (
            f"classes must not have NA values, {int((codes < 0).sum())} of {len(codes)} rows have; make them a class, "
            "as in classes.add_categories('unknown').fillna('unknown')"
        )
        raise ValueError(msg)
    return codes, list(classes.categories)


def _check_weights(weights: Any, n_classes: int) -> NDArray[np.float64]:
    if isinstance(weights, pd.Series):
        msg = "class_weights must be an array in the order of the categories, not a pandas Series"
        raise TypeError(msg)
    if weights is None:
        return np.ones(n_classes)
    try:
        checked = np.array(weights, np.float64)
    except (TypeError, ValueError) as error:
        msg = f"class_weights must be an array of numbers in the order of the categories, got {weights!r}"
        raise TypeError(msg) from error
    if checked.shape != (n_classes,):
        msg = f"class_weights needs one weight per class: {n_classes}, got shape {checked.shape}"
        raise ValueError(msg)
    with np.errstate(over="ignore"):
        is_finite = np.isfinite(checked).all() and np.isfinite(np.maximum(checked, 0).sum())
    if not is_finite or not (checked > 0).any():
        msg = "class_weights must be finite, also in sum, and have at least one positive weight"
        raise ValueError(msg)
    return np.maximum(checked, 0)
