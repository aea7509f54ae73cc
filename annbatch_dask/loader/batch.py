"""Batches out of a load window: rows picked once, into a CSR batch or straight into a dense one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.chunks.reader import Task
from annbatch_dask.chunks.wanted import say_outside
from annbatch_dask.errors import IntegrityError
from annbatch_dask.kernels.assemble import (
    Places,
    SparseRows,
    copy_rows,
    count_selected,
    half_bits,
    normalize_rows,
    scatter_rows,
    select_rows,
    take_columns,
)
from annbatch_dask.loader.blocks import BatchRows, DenseBlock, Loaded, SparseBlock
from annbatch_dask.loader.pool import BufferPool

__all__ = [
    "BatchBuilder",
    "CsrParts",
    "Form",
    "RunTasks",
    "Selection",
    "check_columns",
    "count_parts",
]

Array = NDArray[Any]
Ints = NDArray[np.int64]
RunTasks = Callable[[list[Task]], object]

_MIN_TASK_NBYTES = 2 * 1024 * 1024
_MAX_INT32 = np.iinfo(np.int32).max
_ROWS_AT_ONCE = 64
_WANTED_SHARE = 0.5  # of all columns: of more, too few entries are left out for the time that takes


@dataclass(frozen=True)
class CsrParts:
    """A CSR batch before it becomes a matrix of some library."""

    values: Array
    columns: Array
    indptr: Array
    shape: tuple[int, int]


@dataclass(frozen=True)
class Selection:
    """Columns to deliver, in an order of their own.

    Attributes
    ----------
    columns
        The chosen columns of the data.
    places
        For each column of the data its place in the batch; -1 where it is left out.
    is_wanted
        For each column of the data 1, or 0 where it is left out.
    """

    columns: Ints
    places: Places
    is_wanted: NDArray[np.uint8]

    @classmethod
    def of(cls, columns: Ints, n_columns: int) -> Selection:
        """Select these columns out of ``n_columns``."""
        places = np.full(n_columns, -1, np.int32)
        places[columns] = np.arange(len(columns), dtype=np.int32)
        return cls(columns, places, (places >= 0).view(np.uint8))


@dataclass(frozen=True)
class Form:
    """Form in which rows are delivered.

    Attributes
    ----------
    dense
        Whether sparse rows become dense ones.
    dtype
        What values are delivered in; None leaves it to the window. uint16 for bfloat16, of which numpy knows
        nothing.
    is_bfloat16
        Whether the 16 bits of a value are to be read as bfloat16.
    selection
        Columns to deliver; None for all.
    target_sum
        Scale every row to this sum and take log(1 + x); None leaves the values as they are.
    """

    dense: bool = False
    dtype: np.dtype[Any] | None = None
    is_bfloat16: bool = False
    selection: Selection | None = None
    target_sum: float | None = None

    @property
    def is_half(self) -> bool:
        """True if values are delivered in half precision."""
        return self.is_bfloat16 or self.dtype == np.float16

    @property
    def is_computed(self) -> bool:
        """True if values take more than a cast."""
        return self.is_half or self.target_sum is not None

    @property
    def wanted(self) -> NDArray[np.uint8] | None:
        """The columns whose entries are all that is looked at, as 1 among 0, where to leave out the others pays."""
        if self.selection is None or self.target_sum is not None:  # a row's sum is that of all its entries
            return None
        n_wanted, n_columns = len(self.selection.columns), len(self.selection.places)
        return self.selection.is_wanted if n_wanted <= _WANTED_SHARE * n_columns else None

    def dtype_of(self, loaded: Loaded) -> np.dtype[Any]:
        """Dtype in which the values of a window are delivered."""
        if self.dtype is not None:
            return self.dtype
        if self.target_sum is None or loaded.dtype == np.float64:
            return loaded.dtype
        return np.dtype(np.float32)

    def width_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of a delivered row, from that of the data."""
        return shape[1:] if self.selection is None else (len(self.selection.columns),)


