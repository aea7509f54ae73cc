"""One spec for an obs column that many sources have: dtypes promoted, categories united, nothing guessed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from graphlib import CycleError, TopologicalSorter

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annbatch_dask.errors import SchemaError
from annbatch_dask.formatting import first_few
from annbatch_dask.manifest import SRC_PATH
from annbatch_dask.plan.dtypes import ValueRange, common_dtype, is_wide
from annbatch_dask.plan.genes import unite_names
from annbatch_dask.plan.schema import OBS, Categories, ColumnSchema, ColumnSpec, SourceSchema

__all__ = ["texts_of", "unite_columns", "unite_tags", "unsure"]

_FEW = 10_000
"""Categories that a column may have however few rows there are."""


def unite_columns(sources: Sequence[SourceSchema]) -> tuple[ColumnSpec, ...]:
    """Columns of the collection's obs and obsm frames: every column of any source, in order of first appearance.

    A column that some sources lack is missing there: no category, NaN in floats, and a mask (pandas'
    nullable dtypes) in integers, booleans and strings. Unordered categories of a collection that is extended keep their
    codes, as models may have been trained on them; new ones come behind.

    Raises
    ------
    SchemaError
        Where sources disagree so that no dtype holds all values.
    """
    names = dict.fromkeys((c.frame, c.name) for s in sources for c in s.columns)
    by_source = [{(c.frame, c.name): c for c in s.columns} for s in sources]
    united = []
    for frame, name in names:
        found = [(s.path, cols.get((frame, name))) for s, cols in zip(sources, by_source, strict=True)]
        old = [c for s, (_, c) in zip(sources, found, strict=True) if s.is_dataset and c is not None]
        united.append(replace(_unite(name, found, old), frame=frame))
    return tuple(united)


def unsure(sources: Sequence[SourceSchema]) -> list[frozenset[str]]:
    """Integer matrices and columns of each source whose values decide whether one dtype holds those of all sources.

    They are of 64 bits in some source, and meet floats, integers of the other sign, or genes that are missing.
    """
    found: dict[str, list[tuple[int, str, bool]]] = {}
    for k, s in enumerate(sources):
        for m in s.matrices:
            found.setdefault(m.name, []).append((k, m.dtype, m.kind == "dense" and bool(m.genes)))
        for c in s.columns:
            dtype = c.categories.dtype if c.categories is not None else c.dtype
            if dtype and dtype != "str":
                found.setdefault(c.path, []).append((k, dtype, False))
    out: list[set[str]] = [set() for _ in sources]
    for name, some in found.items():
        dtypes = [d for _, d, _ in some]
        joined = reduce(np.promote_types, map(np.dtype, dtypes))
        may_gain_nan = len(some) > 1 and all(dense for _, _, dense in some)
        if any(map(is_wide, dtypes)) and (joined.kind == "f" or may_gain_nan):
            for k, dtype, _ in some:
                if np.dtype(dtype).kind in "iu":
                    out[k].add(name)
    return [frozenset(names) for names in out]


def texts_of(columns: Sequence[ColumnSpec], sources: Sequence[SourceSchema]) -> tuple[ColumnSpec, ...]:
    """Convert a categorical column with nearly one category per row to strings.

    anndata makes a categorical of every column of strings in which one is repeated, barcodes included; and each dataset
    holds all categories of the collection. So one with more of them than half of its rows, and more than 10,000, is
    carried as strings. An ordered one stays as it is, and so does one that the collection has as a categorical.
    """
    return tuple(_text(c) if _is_text(c, sources) else c for c in columns)


def _is_text(column: ColumnSpec, sources: Sequence[SourceSchema]) -> bool:
    c = column.categories
    if c is None or c.dtype != "str" or c.ordered:
        return False
    having = [s for s, there in zip(sources, column.present, strict=True) if there]
    return len(c.values) > max(_FEW, sum(s.n_obs for s in having) // 2) and not any(s.is_dataset for s in having)


def _text(column: ColumnSpec) -> ColumnSpec:
    none = (None,) * len(column.present)
    return replace(column, kind="string", categories=None, nullable=True, code_maps=none)


def unite_tags(sources: Sequence[SourceSchema]) -> ColumnSpec:
    """The column that says where a row came from: each source's path, or what a collection's rows say already."""
    sets = [_tag(s) for s in sources]
    values = tuple(dict.fromkeys(v for c in sets for v in c.values))
    index = Categories(values, "str").index()
    return ColumnSpec(
        SRC_PATH,
        "categorical",
        categories=Categories(values, "str"),
        present=(True,) * len(sources),
        code_maps=tuple(_code_map(c, index) for c in sets),
    )


def _tag(source: SourceSchema) -> Categories:
    if not source.is_dataset:
        return Categories((source.path,), "str")
    found = next((c.categories for c in source.columns if c.path == f"{OBS}/{SRC_PATH}"), None)
    if found is None or found.dtype != "str":
        msg = f"{source.path} has no categorical obs column {SRC_PATH!r}, so it is no dataset of a collection"
        raise SchemaError(msg)
    return found


def _unite(name: str, found: Sequence[tuple[str, ColumnSchema | None]], old: Sequence[ColumnSchema]) -> ColumnSpec:
    columns = _with_kinds([(path, c) for path, c in found if c is not None])
    present = tuple(c is not None for _, c in found)
    kinds = {c.kind for _, c in columns}
    if kinds == {"categorical"}:
        return _unite_categories(name, found, columns, present, old)
    if kinds <= {"numeric", "categorical"} and _all_numeric(columns):
        return _unite_numbers(name, found, columns, present)
    if kinds <= {"string", "categorical"} and _all_strings(columns):
        nullable = not all(present) or any(c.nullable or c.kind == "categorical" for _, c in columns)
        return ColumnSpec(name, "string", nullable=nullable, present=present, code_maps=(None,) * len(found))
    a, b = next((x, y) for x in columns for y in columns if _family(x[1]) != _family(y[1]))
    msg = (
        f"obs column {name!r} holds {_words(a[1])} in {a[0]} and {_words(b[1])} in {b[0]}; "
        "make them one kind in load_adata"
    )
    raise SchemaError(msg)


def _with_kinds(columns: Sequence[tuple[str, ColumnSchema]]) -> list[tuple[str, ColumnSchema]]:
    """Categories that are none, where every value is missing, count as of the kind that the other sources have."""
    dtypes = (_value_dtype(c) for _, c in columns if c.categories is None or c.categories.values)
    dtype = next(dtypes, _value_dtype(columns[0][1]))  # or of the first, where all are none
    return [
        (path, c if c.categories is None or c.categories.values else _without_values(c, dtype)) for path, c in columns
    ]


def _value_dtype(c: ColumnSchema) -> str:
    if c.categories is not None:
        return c.categories.dtype
    return "str" if c.kind == "string" else c.dtype


def _without_values(c: ColumnSchema, dtype: str) -> ColumnSchema:
    assert c.categories is not None  # noqa: S101
    return replace(c, categories=replace(c.categories, dtype=dtype))


def _family(c: ColumnSchema) -> str:
    if c.categories is not None:
        return "string" if c.categories.dtype == "str" else "numeric"
    return c.kind


def _words(c: ColumnSchema) -> str:
    if c.categories is not None:
        return f"categories of dtype {c.categories.dtype}"
    return c.dtype if c.kind == "numeric" else "strings"


def _all_numeric(columns: Sequence[tuple[str, ColumnSchema]]) -> bool:
    return all(_family(c) == "numeric" for _, c in columns)


def _all_strings(columns: Sequence[tuple[str, ColumnSchema]]) -> bool:
    return all(_family(c) == "string" for _, c in columns)


def _unite_numbers(
    name: str,
    found: Sequence[tuple[str, ColumnSchema | None]],
    columns: Sequence[tuple[str, ColumnSchema]],
    present: tuple[bool, ...],
) -> ColumnSpec:
    sets = [(path, c.categories.dtype, _range_of(c.categories)) for path, c in columns if c.categories]
    plain = [(path, c.dtype, c.values) for path, c in columns if not c.categories]
    dtype = common_dtype(f"obs column {name!r}", [*plain, *sets])
    gaps = not all(present) or any(c.nullable or c.kind == "categorical" for _, c in columns)
    nullable = gaps and dtype.kind in "biu"  # a float says "missing" with NaN
    return ColumnSpec(
        name, "numeric", dtype=dtype.name, nullable=nullable, present=present, code_maps=(None,) * len(found)
    )


def _unite_categories(
    name: str,
    found: Sequence[tuple[str, ColumnSchema | None]],
    columns: Sequence[tuple[str, ColumnSchema]],
    present: tuple[bool, ...],
    old: Sequence[ColumnSchema],
) -> ColumnSpec:
    sets = [(path, c.categories) for path, c in columns if c.categories is not None]
    families = {_family(c) for _, c in columns}
    if len(families) > 1:
        shown = first_few((f"{path}: {c.dtype}" for path, c in sets), separator="; ")
        msg = f"obs column {name!r} has categories of clashing kinds ({shown}); make them one kind in load_adata"
        raise SchemaError(msg)
    if len({c.ordered for _, c in sets}) > 1:
        yes, no = next(p for p, c in sets if c.ordered), next(p for p, c in sets if not c.ordered)
        msg = (
            f"obs column {name!r} is ordered in {yes} and unordered in {no}; "
            "call .cat.as_ordered() or .cat.as_unordered() in load_adata"
        )
        raise SchemaError(msg)
    united = _merge_orders(name, sets) if sets[0][1].ordered else _with_first(old, _union(name, sets))
    index = united.index()
    maps = tuple(None if c is None or c.categories is None else _code_map(c.categories, index) for _, c in found)
    return ColumnSpec(name, "categorical", categories=united, present=present, code_maps=maps)


def _union(name: str, sets: Sequence[tuple[str, Categories]]) -> Categories:
    if sets[0][1].dtype == "str":
        return Categories(tuple(unite_names([c.values for _, c in sets])), "str")
    dtype = _dtype_of(name, sets)
    joined = reduce(lambda a, b: a.union(b), (c.index().astype(dtype) for _, c in sets))
    return Categories(tuple(joined.tolist()), joined.dtype.name)


def _with_first(old: Sequence[ColumnSchema], united: Categories) -> Categories:
    """The categories, those of a collection first and in its order."""
    known = dict.fromkeys(value for c in old if c.categories is not None for value in c.categories.values)
    place = {value: k for k, value in enumerate(known)}
    return replace(united, values=tuple(sorted(united.values, key=lambda value: place.get(value, len(place)))))


def _dtype_of(name: str, sets: Sequence[tuple[str, Categories]]) -> np.dtype:
    """One dtype for categories that are numbers."""
    return common_dtype(f"obs column {name!r}", [(path, c.dtype, _range_of(c)) for path, c in sets])


def _merge_orders(name: str, sets: Sequence[tuple[str, Categories]]) -> Categories:
    """The one order that all sources agree with; an error where there is none, or more than one."""
    graph: TopologicalSorter[object] = TopologicalSorter()
    for _, c in sets:
        for value in c.values:
            graph.add(value)
        for low, high in zip(c.values, c.values[1:], strict=False):
            graph.add(high, low)
    shown = first_few((f"{path}: {first_few(map(str, c.values), separator=' < ')}" for path, c in sets), separator="; ")
    remedy = "set the same ordered categories in all files with load_adata, or make the column unordered"
    try:
        graph.prepare()
    except CycleError as error:
        circle = first_few(map(repr, error.args[1]), separator=" < ")
        msg = f"obs column {name!r} is ordered in clashing ways ({shown}), so that {circle}; {remedy}"
        raise SchemaError(msg) from None
    values: list[object] = []
    while graph.is_active():
        ready = graph.get_ready()
        if len(ready) > 1:
            pair = f"{ready[0]!r} and {ready[1]!r}"
            msg = f"obs column {name!r}: the orders ({shown}) do not say how {pair} compare; {remedy}"
            raise SchemaError(msg)
        values.extend(ready)
        graph.done(*ready)
    dtype = "str" if sets[0][1].dtype == "str" else _dtype_of(name, sets).name
    return Categories(tuple(values), dtype, ordered=True)


def _range_of(categories: Categories) -> ValueRange | None:
    """Range of categories that are whole numbers."""
    if not is_wide(categories.dtype) or not categories.values:
        return None
    values = np.array(categories.values, categories.dtype)
    low, high = int(values.min()), int(values.max())
    return ValueRange(integral=True, low=low, high=high, single=False, double=-(2**53) <= low and high <= 2**53)


def _code_map(categories: Categories, united: pd.Index) -> NDArray[np.int64]:
    """(n_categories,) united code of each code. NaN never is a category, so every one is found."""
    codes = united.get_indexer(categories.index())
    if (codes < 0).any() or any(isinstance(v, float) and math.isnan(v) for v in categories.values):
        msg = f"categories {categories.values!r} hold a missing value; drop it from the categories"
        raise SchemaError(msg)
    return np.asarray(codes, np.int64)
