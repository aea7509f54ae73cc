"""obs columns: slices of stored or in-memory columns as plain arrays, and frames made of such arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annbatch_dask.errors import SchemaError
from annbatch_dask.plan.dtypes import is_number
from annbatch_dask.plan.schema import Categories, ColumnSchema, ColumnSpec

__all__ = [
    "ColumnRows",
    "check_text",
    "describe_elem",
    "describe_series",
    "elem_rows",
    "mean_width",
    "names_of_column",
    "series_rows",
    "to_pandas",
]


@dataclass(frozen=True)
class ColumnRows:
    """Some rows of a column.

    Attributes
    ----------
    values
        (n,) numbers, category codes (-1 for missing), or an object array of strings ("" where masked).
    mask
        (n,) bool, True where missing; None where nothing can be.
    """

    values: NDArray
    mask: NDArray[np.bool_] | None = None


def _encoding(elem: Any) -> str:
    return str(elem.attrs.get("encoding-type", "array"))


_SAMPLE = 256
"""Strings looked at in each of three places."""


def mean_width(read: Callable[[int, int], Any], n: int) -> int:
    """UTF-8 bytes of a string, from samples at the start, the middle and the end: of that where they are longest."""
    starts = sorted({0, max(0, (n - _SAMPLE) // 2), max(0, n - _SAMPLE)})
    found = [read(a, min(a + _SAMPLE, n)) for a in starts] if n else []
    means = [sum(len(str(v).encode("utf-8", "surrogatepass")) for v in strings) / len(strings) for strings in found]
    return math.ceil(max(means, default=0))


def describe_elem(name: str, elem: Any, categories: Any = None, *, metadata_only: bool = False) -> ColumnSchema | None:
    """Schema of a stored column; None for an encoding this package does not know.

    ``categories``: those of a column of codes, which anndata 0.7 wrote beside the columns. With ``metadata_only`` no
    value is read, so the width of strings stays unknown.
    """
    schema = _describe_elem(name, elem, categories)
    if metadata_only or schema is None or schema.kind != "string":
        return schema
    values = elem["values"] if hasattr(elem, "keys") else elem
    return replace(schema, width=mean_width(lambda a, b: _strings(values, slice(a, b)), values.shape[0]))


def _describe_elem(name: str, elem: Any, categories: Any) -> ColumnSchema | None:
    encoding = _encoding(elem)
    if categories is not None:
        return ColumnSchema(name, "categorical", categories=_stored_categories(categories, categories))
    if encoding == "categorical":
        return ColumnSchema(name, "categorical", categories=_stored_categories(elem, elem["categories"]))
    if encoding in ("nullable-integer", "nullable-boolean"):
        return ColumnSchema(name, "numeric", dtype=elem["values"].dtype.name, nullable=True)
    if encoding == "nullable-string-array":
        return ColumnSchema(name, "string", nullable=True)
    if encoding == "string-array" or (encoding == "array" and elem.dtype.kind in "OTUS"):
        return ColumnSchema(name, "string")
    if encoding == "array" and is_number(elem.dtype) and elem.ndim == 1:
        return ColumnSchema(name, "numeric", dtype=elem.dtype.newbyteorder("=").name)
    return None


def _stored_categories(about: Any, values: Any) -> Categories:
    ordered = bool(about.attrs.get("ordered", False))
    if _encoding(values).startswith("nullable"):  # none is missing: it would be no category
        values = values["values"]
    if values.dtype.kind in "OTUS":
        return Categories(tuple(_strings(values, slice(None))), "str", ordered)
    return Categories(tuple(values[...].tolist()), values.dtype.newbyteorder("=").name, ordered)


def _strings(elem: Any, rows: slice) -> NDArray[np.object_]:
    if isinstance(elem, h5py.Dataset):
        elem = elem.asstr() if h5py.check_string_dtype(elem.dtype) else elem
    try:
        found = np.asarray(elem[rows])
        return (found.astype(str) if is_number(found.dtype) else found).astype(object)  # names may be numbers
    except UnicodeDecodeError as e:
        msg = f"{elem.name}: {e.object[:20]!r} is no Unicode text ({e.reason}); write the file anew"
        raise SchemaError(msg) from e


def elem_rows(column: ColumnSchema, elem: Any, start: int, stop: int) -> ColumnRows:
    """Rows [start, stop) of a stored column."""
    rows = slice(start, stop)
    if column.kind == "categorical":
        codes = elem["codes"] if hasattr(elem, "keys") else elem
        return ColumnRows(_checked_codes(column, np.asarray(codes[rows])))
    nullable = _encoding(elem).startswith("nullable")
    values, mask = (elem["values"], np.asarray(elem["mask"][rows], bool)) if nullable else (elem, None)
    if column.kind == "numeric":
        return ColumnRows(np.asarray(values[rows]).astype(column.dtype, copy=False), mask)
    strings = _strings(values, rows)
    if mask is not None:
        strings[mask] = ""
    return ColumnRows(strings, mask)


def _checked_codes(column: ColumnSchema, codes: NDArray) -> NDArray:
    """Refuse codes of no category: one would pass for a missing value, or for another category."""
    assert column.categories is not None  # it is a categorical
    n = len(column.categories.values)
    if len(codes) and (codes.min() < -1 or codes.max() >= n):
        low, high = int(codes.min()), int(codes.max())
        msg = f"codes of {column.path} run from {low:,} to {high:,}, and it has {n:,} categories; write it anew"
        raise SchemaError(msg)
    return codes


def describe_series(name: str, series: pd.Series) -> ColumnSchema:
    """Schema of a column in memory.

    Raises
    ------
    SchemaError
        For dtypes that AnnData files cannot hold either, and categories that are one as text.
    """
    dtype = series.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        return ColumnSchema(name, "categorical", categories=_categories_of(name, dtype))
    if (plain := _plain(dtype)) is not None:
        nullable = not isinstance(dtype, np.dtype) and plain.kind != "f"
        return ColumnSchema(name, "numeric", dtype=plain.name, nullable=nullable)
    present = series[~series.isna()]
    if isinstance(dtype, pd.StringDtype) or all(isinstance(v, str) for v in present):
        check_text(f"obs column {name!r}", present)
        width = mean_width(lambda a, b: series.iloc[a:b], len(series))
        return ColumnSchema(name, "string", nullable=bool(series.isna().any()), width=width)
    other = next(type(v).__name__ for v in present if not isinstance(v, str))
    msg = f"obs column {name!r} of dtype {dtype} holds {other} values; convert it to numbers, strings or a categorical"
    raise SchemaError(msg)


def _plain(dtype: Any) -> np.dtype | None:
    """A dtype of numbers as numpy has it, without pandas' mask; None for any other."""
    plain = getattr(dtype, "numpy_dtype", dtype)
    return plain if isinstance(plain, np.dtype) and is_number(plain) else None


