"""Sampling strategies: which rows of a collection, in which order."""

from __future__ import annotations

import warnings
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from annbatch_dask.flags import check_flag
from annbatch_dask.kernels.assemble import has_kernels
from annbatch_dask.order.keys import Key
from annbatch_dask.order.rows import Blocks, Given, InOrder, Order, Rounds, Weighted, WeightTable
from annbatch_dask.sizes import check_whole
from annbatch_dask.warn import warn

__all__ = [
    "BlockShuffling",
    "BlockWeightedSampling",
    "ClassBalancedSampling",
    "Ints",
    "SamplingStrategy",
    "Streaming",
    "count_rows",
]

Ints = NDArray[np.int64]


def count_rows(collection: Any) -> int:
    """Rows of anything: the first axis where there is one (a sparse matrix has no ``len``), else ``len``."""
    shape = getattr(collection, "shape", None)
    return int(shape[0]) if isinstance(shape, tuple) and shape else len(collection)


class SamplingStrategy:
    """Base of all strategies; a strategy of your own implements ``get_indices``.

    Parameters
    ----------
    indices
        The rows to draw from, repeats allowed, or a mask; by default all. They are sorted, with a UserWarning where
        they were not: the strategy decides the order. Weights and labels stay with their rows.

    Examples
    --------
    >>> class EveryOther(scdataset.SamplingStrategy):
    ...     def get_indices(self, data_collection, seed=None, rng=None):
    ...         return np.arange(0, len(data_collection), 2)
    >>> next(iter(scdataset.scDataset(np.arange(100), EveryOther(), batch_size=4, seed=0))).tolist()
    [0, 2, 4, 6]
    """

    _shuffle_before_yield: bool | None = None
    _n_masked: int | None = None

    def __init__(self, indices: ArrayLike | None = None) -> None:
        self._rank_of_given: Ints | None = None
        self._indices: Ints | None = None
        if indices is not None:
            asked = np.asarray(indices)
            given = _check_indices(asked)
            self._n_masked = len(asked) if asked.dtype == bool else None
            order = np.argsort(given, kind="stable")
            if len(given) and (given[1:] < given[:-1]).any():
                msg = f"{len(given):,} indices were not sorted, and are now; the strategy decides the order of an epoch"
                warn(msg)
            self._indices, self._rank_of_given = given[order], order

    def get_indices(
        self, data_collection: Any, seed: int | None = None, rng: np.random.Generator | None = None
    ) -> NDArray[np.integer[Any]]:
        """All rows of one epoch, in their order.

        Parameters
        ----------
        data_collection
            Only its length matters.
        seed, rng
            Seed or generator of the order; ``rng`` takes precedence.
        """
        if type(self).order is SamplingStrategy.order:
            raise NotImplementedError
        key = int(self._get_rng(seed, rng).integers(2**62)) if rng is not None or seed is None else seed
        order = self.order(self._rows_of(data_collection), (key, 0))
        return order.take(0, len(order))

    def get_len(self, data_collection: Any) -> int:
        """Rows of one epoch."""
        return len(self.get_indices(data_collection, seed=0))

    def order(self, n_obs: int, key: Key) -> Order:
        """The rows of one epoch, as a function of position."""
        return self._ask(range(n_obs), key)

    def order_of(self, data_collection: Any, key: Key) -> Order:
        """The same of a collection, which a ``get_indices`` of the user's is given, also that of a derived strategy."""
        if self._is_asked_before("order"):
            return self._ask(data_collection, key)
        return self.order(self._rows_of(data_collection), key)

    def len_of(self, data_collection: Any) -> int:
        """Rows of one epoch of :meth:`order_of`."""
        if self._is_asked_before("get_len"):
            return len(self._ask(data_collection, (0, 0)))
        return self.get_len(data_collection)

    def _is_asked_before(self, name: str) -> bool:
        """True if ``get_indices`` is that of a class derived from the one whose ``name`` this strategy has."""
        classes = type(self).__mro__
        asked, other = (next(i for i, c in enumerate(classes) if n in vars(c)) for n in ("get_indices", name))
        return asked < other

    def _ask(self, data_collection: Any, key: Key) -> Order:
        rows = np.asarray(self.get_indices(data_collection, seed=_seed_of(key)))
        if rows.dtype == bool:
            msg = f"get_indices of {type(self).__name__} returned a mask; return rows, np.flatnonzero(mask)"
            raise TypeError(msg)
        return Given(_check_indices(rows))

    def identity(self) -> tuple[object, ...]:
        """Identity of the order, apart from the seed."""
        return (type(self).__qualname__, self._indices_digest)

    @cached_property
    def _indices_digest(self) -> str | None:
        return _digest(self._indices)

    def _get_rng(self, seed: int | None = None, rng: np.random.Generator | None = None) -> np.random.Generator:
        return np.random.default_rng(seed) if rng is None else rng

    def _count(self, data_collection: Any) -> int:
        """Rows to draw from."""
        return count_rows(data_collection) if self._indices is None else len(self._indices)

    def _rows_of(self, data_collection: Any) -> int:
        """Rows of the collection; where it does not say, as many as the indices need."""
        try:
            return count_rows(data_collection)
        except TypeError:
            if self._indices is None:
                raise
            return int(self._indices[-1]) + 1 if len(self._indices) else 0

    def _check_range(self, n_obs: int) -> None:
        if self._n_masked not in {None, n_obs}:
            msg = f"indices is a mask of {self._n_masked} rows, the collection has {n_obs}"
            raise ValueError(msg)
        if self._indices is not None and len(self._indices) and self._indices[-1] >= n_obs:
            msg = f"indices go up to {self._indices[-1]}, the collection has {n_obs} rows"
            raise ValueError(msg)


