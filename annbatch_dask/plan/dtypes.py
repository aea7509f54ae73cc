"""Chooses the smallest dtype that holds values exactly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np

from annbatch_dask.errors import SchemaError

__all__ = [
    "NOTHING",
    "ValueRange",
    "common_dtype",
    "index_dtype",
    "is_number",
    "is_wide",
    "merge_ranges",
    "signed_dtype",
    "smallest_dtype",
    "sum_dtype",
]

_UNSIGNED = ("uint8", "uint16", "uint32", "uint64")
_SIGNED = ("int8", "int16", "int32", "int64")


@dataclass(frozen=True)
class ValueRange:
    """Range of some values, from which a dtype is chosen; merging is associative.

    Attributes
    ----------
    integral
        Every value is a whole number (and none is a negative zero, NaN or infinite).
    low, high
        Least and greatest of the finite values and 0; ints where ``integral``.
    single
        Every value survives a cast to float32 and back.
    n_nan, n_inf
        Counts, for the report.
    double
        Every value survives a cast to float64 and back; False only for integers beyond 2**53.
    """

    integral: bool
    low: float
    high: float
    single: bool
    n_nan: int = 0
    n_inf: int = 0
    double: bool = True


NOTHING = ValueRange(integral=True, low=0, high=0, single=True)
"""The range of no values at all: the neutral element of merging."""


def merge_ranges(ranges: Iterable[ValueRange]) -> ValueRange:
    """Range of the union of the values."""
    out = NOTHING
    for r in ranges:
        out = replace(
            out,
            integral=out.integral and r.integral,
            low=min(out.low, r.low),
            high=max(out.high, r.high),
            single=out.single and r.single,
            n_nan=out.n_nan + r.n_nan,
            n_inf=out.n_inf + r.n_inf,
            double=out.double and r.double,
        )
    return out


def _integer_dtype(low: float, high: float) -> np.dtype:
    for name in _UNSIGNED if low >= 0 else _SIGNED:
        info = np.iinfo(name)
        if info.min <= low and high <= info.max:
            return np.dtype(name)
    msg = f"no dtype holds both {low:,} and {high:,} exactly; make them one kind in load_adata"
    raise SchemaError(msg)


def smallest_dtype(values: ValueRange, source: np.dtype) -> np.dtype:
    """Smallest dtype that holds every value of ``source`` exactly; the source's own on a tie.

    Examples
    --------
    >>> counts = ValueRange(integral=True, low=0, high=300, single=True)
    >>> smallest_dtype(counts, np.dtype("float32"))
    dtype('uint16')
    """
    if source.kind == "f" and not values.integral and not values.double:
        msg = (
            f"whole numbers from {values.low:,} to {values.high:,} meet fractions, and no dtype holds both exactly; "
            "make them one kind in load_adata"
        )
        raise SchemaError(msg)
    candidates = [source]
    if source.kind in "iuf" and values.integral:
        candidates.append(_integer_dtype(values.low, values.high))
    if source.kind == "f" and values.single:
        candidates.append(np.dtype(np.float32))
    # min() keeps the first of equals: the source's dtype, then the integer one
    best = min(candidates, key=lambda d: d.itemsize)
    tied_float = source.kind == "f" and values.single and best.itemsize == 4  # noqa: PLR2004
    return np.dtype(np.float32) if tied_float else best


def sum_dtype(dtype: str, n: int) -> str:
    """Dtype of a sum of up to ``n`` values: one that holds any, where those take two bytes or fewer and are whole.

    Sums of others are looked at, one by one.

    Examples
    --------
    >>> sum_dtype("uint8", 2), sum_dtype("int32", 2), sum_dtype("float32", 2)
    ('uint16', 'int32', 'float32')
    """
    kind = np.dtype(dtype)
    if n < 2 or kind.kind not in "biu" or kind.itemsize > 2:  # noqa: PLR2004
        return dtype
    low, high = (0, 1) if kind.kind == "b" else (int(np.iinfo(kind).min), int(np.iinfo(kind).max))
    return _integer_dtype(n * low, n * high).name


def is_number(dtype: np.dtype) -> bool:
    """True for numbers that zarr holds and kernels know: real ones, of 64 bits at most."""
    return dtype.kind in "biuf" and dtype.itemsize <= 8  # noqa: PLR2004


def is_wide(dtype: str) -> bool:
    """True if a dtype holds whole numbers that float64 rounds."""
    return dtype in ("int64", "uint64")


def common_dtype(name: str, found: Sequence[tuple[str, str, ValueRange | None]]) -> np.dtype:
    """The dtype of an element that many sources have, which holds all of their values exactly.

    Parameters
    ----------
    name
        Name of the element.
    found
        Path, dtype and range of values of each source; None where values were not read.

    Raises
    ------
    SchemaError
        Where integers beyond 2**53 meet floats, or integers below zero others from 2**63 on.
    """
    dtype = reduce(np.promote_types, (np.dtype(d) for _, d, _ in found))
    wide = [(path, d, r) for path, d, r in found if is_wide(d) and r is not None and not r.double]
    if dtype.kind != "f" or not wide:
        return dtype
    path, kind, values = wide[0]
    other = next((p, d) for p, d, _ in found if np.promote_types(d, kind).kind == "f" or d != kind)
    if all(np.dtype(d).kind in "biu" for _, d, _ in found):
        low = min(_lowest(d, r) for _, d, r in found)
        high = max(r.high for _, _, r in wide)
        if low >= 0 or high < 2**63:
            return np.dtype(np.uint64 if low >= 0 else np.int64)
        values = replace(values, low=low, high=high)
    msg = (
        f"{name} holds whole numbers from {values.low:,} to {values.high:,} in {path} ({kind}) and is {other[1]} in "
        f"{other[0]}, and no dtype holds both exactly; make them one kind in load_adata, or leave it out with elements"
    )
    raise SchemaError(msg)


def _lowest(dtype: str, values: ValueRange | None) -> float:
    if values is not None:
        return values.low
    return 0 if dtype == "bool" else int(np.iinfo(dtype).min)


def index_dtype(n: int) -> np.dtype:
    """Smallest unsigned dtype for indices into ``n`` columns.

    Examples
    --------
    >>> index_dtype(38_000)
    dtype('uint16')
    """
    return _integer_dtype(0, max(0, n - 1))


def signed_dtype(n: int) -> np.dtype:
    """Smallest signed dtype for codes in [-1, n)."""
    return _integer_dtype(-1, max(0, n - 1))
