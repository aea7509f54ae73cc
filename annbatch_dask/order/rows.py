"""Orders of single rows, looked up at any stretch of positions without the rest being made."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.kernels.weights import find_rows, sum_spans
from annbatch_dask.order.keys import Key, Shuffled, generator, uniforms

__all__ = ["Blocks", "Given", "InOrder", "Order", "Rounds", "WeightTable", "Weighted"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_TAIL, _DRAW, _ROUND = range(3)
"""What a number is drawn for."""

_SPAN = 256
"""Weights summed up together. A draw finds its span by bisection and looks at every weight of it."""

_STRETCH = 1 << 20
"""Rows looked at together in a draw without replacement."""


class Order(Protocol):
    """A sequence of ``len(order)`` numbers."""

    def __len__(self) -> int: ...

    def take(self, start: int, stop: int) -> Ints:
        """(stop - start,) int64, what is at these positions."""
        ...


class InOrder:
    """0, 1, 2, ..."""

    def __init__(self, n: int) -> None:
        self._n = n

    def __len__(self) -> int:
        return self._n

    def take(self, start: int, stop: int) -> Ints:
        """The positions themselves."""
        return np.arange(start, stop)


class Given:
    """Rows given by an array."""

    def __init__(self, values: Ints) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def take(self, start: int, stop: int) -> Ints:
        """Part of the array."""
        return self._values[start:stop]


class Blocks:
    """[0, n) in blocks of ``block_size`` in random order; inside a block the order is kept.

    As many numbers as the last block is short of come last, or not at all with ``drop_last``: not those of the short
    block, in most epochs, but neighbours out of another one, whose places the short block takes. So every number is
    at every position, and left out, with the same chance.
    """

    def __init__(self, n: int, block_size: int, key: Key, *, drop_last: bool = False) -> None:
        self._block_size = block_size
        self._n_blocks, self._n_tail = divmod(n, block_size)
        self._n = n - self._n_tail if drop_last else n
        self._order = Shuffled(self._n_blocks, key)
        self._swapped, self._first = divmod(int(generator(key, _TAIL).integers(max(n, 1))), block_size)

    def __len__(self) -> int:
        return self._n

    def take(self, start: int, stop: int) -> Ints:
        """The numbers at these positions."""
        block, rest = np.divmod(np.arange(start, stop), self._block_size)
        is_tail = block == self._n_blocks
        found = np.empty(len(block), np.int64)
        found[~is_tail] = self._blocks(block[~is_tail])
        found[is_tail] = self._n_blocks
        return self._swap(found, rest)

    def _swap(self, block: Ints, rest: Ints) -> Ints:
        """The numbers at these places of blocks, where the tail and part of another block have changed places."""
        found = block * self._block_size + rest
        if self._n_tail and self._swapped < self._n_blocks:
            place = (rest - self._first) % self._block_size
            to_tail = (block == self._swapped) & (place < self._n_tail)
            from_tail = block == self._n_blocks
            found[to_tail] = self._n_blocks * self._block_size + place[to_tail]
            back = (rest[from_tail] + self._first) % self._block_size
            found[from_tail] = self._swapped * self._block_size + back
        return found

    def _blocks(self, positions: Ints) -> Ints:
        """Block at each position; neighbours mostly ask for the same one."""
        wanted, inverse = np.unique(positions, return_inverse=True)
        return self._order.at(wanted)[inverse]


class WeightTable:
    """Finds the row a number between 0 and the sum of all weights falls on, with little beside the weights.

    Parameters
    ----------
    weights
        (n,) of any real dtype, 0 or more, not all 0.
    """

    def __init__(self, weights: NDArray[Any]) -> None:
        self.weights = weights
        self._bounds = sum_spans(weights, _SPAN)

    def __len__(self) -> int:
        return len(self.weights)

    @cached_property
    def n_positive(self) -> int:
        """Number of rows that can be drawn."""
        return int(np.count_nonzero(self.weights))

    def find(self, shares: Floats) -> Ints:
        """(k,) int64, the row at each of the (k,) shares in [0, 1) of the sum. Never one of weight 0."""
        rows: Ints = find_rows(self.weights, _SPAN, self._bounds, shares * self._bounds[-1])
        return rows


class Weighted:
    """``n_draws`` rows drawn with replacement in proportion to their weights, neighbours in blocks of random order.

    Draw ``d`` comes from the ``d``-th of ``n_draws`` equal shares of the sum of weights. So a row is drawn as often
    as its weight says, on average exactly, and in every epoch but for one or two.
    """

    def __init__(self, table: WeightTable, n_draws: int, block_size: int, key: Key) -> None:
        self._table = table
        self._key = key
        self._draws = Blocks(n_draws, block_size, key)

    def __len__(self) -> int:
        return len(self._draws)

    def take(self, start: int, stop: int) -> Ints:
        """The rows drawn at these positions."""
        draws = self._draws.take(start, stop)
        return self._table.find((draws + uniforms(self._key, _DRAW, draws)) / len(self))


class Rounds:
    """Rounds of ``round_size`` rows drawn without replacement, one after the other, ``n_draws`` rows in all.

    A round takes the rows with the smallest ``-log(u) / weight``: the same as drawing one by one in proportion to
    the weights of those that are left (Efraimidis and Spirakis 2006).
    """

    def __init__(self, table: WeightTable, n_draws: int, round_size: int, block_size: int, key: Key) -> None:  # noqa: PLR0913
        self._table = table
        self._n_draws = n_draws
        self._round_size = round_size
        self._block_size = block_size
        self._key = key
        self._latest: tuple[int, Ints] = (-1, np.zeros(0, np.int64))

    def __len__(self) -> int:
        return self._n_draws

    def take(self, start: int, stop: int) -> Ints:
        """The rows drawn at these positions."""
        parts = []
        while start < stop:
            number, first = divmod(start, self._round_size)
            end = min(stop, (number + 1) * self._round_size)
            rows = self._round(number)
            blocks = Blocks(len(rows), self._block_size, (self._key[0] ^ (number + 1), self._key[1]))
            parts.append(rows[blocks.take(first, first + end - start)])
            start = end
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def _round(self, number: int) -> Ints:
        """All rows of a round, ascending."""
        if self._latest[0] != number:
            n = min(self._round_size, self._n_draws - number * self._round_size)
            self._latest = number, self._draw_round(number, n)
        return self._latest[1]

    def _draw_round(self, number: int, n: int) -> Ints:
        rows, times = np.zeros(0, np.int64), np.zeros(0)
        for first in range(0, len(self._table), _STRETCH):
            weights = self._table.weights[first : first + _STRETCH]
            here = first + np.flatnonzero(weights)
            drawn = uniforms(self._key, _ROUND + number, here)
            rows = np.concatenate([rows, here])
            times = np.concatenate([times, -np.log1p(-drawn) / weights[here - first]])
            if len(rows) > n:
                best = np.argpartition(times, n)[:n]
                rows, times = rows[best], times[best]
        return np.sort(rows)