class _Subset:
    """An order of places in a list of rows, as an order of these rows."""

    def __init__(self, order: Order, rows: Ints | None) -> None:
        self._order, self._rows = order, rows

    def __len__(self) -> int:
        return len(self._order)

    def take(self, start: int, stop: int) -> Ints:
        places = self._order.take(start, stop)
        return places if self._rows is None else self._rows[places]


class Streaming(SamplingStrategy):
    """Rows in ascending order.

    Parameters
    ----------
    indices
        The rows to draw from; by default all.
    shuffle
        Mix the rows of each fetch.

    Examples
    --------
    >>> batches = scdataset.scDataset(np.arange(100), scdataset.Streaming(indices=[1, 2, 3]), batch_size=2, seed=0)
    >>> [batch.tolist() for batch in batches]
    [[1, 2], [3]]
    """

    def __init__(self, indices: ArrayLike | None = None, shuffle: bool = False) -> None:  # noqa: FBT001, FBT002 - scDataset's interface
        super().__init__(indices)
        self.shuffle = self._shuffle_before_yield = check_flag("shuffle", shuffle)

    def get_len(self, data_collection: Any) -> int:
        """Rows of one epoch."""
        return self._count(data_collection)

    def order(self, n_obs: int, key: Key) -> Order:  # noqa: ARG002
        """The rows of one epoch, as a function of position."""
        n = n_obs if self._indices is None else len(self._indices)
        return _Subset(InOrder(n), self._indices)


class BlockShuffling(SamplingStrategy):
    """Blocks of neighbouring rows in random order; the rows of each fetch are mixed.

    Parameters
    ----------
    block_size
        Rows of a block; 1 is a full shuffle.
    indices
        The rows to draw from; by default all.
    drop_last
        Leave out as many rows as the last block would be short of; in each epoch others.

    Examples
    --------
    >>> batches = scdataset.scDataset(np.arange(100), scdataset.BlockShuffling(block_size=4), batch_size=10, seed=0)
    >>> len(list(batches))
    10
    """

    _shuffle_before_yield = True

    def __init__(self, block_size: int = 8, indices: ArrayLike | None = None, drop_last: bool = False) -> None:  # noqa: FBT001, FBT002 - scDataset's interface
        super().__init__(indices)
        self.block_size = check_whole("block_size", block_size, 1)
        self.drop_last = check_flag("drop_last", drop_last)

    def get_len(self, data_collection: Any) -> int:
        """Rows of one epoch."""
        n = self._count(data_collection)
        return n - n % self.block_size if self.drop_last else n

    def order(self, n_obs: int, key: Key) -> Order:
        """The rows of one epoch, as a function of position."""
        n = n_obs if self._indices is None else len(self._indices)
        return _Subset(Blocks(n, self.block_size, key, drop_last=self.drop_last), self._indices)

    def identity(self) -> tuple[object, ...]:
        """Identity of the order, apart from the seed."""
        return (*super().identity(), self.block_size, self.drop_last)


