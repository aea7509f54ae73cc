"""Position of a loader within an epoch: saved as a few integers, checked when loaded."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from annbatch_dask.errors import StateError
from annbatch_dask.order.share import Worker, current_worker
from annbatch_dask.samplers.base import SeededSampler
from annbatch_dask.samplers.distributed import DistributedSampler
from annbatch_dask.samplers.sampler import Sampler
from annbatch_dask.types import LoadRequest
from annbatch_dask.warn import warn

__all__ = ["Progress", "Resumable", "State", "digest"]

_VERSION = 2
"""Raised whenever the same seed gives another order, or a state has other fields."""


@dataclass
class Progress:
    """Progress of one iteration.

    Attributes
    ----------
    epoch
        Which pass it is; None before its first batch was asked for.
    n_batches
        Batches handed to the consumer.
    is_over
        Whether the consumer was told that no more come.
    rng_state
        That of the sampler's generator when the pass began, where the order depends on it.
    """

    epoch: int | None = None
    n_batches: int = 0
    is_over: bool = False
    rng_state: dict[str, Any] | None = None

    def begin(self, sampler: Sampler, state: State | None, worker: Worker | None) -> int:
        """Start as the next pass, or where the state says; returns the epoch."""
        if state is None:
            self.epoch, self.rng_state = sampler.epoch_counter.start(worker), _rng_state(_inner(sampler))
            return self.epoch
        state.check_place(worker)
        state.restore_rng(sampler)
        self.epoch = sampler.epoch_counter.start(worker, state.epoch)
        self.n_batches, self.is_over, self.rng_state = state.batch, state.is_over, state.rng_state
        return self.epoch


@dataclass(frozen=True)
class State:
    """Content of :meth:`annbatch_dask.Loader.state_dict`.

    Attributes
    ----------
    epoch, batch
        The pass, and how many of its batches were consumed; with workers, of the worker's part.
    is_over
        Whether the pass is over.
    seed
        The sampler's; None where it has none.
    rng_state
        Instead of a seed, for samplers of the user's: the generator's state when the pass began.
    sampler, data
        Digests of what the order depends on.
    worker, n_workers
        Place among the workers of a DataLoader; 0 and 0 without any. The rank is not told: all stand alike.
    version
        Version of this format and of the orders.
    collection_version
        Number of the version of the collection; None where there is none, or an earlier release saved the state.
    """

    epoch: int
    batch: int
    is_over: bool
    seed: int | None
    rng_state: dict[str, Any] | None
    sampler: str
    data: str
    worker: int
    n_workers: int
    version: int = _VERSION
    collection_version: int | None = None

    @classmethod
    def of(  # noqa: PLR0913 - its fields
        cls,
        progress: Progress,
        epoch: int,
        sampler: Sampler,
        data: str,
        worker: Worker | None,
        collection_version: int | None = None,
    ) -> State:
        """The state of a loader in which one iteration has come this far."""
        inner = _inner(sampler)
        # Before the first batch, and after the last one, the next pass will begin with what the generator has now.
        is_under_way = progress.epoch is not None and not progress.is_over
        return cls(
            epoch=epoch,
            batch=progress.n_batches,
            is_over=progress.is_over,
            seed=inner.seed if isinstance(inner, SeededSampler) else None,
            rng_state=progress.rng_state if is_under_way else _rng_state(inner),
            sampler=digest(sampler.state_identity()),
            data=data,
            worker=0 if worker is None else worker.id,
            n_workers=0 if worker is None else worker.n_workers,
            collection_version=collection_version,
        )

    @classmethod
    def read(cls, state: dict[str, Any]) -> State:
        """Read from a dictionary; StateError if it is not one of this version."""
        if not isinstance(state, Mapping):
            msg = f"a state is what state_dict() returned, got {state!r}"
            raise StateError(msg)
        fields = set(cls.__dataclass_fields__)
        if state.get("version") != _VERSION or set(state) | {"collection_version"} != fields:
            msg = (
                f"not a state of this release's Loader: version {state.get('version')!r}, expected {_VERSION}, and "
                "orders differ; end its epoch with the release that saved it, or begin it anew: "
                f"set_epoch({state.get('epoch', 0)})"
            )
            raise StateError(msg)
        return cls(**state)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only."""
        return asdict(self)

    def check(self, sampler: Sampler, data: str, collection_version: int | None = None) -> None:
        """StateError where order or data are not what they were."""
        if self.sampler != digest(sampler.state_identity()):
            msg = (
                f"the state was saved with another sampler ({self.sampler}) than this loader has "
                f"({digest(sampler.state_identity())}): {sampler.state_identity()}; "
                "use the same settings and as many ranks"
            )
            raise StateError(msg)
        if self.data != data:
            msg = f"the state was saved over other data ({self.data}) than this loader has ({data}); add the same"
            was, now = self.collection_version, collection_version
            if None not in (was, now) and was != now:
                msg = (
                    f"the state was saved over version {was} of its collection ({self.data}), this loader has version "
                    f"{now} ({data}); add that version, if it is kept: DatasetCollection(path, version={was})"
                )
            raise StateError(msg)
        inner = _inner(sampler)
        if isinstance(inner, SeededSampler) and inner.seed_is_given and inner.seed != self.seed:
            msg = f"the state was saved with seed {self.seed}, this loader's is {inner.seed}; use the same rng or none"
            raise StateError(msg)

    def check_place(self, worker: Worker | None) -> None:
        """StateError where another process continues than the one that stopped."""
        found = (0, 0) if worker is None else (worker.id, worker.n_workers)
        if self.batch and found != (self.worker, self.n_workers):
            msg = (
                f"the state was saved in worker {self.worker} of {self.n_workers} of a DataLoader, this is worker "
                f"{found[0]} of {found[1]}; use torchdata's StatefulDataLoader with as many workers"
            )
            raise StateError(msg)

    def restore_rng(self, sampler: Sampler) -> None:
        """Give the sampler the seed, or the generator's state, that were saved."""
        inner = _inner(sampler)
        if isinstance(inner, SeededSampler):
            inner.restore_seed(inner.seed if self.seed is None else self.seed)
        elif inner.rng is not None and self.rng_state is not None:
            inner.rng.bit_generator.state = self.rng_state


