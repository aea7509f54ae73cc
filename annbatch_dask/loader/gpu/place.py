"""A window sent to a device: one copy of what was read, unpacked and cut into rows there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from annbatch_dask.loader.gpu.builder import DeviceBuilder
from annbatch_dask.loader.gpu.device import Array, Device, Ints, Placed, PlacedMatrix
from annbatch_dask.loader.gpu.slab import RowTable, Slab, deal, room_of, tabulate
from annbatch_dask.loader.pool import BufferPool
from annbatch_dask.loader.requests import Window

__all__ = ["place"]


def place(window: Window, slab: Slab, builders: Sequence[DeviceBuilder], device: Device, pool: BufferPool) -> Placed:
    """Begin to bring a window to a device: its slab, and tables of where the rows of each batch are in it.

    There is a builder for each matrix.
    """
    bounds = [0, *np.cumsum([len(split) for split in window.splits]).tolist()]
    tables = [tabulate(loaded, slab) for loaded in window.matrices]
    deals = [deal(window.splits, table.group, len(table.groups)) for table in tables]
    arrays: list[Array] = list(window.codes.values())
    starts = [_starts(table, window.splits if b.is_csr else ()) for table, b in zip(tables, builders, strict=True)]
    for table, (rows, dest, _), its_starts in zip(tables, deals, starts, strict=True):
        arrays += [table.value_at, table.column_at, table.lengths, rows, dest, np.concatenate([[0], *its_starts])]
    there = iter(_uploaded(arrays, device, pool))
    codes = {name: next(there) for name in window.codes}
    matrices = []
    for table, builder, (_, _, pieces), its_starts in zip(tables, builders, deals, starts, strict=True):
        value_at, column_at, lengths, rows, dest, starts_there = (next(there) for _ in range(6))
        ends = [int(part[-1]) for part in its_starts]
        matrices.append(
            PlacedMatrix(
                table, builder.n_columns, value_at, column_at, lengths, rows, dest, pieces, starts_there[1:], ends
            )
        )
    counters = device.counts(len(window.splits) * len(tables))
    return Placed(device.upload(slab.used), matrices, bounds, codes, counters)


def _starts(table: RowTable, splits: Sequence[Ints]) -> list[Ints]:
    """Offsets of the rows of each batch, with the end of the last row."""
    return [np.concatenate([[0], np.cumsum(table.lengths[split], dtype=np.int64)]) for split in splits]


def _uploaded(arrays: Sequence[Array], device: Device, pool: BufferPool) -> list[Any]:
    """Small arrays on the device, by way of one copy."""
    beside = Slab(pool.empty(sum(room_of(array.nbytes) for array in arrays) or room_of(1), np.uint8))
    copies = []
    for array in arrays:
        copy = beside.empty(array.shape, array.dtype)
        copy[...] = array
        copies.append(copy)
    there = device.upload(beside.used)
    return [device.view(there, beside.offset(copy) or 0, copy) for copy in copies]