class BlockWeightedSampling(SamplingStrategy):
    """Rows drawn in proportion to weights, neighbours in blocks of random order; the rows of each fetch are mixed.

    Parameters
    ----------
    block_size
        Draws of a block: they are near each other in the collection.
    indices
        The rows to draw from; by default all.
    weights
        (n,) 0 or more, for all rows of the collection, or for ``indices`` in their order; by default all alike. Used
        where they are, not copied: do not change them afterwards.
    total_size
        Draws of an epoch; by default as many as there are rows to draw from.
    replace
        With replacement each row comes as often as its weight says, on average exactly, and in an epoch but for one
        or two. Without, an epoch is made of rounds.
    sampling_size
        Rows of a round, in which none comes twice. Needed without replacement.

    Examples
    --------
    >>> weights = np.repeat([1, 0], 50)
    >>> strategy = scdataset.BlockWeightedSampling(block_size=4, weights=weights, total_size=40)
    >>> batches = scdataset.scDataset(np.arange(100), strategy, batch_size=10, seed=0)
    >>> len(list(batches))
    4
    """

    _shuffle_before_yield = True
    _given = "weights"

    def __init__(  # noqa: PLR0913 - scDataset's interface
        self,
        block_size: int = 8,
        indices: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        total_size: int | None = None,
        replace: bool = True,  # noqa: FBT001, FBT002
        sampling_size: int | None = None,
    ) -> None:
        super().__init__(indices)
        self.block_size = check_whole("block_size", block_size, 1)
        self._weights = None if weights is None else _check_weights(np.asarray(weights))
        self.total_size = None if total_size is None else check_whole("total_size", total_size, 0)
        self.replace = check_flag("replace", replace)
        self.sampling_size = None if sampling_size is None else check_whole("sampling_size", sampling_size, 1)
        self._table: tuple[int, WeightTable] | None = None
        if self._weights is not None and self._indices is not None and len(self._indices):
            self._check_number(max(len(self._weights), int(self._indices[-1]) + 1))
        if not self.replace and sampling_size is None:
            msg = "sampling_size, the rows of a round, is needed with replace=False"
            raise ValueError(msg)
        if self.replace and sampling_size is not None:
            warnings.warn("sampling_size is ignored with replace=True", UserWarning, stacklevel=2)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_table": None}

    @property
    def weights(self) -> NDArray[np.float64] | None:
        """The weights, with a sum of 1; None where all rows are alike."""
        return None if self._weights is None else np.divide(self._weights, self._weights.sum())

    def get_len(self, data_collection: Any) -> int:
        """Rows of one epoch."""
        return self._count(data_collection) if self.total_size is None else self.total_size

    def order(self, n_obs: int, key: Key) -> Order:
        """The rows of one epoch, as a function of position."""
        table = self._weigh(n_obs)
        n_draws = len(table) if self.total_size is None else self.total_size
        if n_draws and not len(table):
            msg = f"there are no rows to draw {n_draws} from"
            raise ValueError(msg)
        if self.replace:
            return _Subset(Weighted(table, n_draws, self.block_size, key), self._indices)
        assert self.sampling_size is not None  # checked at construction
        size = min(self.sampling_size, n_draws)
        if size > table.n_positive:
            msg = f"a round of {size} rows without replacement needs as many of a weight, not {table.n_positive}"
            raise ValueError(msg)
        return _Subset(Rounds(table, n_draws, size, self.block_size, key), self._indices)

    def identity(self) -> tuple[object, ...]:
        """Identity of the order, apart from the seed."""
        settings = (self.block_size, self.total_size, self.replace, self.sampling_size)
        return (*super().identity(), self._weights_digest, *settings)

    @cached_property
    def _weights_digest(self) -> str | None:
        return _digest(self._weights)

    def _check_range(self, n_obs: int) -> None:
        super()._check_range(n_obs)
        self._check_number(n_obs)

    def _check_number(self, n_obs: int) -> None:
        """ValueError unless there is a weight for each of ``n_obs`` rows, or for each of ``indices``."""
        n_indices = n_obs if self._indices is None else len(self._indices)
        if self._weights is not None and len(self._weights) not in (n_obs, n_indices):
            of = "rows" if self._indices is None else f"rows and {n_indices} indices"
            msg = f"there are {len(self._weights)} {self._given} for {n_obs} {of}; give one for each"
            raise ValueError(msg)

    def _weigh(self, n_obs: int) -> WeightTable:
        """The weights of the rows to draw from, in ascending order of these rows."""
        if self._table is None or self._table[0] != n_obs:
            self._check_number(n_obs)
            self._table = n_obs, WeightTable(self._align(n_obs))
        return self._table[1]

    def _align(self, n_obs: int) -> NDArray[Any]:
        n = n_obs if self._indices is None else len(self._indices)
        if self._weights is None:
            return np.ones(n)
        if self._indices is None or self._rank_of_given is None:
            aligned = self._weights
        elif len(self._weights) == len(self._indices):
            aligned = self._weights[self._rank_of_given]
        else:
            aligned = self._weights[self._indices] if self._indices[-1] < len(self._weights) else self._weights[:0]
        if len(aligned) != n:
            msg = f"there are {len(self._weights)} weights for {n} rows to draw from; give one for each or for all"
            raise ValueError(msg)
        if not aligned.any():
            msg = f"all of the {n} rows to draw from have weight 0"
            raise ValueError(msg)
        return aligned


