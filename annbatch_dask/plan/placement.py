"""Placement of rows: any position for a new build; for an extension, new rows among old rows that keep their order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.plan.permutation import SWAP_OR_NOT, Permutation

__all__ = ["ExtendPermutation", "deal"]


def deal(old: tuple[int, ...], n_new: int) -> tuple[int, ...]:
    """Number of new rows for each dataset, in proportion to its rows, so that all stay equally mixed.

    Parameters
    ----------
    old
        Rows of each dataset.
    n_new
        Rows to deal out.

    Examples
    --------
    >>> deal((100, 100, 50), 10)
    (4, 4, 2)
    """
    total, before, out = sum(old), 0, []
    for n in np.cumsum(old).tolist():
        upto = n_new * n // total
        out.append(upto - before)
        before = upto
    return tuple(out)


@dataclass(frozen=True)
class ExtendPermutation:
    """A bijection that shuffles new rows into datasets that exist, whose own rows stay in them.

    Input rows are those of the datasets, one after another, and then the new ones; output rows are those of the
    extended datasets. The new rows are permuted as a whole and cut into shares, so that each is equally likely to land
    at any of them; then every dataset is permuted on its own. Both are permutations of
    :class:`~annbatch_dask.plan.permutation.Permutation`.

    Parameters
    ----------
    old, new
        Rows that each dataset has, and that it receives.
    seed
        Any non-negative integer.
    name
        Name of the permutations.
    """

    old: tuple[int, ...]
    new: tuple[int, ...]
    seed: int
    name: str = SWAP_OR_NOT

    @property
    def version(self) -> int:
        """Version of the permutations."""
        return self._dealing.version

    @property
    def n_obs(self) -> int:
        """Rows."""
        return sum(self.old) + sum(self.new)

    @cached_property
    def _dealing(self) -> Permutation:
        return Permutation(sum(self.new), self.seed, self.name)

    @cached_property
    def _within(self) -> tuple[Permutation, ...]:
        digests = (blake2b(f"{self.seed}/{k}".encode(), digest_size=8).digest() for k in range(len(self.old)))
        seeds = (int.from_bytes(d, "little") for d in digests)
        pairs = zip(self.old, self.new, seeds, strict=True)
        return tuple(Permutation(a + b, seed, self.name) for a, b, seed in pairs)

    def forward(self, rows: NDArray[np.integer]) -> NDArray[np.int64]:
        """Output position of each input row: (k,) int64 for (k,) integers in [0, n_obs)."""
        old_ends, new_ends = np.cumsum(self.old), np.cumsum(self.new)
        starts = np.concatenate([[0], np.cumsum(np.add(self.old, self.new))])
        out = np.empty(len(rows), np.int64)
        is_new = rows >= old_ends[-1]
        dealt = np.zeros(len(rows), np.int64)
        if is_new.any():
            dealt[is_new] = self._dealing.forward(rows[is_new] - old_ends[-1])
        dataset = np.where(
            is_new, np.searchsorted(new_ends, dealt, side="right"), np.searchsorted(old_ends, rows, side="right")
        )
        for k in np.unique(dataset).tolist():
            mine = dataset == k
            old_start, new_start = old_ends[k] - self.old[k], new_ends[k] - self.new[k]
            local = np.where(is_new[mine], self.old[k] + dealt[mine] - new_start, rows[mine] - old_start)
            out[mine] = starts[k] + self._within[k].forward(local)
        return out
