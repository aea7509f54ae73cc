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
_MANY = 100
"""Groups above which it is asked whether a column is one of groups."""
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
    """A column of obs as a categorical, of all datasets or of those with these names; missing in those without it.

    Raises
    ------
    CollectionError
        If obs lacks it, or nearly each cell would be a group.
    """
    elements: list[Any] = [group["obs"] for group in root.readable()]
    there = list(dict.fromkeys(column for e in elements for column in e.attrs["column-order"]))
    if name not in there:  # of any: datasets that were appended may have other columns
        msg = f"{root.path}: obs has no column {name!r}; it has {', '.join(map(repr, there))}"
        raise CollectionError(msg)
    chosen = [e for e, known in zip(elements, root.names(), strict=True) if only is None or known in only]
    joined = concat_obs([read_obs(e, [name], names=False) for e in chosen], names=False)
    column = pd.Categorical(joined[name] if name in joined else np.full(len(joined), None, object))
    if len(chosen) == len(elements) and len(column.categories) > _MANY:
        _check_groups(root, name, column)
    return column


def _check_groups(root: Root, name: str, column: pd.Categorical) -> None:
    """Refuse a column of which nearly each cell would be a group."""
    n_groups, n_cells = len(np.unique(column.dropna().codes)), int((column.codes >= 0).sum())
    if n_groups > _MANY and (column.categories.dtype.kind == "f" or n_groups > n_cells / 2):
        msg = (
            f"{root.path}: obs column {name!r} has {n_groups:,} different values in {n_cells:,} cells, and each would "
            "be a group; name one of few values, such as pd.cut makes of numbers, in load_adata before a build"
        )
        raise CollectionError(msg)


def whole_counts(values: NDArray) -> NDArray:
    """Values as unsigned integers where they are whole and small, which kernels add up faster; else as they are."""
    if values.dtype.kind not in "fi" or not len(values):
        return values
    low, high = values.min(), values.max()
    if not (low >= 0 and high < 2**32):  # also where one is NaN
        return values
    counts = values.astype(np.uint32)
    return counts if values.dtype.kind == "i" or np.array_equal(counts, values) else values
