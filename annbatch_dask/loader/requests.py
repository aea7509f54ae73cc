"""From a load request to rows of datasets, and back to rows of a load window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annbatch_dask.loader.sources import Block
from annbatch_dask.order.planned import expand
from annbatch_dask.types import LoadRequest

__all__ = ["Assignment", "Labels", "Loaded", "ObsTable", "Window", "assign", "resolve_rows", "resolve_splits"]

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Loaded:
    """The rows of one matrix in a load window.

    Attributes
    ----------
    blocks, block, position
        Row ``j`` is row ``position[j]`` of ``blocks[block[j]]``.
    lengths
        Entries of each row; zeros for dense blocks.
    dtype
        The dtype the values had in the sources.
    """

    blocks: list[Block]
    block: Ints
    position: Ints
    lengths: Ints
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class Window:
    """Rows that were loaded together, in request order.

    Attributes
    ----------
    rows
        Their global positions.
    splits
        One array of positions in this window per batch.
    matrices
        What was loaded of each matrix.
    obs
        The rows of ``obs``, or None.
    codes
        The codes of each label column.
    nbytes
        Memory reserved for the blocks.
    """

    rows: Ints
    splits: list[Ints]
    matrices: list[Loaded]
    obs: pd.DataFrame | None
    codes: dict[str, Ints]
    nbytes: int


@dataclass(frozen=True)
class Assignment:
    """The part of a request that one dataset holds: where in the request, and which of its rows."""

    dataset: int
    places: Ints
    rows: Ints


def resolve_rows(request: LoadRequest, n_obs: int) -> Ints:
    """The global rows of a request, in its order; KeyError without ``requests``, IndexError out of range."""
    rows = expand(request["requests"])
    if len(rows) and (rows.min() < 0 or rows.max() >= n_obs):
        msg = f"request for rows {rows.min()} to {rows.max()}, the loader has rows 0 to {n_obs - 1}"
        raise IndexError(msg)
    return rows


def resolve_splits(request: LoadRequest, n_rows: int) -> list[Ints]:
    """The batches of a request as int64; IndexError where one names a row the request does not have."""
    given = [np.asarray(split) for split in request["splits"]]
    for split in given:
        if split.ndim != 1 or (split.dtype.kind not in "iu" and len(split)):
            msg = (
                "a split must be a 1-D integer array of positions (of a mask: np.flatnonzero(mask)), got dtype "
                f"{split.dtype}, {split.ndim}-D"
            )
            raise TypeError(msg)
    splits = [split.astype(np.int64, copy=False) for split in given]
    for split in splits:
        if len(split) and (split.min() < 0 or split.max() >= n_rows):
            msg = f"split with positions {split.min()} to {split.max()}, the request has {n_rows} rows"
            raise IndexError(msg)
    return splits


def assign(rows: Ints, bounds: Ints) -> list[Assignment]:
    """Deal rows out to the datasets that hold them; dataset ``d`` has rows ``bounds[d]:bounds[d + 1]``."""
    dataset = np.searchsorted(bounds, rows, side="right") - 1
    return [
        Assignment(d, places, rows[places] - bounds[d])
        for d in np.unique(dataset).tolist()
        for places in (np.flatnonzero(dataset == d),)
    ]


class ObsTable:
    """``obs`` of all datasets, taken window by window, with dtypes that do not depend on the window."""

    def __init__(self, frames: Sequence[pd.DataFrame]) -> None:
        self.frames = _aligned(frames)

    def take(self, assignments: Sequence[Assignment], n_rows: int) -> pd.DataFrame:
        """The rows of a window, in request order."""
        if not assignments:
            return self.frames[0].iloc[:0]
        parts = [self.frames[a.dataset].iloc[a.rows] for a in assignments]
        if len(parts) == 1:
            return parts[0]
        order = np.empty(n_rows, np.int64)
        order[np.concatenate([a.places for a in assignments])] = np.arange(n_rows)
        return pd.concat(parts).iloc[order]


class Labels:
    """Columns of ``obs`` as integer codes, in one code space for all datasets.

    The categories of a column are those of all datasets in order of first appearance; the sorted distinct values
    where the column is not categorical. A missing value has code -1.
    """

    def __init__(self, frames: Sequence[pd.DataFrame], names: Sequence[str]) -> None:
        self.categories = {name: _categories([frame[name] for frame in frames]) for name in names}
        self._codes = {
            name: [pd.Categorical(frame[name], categories=categories).codes for frame in frames]
            for name, categories in self.categories.items()
        }

    def take(self, assignments: Sequence[Assignment], n_rows: int) -> dict[str, Ints]:
        """The codes of a window's rows, in request order."""
        taken = {name: np.empty(n_rows, np.int64) for name in self._codes}
        for name, parts in self._codes.items():
            for a in assignments:
                taken[name][a.places] = parts[a.dataset][a.rows]
        return taken


def _categories(columns: Sequence[pd.Series[Any]]) -> pd.Index[Any]:
    if all(isinstance(column.dtype, pd.CategoricalDtype) for column in columns):
        distinct = list(dict.fromkeys(value for column in columns for value in column.cat.categories))
    else:
        distinct = sorted({value for column in columns for value in column.dropna().unique()})
    categories: pd.Index[Any] = pd.Index(distinct)
    return categories


def _aligned(frames: Sequence[pd.DataFrame]) -> list[pd.DataFrame]:
    """The frames with the same columns and dtypes; categories are united."""
    columns = list(dict.fromkeys(name for frame in frames for name in frame.columns))
    aligned = [frame if list(frame.columns) == columns else frame.reindex(columns=columns) for frame in frames]
    for name in columns:
        dtypes = [frame[name].dtype for frame in aligned]
        if any(dtype != dtypes[0] for dtype in dtypes):
            common = _common_dtype([frame[name] for frame in aligned])
            aligned = [frame.assign(**{name: frame[name].astype(common)}) for frame in aligned]
    return aligned


def _common_dtype(columns: Sequence[pd.Series[Any]]) -> Any:
    if all(isinstance(column.dtype, pd.CategoricalDtype) for column in columns):
        # An unordered union whose order is that of first appearance: the rows' values stay what they were.
        categories = dict.fromkeys(value for column in columns for value in column.cat.categories)
        return pd.CategoricalDtype(list(categories))
    dtypes = [cast("Any", column.dtype) for column in columns]
    try:
        return np.result_type(*dtypes)
    except TypeError:  # pandas' own dtypes, such as its two kinds of text
        return pd.concat([column.iloc[:1] for column in columns]).dtype
