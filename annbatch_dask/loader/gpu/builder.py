"""Batches made on a device, of windows that were placed there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from annbatch_dask.kernels import gpu
from annbatch_dask.loader.backing import RowSource
from annbatch_dask.loader.batch import Form
from annbatch_dask.loader.blocks import Loaded
from annbatch_dask.loader.gpu.device import Device, Ints, Placed, Target
from annbatch_dask.loader.gpu.slab import Group, Piece

__all__ = ["DeviceBuilder", "arguments", "launches"]


@dataclass(frozen=True)
class DeviceBuilder:
    """Makes batches of one matrix on a device; what :class:`annbatch_dask.loader.batch.BatchBuilder` is on a CPU.

    Attributes
    ----------
    form
        What rows are delivered as.
    n_columns, shape
        Columns of the data, and shape of a delivered row.
    is_csr
        Whether sparse rows stay sparse.
    device
        Where batches are made.
    columns, places
        The selection of the form, on the device.
    number
        Index of the matrix.
    """

    form: Form
    n_columns: int
    shape: tuple[int, ...]
    is_csr: bool
    device: Device
    columns: Any | None
    places: Any | None
    number: int

    @classmethod
    def of(cls, form: Form, source: RowSource, device: Device, number: int) -> DeviceBuilder:
        """Bring the selection to the device; the source is one of the data."""
        chosen = form.selection
        columns, places = None, None
        if chosen is not None:
            columns, places = device.put(chosen.columns.astype(np.int32)), device.put(chosen.places)
        is_csr, shape = source.is_sparse and not form.dense, source.shape
        return cls(form, math.prod(shape[1:]), form.width_of(shape), is_csr, device, columns, places, number)

    def nbytes(self, loaded: Loaded, split: Ints) -> int:
        """Memory the batch will take, on the device."""
        if self.is_csr:
            return int(loaded.lengths[split].sum()) * (self.form.dtype_of(loaded).itemsize + 4) + 4 * len(split)
        return len(split) * math.prod(self.shape) * self.form.dtype_of(loaded).itemsize

    def build(self, loaded: Loaded, placed: Placed, batch: int) -> Any:
        """Make the rows of one batch."""
        dtype = self.form.dtype_of(loaded)
        target = Target(self.form, dtype, self.n_columns, self.shape, self.columns, self.places, self.number)
        return self.device.make_csr(target, placed, batch) if self.is_csr else self.device.make(target, placed, batch)


def launches(target: Target, placed: Placed, batch: int) -> Iterator[tuple[Piece, Group, tuple[int, int], int, int]]:
    """Pieces of a batch, and for each its group, its grid, the columns of a tile, and bytes of shared memory."""
    n_tiles, tile = gpu.tiles(target.width, target.sum_dtype.itemsize)
    matrix = placed.matrices[target.number]
    for piece in matrix.pieces[batch] if target.width else ():
        group = matrix.table.groups[piece.group]
        shared = 0 if group.columns is None else tile * target.sum_dtype.itemsize
        yield piece, group, (piece.stop - piece.start, n_tiles), tile, shared


def arguments(target: Target, placed: Placed, batch: int, piece: Piece, tile: int, out: Any) -> list[Any]:
    """Arguments of the kernel of one piece. Where no columns are chosen, any array stands for them."""
    matrix = placed.matrices[target.number]
    is_sparse = matrix.table.groups[piece.group].columns is not None
    chosen = target.places if is_sparse else target.columns
    where = [matrix.rows, matrix.dest, piece.start, matrix.rows if chosen is None else chosen, int(chosen is not None)]
    sizes = [target.n_columns, target.width, tile, float(target.form.target_sum or 0), out]
    if not is_sparse:
        return [placed.slab, matrix.value_at, *where, *sizes]
    counter = batch * len(placed.matrices) + target.number
    there = [placed.slab, matrix.value_at, matrix.column_at, matrix.lengths]
    return [*there, *where, *sizes, placed.n_outside, counter]
