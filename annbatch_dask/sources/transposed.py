"""Column-compressed matrices in the order of their rows: strips of columns, and a source whose rows come from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.kernels.rows import count_bands, offsets_of, put_in_bands
from annbatch_dask.kernels.values import narrow_counts
from annbatch_dask.plan.schema import ColumnSchema, MatrixSchema
from annbatch_dask.plan.transposing import ROUNDED, Strip, Transposed
from annbatch_dask.sources.columns import ColumnRows
from annbatch_dask.sources.matrices import (
    CscSlab,
    CsrRows,
    Visitor,
    check_row_indices,
    column_pointers,
    n_rows_of,
    places_of,
    read_flat,
    rows_of_slabs,
    whole_chunks,
)
from annbatch_dask.sources.open import PickedSource
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.spill import SpillReader, write_spill

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["STRIP", "TransposedSource", "visit_values", "write_strip"]

STRIP = "strip"
"""Kind of the files of strips: a part is a band of rows, of one ragged row each."""
_COLUMN, _ROW, _VALUE = "column", "row", "value"
_ENTRIES = 2**20
"""That are visited at a time, about."""
_CHUNKS = 4
"""A strip ends where a chunk does, if it holds so many of them."""


def write_strip(folder: Folder, index: int, strip: Strip, transposed: Transposed, group: Any) -> int:
    """Read one strip of a stored matrix, and write it by bands of rows; returns the bytes written.

    Raises
    ------
    SchemaError
        For a row index outside the matrix.
    """
    a, b = _entries(strip, group)
    indptr, band_of = column_pointers(group), transposed.band_of_rows()
    first, last = _columns(indptr, a, b)
    rows = read_flat(group["indices"], a, b)
    check_row_indices(rows, n_rows_of(group))
    counts = np.zeros(len(transposed.rows) - 1, np.int64)
    count_bands(rows, band_of, counts)
    offsets = offsets_of(counts)
    values = _narrowed(read_flat(group["data"], a, b))
    n = int(offsets[-1])
    out = np.empty(n, np.uint32), np.empty(n, np.uint32), np.empty(n, values.dtype)
    bands = band_of, np.array(transposed.rows[:-1], np.int64)
    put_in_bands(np.clip(indptr[first : last + 1], a, b) - a, (rows, values), bands, offsets[:-1].copy(), out)
    del rows, values
    out[0][:] += np.uint32(first)
    differences = {_COLUMN: False, _ROW: True, _VALUE: False}  # a column comes again for each of its rows
    return write_spill(
        folder,
        index,
        order=np.arange(len(counts)),
        rows=np.arange(len(counts) + 1),
        fixed={},
        ragged={name: (x, offsets) for name, x in zip(differences, out, strict=True)},
        packed={name: differences[name] for name, x in zip(differences, out, strict=True) if x.dtype.kind in "iu"},
        kind=STRIP,
    )


def _entries(strip: Strip, group: Any) -> tuple[int, int]:
    """Entries [a, b) of a strip, which ends where a chunk does unless these are large."""
    n = int(group["data"].shape[0])
    step = -(-n // strip.n_strips)
    chunk = max(int((group[name].chunks or (1,))[0]) for name in ("indices", "data"))
    if _CHUNKS * chunk <= step:
        step = min(-(-step // chunk) * chunk, int(step * ROUNDED))
    last = strip.number == strip.n_strips - 1
    return min(strip.number * step, n), n if last else min((strip.number + 1) * step, n)


def _columns(indptr: NDArray[np.int64], a: int, b: int) -> tuple[int, int]:
    """Columns [first, last) that have the entries [a, b)."""
    if a == b:
        return 0, 0
    first, last = np.searchsorted(indptr, [a, b - 1], side="right").tolist()
    return first - 1, last


def _narrowed(values: NDArray) -> NDArray:
    """Floats that all are counts as uint16, which is exact, and takes a fifth of the bytes."""
    if values.dtype not in (np.float32, np.float64):
        return values.view(np.uint8) if values.dtype == bool else values
    out = np.empty(len(values), np.uint16)
    fits, _ = narrow_counts(values, values.view(f"u{values.dtype.itemsize}"), out)
    return out if fits else values


def visit_values(group: Any, kept: NDArray[np.bool_] | None, visit: Visitor) -> None:
    """Visit the values of a stored matrix in pieces; ``kept``, (n_rows,): those of the rows of which it is true."""
    data, indices = group["data"], group["indices"]
    n = int(data.shape[0])  # arrays of zarr have no len
    for a in range(0, n, step := whole_chunks(data, _ENTRIES)):
        b = min(a + step, n)
        values = read_flat(data, a, b)
        if kept is not None:
            rows = read_flat(indices, a, b)
            check_row_indices(rows, len(kept))
            values = values[kept[rows]]
        visit(a, values)


@dataclass(frozen=True)
class TransposedSource:
    """A source that has the rows of its column-compressed matrices from strips of them.

    Attributes
    ----------
    folder
        Of the strips' files.
    strips
        Numbers of the strips of each matrix, in their order.
    """

    source: PickedSource
    transposed: Transposed
    folder: Folder
    strips: Mapping[str, range]

    def annotations(self) -> AnnData:
        """Annotations of genes and of the input."""
        return self.source.annotations()

    def matrix(self, matrix: MatrixSchema, start: int, stop: int) -> CsrRows | NDArray:
        """Rows [start, stop) of a matrix."""
        if matrix.name not in self.strips:
            return self.source.matrix(matrix, start, stop)
        return self._rows(matrix, start, stop, None)

    def picked(self, matrix: MatrixSchema, rows: NDArray[np.int64]) -> CsrRows | NDArray:
        """Rows of a matrix by their numbers, ascending, one at least."""
        if matrix.name not in self.strips:
            return self.source.picked(matrix, rows)
        return self._rows(matrix, int(rows[0]), int(rows[-1]) + 1, rows)

    def column(self, column: ColumnSchema, start: int, stop: int) -> ColumnRows:
        """Rows [start, stop) of a column."""
        return self.source.column(column, start, stop)

    def names(self, start: int, stop: int) -> NDArray[np.object_]:
        """Obs names of rows [start, stop)."""
        return self.source.names(start, stop)

    def _rows(self, matrix: MatrixSchema, start: int, stop: int, rows: NDArray[np.int64] | None) -> CsrRows:
        n_rows, place = places_of(start, stop, rows)
        slabs = (slab for k in self.strips[matrix.name] for slab in self._slabs(k, start, stop, place))
        return rows_of_slabs(slabs, n_rows, np.dtype(matrix.dtype))

    def _slabs(self, strip: int, start: int, stop: int, place: NDArray[np.int64] | None) -> Iterator[CscSlab]:
        """The entries of a strip in some rows, the columns in their order."""
        bands = self.transposed.bands(start, stop)
        with SpillReader(self.folder, strip, bands, kind=STRIP) as reader:
            reader.hold(bands)  # in one request
            found = [self._band(reader, band, start, stop, place) for band in bands]
        for columns, rows, values in found:
            if len(columns):
                first, last = int(columns[0]), int(columns[-1])
                offsets = np.searchsorted(columns, np.arange(first, last + 2, dtype=columns.dtype))
                yield CscSlab(first, offsets, rows, values)

    def _band(
        self, reader: SpillReader, band: int, start: int, stop: int, place: NDArray[np.int64] | None
    ) -> tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray]:
        """Columns, rows (by their place) and values of the entries of a band."""
        found = reader.read_ragged(band, np.empty(reader.ragged_nbytes(band), np.uint8))
        columns, rows, values = (found[name][:] for name in (_COLUMN, _ROW, _VALUE))
        first, last = self.transposed.rows[band : band + 2]
        if start <= first and last <= stop and place is None:
            return columns, rows + np.uint32(first - start), values
        numbers = rows.astype(np.int64) + (first - start)
        wanted = (numbers >= 0) & (numbers < stop - start)
        if place is not None:
            numbers = np.where(wanted, place[np.clip(numbers, 0, stop - start - 1)], -1)
            wanted = numbers >= 0
        return columns[wanted], numbers[wanted].astype(np.uint32), values[wanted]
