"""Bytes, counts, plurals and lists in words. One system of units: 1 GB is 10**9 bytes."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

__all__ = ["first_few", "format_bytes", "format_count", "plural"]

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def format_bytes(n_bytes: float) -> str:
    """Return a size in words, in decimal units: ``1536`` is ``"1.5 kB"``."""
    size, unit = float(n_bytes), 0
    while abs(size) >= 999.5 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    digits = 0 if unit == 0 or abs(size) >= 99.95 else 1
    return f"{size:.{digits}f} {_UNITS[unit]}"


def format_count(n: float) -> str:
    """Return a number of things: ``1,234``; with a digit behind the point where it is not whole."""
    return f"{n:,.0f}" if float(n).is_integer() or n >= 1000 else f"{n:,.1f}"


def plural(n: int, noun: str) -> str:
    """Return a number and its noun: ``"1 file"``, ``"1,234 files"``."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def first_few(words: Iterable[str], n: int = 5, separator: str = ", ") -> str:
    """Return the first of some words, and dots where there are more than ``n``: ``"a, b, c, d, e, ..."``."""
    shown = list(islice(words, n + 1))
    return separator.join([*shown[:n], "..."] if len(shown) > n else shown)