@dataclass(frozen=True)
class BatchBuilder:
    """Makes batches of one matrix.

    Attributes
    ----------
    form
        What rows are delivered as.
    width
        Shape of a delivered row.
    is_sparse
        Whether windows hold sparse blocks.
    pool
        Where batches are built.
    n_parts
        How many tasks a batch is cut into at most.
    """

    form: Form
    width: tuple[int, ...]
    is_sparse: bool
    pool: BufferPool
    n_parts: int

    def nbytes(self, loaded: Loaded, rows: BatchRows) -> int:
        """Memory the batch will take at most."""
        itemsize = self.form.dtype_of(loaded).itemsize
        if self.is_sparse and not self.form.dense:
            lengths = loaded.sparse_rows[1][rows.rows]
            n_entries = lengths if self.form.selection is None else np.minimum(lengths, self.width[0])
            return int(n_entries.sum()) * (itemsize + 4) + 4 * len(rows)
        return len(rows) * math.prod(self.width) * itemsize

    def build(self, loaded: Loaded, rows: BatchRows, run: RunTasks) -> CsrParts | Array:
        """Pick the rows of one batch; the work is handed to ``run`` in independent pieces."""
        dtype = self.form.dtype_of(loaded)
        if self.is_sparse and not self.form.dense:
            return self._build_csr(loaded, rows, dtype, run)
        out = self.pool.empty((len(rows), *self.width), dtype)
        run(list(self._dense_tasks(loaded, rows, out)))
        return out

    def _build_csr(self, loaded: Loaded, rows: BatchRows, dtype: np.dtype[Any], run: RunTasks) -> CsrParts:
        starts, lengths = (there[rows.rows] for there in loaded.sparse_rows)
        blocks = _sparse(loaded)
        found = self._count(blocks, rows, starts, lengths, run)
        counts = np.empty(len(rows), np.int64)
        counts[rows.slots] = found
        ends = np.cumsum(counts)
        nnz = int(ends[-1]) if len(ends) else 0
        index_dtype = np.int32 if max(nnz, *self.width) <= _MAX_INT32 else np.int64
        values = self.pool.empty(nnz, dtype)
        columns = self.pool.empty(nnz, index_dtype)
        dest = (ends - counts)[rows.slots]
        n_parts = count_parts(self.n_parts, nnz * (values.itemsize + columns.itemsize))
        run(
            [
                partial(_gather, self.form, blocks[k], starts[part], lengths[part], (values, columns), dest[part])
                for k, part in rows.pieces(n_parts)
            ]
        )
        indptr = np.zeros(len(rows) + 1, index_dtype)
        indptr[1:] = ends
        return CsrParts(values, columns, indptr, (len(rows), self.width[0]))

    def _count(
        self, blocks: Sequence[SparseBlock], rows: BatchRows, starts: Ints, lengths: Ints, run: RunTasks
    ) -> Ints:
        """Entries of each row that the batch takes."""
        selection = self.form.selection
        if selection is None:
            return lengths
        counts = np.empty(len(rows), np.int64)
        parts = rows.pieces(self.n_parts)
        run([partial(_count, selection, blocks[k], starts[p], lengths[p], counts[p]) for k, p in parts])
        return counts

    def _dense_tasks(self, loaded: Loaded, rows: BatchRows, out: Array) -> Iterator[Task]:
        parts = rows.pieces(count_parts(self.n_parts, out.nbytes))
        if self.is_sparse:
            starts, lengths = (there[rows.rows] for there in loaded.sparse_rows)
            blocks = _sparse(loaded)
            for k, part in parts:
                yield partial(_densify, self.form, blocks[k], starts[part], lengths[part], out, rows.slots[part])
            return
        positions = loaded.dense_rows[rows.rows]
        for k, part in parts:
            source = loaded.blocks[k]
            assert isinstance(source, DenseBlock)  # noqa: S101
            yield partial(_pick, self.form, source.values, positions[part], out, rows.slots[part])


