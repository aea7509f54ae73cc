"""Which dtype holds these values exactly, in the fewest bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

__all__ = ["NOTHING", "ValueRange", "index_dtype", "merge_ranges", "signed_dtype", "smallest_dtype"]

_UNSIGNED = ("uint8", "uint16", "uint32", "uint64")
_SIGNED = ("int8", "int16", "int32", "int64")


@dataclass(frozen=True)
class ValueRange:
    """What must be known of some values to choose a dtype; merging is associative.

    Attributes
    ----------
    integral
        Every value is a whole number (and none is a negative zero, NaN or infinite).
    low, high
        Least and greatest of the whole numbers; only meaningful where ``integral``.
    single
        Every value survives a cast to float32 and back.
    n_nan, n_inf
        Counts, for the report.
    """

    integral: bool
    low: int
    high: int
    single: bool
    n_nan: int = 0
    n_inf: int = 0


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
        )
    return out


def _integer_dtype(low: int, high: int) -> np.dtype:
    for name in _UNSIGNED if low >= 0 else _SIGNED:
        info = np.iinfo(name)
        if info.min <= low and high <= info.max:
            return np.dtype(name)
    msg = f"no integer dtype holds both {low} and {high}"
    raise OverflowError(msg)


def smallest_dtype(values: ValueRange, source: np.dtype) -> np.dtype:
    """Smallest dtype that holds every value of ``source`` exactly; the source's own on a tie.

    Examples
    --------
    >>> counts = ValueRange(integral=True, low=0, high=300, single=True)
    >>> smallest_dtype(counts, np.dtype("float32"))
    dtype('uint16')
    """
    candidates = [source]
    if source.kind in "iuf" and values.integral:
        candidates.append(_integer_dtype(values.low, values.high))
    if source.kind == "f" and values.single:
        candidates.append(np.dtype(np.float32))
    # min() keeps the first of equals: the source's dtype, then the integer one
    best = min(candidates, key=lambda d: d.itemsize)
    tied_float = source.kind == "f" and values.single and best.itemsize == 4  # noqa: PLR2004
    return np.dtype(np.float32) if tied_float else best


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
