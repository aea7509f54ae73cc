"""Frames as anndata stores them: a group of columns and an index."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

__all__ = ["concat_obs", "n_rows", "plainly_named", "read_obs", "unite_categories"]


def n_rows(frame: Any) -> int:
    """Rows of a stored frame."""
    index = frame[str(frame.attrs["_index"])]
    return int((index["values"] if hasattr(index, "keys") else index).shape[0])


def read_obs(frame: Any, columns: Sequence[str] | None, *, names: bool) -> pd.DataFrame:
    """Some columns of a stored frame, those of these names that it has; None reads all.

    Without ``names`` the index is not read, and the rows are numbered.
    """
    import anndata as ad  # takes seconds, and sources count rows without it

    if columns is None and names:
        whole: pd.DataFrame = ad.io.read_elem(frame)
        return whole
    stored = list(frame.attrs["column-order"])
    there = stored if columns is None else [name for name in columns if name in stored]
    index = str(frame.attrs["_index"])
    rows = ad.io.read_elem(frame[index]) if names else pd.RangeIndex(n_rows(frame))
    out = pd.DataFrame({name: ad.io.read_elem(frame[name]) for name in there}, index=rows, columns=there)
    out.index.name = None if index == "_index" or not names else index
    return out


def plainly_named(frame: pd.DataFrame) -> pd.DataFrame:
    """The same with names as objects, which are stored alike, and equal, whichever dtype pandas has for text."""
    return frame.set_axis(frame.index.astype(object), axis=0)


def concat_obs(frames: Sequence[pd.DataFrame], *, names: bool) -> pd.DataFrame:
    """One below the other; a column that is categorical in all stays it, with the categories of all."""
    out = pd.concat(frames, ignore_index=not names)
    for name in out.columns:  # pd.concat keeps a categorical only where all categories agree
        if all(isinstance(f[name].dtype, pd.CategoricalDtype) for f in frames if name in f):
            united = pd.api.types.union_categoricals(_categoricals(frames, name))
            out[name] = pd.Series(united, index=out.index)
    return out


def _categoricals(frames: Sequence[pd.DataFrame], name: str) -> list[pd.Categorical]:
    """A categorical column of each frame; of those that lack it, all missing."""
    some = next(f[name].cat.categories for f in frames if name in f)
    return [f[name].array if name in f else pd.Categorical.from_codes(np.full(len(f), -1), some) for f in frames]


def unite_categories(sets: Iterable[Iterable[Any]]) -> list[Any]:
    """The distinct ones, in order of first appearance: codes of the first stay what they were."""
    return list(dict.fromkeys(value for some in sets for value in some))
