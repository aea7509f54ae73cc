"""Batches out of a load window: rows picked once, into a CSR batch or straight into a dense one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.errors import IntegrityError
from annbatch_dask.kernels.assemble import copy_rows, scatter_rows
from annbatch_dask.loader.pool import BufferPool
from annbatch_dask.loader.requests import Window
from annbatch_dask.loader.sources import DenseBlock, SparseBlock
from annbatch_dask.storage.ranges import Task

__all__ = ["BatchBuilder", "CsrParts", "RunTasks"]

Array = NDArray[Any]
Ints = NDArray[np.int64]
RunTasks = Callable[[list[Task]], None]

_MIN_TASK_NBYTES = 1024 * 1024
_MAX_INT32 = np.iinfo(np.int32).max


@dataclass(frozen=True)
class CsrParts:
    """A CSR batch before it becomes a matrix of some library."""

    values: Array
    columns: Array
    indptr: Array
    shape: tuple[int, int]


@dataclass(frozen=True)
class BatchBuilder:
    """Makes batches of one form.

    Attributes
    ----------
    width
        Shape of one row.
    is_sparse
        Whether windows hold sparse blocks.
    dense
        Whether sparse rows are delivered dense.
    dtype
        What values are delivered in; None leaves it to the window.
    pool
        Where batches are built.
    n_parts
        How many tasks a batch is cut into at most.
    """

    width: tuple[int, ...]
    is_sparse: bool
    dense: bool
    dtype: np.dtype[Any] | None
    pool: BufferPool
    n_parts: int

    def nbytes(self, window: Window, split: Ints) -> int:
        """Memory the batch will take."""
        itemsize = (self.dtype or window.dtype).itemsize
        if self.is_sparse and not self.dense:
            return int(window.lengths[split].sum()) * (itemsize + 4) + 4 * len(split)
        return len(split) * math.prod(self.width) * itemsize

    def build(self, window: Window, split: Ints, run: RunTasks) -> CsrParts | Array:
        """Pick the rows of one batch; the work is handed to ``run`` in independent pieces."""
        dtype = self.dtype or window.dtype
        if self.is_sparse and not self.dense:
            return self._build_csr(window, split, dtype, run)
        out = self.pool.empty((len(split), *self.width), dtype)
        run(list(self._dense_tasks(window, split, out)))
        return out

    def _build_csr(self, window: Window, split: Ints, dtype: np.dtype[Any], run: RunTasks) -> CsrParts:
        ends = np.cumsum(window.lengths[split])
        nnz = int(ends[-1]) if len(ends) else 0
        index_dtype = np.int32 if max(nnz, *self.width) <= _MAX_INT32 else np.int64
        values = self.pool.empty(nnz, dtype)
        columns = self.pool.empty(nnz, index_dtype)
        dest = ends - window.lengths[split]
        n_parts = self._n_parts(nnz * (values.itemsize + columns.itemsize))
        run(
            [
                partial(_gather, block, starts, lengths, (values, columns), dest[places])
                for block, places, starts, lengths in _sparse_parts(window, split, n_parts)
            ]
        )
        indptr = np.zeros(len(split) + 1, index_dtype)
        indptr[1:] = ends
        return CsrParts(values, columns, indptr, (len(split), self.width[0]))

    def _dense_tasks(self, window: Window, split: Ints, out: Array) -> Iterator[Task]:
        n_parts = self._n_parts(out.nbytes)
        if self.is_sparse:
            for block, places, starts, lengths in _sparse_parts(window, split, n_parts):
                yield partial(_densify, block, starts, lengths, out, places)
            return
        width = math.prod(self.width)
        for number, places in _parts(window, split, n_parts):
            source = window.blocks[number]
            assert isinstance(source, DenseBlock)  # noqa: S101
            positions = source.positions[window.position[split[places]]]
            yield partial(_pick, source.values, positions, width, out, places)

    def _n_parts(self, nbytes: int) -> int:
        return max(1, min(self.n_parts, nbytes // _MIN_TASK_NBYTES))


def _parts(window: Window, split: Ints, n_parts: int) -> Iterator[tuple[int, Ints]]:
    """Pieces of a batch, each from one block: the block and the places in the batch."""
    block = window.block[split]
    for b in range(len(window.blocks)):
        places = np.flatnonzero(block == b)
        if len(places):
            n = max(1, min(len(places), -(-n_parts * len(places) // len(split))))
            for piece in np.array_split(places, n):
                yield b, piece


def _sparse_parts(window: Window, split: Ints, n_parts: int) -> Iterator[tuple[SparseBlock, Ints, Ints, Ints]]:
    for b, places in _parts(window, split, n_parts):
        source = window.blocks[b]
        assert isinstance(source, SparseBlock)  # noqa: S101
        rows = window.position[split[places]]
        yield source, places, source.starts[rows], source.lengths[rows]


def _gather(block: SparseBlock, starts: Ints, lengths: Ints, out: tuple[Array, Array], dest: Ints) -> None:
    values, columns = out
    copy_rows(block.values, starts, lengths, values, dest)
    copy_rows(block.columns, starts, lengths, columns, dest)


def _densify(block: SparseBlock, starts: Ints, lengths: Ints, out: Array, places: Ints) -> None:
    n_outside = scatter_rows(block.values, block.columns, starts, lengths, out, places)
    if n_outside:
        msg = f"{n_outside} entries name a column beyond the {out.shape[1]} the data has: the data is damaged"
        raise IntegrityError(msg)


def _pick(values: Array, positions: Ints, width: int, out: Array, places: Ints) -> None:
    lengths = np.full(len(positions), width, np.int64)
    copy_rows(values.reshape(-1), positions * width, lengths, out.reshape(-1), places * width)
