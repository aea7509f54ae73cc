"""A source of which some rows alone are there: to all that reads it, the others do not exist."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.plan.kept import KeptRows
from annbatch_dask.plan.schema import ColumnSchema, MatrixSchema, SourceSchema
from annbatch_dask.sources.columns import ColumnRows
from annbatch_dask.sources.matrices import CsrRows
from annbatch_dask.sources.open import PickedSource, Source, WholeSource
from annbatch_dask.sources.picked import windows

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["choose_rows", "chosen_schema"]

_WINDOW = 2**16
"""Rows of a column that are read at a time."""


def choose_rows(source: PickedSource, kept: KeptRows | None) -> Source:
    """A source with these of its rows; all where None."""
    return source if kept is None or kept.is_all else _ChosenSource(source, kept)


def chosen_schema(source: WholeSource, kept: KeptRows | None, *, metadata_only: bool = False) -> SourceSchema:
    """Schema of a source with these of its rows."""
    if kept is None:
        return source.schema(metadata_only=metadata_only)
    found = source.schema(metadata_only=metadata_only, rows=None if kept.is_all else kept.mask())
    cuts = None if found.cuts is None else np.unique(kept.numbers(found.cuts.tolist()))
    return replace(found, n_obs=kept.n_kept, cuts=cuts, kept=kept)


class _ChosenSource:
    def __init__(self, source: PickedSource, kept: KeptRows) -> None:
        self._source, self._kept = source, kept

    def annotations(self) -> AnnData:
        return self._source.annotations()

    def matrix(self, matrix: MatrixSchema, start: int, stop: int) -> CsrRows | NDArray:
        rows = self._kept.rows(start, stop)
        if not len(rows):
            return self._source.matrix(matrix, 0, 0)
        first, last = int(rows[0]), int(rows[-1])
        if last - first + 1 == len(rows):
            return self._source.matrix(matrix, first, last + 1)
        return self._source.picked(matrix, rows)

    def column(self, column: ColumnSchema, start: int, stop: int) -> ColumnRows:
        rows = self._kept.rows(start, stop)
        found = [
            (self._source.column(column, int(rows[a]), int(rows[b - 1]) + 1), rows[a:b] - rows[a])
            for a, b in windows(rows, _WINDOW)
            if a < b
        ]
        if not found:
            return self._source.column(column, 0, 0)
        masks = [None if piece.mask is None else piece.mask[at] for piece, at in found]
        return ColumnRows(
            np.concatenate([piece.values[at] for piece, at in found]),
            None if any(mask is None for mask in masks) else np.concatenate([m for m in masks if m is not None]),
        )

    def names(self, start: int, stop: int) -> NDArray[np.object_]:
        rows = self._kept.rows(start, stop)
        found = [
            self._source.names(int(rows[a]), int(rows[b - 1]) + 1)[rows[a:b] - rows[a]]
            for a, b in windows(rows, _WINDOW)
            if a < b
        ]
        return np.concatenate([np.zeros(0, object), *found])
