"""Rows of a source that a build keeps, as packed bits: an eighth of a byte for each row that there is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.plan.digest import digest

__all__ = ["KeptRows"]

_SEGMENT = 2**12
"""Bytes of bits between the points at which kept rows are counted."""


@dataclass(frozen=True)
class KeptRows:
    """The rows of a source that are kept, in their order.

    A kept row has a number of its own, from 0: that is what a plan, its blocks and its permutation know of.

    Attributes
    ----------
    n_rows, n_kept
        Rows that the source has, and how many of them are kept.
    where
        The condition on obs by which they were chosen; "" if there was none.
    dropped
        Names of rules, and how many rows each dropped: a row counts for the first that it does not meet.
    digest
        Of the bits.
    bits
        (ceil(n_rows / 8),) uint8 as of :func:`numpy.packbits`.

    Examples
    --------
    >>> from annbatch_dask.plan.kept import KeptRows
    >>> kept = KeptRows.of(np.array([False, True, True, False, True]), where="n > 1", dropped={"where": 2})
    >>> kept.n_kept, kept.rows(1, 3).tolist()
    (3, [2, 4])
    """

    n_rows: int
    n_kept: int
    where: str
    dropped: tuple[tuple[str, int], ...]
    digest: str
    bits: NDArray[np.uint8] = field(compare=False, repr=False)

    @classmethod
    def of(cls, mask: NDArray[np.bool_], *, where: str, dropped: dict[str, int]) -> KeptRows:
        """The rows of which ``mask``, (n_rows,) bool, is true."""
        bits = np.packbits(mask)
        rules = tuple((rule, n) for rule, n in dropped.items() if n)
        return cls(len(mask), int(np.count_nonzero(mask)), where, rules, digest(bits.tobytes()), bits)

    def narrowed(self, mask: NDArray[np.bool_], dropped: dict[str, int]) -> KeptRows:
        """Those of the kept rows of which ``mask``, (n_kept,) bool, is true, and what more was dropped."""
        left = self.mask()
        left[left] = mask
        return self.of(left, where=self.where, dropped=dict(self.dropped) | dropped)

    @property
    def is_all(self) -> bool:
        """True if no row was dropped."""
        return self.n_kept == self.n_rows

    def mask(self) -> NDArray[np.bool_]:
        """(n_rows,) bool, true where a row is kept."""
        return np.unpackbits(self.bits, count=self.n_rows).astype(bool)

    @cached_property
    def _before(self) -> NDArray[np.int64]:
        """(n_segments + 1,) kept rows before each segment of the bits, and all."""
        counts = [int(np.bitwise_count(self.bits[a : a + _SEGMENT]).sum()) for a in range(0, len(self.bits), _SEGMENT)]
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def rows(self, start: int, stop: int) -> NDArray[np.int64]:
        """Rows of the source that are kept as numbers [start, stop): (stop - start,) int64, ascending."""
        if start >= stop:
            return np.zeros(0, np.int64)
        first = int(np.searchsorted(self._before, start, side="right")) - 1
        last = int(np.searchsorted(self._before, stop, side="left"))
        found = np.flatnonzero(np.unpackbits(self.bits[first * _SEGMENT : last * _SEGMENT]))
        skipped = int(self._before[first])
        return found[start - skipped : stop - skipped].astype(np.int64) + 8 * _SEGMENT * first

    def spread(self, numbers: NDArray[np.int64]) -> NDArray[np.float64]:
        """About how many rows of the source lie before each kept row of some numbers."""
        at = np.minimum(np.arange(len(self._before)) * 8 * _SEGMENT, self.n_rows)
        return np.interp(numbers, self._before, at)

    def numbers(self, rows: Iterable[int]) -> NDArray[np.int64]:
        """How many rows are kept before each of some rows of the source, ascending or not."""
        out = []
        for row in rows:
            segment = min(row // (8 * _SEGMENT), len(self._before) - 1)
            bits = np.unpackbits(self.bits[segment * _SEGMENT : -(-row // 8)], count=row - 8 * _SEGMENT * segment)
            out.append(int(self._before[segment]) + int(np.count_nonzero(bits)))
        return np.array(out, np.int64)