def count_parts(n_parts: int, nbytes: int) -> int:
    """Tasks that the making of so many bytes is cut into, ``n_parts`` at most."""
    return max(1, min(n_parts, nbytes // _MIN_TASK_NBYTES))


def _sparse(loaded: Loaded) -> Sequence[SparseBlock]:
    return [block for block in loaded.blocks if isinstance(block, SparseBlock)]


# ------------------------------------------------------------------------------- tasks over sparse blocks


def _count(selection: Selection, block: SparseBlock, starts: Ints, lengths: Ints, out: Ints) -> None:
    out[:], n_outside = count_selected(block.columns, starts, lengths, selection.places)
    check_columns(n_outside, len(selection.places))


def _gather(form: Form, block: SparseBlock, starts: Ints, lengths: Ints, out: tuple[Array, Array], dest: Ints) -> None:
    values, columns = _bits(out[0], form), out[1]
    sparse = _prepared(form, block, starts, lengths, out[0].dtype)
    if form.selection is not None:
        select_rows(sparse, starts, lengths, form.selection.places, (values, columns), dest)
        return
    copy_rows(sparse.values, sparse.at(starts, lengths)[1], lengths, values, dest)
    copy_rows(block.columns, starts, lengths, columns, dest)


def _densify(form: Form, block: SparseBlock, starts: Ints, lengths: Ints, out: Array, places: Ints) -> None:
    selected = None if form.selection is None else form.selection.places
    for part in _steps(len(starts), form):
        rows = starts[part], lengths[part]
        sparse = _prepared(form, block, *rows, out.dtype)
        n_outside, n_repeated = scatter_rows(sparse, *rows, _bits(out, form), places[part], selected)
        check_columns(n_outside, out.shape[1] if selected is None else len(selected))
        if n_repeated and form.is_half:
            # The bits of half precision cannot be added up; such rows are rare, and take the long way.
            full = np.empty((len(rows[0]), out.shape[1]), np.float32)
            single = replace(form, dtype=full.dtype, is_bfloat16=False)
            _densify(single, block, *rows, full, np.arange(len(full)))
            _bits(out, form)[places[part]] = half_bits(full, bfloat16=form.is_bfloat16)


def _prepared(form: Form, block: SparseBlock, starts: Ints, lengths: Ints, dtype: np.dtype[Any]) -> SparseRows:
    """The rows, in place where their values only have to be cast, else with values worked out beforehand."""
    if not form.is_computed:
        return SparseRows(block.values, block.columns)
    flat, flat_starts = _compute(form, block.values, starts, lengths, dtype)
    return SparseRows(flat, block.columns, flat_starts)


def check_columns(n_outside: int, n_columns: int) -> None:
    """IntegrityError if entries name a column that does not exist."""
    if n_outside:
        raise IntegrityError(say_outside(n_outside, n_columns))


# ------------------------------------------------------------------------------- tasks over dense blocks


def _pick(form: Form, values: Array, positions: Ints, out: Array, places: Ints) -> None:
    width = math.prod(values.shape[1:])
    dest = _bits(out, form)
    for part in _steps(len(positions), form):
        starts, lengths = positions[part] * width, np.full(len(positions[part]), width, np.int64)
        flat = values.reshape(-1)
        if form.is_computed:
            flat, starts = _compute(form, flat, starts, lengths, out.dtype)
        if form.selection is None:
            copy_rows(flat, starts, lengths, dest.reshape(-1), places[part] * width)
        else:
            take_columns(flat, starts, form.selection.columns, dest, places[part])


# ------------------------------------------------------------------------------------------------- values


def _compute(form: Form, values: Array, starts: Ints, lengths: Ints, dtype: np.dtype[Any]) -> tuple[Array, Ints]:
    """Values of some rows, normalised, in half precision as bits; and where each row of them begins."""
    ends = np.cumsum(lengths)
    flat_starts = ends - lengths
    n_values = int(ends[-1]) if len(ends) else 0
    if form.target_sum is None:
        flat = np.empty(n_values, values.dtype)
        copy_rows(values, starts, lengths, flat, flat_starts)
    else:
        flat = np.empty(n_values, np.float32 if form.is_half else dtype)
        normalize_rows(values, starts, lengths, flat, flat_starts, target_sum=form.target_sum)
    return (half_bits(flat, bfloat16=form.is_bfloat16) if form.is_half else flat), flat_starts


def _bits(out: Array, form: Form) -> Array:
    """View half-precision output as integers."""
    return out.view(np.uint16) if form.is_half else out


def _steps(n_rows: int, form: Form) -> Iterator[slice]:
    """All rows; where values are worked out a few at a time, which stay in the cache until they are used."""
    n_each = _ROWS_AT_ONCE if form.is_computed else max(n_rows, 1)
    return (slice(first, first + n_each) for first in range(0, n_rows, n_each))
