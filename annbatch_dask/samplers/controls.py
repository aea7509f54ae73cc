"""Controls by what they have in common with cells, drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from annbatch_dask.errors import SelectionError
from annbatch_dask.formatting import first_few

__all__ = ["Controls", "number_groups"]

Ints = NDArray[np.int64]


def number_groups(values: Any) -> tuple[Ints, Sequence[Any]]:
    """The group of each row, numbered in order of appearance, and what each has in common: also if it is missing.

    Several columns, of a frame, make a group of each combination of their values.
    """
    if isinstance(values, pd.DataFrame) and len(values.columns) == 1:
        values = values.iloc[:, 0]
    if not isinstance(values, pd.DataFrame):
        if np.ndim(values) > 1:
            msg = f"an array of shape {np.shape(values)} has several values a row; give a frame of these columns"
            raise SelectionError(msg)
        codes, groups = pd.factorize(pd.Series(values), use_na_sentinel=False)
        return codes.astype(np.int64), list(groups)
    columns = [pd.factorize(values[name], use_na_sentinel=False) for name in values.columns]
    joined = np.zeros(len(values), np.int64)
    for codes, groups in columns:
        joined = pd.factorize(joined * len(groups) + codes)[0].astype(np.int64)
    _, firsts = np.unique(joined, return_index=True)
    return joined, list(zip(*(np.asarray(groups, object)[codes[firsts]] for codes, groups in columns), strict=True))


def _flags(values: ArrayLike) -> NDArray[np.bool_]:
    """Values as true or false; texts and missing ones, all of which numpy calls true, are refused."""
    given = np.asarray(values)
    if given.dtype != bool:
        others = [v for v in pd.unique(given.ravel()).tolist() if isinstance(v, str) or v not in {0, 1}]
        if others:
            msg = (
                f"is_control holds {first_few(map(repr, others))}; give True or False for each row, such as "
                "obs['perturbation'] == 'control'"
            )
            raise SelectionError(msg)
    return given.astype(bool)


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
        """Sort controls by group; SelectionError if a group has cells that are none, and no control.

        ``is_control`` holds True and False, or 1 and 0.
        """
        controls = _flags(is_control)
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
