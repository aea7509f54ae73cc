"""One pass over the rows, cut into load requests and batches, as a function of position."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.order.planned import Planned, cut
from annbatch_dask.types import LoadRequest

__all__ = ["Epoch"]

Ints = NDArray[np.int64]
Requests = list[slice] | NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Epoch:
    """A pass over ``n_rows`` rows, ``window`` of them loaded together. Nothing is made before it is asked for.

    Attributes
    ----------
    n_rows
        Rows of the pass.
    window
        Rows of a load request; the last one may be shorter.
    batch_size
        Rows of a batch.
    drop_last
        Leave out the last batch if it is not full.
    take
        ``(k, start, stop)`` to the rows at these positions of the pass, those of request ``k``.
    mix
        ``(k, n_rows)`` to the order in which the rows of request ``k`` are cut into batches.
    """

    n_rows: int
    window: int
    batch_size: int
    drop_last: bool
    take: Callable[[int, int, int], Requests]
    mix: Callable[[int, int], Ints]

    @property
    def n_batches(self) -> int:
        """Batches of the pass, where a window is a whole number of them."""
        per_window = -(-self.window // self.batch_size)
        n_full, n_rest = divmod(self.n_rows, self.window)
        rest = n_rest // self.batch_size if self.drop_last else -(-n_rest // self.batch_size)
        return n_full * per_window + rest

    def planned(self) -> Iterator[Planned]:
        """The load requests, in their order."""
        full = self._sizes(self.window)
        for k, start in enumerate(range(0, self.n_rows, self.window)):
            n_rows = min(self.window, self.n_rows - start)
            sizes = full if n_rows == self.window else self._sizes(n_rows)
            if sizes:
                yield Planned(sizes, partial(self._make, k, start, start + n_rows))

    def _sizes(self, n_rows: int) -> tuple[int, ...]:
        n_full, n_rest = divmod(n_rows, self.batch_size)
        return (self.batch_size,) * n_full + ((n_rest,) if n_rest and not self.drop_last else ())

    def _make(self, k: int, start: int, stop: int) -> LoadRequest:
        order = self.mix(k, stop - start)
        if self.drop_last:
            order = order[: len(order) // self.batch_size * self.batch_size]
        return {"requests": self.take(k, start, stop), "splits": cut(order, self.batch_size)}
