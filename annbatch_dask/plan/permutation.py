"""A stateless permutation of [0, n), named and versioned in the manifest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.errors import LayoutError
from annbatch_dask.kernels.permute import count_rounds, round_keys, swap_or_not

__all__ = ["IDENTITY", "SWAP_OR_NOT", "Permutation"]

SWAP_OR_NOT = "swap-or-not"
IDENTITY = "identity"
_VERSION = 1


@dataclass(frozen=True)
class Permutation:
    """A keyed bijection on [0, n_obs) that any worker computes for any row, with its inverse.

    Parameters
    ----------
    n_obs
        Number of rows.
    seed
        Any non-negative integer; with ``n_obs`` it fixes the permutation.
    name
        ``"swap-or-not"`` (see :func:`annbatch_dask.kernels.permute.swap_or_not`) or ``"identity"``.
    version
        Raised whenever the same seed would give another order.

    Notes
    -----
    Rounds: with r rounds the distance of q queried rows from uniform falls like
    ``N**1.5 * ((q + N) / 2N) ** (r / 4)`` (Hoang, Morris, Rogaway 2012, theorem 2), so
    ``96 + 6 * log2(N)`` rounds leave pairs of rows indistinguishable from uniform at every size.

    Examples
    --------
    >>> p = Permutation(10, seed=1)
    >>> sorted(p.forward(np.arange(10)).tolist()) == list(range(10))
    True
    """

    n_obs: int
    seed: int
    name: str = SWAP_OR_NOT
    version: int = _VERSION

    def __post_init__(self) -> None:
        """Refuse what this code cannot reproduce."""
        if self.name not in (SWAP_OR_NOT, IDENTITY) or self.version != _VERSION:
            msg = (
                f"permutation {self.name!r} version {self.version} is not known to this release, which has "
                f"{SWAP_OR_NOT!r} version {_VERSION}; use the release that made the collection"
            )
            raise LayoutError(msg)
        if self.seed < 0:
            msg = f"the seed is {self.seed}, it must be 0 or more"
            raise LayoutError(msg)

    @property
    def n_rounds(self) -> int:
        """Number of rounds, from ``n_obs`` alone."""
        return count_rounds(self.n_obs)

    @cached_property
    def _keys(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        return round_keys(self.n_obs, self.n_rounds, self.name, self.version, self.n_obs, self.seed)

    def forward(self, rows: NDArray[np.integer]) -> NDArray[np.int64]:
        """Output position of each input row.

        Parameters
        ----------
        rows
            (k,) integers in [0, n_obs).

        Returns
        -------
        (k,) int64 in [0, n_obs).
        """
        return self._apply(rows, np.arange(self.n_rounds))

    def inverse(self, positions: NDArray[np.integer]) -> NDArray[np.int64]:
        """Input row at each output position: ``inverse(forward(x)) == x``."""
        return self._apply(positions, np.arange(self.n_rounds)[::-1].copy())

    def _apply(self, rows: NDArray[np.integer], order: NDArray[np.int64]) -> NDArray[np.int64]:
        out = rows.astype(np.uint64)
        if self.name == SWAP_OR_NOT and self.n_obs > 1:
            swap_or_not(out, np.uint64(self.n_obs), *self._keys, order)
        return out.astype(np.int64)
