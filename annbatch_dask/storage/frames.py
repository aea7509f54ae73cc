"""Frames as anndata stores them: a group of columns and an index."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
import pandas as pd

__all__ = ["concat_obs", "n_rows", "plainly_named", "read_obs", "stack", "unite_categories"]


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
    if names:
        index = frames[0].index.append([f.index for f in frames[1:]])
    else:
        index = pd.RangeIndex(sum(map(len, frames)))
    columns = dict.fromkeys(name for f in frames for name in f.columns)
    sizes = [len(f) for f in frames]
    data = {name: stack([f[name] if name in f else None for f in frames], sizes, ordered=True) for name in columns}
    return pd.DataFrame(data, index, copy=False) if data else pd.DataFrame(index=index)


def stack(parts: Sequence[pd.Series | None], sizes: Sequence[int], *, ordered: bool) -> Any:
    """Parts of a column as one array, of a dtype that holds the values of all.

    Parts that are None are missing, whatever dtype the others have; so are categoricals that have no categories.
    Categories are united in order of first appearance; with ``ordered``, ordered ones keep the order of a part whose
    categories have all others among them.
    """
    void = [part is None or (_is_categorical(part) and not len(part.cat.categories)) for part in parts]
    if all(void):
        void = [part is None for part in parts]
    there = [part for part, is_void in zip(parts, void, strict=True) if part is not None and not is_void]
    if not all(map(_is_categorical, there)):  # what is missing among the values of categories counts for the dtype
        parts = [pd.Series(np.asarray(p)) if p is not None and _is_categorical(p) else p for p in parts]
        there = [part for part, is_void in zip(parts, void, strict=True) if part is not None and not is_void]
    dtype = _common_dtype(there, ordered=ordered)
    if any(void):  # integers of numpy become floats, booleans objects
        dtype = pd.Series(dtype=dtype).reindex([0]).dtype
    same = []
    for part, is_void, n in zip(parts, void, sizes, strict=True):
        if part is None or is_void:
            same.append(pd.Series(index=pd.RangeIndex(n), dtype=dtype))
        else:
            same.append(part if part.dtype == dtype else part.astype(dtype))
    whole = pd.concat(same, ignore_index=True)
    return whole.to_numpy() if isinstance(whole.dtype, np.dtype) else whole.array


def _is_categorical(column: pd.Series) -> bool:
    return isinstance(column.dtype, pd.CategoricalDtype)


def _common_dtype(columns: Sequence[pd.Series[Any]], *, ordered: bool) -> Any:
    if all(column.dtype == columns[0].dtype for column in columns):
        return columns[0].dtype
    if all(map(_is_categorical, columns)):
        sets = [column.cat.categories for column in columns]
        widest = max(sets, key=len)
        is_one_order = ordered and all(c.cat.ordered for c in columns) and all(_is_within(c, widest) for c in sets)
        return pd.CategoricalDtype(widest if is_one_order else unite_categories(sets), ordered=is_one_order)
    dtypes = [cast("Any", column.dtype) for column in columns]
    try:
        return np.result_type(*dtypes)
    except TypeError:  # pandas' own dtypes, such as its two kinds of text
        return pd.concat([column.iloc[:1] for column in columns]).dtype


def _is_within(some: pd.Index, whole: pd.Index) -> bool:
    """Whether categories are among others, in the same order."""
    places = whole.get_indexer(some)
    return bool((places >= 0).all() and (np.diff(places) > 0).all())


def unite_categories(sets: Iterable[Iterable[Any]]) -> list[Any]:
    """The distinct ones, in order of first appearance: codes of the first stay what they were."""
    return list(dict.fromkeys(value for some in sets for value in some))
