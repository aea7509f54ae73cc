"""The interface of a sampler."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from operator import index
from typing import Any

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.order.planned import Planned, cut, expand, plan_request, skip
from annbatch_dask.order.share import by_worker, current_worker
from annbatch_dask.samplers.epoch_counter import EpochCounter
from annbatch_dask.seeds import check_rng
from annbatch_dask.types import LoadRequest

__all__ = ["Sampler", "check_mask", "count_rows"]


def check_mask(mask: slice) -> slice:
    """The mask with its start filled in; TypeError or ValueError unless it is a plain ascending range."""
    if not isinstance(mask, slice) or not all(hasattr(end, "__index__") for end in (mask.start or 0, mask.stop or 0)):
        msg = f"mask is {mask!r}; give a range of rows, slice(start, stop)"
        raise TypeError(msg)
    if mask.step not in (None, 1):
        msg = f"mask.step must be 1, but got {mask.step}"
        raise ValueError(msg)
    start = 0 if mask.start is None else index(mask.start)
    stop = None if mask.stop is None else index(mask.stop)
    if start < 0:
        msg = f"mask.start must be >= 0, but got {start}"
        raise ValueError(msg)
    if stop is not None and start >= stop:
        msg = f"mask.start must be < mask.stop, but got {start} and {stop}"
        raise ValueError(msg)
    return slice(start, stop)


class Sampler(ABC):
    """Decides which rows are loaded together, and which of them make a batch.

    Subclasses implement ``batch_size``, ``shuffle``, ``n_batches``, ``validate`` and ``_sample``; they need
    not call ``super().__init__()``. What ``_sample`` yields is shared out among the workers of a DataLoader
    afterwards: it must be the same in each of them.

    Examples
    --------
    >>> class Backwards(abc.Sampler):
    ...     batch_size, shuffle = 100, False
    ...
    ...     def n_batches(self, n_obs):
    ...         return n_obs // 100
    ...
    ...     def validate(self, n_obs):
    ...         pass
    ...
    ...     def _sample(self, n_obs):
    ...         for stop in range(n_obs, 0, -100):
    ...             yield {"requests": [slice(stop - 100, stop)]}
    >>> loader = Loader(batch_sampler=Backwards(), return_index=True).use_collection(collection)
    >>> [int(batch["index"][0]) for batch in loader]
    [400, 300, 200, 100, 0]
    """

    # Class attributes, so that a subclass with an __init__ of its own still has them.
    _takes_mask: bool = True
    _mask: slice = slice(0, None)
    _rng: np.random.Generator | None = None

    @property
    @abstractmethod
    def batch_size(self) -> int | None:
        """Rows in a batch; None only where every request brings its own splits."""

    @property
    def n_together(self) -> int:
        """Neighbouring rows of a batch that belong together; a global batch is not cut between them."""
        return 1

    @property
    @abstractmethod
    def shuffle(self) -> bool | None:
        """True if rows are mixed within a request; None only where requests bring their own splits."""

    @property
    def mask(self) -> slice:
        """The range of rows that may be drawn."""
        return self._mask

    @mask.setter
    def mask(self, value: slice) -> None:
        mask = check_mask(value)
        if not self._takes_mask and mask != slice(0, None):
            msg = (
                f"{type(self).__name__} was given what it draws from, and takes no mask: Loader(where=...) selects rows"
            )
            raise ValueError(msg)
        self._mask = mask

    @property
    def rng(self) -> np.random.Generator | None:
        """Source of randomness."""
        return self._rng

    @rng.setter
    def rng(self, value: np.random.Generator | None) -> None:
        self._rng = check_rng(value)

    @abstractmethod
    def n_batches(self, n_obs: int) -> int:
        """Number of batches of one pass over ``n_obs`` rows."""

    @abstractmethod
    def validate(self, n_obs: int) -> None:
        """Raise ValueError where this sampler cannot run over ``n_obs`` rows."""

    @abstractmethod
    def _sample(self, n_obs: int) -> Iterator[LoadRequest]:
        """The load requests of one pass; the place to extend."""

    def sample(self, n_obs: int) -> Iterator[LoadRequest]:
        """The load requests of one pass, checked, each with its splits.

        In a worker of a torch DataLoader these are the worker's part of the pass.

        Parameters
        ----------
        n_obs
            Rows of the loader.

        Yields
        ------
        LoadRequest
            With ``splits`` always present.
        """
        self.validate(n_obs)
        yield from self.resume_requests(n_obs, self.epoch_counter.start(current_worker()), 0)

    def resume_requests(self, n_obs: int, epoch: int, n_batches: int) -> Iterator[LoadRequest]:
        """The load requests of an epoch without its first ``n_batches``; of this worker's part of it."""
        stream = by_worker(self.plan_requests(n_obs, epoch), current_worker(), in_order=not self.shuffle)
        for planned in skip(stream, n_batches):
            yield planned.make()

    @property
    def epoch_counter(self) -> EpochCounter:
        """Counts the passes."""
        if "_epochs" not in self.__dict__:
            self._epochs = EpochCounter()
        return self._epochs

    def set_epoch(self, epoch: int) -> None:
        """Let the next pass be this one, counted from 0."""
        self.epoch_counter.set(epoch)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | ({"_epochs": self._epochs.share()} if "_epochs" in self.__dict__ else {})

    def plan_requests(self, n_obs: int, epoch: int) -> Iterator[Planned]:  # noqa: ARG002 - for subclasses
        """The load requests of one epoch, all workers' together."""
        requests = self._sample(n_obs)
        try:
            for request in requests:
                if "requests" not in request:
                    msg = f"a load request of {type(self).__name__} has no 'requests', but {sorted(request)}"
                    raise KeyError(msg)
                if "splits" not in request:
                    request = {"requests": request["requests"], "splits": self._default_splits(request)}  # noqa: PLW2901
                yield plan_request(request)
        finally:
            close = getattr(requests, "close", None)
            if close is not None:
                close()

    def state_identity(self) -> tuple[object, ...]:
        """Identity that a saved state and the sampler that resumes from it must share."""
        return (type(self).__qualname__, self.batch_size, self.shuffle, self.mask.start, self.mask.stop)

    def _default_splits(self, request: LoadRequest) -> list[NDArray[np.integer[Any]]]:
        for name in ("batch_size", "shuffle"):
            if getattr(self, name) is None:
                msg = f"{name} must be set when splits are not provided in LoadRequest"
                raise ValueError(msg)
        n_rows = count_rows(request["requests"])
        rng = self.rng or np.random.default_rng()
        order = rng.permutation(n_rows) if self.shuffle else np.arange(n_rows)
        return cut(order, self.batch_size or 1)


def count_rows(requests: list[slice] | NDArray[np.integer[Any]]) -> int:
    """Rows asked for, repeats counted."""
    return len(expand(requests))
