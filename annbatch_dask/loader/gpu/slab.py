"""A window's bytes in one piece, to be copied to a device at once, and where the rows of each batch are in it.

No library of arrays is used here: what is found is handed to a device in :mod:`annbatch_dask.loader.gpu.device`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from annbatch_dask.chunks.dealing import Task
from annbatch_dask.kernels.assemble import copy_rows
from annbatch_dask.loader.backing import Located, RowSource
from annbatch_dask.loader.blocks import Block, DenseBlock, Loaded, SparseBlock

__all__ = ["Group", "Piece", "RowTable", "Slab", "deal", "room_for", "room_of", "stage", "tabulate"]

Array = NDArray[Any]
Ints = NDArray[np.int64]
_ALIGNMENT = 64
_MAX_COLUMN_NBYTES = 8


class Slab:
    """Hands out arrays that are one behind the other in given memory.

    Parameters
    ----------
    memory
        1-D bytes, aligned to 64.
    """

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self.memory = memory
        self._used = 0

    def empty(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> Array:
        """An uninitialised array, C-contiguous; MemoryError where the slab is full."""
        kind = np.dtype(dtype)
        shape = (shape,) if isinstance(shape, int) else shape
        nbytes = math.prod(shape) * kind.itemsize
        if self._used + room_of(nbytes) > len(self.memory):
            msg = f"a slab of {len(self.memory)} bytes has no room for {nbytes} more beside {self._used}"
            raise MemoryError(msg)
        part = self.memory[self._used : self._used + nbytes]
        self._used += room_of(nbytes)
        return part.view(kind).reshape(shape)

    @property
    def used(self) -> NDArray[np.uint8]:
        """The part that was handed out."""
        return self.memory[: self._used]

    def offset(self, array: Array) -> int | None:
        """Offset of an array in the slab; None if it is elsewhere."""
        offset = int(array.ctypes.data) - int(self.memory.ctypes.data)
        return offset if 0 <= offset <= len(self.memory) - array.nbytes else None


def room_of(nbytes: int) -> int:
    """Bytes that an array takes in a slab."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def room_for(source: RowSource, located: Located) -> int:
    """Bytes that the rows take in a slab at most: those that are read, or copies of rows that are in memory."""
    if located.nbytes:
        nbytes = located.nbytes
    elif source.is_sparse:
        nbytes = int(located.lengths.sum()) * (source.stored_dtype.itemsize + _MAX_COLUMN_NBYTES)
    else:
        nbytes = len(located.starts) * math.prod(source.shape[1:]) * source.stored_dtype.itemsize
    return nbytes + 2 * _ALIGNMENT  # values and columns


def stage(block: Block, slab: Slab) -> tuple[Block, list[Task]]:
    """The block in the slab: itself where it is there already, else a copy of its rows that the tasks make."""
    if slab.offset(block.values) is not None:
        return block, []
    if isinstance(block, DenseBlock):
        n_rows, shape = len(block.positions), block.values.shape[1:]
        rows = slab.empty((n_rows, *shape), _native(block.values))
        width = math.prod(shape)
        lengths, dest = np.full(n_rows, width, np.int64), np.arange(n_rows) * width
        copied = partial(copy_rows, _flat(block.values), block.positions * width, lengths, rows.reshape(-1), dest)
        return DenseBlock(rows, np.arange(n_rows)), [copied]
    ends = np.cumsum(block.lengths)
    n_entries = int(ends[-1]) if len(ends) else 0
    dest = ends - block.lengths
    copies: list[Array] = []
    tasks: list[Task] = []
    for source in (block.values, block.columns):
        copy = slab.empty(n_entries, _native(source))
        copies.append(copy)
        tasks.append(partial(copy_rows, source, block.starts, block.lengths, copy, dest))
    return SparseBlock(copies[0], copies[1], dest, block.lengths), tasks


def _native(array: Array) -> np.dtype[Any]:
    return array.dtype.newbyteorder("=")


def _flat(array: Array) -> Array:
    return array.reshape(-1)


class Group(NamedTuple):
    """Rows of one window and matrix whose values, and columns, have one dtype; None for those of dense rows."""

    values: np.dtype[Any]
    columns: np.dtype[Any] | None


@dataclass(frozen=True)
class RowTable:
    """Locations of the rows of one matrix in the slab.

    Attributes
    ----------
    groups
        What kinds of rows there are; a kernel reads one of them.
    group
        Group of each row.
    value_at, column_at
        Where a row's values and columns begin, in bytes; columns of dense rows begin nowhere.
    lengths
        Entries of each row.
    """

    groups: tuple[Group, ...]
    group: NDArray[np.int32]
    value_at: Ints
    column_at: Ints
    lengths: NDArray[np.int32]


def tabulate(loaded: Loaded, slab: Slab) -> RowTable:
    """Find the rows of one matrix, all of whose blocks are in the slab."""
    n_rows = len(loaded.block)
    groups: dict[Group, int] = {}
    group = np.zeros(n_rows, np.int32)
    value_at, column_at = np.zeros(n_rows, np.int64), np.zeros(n_rows, np.int64)
    for number, block in enumerate(loaded.blocks):
        rows: Any = slice(None) if len(loaded.blocks) == 1 else np.flatnonzero(loaded.block == number)
        position = loaded.position[rows]
        if isinstance(block, SparseBlock):
            kind = Group(block.values.dtype, block.columns.dtype)
            starts = block.starts[position]
            column_at[rows] = starts * block.columns.itemsize + _offset(slab, block.columns)
        else:
            kind = Group(block.values.dtype, None)
            starts = block.positions[position] * math.prod(block.values.shape[1:])
        group[rows] = groups.setdefault(kind, len(groups))
        value_at[rows] = starts * block.values.itemsize + _offset(slab, block.values)
    return RowTable(tuple(groups), group, value_at, column_at, loaded.lengths.astype(np.int32))


def _offset(slab: Slab, array: Array) -> int:
    offset = slab.offset(array)
    if offset is None:
        msg = f"an array of {array.nbytes} bytes is not in the slab"
        raise ValueError(msg)
    return offset


class Piece(NamedTuple):
    """The rows of one batch that one kernel makes: their group, and where they stand in the deal."""

    group: int
    start: int
    stop: int


def deal(
    splits: Sequence[Ints], group: NDArray[np.int32], n_groups: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], list[list[Piece]]]:
    """Deal the rows of all batches out to kernels.

    Parameters
    ----------
    splits
        Rows of the window, one array a batch.
    group
        Group of each row of the window.
    n_groups
        How many there are.

    Returns
    -------
    rows, dest, pieces
        Rows of the window, and for each its place in its batch; and the pieces of each batch.
    """
    all_rows: list[Ints] = []
    all_dest: list[Ints] = []
    pieces: list[list[Piece]] = []
    first = 0
    for split in splits:
        stop = first + len(split)
        if n_groups <= 1:
            all_rows.append(split)
            all_dest.append(np.arange(len(split)))
            pieces.append([Piece(0, first, stop)] if len(split) else [])
        else:
            its_group = group[split]
            order = np.argsort(its_group, kind="stable")
            all_rows.append(split[order])
            all_dest.append(order)
            bounds = first + np.searchsorted(its_group[order], np.arange(n_groups + 1))
            pairs = zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
            pieces.append([Piece(number, begin, end) for number, (begin, end) in enumerate(pairs) if end > begin])
        first = stop
    return _joined(all_rows), _joined(all_dest), pieces


def _joined(parts: Iterable[Ints]) -> NDArray[np.int32]:
    found = list(parts)
    return np.concatenate(found).astype(np.int32) if found else np.zeros(0, np.int32)
