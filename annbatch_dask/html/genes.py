"""Genes shared by sources, as the rows of an UpSet plot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["OverlapRow", "overlap_rows"]

_MAX_DOTS = 12
"""Sources that get a column of dots each; of more, rows say how many sources have the genes."""


@dataclass(frozen=True)
class OverlapRow:
    """Genes that exactly the same sources have.

    Attributes
    ----------
    label
        The sources in words, by their numbers.
    dots
        Whether each source has them; empty where there are too many sources to show.
    n_genes
        How many genes.
    share
        Relative to the most frequent row, in (0, 1].
    """

    label: str
    dots: tuple[bool, ...]
    n_genes: int
    share: float


def overlap_rows(overlaps: Mapping[int, int], n_sources: int, *, first: int = 1, n_other: int = 0) -> list[OverlapRow]:
    """Rows of the table, the most genes first.

    Parameters
    ----------
    overlaps
        Genes by a bit mask of the sources that have them.
    n_sources
        Sources.
    first
        Number of the first source, for the labels.
    n_other
        Genes of sets of sources that are not in ``overlaps``.
    """
    counts: Counter[tuple[str, tuple[bool, ...]]] = Counter()
    for mask, n in overlaps.items():
        has = tuple(bool(mask >> k & 1) for k in range(n_sources))
        counts[_label(has, first), has if n_sources <= _MAX_DOTS else ()] += n
    if n_other:
        counts["other sets of sources", ()] += n_other
    most = max(counts.values(), default=1)
    return [OverlapRow(label, dots, n, n / most) for (label, dots), n in counts.most_common()]


def _label(has: tuple[bool, ...], first: int) -> str:
    numbers = [str(k) for k, yes in enumerate(has, start=first) if yes]
    if len(has) == 1:
        return f"in {first}" if numbers else f"not in {first}"
    if not numbers:
        return "in none of them"
    if len(numbers) == len(has):
        return f"shared by all {len(has)}"
    if len(numbers) == 1 and len(has) <= _MAX_DOTS:
        return f"only in {numbers[0]}"
    return f"only in {' and '.join(numbers)}" if len(has) <= _MAX_DOTS else f"in {len(numbers)} of {len(has)}"
