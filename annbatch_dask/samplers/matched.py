"""Cells drawn together with controls of their own group: for models of perturbations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from annbatch_dask.order.epoch import Epoch
from annbatch_dask.order.keys import Key, generator
from annbatch_dask.order.planned import Planned, expand
from annbatch_dask.samplers.base import DRAW, RunSampler, mixed
from annbatch_dask.samplers.controls import Controls
from annbatch_dask.samplers.runs import shuffled_runs
from annbatch_dask.seeds import Seed
from annbatch_dask.sizes import check_positive
from annbatch_dask.types import LoadRequest

__all__ = ["MatchedControlSampler"]

Ints = NDArray[np.int64]


class MatchedControlSampler(RunSampler):
    """Each perturbed cell once, in random order, followed by controls of the same group.

    A batch has groups of ``1 + n_controls`` rows: a perturbed cell, then its controls. So
    ``X.reshape(-1, 1 + n_controls, n_vars)`` pairs them. Controls are drawn with replacement, all of a group alike.

    Parameters
    ----------
    chunk_size
        Perturbed cells read together.
    preload_nchunks
        Chunks in one load window.
    batch_size
        Rows in a batch, controls counted.
    is_control
        (n_obs,) whether a row is a control.
    match
        (n_obs,) what a cell and its controls have in common: batch, cell line (as a categorical, strings or numbers),
        or both, as a frame.
    n_controls
        Controls for each perturbed cell.
    drop_last
        Leave out the last batch if it is not full.
    seed
        Fixes the order: a non-negative integer, or a generator to draw one from; by default one is
        drawn from the system.
    rng
        annbatch's name of ``seed``: a generator.

    Raises
    ------
    SelectionError
        If a perturbed cell's group has no control.

    Examples
    --------
    >>> obs = collection.obs(["cell_type", "donor"], names=False)
    >>> sampler = samplers.MatchedControlSampler(16, 8, 64, is_control=obs["cell_type"] == "T", match=obs["donor"])
    >>> batch = next(iter(Loader(batch_sampler=sampler).use_collection(collection)))
    >>> int((batch["obs"]["cell_type"] == "T").sum())
    32
    """

    _takes_mask = False

    def __init__(  # noqa: PLR0913
        self,
        chunk_size: int,
        preload_nchunks: int,
        batch_size: int,
        *,
        is_control: ArrayLike,
        match: Any,
        n_controls: int = 1,
        drop_last: bool = False,
        rng: np.random.Generator | None = None,
        seed: Seed | None = None,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("n_controls", n_controls)):
            check_positive(name, value)
        n_together = 1 + int(n_controls)
        if batch_size % n_together:
            msg = f"a batch of {batch_size} rows cannot hold whole groups of a cell and {n_controls} controls"
            raise ValueError(msg)
        super().__init__(chunk_size, preload_nchunks, batch_size // n_together, drop_last=drop_last, mask=None)
        self._n_controls = n_together - 1
        self._controls = Controls.of(is_control, match)
        self._perturbed = np.flatnonzero(~self._controls.is_control)
        self._n_obs = len(self._controls.groups)
        self.take_seed(seed, rng)

    @property
    def batch_size(self) -> int:
        """Rows in a batch, controls counted."""
        return self._batch_size * (1 + self._n_controls)

    @property
    def shuffle(self) -> bool:
        """Always True."""
        return True

    @property
    def n_together(self) -> int:
        """Rows of a cell and its controls."""
        return 1 + self._n_controls

    def validate(self, n_obs: int) -> None:
        """ValueError unless it was made for as many rows."""
        if n_obs != self._n_obs:
            msg = f"is_control has {self._n_obs} rows, which does not match loader n_obs ({n_obs})"
            raise ValueError(msg)

    def state_identity(self) -> tuple[object, ...]:
        """Identity that a saved state and the sampler that resumes from it must share."""
        return (*super().state_identity(), self._n_controls, self._digest)

    @cached_property
    def _digest(self) -> str:
        groups = self._controls.groups[self._perturbed]
        content = b"".join(part.tobytes() for part in (self._perturbed, groups, self._controls.rows))
        return blake2b(content, digest_size=8).hexdigest()

    def _n_rows(self, n_obs: int) -> int:  # noqa: ARG002 - it was made for these rows
        return len(self._perturbed)

    def epoch(self, n_obs: int, key: Key) -> Epoch:  # noqa: ARG002
        """The pass over the perturbed cells, without their controls."""
        n = len(self._perturbed)
        take = shuffled_runs(0, n, self._chunk_size, n, key)
        return Epoch(n, self.window, self._batch_size, self._drop_last, take, partial(mixed, key))

    def plan_requests(self, n_obs: int, epoch: int) -> Iterator[Planned]:
        """The load requests of one epoch, all workers' together."""
        key = (self.seed, epoch)
        for k, planned in enumerate(super().plan_requests(n_obs, epoch)):
            sizes = tuple(size * (1 + self._n_controls) for size in planned.sizes)
            yield Planned(sizes, partial(self._add_controls, planned.make, key, k))

    def _add_controls(self, make: Callable[[], LoadRequest], key: Key, k: int) -> LoadRequest:
        request = make()
        places = expand(request["requests"])
        drawn = self._controls.draw(generator(key, DRAW, k), self._perturbed[places], self._n_controls)
        # Row of the request: first all perturbed cells, then the controls of each.
        of_cell = np.arange(len(places))[:, None]
        of_controls = len(places) + np.arange(drawn.size).reshape(drawn.shape)
        together = np.concatenate([of_cell, of_controls], axis=1)
        rows = np.concatenate([self._perturbed[places], drawn.ravel()])
        return {"requests": rows, "splits": [together[split].ravel() for split in request["splits"]]}
