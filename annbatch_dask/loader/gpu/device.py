"""The interface of a device and the values passed to it, independent of any library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from annbatch_dask.kernels import gpu
from annbatch_dask.loader.batch import CsrParts, Form, check_columns
from annbatch_dask.loader.gpu.slab import Group, Piece, RowTable

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

__all__ = ["Array", "Device", "Handover", "Ints", "Placed", "PlacedMatrix", "Target"]

Array = NDArray[Any]
Ints = NDArray[np.int64]


class Handover(Protocol):
    """Hand-over of a batch to the consumer's thread, and the check of the batch afterwards."""

    def take(self, batch: Any) -> None:
        """Let what the consumer does next with the batch wait until it is made."""

    def check(self, *, wait: bool) -> bool:
        """True if the batch is known to be sound; IntegrityError if it is not. With ``wait`` it is known."""


class Device(Protocol):
    """Device that makes batches; iterations may share one."""

    def allocate(self, nbytes: int) -> NDArray[np.uint8]:
        """Host memory that the device reads fast."""

    def entered(self) -> AbstractContextManager[None]:
        """Make this device and its stream current in the calling thread."""

    def put(self, array: Array) -> Any:
        """A copy on the device."""

    def upload(self, memory: NDArray[np.uint8]) -> Any:
        """Bytes on the device, sooner or later; until then the memory is kept, and must not change."""

    def view(self, uploaded: Any, offset: int, array: Array) -> Any:
        """An array of which the copy is at this offset of what was uploaded."""

    def counts(self, n: int) -> Any:
        """Allocate counters of value 0."""

    @property
    def makes_csr(self) -> bool:
        """True if it makes sparse batches."""

    def make(self, target: Target, placed: Placed, batch: int) -> Any:
        """The rows of one batch, as they are delivered."""

    def make_csr(self, target: Target, placed: Placed, batch: int) -> Any:
        """Like `make`, as a sparse matrix."""

    def deliver(self, built: CsrParts | Array, *, bfloat16: bool) -> Any:
        """Copy a batch that was built on the host."""

    def hand_over(self, placed: Placed | None, batch: int) -> Handover | None:
        """Hand-over of a batch that is still being made; None if it is finished and sound."""


@dataclass(frozen=True)
class PlacedMatrix:
    """One matrix of a window on a device.

    Attributes
    ----------
    table, n_columns
        What rows there are, and their columns.
    value_at, column_at, lengths
        Columns of the table, on the device.
    rows, dest
        On the device: of all batches one behind the other, rows of the window and their places in the batch.
    pieces
        Pieces of each batch.
    starts, ends
        For sparse batches, on the device: offset of each row in its batch, and the end of the last one;
        of all batches one behind the other. On the host: where each batch ends.
    """

    table: RowTable
    n_columns: int
    value_at: Any
    column_at: Any
    lengths: Any
    rows: Any
    dest: Any
    pieces: list[list[Piece]]
    starts: Any
    ends: list[int]


@dataclass(frozen=True)
class Placed:
    """A window on a device.

    Attributes
    ----------
    slab
        Its bytes.
    matrices
        Where their rows are in it.
    bounds
        Batch ``b`` has rows ``bounds[b]:bounds[b + 1]`` of all batches one behind the other.
    codes
        Label codes of those rows, on the device.
    n_outside
        A counter for each batch and matrix, on the device.
    """

    slab: Any
    matrices: list[PlacedMatrix]
    bounds: list[int]
    codes: Mapping[str, Any]
    n_outside: Any

    def codes_of(self, batch: int) -> dict[str, Any]:
        """Label codes of one batch."""
        part = slice(self.bounds[batch], self.bounds[batch + 1])
        return {name: codes[part] for name, codes in self.codes.items()}

    def counters(self, batch: int) -> slice:
        """Slice of the counters that belong to one batch."""
        return slice(batch * len(self.matrices), (batch + 1) * len(self.matrices))

    def check(self, counted: Sequence[int]) -> None:
        """IntegrityError if a counter of a batch is not 0."""
        for n_outside, matrix in zip(counted, self.matrices, strict=True):
            check_columns(int(n_outside), matrix.n_columns)


@dataclass(frozen=True)
class Target:
    """Output of rows on a device.

    Attributes
    ----------
    form
        As asked for.
    dtype
        Dtype of the result; uint16 for bfloat16.
    n_columns, width
        Columns of the data, and of the result.
    shape
        Shape of a delivered row.
    columns, places
        The selection of the form, on the device; None for all columns.
    number
        Index of the matrix.
    """

    form: Form
    dtype: np.dtype[Any]
    n_columns: int
    shape: tuple[int, ...]
    columns: Any | None
    places: Any | None
    number: int

    @property
    def width(self) -> int:
        """Values of a delivered row."""
        return math.prod(self.shape)

    @property
    def sum_dtype(self) -> np.dtype[Any]:
        """Dtype of sums: a GPU adds in few dtypes, and half precision would round at each step."""
        if self.form.is_half:
            return np.dtype(np.float32)
        if self.dtype.kind in "biu":
            return np.dtype(np.int32 if self.dtype.itemsize < 4 else np.int64)
        if self.dtype in (np.float32, np.float64):
            return self.dtype
        msg = f"dense='gpu' makes no rows of {self.dtype}; pass dtype='float32' to the Loader, or dense='cpu'"
        raise TypeError(msg)

    def kernel(self, group: Group, index: DTypeLike | None = None) -> str:
        """The kernel that makes them of rows of a group; sparse ones with columns of an index dtype."""
        delivered = None if self.form.is_bfloat16 else self.dtype
        if group.columns is None:
            return gpu.kernel_name("pick", [group.values], self.sum_dtype, delivered)
        kernel: Literal["densify", "gather"] = "densify" if index is None else "gather"
        return gpu.kernel_name(kernel, [group.values, group.columns], self.sum_dtype, delivered, index)