class ClassBalancedSampling(BlockWeightedSampling):
    """Rows drawn such that every class is drawn equally often.

    Parameters are those of :class:`BlockWeightedSampling`, with ``labels`` instead of ``weights``:

    labels
        The class of every row of the collection, which then weighs by the whole collection's frequencies, or of
        ``indices`` in their order, which balances the subset.

    Examples
    --------
    >>> labels = np.repeat(["rare", "common"], [10, 90])
    >>> strategy = scdataset.ClassBalancedSampling(labels, block_size=1, total_size=1000)
    >>> rows = np.concatenate(list(scdataset.scDataset(np.arange(100), strategy, batch_size=100, seed=0)))
    >>> bool(400 < (rows < 10).sum() < 600)
    True
    """

    _given = "labels"

    def __init__(  # noqa: PLR0913 - scDataset's interface
        self,
        labels: Any,
        block_size: int = 8,
        indices: ArrayLike | None = None,
        total_size: int | None = None,
        replace: bool = True,  # noqa: FBT001, FBT002
        sampling_size: int | None = None,
    ) -> None:
        self.labels = labels
        codes = pd.factorize(pd.Series(labels), use_na_sentinel=False)[0]
        if not len(codes):
            msg = "labels is empty"
            raise ValueError(msg)
        n_indices = 0 if indices is None else len(_check_indices(np.asarray(indices)))
        if len(codes) < n_indices:
            msg = f"there are {len(codes)} labels for {n_indices} indices"
            raise ValueError(msg)
        weights = 1 / np.bincount(codes)[codes]
        super().__init__(block_size, indices, weights, total_size, replace, sampling_size)


def _seed_of(key: Key) -> int:
    """One integer for strategies of the user's, which take no more."""
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=7).digest(), "little")


def _digest(values: NDArray[Any] | None) -> str | None:
    return None if values is None else blake2b(values.tobytes(), digest_size=8).hexdigest()


def _check_indices(indices: NDArray[Any]) -> Ints:
    if indices.dtype == bool and indices.ndim == 1:
        return np.flatnonzero(indices)
    if indices.ndim != 1 or (indices.dtype.kind not in "iu" and len(indices)):
        msg = f"indices must be integers or a mask, got an array of {indices.dtype} of shape {indices.shape}"
        raise TypeError(msg)
    if len(indices) and indices.min() < 0:
        msg = f"indices must be 0 or more, got {indices.min()}"
        raise ValueError(msg)
    return indices.astype(np.int64)


def _check_weights(weights: NDArray[Any]) -> NDArray[Any]:
    if weights.ndim != 1 or weights.dtype.kind not in "biuf":
        msg = f"weights must be a list of numbers, got an array of shape {weights.shape} of {weights.dtype}"
        raise ValueError(msg)
    if not has_kernels(weights.dtype):
        weights = weights.astype(np.float64)
    total = weights.sum(dtype=np.float64)
    if not np.isfinite(total) or total <= 0 or weights.min() < 0:
        msg = f"weights must be 0 or more and have a positive sum, got a sum of {total}"
        raise ValueError(msg)
    return weights
