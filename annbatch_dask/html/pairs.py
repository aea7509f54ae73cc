"""Cells of one source that stand in another too, as a matrix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["PairMatrix", "pair_matrix"]

_MAX_SIDE = 12
"""Sources that get a row or a column each."""


@dataclass(frozen=True)
class PairMatrix:
    """How many cells of which source have the X of an earlier cell of which other one.

    Attributes
    ----------
    rows, columns
        Number and path of the sources of the later and of the earlier cells.
    cells
        For each row, each column's number of cells, and that relative to the largest.
    n_other
        Cells of pairs of sources that have no place in it.
    """

    rows: tuple[tuple[int, str], ...]
    columns: tuple[tuple[int, str], ...]
    cells: tuple[tuple[tuple[int, float], ...], ...]
    n_other: int


def pair_matrix(pairs: Iterable[tuple[str, str, int]], paths: Sequence[str]) -> PairMatrix:
    """The matrix of ``(later, earlier, cells)``; sources are numbered from 1, as in ``paths``."""
    pairs = list(pairs)
    numbers = {path: k for k, path in reversed(list(enumerate(paths, start=1)))}
    known = [(a, b, n) for a, b, n in pairs if a in numbers and b in numbers]
    rows, columns = (_largest(known, side, numbers) for side in (0, 1))
    found = {(a, b): n for a, b, n in known}
    cells = [[found.get((a, b), 0) for _, b in columns] for _, a in rows]
    most = max((n for row in cells for n in row), default=0) or 1
    n_other = sum(n for _, _, n in pairs) - sum(map(sum, cells))
    return PairMatrix(rows, columns, tuple(tuple((n, n / most) for n in row) for row in cells), n_other)


def _largest(pairs: Sequence[tuple[str, str, int]], side: int, numbers: dict[str, int]) -> tuple[tuple[int, str], ...]:
    """The sources on one side that have the most cells, by their number."""
    total: Counter[str] = Counter()
    for pair in pairs:
        total[str(pair[side])] += pair[2]
    return tuple(sorted((numbers[path], path) for path, _ in total.most_common(_MAX_SIDE)))
