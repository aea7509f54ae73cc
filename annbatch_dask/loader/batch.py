"""Batches out of a load window: rows picked once, into a CSR batch or straight into a dense one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.chunks.dealing import Task
from annbatch_dask.chunks.wanted import say_outside
from annbatch_dask.errors import IntegrityError
from annbatch_dask.kernels.assemble import (
    Places,
    SparseRows,
    copy_rows,
    count_selected,
    half_bits,
    has_kernels,
    normalize_rows,
    scatter_rows,
    select_rows,
    take_columns,
)
from annbatch_dask.kernels.entries import Entries, entry_copier
from annbatch_dask.loader.blocks import BatchRows, DenseBlock, Loaded, PickedBlock, SparseBlock
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
Floats = NDArray[np.float64]
RunTasks = Callable[[list[Task]], object]

_MIN_TASK_NBYTES = 2 * 1024 * 1024
_MIN_COPY_NBYTES = 8 * 1024 * 1024  # is copied in the time that waking some threads takes
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
        if self.selection is None:
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
            if (entries := self._entries(loaded, rows)) is not None:
                n_entries = entries.pointers[-1]
            else:
                run, is_all = loaded.sparse_rows.run(rows), self.form.selection is None
                n_entries = run.pointers[-1] if is_all else np.minimum(run.lengths, self.width[0]).sum()
            return int(n_entries) * (itemsize + 4) + 4 * len(rows)
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
        entries = self._entries(loaded, rows)
        if entries is not None:
            pointers = entries.pointers
            values, columns = self._room_for(int(pointers[-1]), dtype)
            n_tasks = count_parts(-(-self.n_parts // 4), values.nbytes + columns.nbytes, _MIN_COPY_NBYTES)
            block = _sparse(loaded, 0)
            copier = entry_copier(entries, (block.values, block.columns), (values, columns), 4 * n_tasks)
            run([copier] * n_tasks)
            is_short = columns.dtype == entries.short.dtype
            return CsrParts(values, columns, entries.short if is_short else pointers, (len(rows), self.width[0]))
        pointers, dest = self._place(loaded, rows, run)
        values, columns = self._room_for(int(pointers[-1]), dtype)
        n_parts = count_parts(-(-self.n_parts // 2), values.nbytes + columns.nbytes)  # all alike
        parts = _sparse_parts(loaded, rows, n_parts)
        run([partial(_gather, self.form, part, (values, columns), dest[piece]) for part, piece in parts])
        return CsrParts(values, columns, pointers.astype(columns.dtype), (len(rows), self.width[0]))

    def _room_for(self, nnz: int, dtype: np.dtype[Any]) -> tuple[Array, Array]:
        """Values and columns of so many entries."""
        index_dtype = np.int32 if max(nnz, *self.width) <= _MAX_INT32 else np.int64
        return self.pool.empty(nnz, dtype), self.pool.empty(nnz, index_dtype)

    def _entries(self, loaded: Loaded, rows: BatchRows) -> Entries | None:
        """The entries of a batch, where they are copied as they are or cast, from all blocks alike."""
        is_plain = self.form.selection is None and not self.form.is_computed
        if not is_plain or not has_kernels(self.form.dtype_of(loaded)):
            return None
        return None if loaded.entries is None else loaded.entries.of_batch(rows)

    def _place(self, loaded: Loaded, rows: BatchRows, run: RunTasks) -> tuple[Ints, Ints]:
        """0 and where each row of the batch ends, and where each of ``rows`` begins in it."""
        selection, found = self.form.selection, loaded.sparse_rows.run(rows)
        if selection is None:
            return found.pointers, found.dest
        counts, ends = np.empty(len(rows), np.int64), np.zeros(len(rows) + 1, np.int64)
        parts = _sparse_parts(loaded, rows, self.n_parts)
        run([partial(_count, selection, part, counts[piece]) for part, piece in parts])
        ends[1 + rows.slots] = counts
        np.cumsum(ends, out=ends)
        return ends, ends[rows.slots]

    def _dense_tasks(self, loaded: Loaded, rows: BatchRows, out: Array) -> Iterator[Task]:
        n_parts = count_parts(self.n_parts, out.nbytes)
        if self.is_sparse:
            for part, piece in _sparse_parts(loaded, rows, n_parts):
                yield partial(_densify, self.form, part, out, rows.slots[piece])
            return
        positions = loaded.dense_rows[rows.rows]
        for k, piece in rows.pieces(n_parts):
            source = loaded.blocks[k]
            assert isinstance(source, DenseBlock)  # noqa: S101
            yield partial(_pick, self.form, source.values, positions[piece], out, rows.slots[piece])


def count_parts(n_parts: int, nbytes: int, min_nbytes: int = _MIN_TASK_NBYTES) -> int:
    """Tasks that the making of so many bytes is cut into, ``n_parts`` at most."""
    return max(1, min(n_parts, nbytes // min_nbytes))


class _Part(NamedTuple):
    """Rows of one block: where each begins, its length, and the sum of its values where the block lacks some."""

    block: SparseBlock
    starts: Ints
    lengths: Ints
    totals: Floats | None

    def cut(self, piece: slice) -> _Part:
        totals = None if self.totals is None else self.totals[piece]
        return _Part(self.block, self.starts[piece], self.lengths[piece], totals)


def _sparse_parts(loaded: Loaded, rows: BatchRows, n_parts: int) -> Iterator[tuple[_Part, slice]]:
    """Parts of a batch of sparse rows, and which of its rows each has."""
    starts, lengths, *_ = loaded.sparse_rows.run(rows)
    totals = None if loaded.totals is None else loaded.totals[rows.rows]
    for k, piece in rows.pieces(n_parts):
        block = _sparse(loaded, k)
        its_totals = totals[piece] if totals is not None and isinstance(block, PickedBlock) else None
        yield _Part(block, starts[piece], lengths[piece], its_totals), piece


def _sparse(loaded: Loaded, number: int) -> SparseBlock:
    block = loaded.blocks[number]
    assert isinstance(block, SparseBlock)  # noqa: S101
    return block


# ------------------------------------------------------------------------------- tasks over sparse blocks


def _count(selection: Selection, part: _Part, out: Ints) -> None:
    out[:], n_outside = count_selected(part.block.columns, part.starts, part.lengths, selection.places)
    check_columns(n_outside, len(selection.places))


def _gather(form: Form, part: _Part, out: tuple[Array, Array], dest: Ints) -> None:
    values, columns, starts, lengths = _bits(out[0], form), out[1], part.starts, part.lengths
    sparse = _prepared(form, part, out[0].dtype)
    if form.selection is not None:
        select_rows(sparse, starts, lengths, form.selection.places, (values, columns), dest)
        return
    copy_rows(sparse.values, sparse.at(starts, lengths)[1], lengths, values, dest)
    copy_rows(sparse.columns, starts, lengths, columns, dest)


def _densify(form: Form, part: _Part, out: Array, places: Ints) -> None:
    selected = None if form.selection is None else form.selection.places
    for step in _steps(len(places), form):
        some = part.cut(step)
        rows, sparse = (some.starts, some.lengths), _prepared(form, some, out.dtype)
        n_outside, n_repeated = scatter_rows(sparse, *rows, _bits(out, form), places[step], selected)
        check_columns(n_outside, out.shape[1] if selected is None else len(selected))
        if n_repeated and form.is_half:
            # The bits of half precision cannot be added up; such rows are rare, and take the long way.
            full = np.empty((len(rows[0]), out.shape[1]), np.float32)
            single = replace(form, dtype=full.dtype, is_bfloat16=False)
            _densify(single, some, full, np.arange(len(full)))
            _bits(out, form)[places[step]] = half_bits(full, bfloat16=form.is_bfloat16)


def _prepared(form: Form, part: _Part, dtype: np.dtype[Any]) -> SparseRows:
    """The rows, in place where their values only have to be cast, else with values worked out beforehand."""
    values, columns = part.block.values, part.block.columns
    if not form.is_computed:
        return SparseRows(values, columns)
    flat, flat_starts = _compute(form, values, part.starts, part.lengths, dtype, part.totals)
    return SparseRows(flat, columns, flat_starts)


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


def _compute(  # noqa: PLR0913, PLR0917
    form: Form, values: Array, starts: Ints, lengths: Ints, dtype: np.dtype[Any], totals: Floats | None = None
) -> tuple[Array, Ints]:
    """Values of some rows, normalised, in half precision as bits; and where each row of them begins."""
    ends = np.cumsum(lengths)
    flat_starts = ends - lengths
    n_values = int(ends[-1]) if len(ends) else 0
    if form.target_sum is None:
        flat = np.empty(n_values, values.dtype)
        copy_rows(values, starts, lengths, flat, flat_starts)
    else:
        flat = np.empty(n_values, np.float32 if form.is_half else dtype)
        normalize_rows(values, starts, lengths, flat, flat_starts, target_sum=form.target_sum, totals=totals)
    return (half_bits(flat, bfloat16=form.is_bfloat16) if form.is_half else flat), flat_starts


def _bits(out: Array, form: Form) -> Array:
    """View half-precision output as integers."""
    return out.view(np.uint16) if form.is_half else out


def _steps(n_rows: int, form: Form) -> Iterator[slice]:
    """All rows; where values are worked out a few at a time, which stay in the cache until they are used."""
    n_each = _ROWS_AT_ONCE if form.is_computed else max(n_rows, 1)
    return (slice(first, first + n_each) for first in range(0, n_rows, n_each))
