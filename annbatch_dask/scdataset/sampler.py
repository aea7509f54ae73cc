"""The sampler of a strategy: its rows, fetched together and cut into batches."""

from __future__ import annotations

from functools import partial
from typing import Any, Self

import numpy as np

from annbatch_dask.flags import check_flag
from annbatch_dask.order.epoch import Epoch
from annbatch_dask.order.keys import Key
from annbatch_dask.order.rows import Order
from annbatch_dask.samplers.base import SeededSampler, mixed
from annbatch_dask.scdataset.strategy import Ints, SamplingStrategy, Streaming
from annbatch_dask.seeds import Seed
from annbatch_dask.sizes import check_whole

__all__ = ["Lent", "StrategySampler"]


class Lent:
    """The collection that a strategy of the user's is asked about: not copied with the sampler, nor pickled."""

    def __init__(self, collection: Any = None) -> None:
        self.collection = collection

    def __deepcopy__(self, _: object) -> Self:
        return self

    def __reduce__(self) -> tuple[type[Lent], tuple[()]]:
        return Lent, ()


class StrategySampler(SeededSampler):
    """A strategy as a sampler, for ``Loader(batch_sampler=...)`` and :class:`scDataset` alike.

    Parameters
    ----------
    strategy
        Which rows, in which order.
    batch_size
        Rows in a batch.
    fetch_factor
        Batches loaded together.
    drop_last
        Leave out the last batch if it is not full.
    seed
        Fixes the order: a non-negative integer, or a generator to draw one from; by default one is
        drawn from the system.
    rng
        annbatch's name of ``seed``: a generator.

    Examples
    --------
    >>> sampler = scdataset.StrategySampler(scdataset.BlockShuffling(16), batch_size=64)
    >>> len(list(Loader(batch_sampler=sampler).use_collection(collection)))
    8
    """

    _takes_mask = False

    def __init__(
        self,
        strategy: SamplingStrategy,
        batch_size: int,
        fetch_factor: int = 16,
        *,
        drop_last: bool = False,
        rng: np.random.Generator | None = None,
        seed: Seed | None = None,
    ) -> None:
        if not isinstance(strategy, SamplingStrategy):
            msg = f"strategy must be a SamplingStrategy, got {strategy!r}"
            raise TypeError(msg)
        self._strategy = strategy
        self._batch_size = check_whole("batch_size", batch_size, 1)
        self._fetch_size = self._batch_size * check_whole("fetch_factor", fetch_factor, 1)
        self._drop_last = check_flag("drop_last", drop_last)
        self.lent = Lent()
        self.take_seed(seed, rng)

    @property
    def batch_size(self) -> int:
        """Rows in a batch."""
        return self._batch_size

    @property
    def shuffle(self) -> bool:
        """True if the order is a random one."""
        return not isinstance(self._strategy, Streaming) or self._strategy.shuffle

    def n_batches(self, n_obs: int) -> int:
        """Batches of one pass over ``n_obs`` rows."""
        n_rows = self._strategy.len_of(self._collection(n_obs))
        return n_rows // self._batch_size if self._drop_last else -(-n_rows // self._batch_size)

    def validate(self, n_obs: int) -> None:
        """ValueError where the strategy's rows are not among ``n_obs``."""
        self._strategy._check_range(n_obs)  # noqa: SLF001

    def epoch(self, n_obs: int, key: Key) -> Epoch:
        """The pass with this key over ``n_obs`` rows."""
        order = self._strategy.order_of(self._collection(n_obs), key)
        mix = partial(mixed, key) if self._strategy._shuffle_before_yield else _as_fetched  # noqa: SLF001
        return Epoch(len(order), self._fetch_size, self._batch_size, self._drop_last, partial(_take, order), mix)

    def _collection(self, n_obs: int) -> Any:
        return range(n_obs) if self.lent.collection is None else self.lent.collection

    def state_identity(self) -> tuple[object, ...]:
        """Identity that a saved state and the sampler that resumes from it must share."""
        return (*super().state_identity(), self._fetch_size, self._drop_last, *self._strategy.identity())


def _take(order: Order, _: int, start: int, stop: int) -> Ints:
    return np.sort(order.take(start, stop))


def _as_fetched(_: int, n_rows: int) -> Ints:
    return np.arange(n_rows)
