"""Bytes per row in a source, in a scatter task and in a partition of the output, from schemas alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.plan.dtypes import index_dtype, signed_dtype
from annbatch_dask.plan.memory import IN_FLIGHT_NBYTES
from annbatch_dask.plan.schema import Categories, ColumnSpec, MatrixSchema, MatrixSpec, SourceSchema, heaviest_at

__all__ = [
    "Weight",
    "Bounds",
    "bounds_of",
    "categories_nbytes",
    "csc_nbytes",
    "fixed_nbytes",
    "frame_nbytes",
    "heaviest_rows",
    "held_weight",
    "part_weight",
    "read_weight",
    "shared_nbytes",
]

_ROW_NBYTES = 48
"""Bytes per row in a scatter task, apart from its content: its position, its order, its hash."""
_ENTRY_NBYTES = 12
"""Of a string beside its characters, while it travels: its length, and where it begins."""
_STRING_NBYTES = 65
"""Of a string in Python beside its characters, and of the pointer to it."""


@dataclass(frozen=True)
class Weight:
    """Bytes that rows of a source take: so many each, and so many for each stored value of a matrix."""

    per_row: float
    per_value: Mapping[str, float] = field(default_factory=dict)

    def before(self, source: SourceSchema, edges: NDArray[np.int64]) -> NDArray[np.float64]:
        """Bytes of the rows before each of some rows."""
        total = edges.astype(np.float64) * self.per_row
        for m in source.matrices:
            if m.name in self.per_value:
                knots = np.minimum(np.arange(len(m.nnz)) * m.row_step, source.n_obs)
                total += np.interp(edges, knots, m.nnz) * self.per_value[m.name]
        return total

    def heaviest(self, source: SourceSchema) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Rows, and bytes at most of each, the heaviest first: together they outweigh any choice of rows."""
        sparse = [m for m in source.matrices if m.name in self.per_value]
        ends = np.array([source.n_obs]) if not sparse else 1 + heaviest_at(source.n_obs)
        total = ends * float(self.per_row)
        for m in sparse:
            total += m.heaviest * self.per_value[m.name]
        counts, sums = np.diff(ends, prepend=0).astype(np.float64), np.diff(total, prepend=0.0)
        at_most = np.append(sums[:1] / counts[:1], (sums / counts)[:-1])  # none is heavier than the rows before it
        return np.minimum(counts, sums / np.maximum(at_most, 1e-9)), at_most


