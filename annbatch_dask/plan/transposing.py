"""Inputs that are stored by columns and are larger than a task: how they are put in the order of their rows, once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.plan.costs import fixed_nbytes
from annbatch_dask.plan.kept import KeptRows
from annbatch_dask.plan.layout import MAX_READS, Block
from annbatch_dask.plan.memory import SMALL_NBYTES
from annbatch_dask.plan.schema import MatrixSchema, SourceSchema

__all__ = ["ROUNDED", "Strip", "Transposed", "find_transposed", "strips_of"]

_LEAST = 2**16
"""Entries of a strip, at least."""
ROUNDED = 1.25
"""Times its entries that a strip may have, as it ends where a chunk does."""
_ROW_NBYTES = 5
"""Of a row of the source in a task: the band that it is in, and whether it is kept."""


@dataclass(frozen=True)
class Strip:
    """Columns of a matrix, about as many entries as any other of its strips: the work of one transpose task.

    ``number`` of ``n_strips``; ``n_bytes`` what its entries take uncompressed, ``peak_nbytes`` the task's peak memory.
    """

    source: int
    matrix: str
    number: int
    n_strips: int
    n_bytes: int
    peak_nbytes: int


@dataclass(frozen=True)
class Transposed:
    """A source whose column-compressed matrices are put in the order of its rows before its blocks are read.

    Attributes
    ----------
    source
        Its number.
    rows
        (n_bands + 1,) rows of the source, all of them counted, between which its blocks are: its bands.
    kept
        The rows that may take part; None for all.
    n_strips
        Strips of each matrix.
    """

    source: int
    rows: tuple[int, ...]
    kept: KeptRows | None
    n_strips: Mapping[str, int]

    def bands(self, start: int, stop: int) -> range:
        """The bands that hold rows [start, stop)."""
        first = int(np.searchsorted(self.rows, start, side="right")) - 1
        return range(first, max(first, int(np.searchsorted(self.rows, stop, side="left"))))

    def band_of_rows(self) -> NDArray[np.int32]:
        """(n_rows,) the band of each row; -1 for those that take no part."""
        edges = np.array(self.rows)
        out = np.repeat(np.arange(len(edges) - 1, dtype=np.int32), np.diff(edges))
        if self.kept is not None:
            out[~self.kept.mask()] = -1
        return out


def find_transposed(
    sources: Sequence[SourceSchema], blocks: Sequence[Block], *, strip_nbytes: int, task_nbytes: int
) -> tuple[Transposed, ...]:
    """The sources that would be read too often for their blocks, as these have them.

    Parameters
    ----------
    strip_nbytes
        Bytes of a strip's entries, about.
    task_nbytes
        Memory that a task may hold.
    """
    of_source: dict[int, list[Block]] = {}
    for b in blocks:
        if _by_columns(sources[b.source]):
            of_source.setdefault(b.source, []).append(b)
    return tuple(
        Transposed(
            k,
            _bands(sources[k], found),
            sources[k].kept,
            {m.name: _n_strips(sources[k], m, strip_nbytes, task_nbytes) for m in _by_columns(sources[k])},
        )
        for k, found in of_source.items()
        if len(found) > MAX_READS
    )


def strips_of(sources: Sequence[SourceSchema], transposed: Sequence[Transposed]) -> tuple[Strip, ...]:
    """The transpose tasks, in their order."""
    out: list[Strip] = []
    for t in transposed:
        for m in (m for m in sources[t.source].matrices if m.name in t.n_strips):
            n = t.n_strips[m.name]
            peak = _peak_nbytes(sources[t.source], m, ROUNDED * m.n_stored / n)
            nbytes = m.n_stored * _entry_nbytes(m)
            cuts = [nbytes * k // n for k in range(n + 1)]
            out += [Strip(t.source, m.name, k, n, cuts[k + 1] - cuts[k], peak) for k in range(n)]
    return tuple(out)


def _by_columns(source: SourceSchema) -> list[MatrixSchema]:
    return [m for m in source.matrices if m.is_by_columns]


def _bands(source: SourceSchema, blocks: Sequence[Block]) -> tuple[int, ...]:
    starts = [b.start for b in blocks[1:]]
    if source.kept is None:
        return (0, *starts, source.n_obs)
    return (0, *(int(source.kept.rows(a, a + 1)[0]) for a in starts), source.kept.n_rows)


def _entry_nbytes(m: MatrixSchema) -> int:
    return np.dtype(m.dtype).itemsize + np.dtype(m.index_dtype).itemsize


def _peak_nbytes(source: SourceSchema, m: MatrixSchema, n_entries: float) -> int:
    """Peak of a task: rows and values as they are stored, then both and the columns by band."""
    n_rows = source.n_obs if source.kept is None else source.kept.n_rows
    return int(n_entries * _held_nbytes(m)) + n_rows * _ROW_NBYTES + fixed_nbytes(source) + SMALL_NBYTES


def _held_nbytes(m: MatrixSchema) -> int:
    return _entry_nbytes(m) + np.dtype(m.dtype).itemsize + 8


def _n_strips(source: SourceSchema, m: MatrixSchema, strip_nbytes: int, task_nbytes: int) -> int:
    room = (task_nbytes - _peak_nbytes(source, m, 0)) // _held_nbytes(m)
    return max(1, int(-(-m.n_stored * ROUNDED // max(_LEAST, min(strip_nbytes // _entry_nbytes(m), room)))))