class Resumable(ABC):
    """Passes over data that a sampler orders: counted, stopped and resumed."""

    _batch_sampler: Sampler
    _progress: Progress
    _resume_from: State | None
    _collection_version: int | None = None
    """Of the collection that the data are, if they are one."""

    @abstractmethod
    def _data_digest(self) -> str:
        """Differs where the data do."""

    def _begin(self, progress: Progress, n_obs: int) -> Iterator[LoadRequest]:
        """The requests of the pass that begins, from where it was left if a state was loaded."""
        sampler, worker = self._batch_sampler, current_worker()
        sampler.validate(n_obs)
        _warn_of_nothing(_inner(sampler), n_obs)
        state, self._resume_from = self._resume_from, None
        epoch = progress.begin(sampler, state, worker)
        return iter(()) if progress.is_over else sampler.resume_requests(n_obs, epoch, progress.n_batches)

    def set_epoch(self, epoch: int) -> None:
        """Let the next pass be this one, counted from 0. Passes count themselves otherwise.

        After :meth:`load_state_dict` of a state in the middle of this very epoch, the pass still continues from there.
        """
        if self._resume_from is not None and self._resume_from.epoch == epoch:
            return
        self._resume_from, self._progress = None, Progress()
        self._batch_sampler.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the latest iteration, counted in delivered batches: a few integers.

        Raises
        ------
        RuntimeError
            If workers of a DataLoader iterate: only they know. torchdata's ``StatefulDataLoader`` asks them.
        """
        if self._resume_from is not None:
            return self._resume_from.to_dict()
        worker, counter = current_worker(), self._batch_sampler.epoch_counter
        if worker is None and counter.is_elsewhere:
            msg = (
                "the loader is iterated by workers of a DataLoader, and only they know how far they are; use "
                "torchdata.stateful_dataloader.StatefulDataLoader and its state_dict, or num_workers=0"
            )
            raise RuntimeError(msg)
        epoch = counter.peek(worker) if self._progress.epoch is None else self._progress.epoch
        data, version = self._data_digest(), self._collection_version
        return State.of(self._progress, epoch, self._batch_sampler, data, worker, version).to_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next pass continue after the last batch that was taken before the state was saved.

        Raises
        ------
        StateError
            If the state was saved with another sampler or seed, over other data, in another worker, or on another
            number of ranks.
        """
        loaded = State.read(state)
        loaded.check(self._batch_sampler, self._data_digest(), self._collection_version)
        loaded.restore_rng(self._batch_sampler)
        self._resume_from, worker = None, current_worker()
        if worker is not None:  # one whose part is over must wait for the others' before a new pass begins
            self._resume_from = loaded
        elif loaded.is_over or not loaded.batch:
            self.set_epoch(loaded.epoch + loaded.is_over)
        else:
            loaded.check_place(None)
            self._batch_sampler.set_epoch(loaded.epoch)
            self._resume_from = loaded


def _rng_state(sampler: Sampler) -> dict[str, Any] | None:
    """State of the random generator that the order depends on; None for our own samplers."""
    if isinstance(sampler, SeededSampler) or sampler.rng is None:
        return None
    return dict(sampler.rng.bit_generator.state)


def digest(value: object) -> str:
    """Sixteen digits that differ where the value does: of JSON, which reads alike in all releases, unlike a repr."""
    return blake2b(json.dumps(value, sort_keys=True, default=_plain).encode(), digest_size=8).hexdigest()


def _plain(value: object) -> object:
    """A value of numpy's as one of Python's."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    msg = f"a saved state depends on {value!r}; state_identity() may return numbers, texts, None, and tuples of them"
    raise TypeError(msg)


def _warn_of_nothing(sampler: Sampler, n_obs: int) -> None:
    """Say where a pass has no batch at all, since its rows are too few for one."""
    if isinstance(sampler, SeededSampler) and sampler.drops_last and not sampler.n_batches(n_obs):
        msg = f"no batch comes: {n_obs} rows do not fill one of {sampler.batch_size}, and drop_last leaves them out"
        warn(msg)


def _inner(sampler: Sampler) -> Sampler:
    return sampler.sampler if isinstance(sampler, DistributedSampler) else sampler