def heaviest_rows(
    sources: Sequence[SourceSchema], weights: Sequence[Weight]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(k,) numbers of rows, ascending, and (k,) bytes that no choice of so many rows exceeds; linear between them."""
    found = [w.heaviest(s) for s, w in zip(sources, weights, strict=True) if s.n_obs]
    counts, each = (np.concatenate(x) for x in zip(*found, strict=True))
    order = np.argsort(-each, kind="stable")
    return (
        np.concatenate([[0], np.cumsum(counts[order])]),
        np.concatenate([[0], np.cumsum((counts * each)[order])]),
    )


# --- of a source ---------------------------------------------------------------------------------------------------


def read_weight(source: SourceSchema, *, obs_nbytes: float) -> Weight:
    """Bytes per row as the source stores them, uncompressed."""
    dense = sum(m.n_cols * _item(m.dtype) for m in source.matrices if m.kind == "dense")
    sparse = {m.name: _item(m.dtype) + _item(m.index_dtype) for m in source.matrices if m.kind != "dense"}
    return Weight(obs_nbytes + dense + 8 * len(sparse), sparse)


def csc_nbytes(source: SourceSchema) -> int:
    """Bytes of its column-compressed matrices, uncompressed: what each of its blocks reads."""
    return sum(m.n_stored * (_item(m.dtype) + _item(m.index_dtype)) for m in source.matrices)


def held_weight(
    source: SourceSchema, matrices: Sequence[MatrixSpec], columns: Sequence[ColumnSpec], *, obs_nbytes: float
) -> Weight:
    """Bytes per row that a scatter task holds; its peak is at most twice that, see :mod:`annbatch_dask.plan.memory`.

    A sparse row weighs what it weighs in the source. A dense one is widened to the collection's genes; among sparse
    sources it becomes three arrays, which may have an entry for each of its values.
    """
    read, specs = read_weight(source, obs_nbytes=0), {m.name: m for m in matrices}
    obs = max(obs_nbytes, (_ROW_NBYTES + _obs_row(source, columns)) / 2)
    wider = sum(_dense_excess(m, specs[m.name]) for m in source.matrices if m.kind == "dense")
    return Weight(read.per_row + obs + wider, read.per_value)


def _dense_excess(m: MatrixSchema, spec: MatrixSpec) -> float:
    item = _item(m.dtype)
    if spec.kind == "csr":
        return m.n_cols * 2.0  # indices of four bytes
    return max(0.0, float(spec.n_cols * _item(spec.source_dtype)) - m.n_cols * item)


def part_weight(
    source: SourceSchema, matrices: Sequence[MatrixSpec], columns: Sequence[ColumnSpec], *, obs_nbytes: float
) -> Weight:
    """Its rows in a part of the output: at least what the source stores."""
    read, specs = read_weight(source, obs_nbytes=0), {m.name: m for m in matrices}
    per_row, per_value = max(obs_nbytes, _obs_row(source, columns)) + 8.0 * len(read.per_value), {}
    for m in source.matrices:
        spec = specs[m.name]
        value = _item(spec.source_dtype) + (index_dtype(spec.n_cols).itemsize if spec.kind == "csr" else 0)
        if m.kind != "dense":
            per_value[m.name] = max(read.per_value[m.name], value)
        else:
            per_row += max(m.n_cols * _item(m.dtype), (m.n_cols if spec.kind == "csr" else spec.n_cols) * value)
    return Weight(per_row, per_value)


def fixed_nbytes(source: SourceSchema) -> int:
    """Bytes that a task holds for any rows of a source: all of an in-memory source, and chunks in flight."""
    chunks = max((m.in_flight_nbytes for m in source.matrices), default=0)
    return source.resident_nbytes + max(0, chunks - IN_FLIGHT_NBYTES)


def _item(dtype: str) -> int:
    return np.dtype(dtype).itemsize


@dataclass(frozen=True)
class Bounds:
    """What a build's speed is bound by, roughly, from what was measured of single-cell counts.

    Attributes
    ----------
    inflate_s
        Seconds of one core to inflate what is read.
    spill_nbytes, write_nbytes
        Bytes of the spill files and of the result.
    """

    inflate_s: float
    spill_nbytes: float
    write_nbytes: float


_INFLATE_NBYTES_S = 600e6
"""Of gzip, uncompressed, on one core."""
_SPILLED_COLUMN, _SPILLED_COUNT = 0.8, 0.5
_WRITTEN_COLUMN, _WRITTEN_COUNT = 1.3, 0.6


def bounds_of(sources: Sequence[SourceSchema], n_bytes_read: int) -> Bounds:
    """Bounds of a build of these sources."""
    spilled = written = 0.0
    for s in sources:
        for m in s.matrices:
            n = float(s.n_obs * m.n_cols if m.kind == "dense" else m.nnz[-1])
            columns = 0.0 if m.kind == "dense" else n
            item = float(_item(m.dtype))
            spilled += columns * _SPILLED_COLUMN + n * (item if m.integral is False else _SPILLED_COUNT)
            written += columns * _WRITTEN_COLUMN + n * (item if m.integral is False else _WRITTEN_COUNT)
    return Bounds(n_bytes_read / _INFLATE_NBYTES_S, spilled, written)


# --- of obs --------------------------------------------------------------------------------------------------------


def _obs_row(source: SourceSchema, columns: Sequence[ColumnSpec]) -> float:
    """Bytes of a row's name and columns as they travel: codes, numbers, the bytes of strings."""
    found = {c.path: _width(c.categories, c.width) for c in source.columns}
    total = float(_ENTRY_NBYTES + source.name_width)
    for c in columns:
        total += _plain_nbytes(c) if c.kind != "string" else _ENTRY_NBYTES + found.get(c.path, 0.0) + c.nullable
    return total


def _plain_nbytes(column: ColumnSpec) -> int:
    dtype = column.dtype if column.categories is None else signed_dtype(len(column.categories.values))
    return np.dtype(dtype).itemsize + column.nullable


def _width(categories: Categories | None, width: float) -> float:
    """Bytes of a string of a column, on average, also of one that names categories."""
    if categories is None or not categories.values:
        return float(width)
    return sum(len(str(v)) for v in categories.values) / len(categories.values)


def frame_nbytes(sources: Sequence[SourceSchema], columns: Sequence[ColumnSpec], *, mixed: bool) -> tuple[float, float]:
    """Bytes of a row of a dataset's obs: as it is collected, and at the time when it is written.

    ``mixed``: a dataset's rows are of all sources, so that its strings are as long as all are on average; else as those
    of the source that has the longest. Columns of strings are written one after another; what is written stays in
    memory too, compressed, and at worst not smaller.
    """
    plain = sum(_plain_nbytes(c) for c in columns if c.kind != "string")
    rows = np.array([s.n_obs for s in sources], np.float64)
    by_source = [{c.path: _width(c.categories, c.width) for c in s.columns} for s in sources]
    widths = [[float(s.name_width) for s in sources]]
    widths += [[found.get(c.path, 0.0) for found in by_source] for c in columns if c.kind == "string"]
    means = [float(np.average(w, weights=rows)) if mixed else max(w) for w in widths]
    collected = plain + sum(w + _ENTRY_NBYTES for w in means)
    names = _STRING_NBYTES + means[0]
    at_work = 50 + 3.6 * max(means)  # measured: 97 bytes a row for strings of 20, 402 for 104, 1,777 for 500
    return collected, collected + plain + sum(means) + names + at_work


def categories_nbytes(columns: Sequence[ColumnSpec]) -> float:
    """Bytes of categories while a dataset is written: those of all columns stored, those of one at work."""
    sizes = [(len(c.categories.values), _width(c.categories, 0)) for c in columns if c.categories is not None]
    return sum(n * (16 + 2 * w) for n, w in sizes) + max((n * (_STRING_NBYTES + 3 * w) for n, w in sizes), default=0)


def shared_nbytes(
    sources: Sequence[SourceSchema], columns: Sequence[ColumnSpec], maps: Sequence[NDArray[np.unsignedinteger]]
) -> float:
    """Bytes of the job in a worker process: categories, codes, genes and kept rows of all sources."""
    total = float(sum(m.nbytes for m in maps))
    for c in columns:
        if c.categories is not None:
            total += len(c.categories.values) * (_STRING_NBYTES + _width(c.categories, 0))
    for s in sources:
        total += 0 if s.kept is None else s.kept.bits.nbytes
        total += sum(24.0 * len(c.categories.values) for c in s.columns if c.categories is not None)
    return total
