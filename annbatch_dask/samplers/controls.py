"""Controls by what they have in common with cells, drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from annbatch_dask.errors import SelectionError

__all__ = ["Controls", "number_groups"]

Ints = NDArray[np.int64]


def number_groups(values: Any) -> tuple[Ints, Sequence[Any]]:
    """The group of each row, numbered in order of appearance, and what each has in common: also if it is missing.

    Several columns, of a frame, make a group of each combination of their values.
    """
    if isinstance(values, pd.DataFrame) and len(values.columns) == 1:
        values = values.iloc[:, 0]
    if not isinstance(values, pd.DataFrame):
        codes, groups = pd.factorize(pd.Series(values), use_na_sentinel=False)
        return codes.astype(np.int64), list(groups)
    columns = [pd.factorize(values[name], use_na_sentinel=False) for name in values.columns]
    joined = np.zeros(len(values), np.int64)
    for codes, groups in columns:
        joined = pd.factorize(joined * len(groups) + codes)[0].astype(np.int64)
    _, firsts = np.unique(joined, return_index=True)
    return joined, list(zip(*(np.asarray(groups, object)[codes[firsts]] for codes, groups in columns), strict=True))


@dataclass(frozen=True)
class Controls:
    """Rows that are controls, group by group.

    Attributes
    ----------
    rows
        Those of group ``g`` are ``rows[bounds[g]:bounds[g + 1]]``.
    groups
        (n_obs,) the group of every row, control or not.
    bounds
        (n_groups + 1,).
    is_control
        (n_obs,) whether a row is one.
    """

    rows: Ints
    groups: Ints
    bounds: Ints
    is_control: NDArray[np.bool_]

    @classmethod
    def of(cls, is_control: ArrayLike, match: Any) -> Controls:
        """Sort controls by group; SelectionError if a group has cells that are none, and no control."""
        controls = np.asarray(is_control, bool)
        codes, groups = number_groups(match)
        if controls.shape != codes.shape:
            msg = f"is_control has shape {controls.shape}, match {codes.shape}; both need one value per row"
            raise SelectionError(msg)
        rows = np.flatnonzero(controls)
        n_each = np.bincount(codes[rows], minlength=len(groups))
        alone = np.unique(codes[~controls][n_each[codes[~controls]] == 0])
        if len(alone):
            names = [groups[code] for code in alone[:5].tolist()]
            msg = f"{len(alone)} groups have perturbed cells and no control, such as {names}; leave them out (where=)"
            raise SelectionError(msg)
        ordered = rows[np.argsort(codes[rows], kind="stable")]
        return cls(ordered, codes, np.concatenate([[0], np.cumsum(n_each)]), controls)

    def draw(self, rng: np.random.Generator, cells: Ints, n_each: int = 1) -> Ints:
        """(n, n_each) controls of the group of each of the (n,) cells, with replacement, all alike."""
        groups = self.groups[cells]
        first, n_rows = self.bounds[groups], np.diff(self.bounds)[groups]
        drawn: Ints = self.rows[first[:, None] + rng.integers(n_rows[:, None], size=(len(groups), n_each))]
        return drawn