def _categories_of(name: str, dtype: pd.CategoricalDtype) -> Categories:
    plain, index = _plain(dtype.categories.dtype), dtype.categories
    if plain is not None:
        return Categories(tuple(index.to_numpy(plain).tolist()), plain.name, bool(dtype.ordered))
    values = tuple(map(str, index))
    if len(known := dict(zip(values, index, strict=True))) < len(values):
        one, two = next((known[text], v) for text, v in zip(values, index, strict=True) if known[text] is not v)
        same = f"the categories {two!r} and {one!r}, which are one as text"
        msg = f"obs column {name!r} has {same}; rename one in load_adata"
        raise SchemaError(msg)
    return Categories(values, "str", bool(dtype.ordered))


def check_text(what: str, strings: Iterable[Any]) -> None:
    """Refuse strings that are no Unicode text, which no file can hold.

    Raises
    ------
    SchemaError
        With the first one.
    """
    for text in strings:
        if isinstance(text, str) and not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as e:
                msg = f"{what}: {text!r} is no Unicode text ({e.reason}); replace it in load_adata"
                raise SchemaError(msg) from e


def series_rows(column: ColumnSchema, series: pd.Series) -> ColumnRows:
    """All rows of a column in memory."""
    if column.kind == "categorical":
        assert column.categories is not None  # it is a categorical
        known = describe_series(column.name, series).categories
        assert known is not None
        codes = np.asarray(series.cat.codes)
        if known.values == column.categories.values:
            return ColumnRows(codes)
        united = column.categories.index().get_indexer(known.index())  # a lazy slice has lost those it does not use
        return ColumnRows(np.append(united, -1)[codes])
    mask = series.isna().to_numpy(bool) if column.nullable else None
    if column.kind == "string":
        values = series.to_numpy(object, na_value="") if mask is not None else series.to_numpy(object)
        return ColumnRows(values, mask)
    if isinstance(series.dtype, np.dtype):
        return ColumnRows(series.to_numpy())
    missing = np.nan if mask is None else np.zeros(1, column.dtype)[0]
    return ColumnRows(series.to_numpy(column.dtype, na_value=missing), mask)


def names_of_column(column: ColumnSchema, rows: ColumnRows) -> NDArray[np.object_]:
    """Values of a column of var as names: text, and whole numbers in figures; None where there is none.

    Raises
    ------
    SchemaError
        If they are fractions or booleans.
    """
    kind = column.dtype if column.categories is None else column.categories.dtype
    if column.categories is not None and not len(column.categories.values):
        return np.full(len(rows.values), None)  # no value at all, whatever it would be
    if kind not in ("", "str") and np.dtype(kind).kind not in "iu":
        msg = f"var column {column.name!r} holds {kind} values, which name no genes; convert them to text in load_adata"
        raise SchemaError(msg)
    if column.categories is not None:
        known = np.array([*map(str, column.categories.values), None], object)
        return np.asarray(known[rows.values], object)  # code -1 takes the last
    names = np.array([str(v) for v in rows.values.tolist()] or [], object)
    if rows.mask is not None:
        names[rows.mask] = None
    return names


def to_pandas(spec: ColumnSpec | ColumnSchema, values: NDArray, mask: NDArray[np.bool_] | None) -> Any:
    """A column of the collection, or of a source, as the array pandas holds for its spec."""
    if spec.categories is not None:
        return pd.Categorical.from_codes(values, spec.categories.index(), ordered=spec.categories.ordered)
    if spec.kind == "string":
        if mask is None:
            return values
        return pd.Series(values, dtype=pd.StringDtype("python")).mask(mask).array
    if mask is None:
        return values
    if values.dtype.kind == "b":
        return pd.arrays.BooleanArray(values, mask)
    return pd.arrays.IntegerArray(values, mask)
