"""A pass over a matrix of a collection, on Dask: a task for each of its blocks, whose results are added up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd
from dask.delayed import delayed
from numpy.typing import NDArray

from annbatch_dask.errors import CollectionError
from annbatch_dask.storage.frames import concat_obs, read_obs
from annbatch_dask.storage.root import Root

if TYPE_CHECKING:
    import dask.array as da

__all__ = ["column_of", "sum_blocks", "whole_counts"]

T = TypeVar("T")
_SPLIT_EVERY = 8
"""Results that are added up by one task: few are in memory at once."""


def sum_blocks(
    matrix: da.Array, codes: NDArray, task: Callable[..., T], add: Callable[[Sequence[T]], T], *shared: Any
) -> T:
    """Add up what a task makes of each block of rows, in their order, on the scheduler that dask is set to use.

    Parameters
    ----------
    matrix
        (n_obs, ...) of at least one block.
    codes
        (n_obs,) group of each row.
    task
        Called with a block, its rows' codes, and what is ``shared``.
    add
        Adds up results.
    """
    blocks, bounds = matrix.to_delayed().ravel(), np.cumsum([0, *matrix.chunks[0]])
    given = [delayed(s, pure=False) for s in shared]
    parts = [
        delayed(task)(block, codes[start:stop], *given)
        for block, start, stop in zip(blocks, bounds[:-1], bounds[1:], strict=True)
    ]
    while len(parts) > 1:
        parts = [delayed(add)(parts[k : k + _SPLIT_EVERY]) for k in range(0, len(parts), _SPLIT_EVERY)]
    total: T = parts[0].compute()
    return total


def column_of(root: Root, name: str, only: Sequence[str] | None = None) -> pd.Categorical:
    """A column of obs as a categorical, of all datasets or of those with these names.

    Raises
    ------
    CollectionError
        If obs lacks it.
    """
    groups = [g for g, known in zip(root.readable(), root.names(), strict=True) if only is None or known in only]
    frames = [read_obs(group["obs"], [name], names=False) for group in groups]
    if any(name not in frame for frame in frames):
        there: Any = groups[0]["obs"]
        msg = f"{root.path}: obs has no column {name!r}; it has {', '.join(map(repr, there.attrs['column-order']))}"
        raise CollectionError(msg)
    return pd.Categorical(concat_obs(frames, names=False)[name])


def whole_counts(values: NDArray) -> NDArray:
    """Values as unsigned integers where they are whole and small, which kernels add up faster; else as they are."""
    if values.dtype.kind not in "fi" or not len(values):
        return values
    low, high = values.min(), values.max()
    if not (low >= 0 and high < 2**32):  # also where one is NaN
        return values
    counts = values.astype(np.uint32)
    return counts if values.dtype.kind == "i" or np.array_equal(counts, values) else values
