"""Rows that were loaded, as they are in memory, and which of them a window holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Block", "DenseBlock", "Loaded", "PickedBlock", "SparseBlock"]

Array = NDArray[Any]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class SparseBlock:
    """Loaded sparse rows: row ``i`` is ``starts[i]:starts[i] + lengths[i]`` of both flat arrays."""

    values: Array
    columns: Array
    starts: Ints
    lengths: Ints


@dataclass(frozen=True)
class PickedBlock(SparseBlock):
    """A block without the entries of columns that are not wanted.

    ``n_used`` says of how many entries of its room there are any; like all else, it is known once all tasks have run.
    """

    n_used: Ints

    @property
    def spare_nbytes(self) -> int:
        """Room that was never touched."""
        return (len(self.values) - int(self.n_used[0])) * (self.values.itemsize + self.columns.itemsize)


@dataclass(frozen=True)
class DenseBlock:
    """Loaded dense rows: row ``i`` is ``values[positions[i]]``; ``values`` is C-contiguous."""

    values: Array
    positions: Ints


Block = SparseBlock | DenseBlock


@dataclass(frozen=True)
class Loaded:
    """The rows of one matrix in a load window.

    Attributes
    ----------
    blocks, block, position
        Row ``j`` is row ``position[j]`` of ``blocks[block[j]]``.
    lengths
        Entries of each row; zeros for dense blocks.
    dtype
        The dtype the values had in the sources.
    """

    blocks: list[Block]
    block: Ints
    position: Ints
    lengths: Ints
    dtype: np.dtype[Any]
