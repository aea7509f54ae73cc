"""Batches made on a GPU: a window goes there in one copy, as it is stored, and each batch is made of it there.

``window -> pinned slab -> [one copy] -> rows as stored -> [one kernel a batch] -> batch``

A device is torch's for batches of tensors, else cupy's. Tensors are made on a stream of the loader's own, which nobody
waits for on the host: the consumer's stream waits for the batch, in the consumer's thread, as it takes it. Batches for
cupy and jax are finished before they are handed over, and belong to the default stream.

torch's device may be a CPU: the same code, without streams, in tests.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from annbatch_dask.errors import DeviceError
from annbatch_dask.kernels import gpu, tensors
from annbatch_dask.loader.backing import Source
from annbatch_dask.loader.batch import CsrParts, Form, check_columns
from annbatch_dask.loader.output import Framework, csr_tensor, make_deliver, tensors_of
from annbatch_dask.loader.pool import BufferPool
from annbatch_dask.loader.requests import Loaded, Window
from annbatch_dask.loader.slab import Group, Piece, RowTable, Slab, deal, room_of, tabulate

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

__all__ = [
    "CupyDevice",
    "Device",
    "DeviceBuilder",
    "Handover",
    "Placed",
    "TorchDevice",
    "check_device",
    "find_device",
    "has_device",
    "place",
]

_MAX_INT32 = np.iinfo(np.int32).max
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED

Array = NDArray[Any]
Ints = NDArray[np.int64]


class Handover(Protocol):
    """What is done in the consumer's thread as it takes a batch, and what is known of the batch later."""

    def take(self, batch: Any) -> None:
        """Let what the consumer does next with the batch wait until it is made."""

    def check(self, *, wait: bool) -> bool:
        """Whether the batch is known to be sound; IntegrityError if it is not. With ``wait`` it is known."""


class Device(Protocol):
    """Where batches are made; any number of iterations share one."""

    def allocate(self, nbytes: int) -> NDArray[np.uint8]:
        """Host memory that the device reads fast."""

    def entered(self) -> AbstractContextManager[None]:
        """In the calling thread, work on this device and its stream."""

    def put(self, array: Array) -> Any:
        """A copy on the device."""

    def upload(self, memory: NDArray[np.uint8]) -> Any:
        """Bytes on the device, sooner or later; until then the memory is kept, and must not change."""

    def view(self, uploaded: Any, offset: int, array: Array) -> Any:
        """An array of which the copy lies at this offset of what was uploaded."""

    def counts(self, n: int) -> Any:
        """That many counters, all 0."""

    @property
    def makes_csr(self) -> bool:
        """Whether it makes sparse batches."""

    def make(self, target: Target, placed: Placed, batch: int) -> Any:
        """The rows of one batch, as they are delivered."""

    def make_csr(self, target: Target, placed: Placed, batch: int) -> Any:
        """The same, as a sparse matrix."""

    def deliver(self, built: CsrParts | Array, *, bfloat16: bool) -> Any:
        """What was built on the host."""

    def hand_over(self, placed: Placed | None, batch: int) -> Handover | None:
        """What becomes of a batch whose making was begun; None where it is finished, and sound."""


# ------------------------------------------------------------------------------------------- finding one


def check_device(to: Framework | None) -> None:
    """ImportError or DeviceError where no batch can be made on a GPU."""
    if to == "torch":
        import torch

        library, n_devices = f"torch {torch.__version__}", torch.cuda.device_count()
    elif find_spec("cupy") is None:
        msg = f"Could not find cupy, which dense='gpu' needs with to={to!r}; install it, or deliver to='torch'"
        raise ImportError(msg)
    else:
        library, n_devices = "cupy", _count_cupy_devices()
    if not n_devices:
        msg = (
            f"dense='gpu' needs a CUDA device, {library} finds 0; pass dense='cpu', and preload_to_gpu=False "
            "where cupy is installed"
        )
        raise DeviceError(msg)


def has_device(to: Framework | None) -> bool:
    """Whether :func:`check_device` finds nothing amiss."""
    try:
        check_device(to)
    except (ImportError, DeviceError):
        return False
    return True


def _count_cupy_devices() -> int:
    import cupy

    try:
        return int(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError:  # no driver
        return 0


def find_device(to: Framework | None) -> Device:
    """The current device of the calling thread: that of the consumer, since new threads begin with the first one.

    It is the same in every iteration: a stream has memory of its own, which is used again.
    """
    if to == "torch":
        import torch

        return _torch_device(torch.cuda.current_device())
    import cupy

    return _cupy_device(cupy.cuda.runtime.getDevice(), to)


@cache
def _torch_device(index: int) -> TorchDevice:
    import torch

    return TorchDevice(torch.device("cuda", index))


@cache
def _cupy_device(index: int, to: Framework | None) -> CupyDevice:
    return CupyDevice(index, to)


# ------------------------------------------------------------------------------------- windows on a device


@dataclass(frozen=True)
class PlacedMatrix:
    """One matrix of a window on a device.

    Attributes
    ----------
    table, n_columns
        What rows there are, and their columns.
    value_at, column_at, lengths
        Of the table, on the device.
    rows, dest
        On the device: of all batches one behind the other, rows of the window and their places in the batch.
    pieces
        Of each batch.
    starts, ends
        Of sparse batches, on the device: where each row begins in its batch, and behind the last one where that ends;
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
        Where their rows lie in it.
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
        """Which counters are of one batch."""
        return slice(batch * len(self.matrices), (batch + 1) * len(self.matrices))

    def check(self, counted: Sequence[int]) -> None:
        """IntegrityError if a counter of a batch is not 0."""
        for n_outside, matrix in zip(counted, self.matrices, strict=True):
            check_columns(int(n_outside), matrix.n_columns)


def place(window: Window, slab: Slab, builders: Sequence[DeviceBuilder], device: Device, pool: BufferPool) -> Placed:
    """Begin to bring a window to a device: its slab, and tables of where the rows of each batch lie in it.

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
    """Where each row of each batch begins, and where the last one ends."""
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


# ---------------------------------------------------------------------------------------- building batches


@dataclass(frozen=True)
class Target:
    """What rows become on a device.

    Attributes
    ----------
    form
        As asked for.
    dtype
        Of the result; uint16 for bfloat16.
    n_columns, width
        Columns of the data, and of the result.
    shape
        Of a delivered row.
    columns, places
        The selection of the form, on the device; None for all columns.
    number
        Of the matrix among all.
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
        """What values are added up in: a GPU adds in few dtypes, and half precision would round at each step."""
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
        Of the matrix among all.
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
    def of(cls, form: Form, source: Source, device: Device, number: int) -> DeviceBuilder:
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


def _launches(target: Target, placed: Placed, batch: int) -> Iterator[tuple[Piece, Group, tuple[int, int], int, int]]:
    """Pieces of a batch, and for each its group, its grid, the columns of a tile, and bytes of shared memory."""
    n_tiles, tile = gpu.tiles(target.width, target.sum_dtype.itemsize)
    matrix = placed.matrices[target.number]
    for piece in matrix.pieces[batch] if target.width else ():
        group = matrix.table.groups[piece.group]
        shared = 0 if group.columns is None else tile * target.sum_dtype.itemsize
        yield piece, group, (piece.stop - piece.start, n_tiles), tile, shared


def _arguments(target: Target, placed: Placed, batch: int, piece: Piece, tile: int, out: Any) -> list[Any]:
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


# ------------------------------------------------------------------------------------------------- torch


class TorchDevice:
    """Batches of tensors.

    Their memory is torch's, of one stream: it is used again when the consumer's stream has done with it.

    Parameters
    ----------
    device
        A ``torch.device``. On a CPU the same operations run without streams.
    """

    def __init__(self, device: Any) -> None:
        import torch

        self.device = device
        self._is_cuda = device.type == "cuda"
        # Before a consumer's kernels, where both could run: it waits for batches.
        self.stream: Any = torch.cuda.Stream(device, priority=-1) if self._is_cuda else None
        self._compiler = gpu.find_compiler("torch") if self._is_cuda else None
        self._in_flight: deque[tuple[Any, Array]] = deque()

    def allocate(self, nbytes: int) -> NDArray[np.uint8]:
        """Pinned memory."""
        import torch

        with self.entered():
            memory: NDArray[np.uint8] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._is_cuda).numpy()
        return memory

    @contextmanager
    def entered(self) -> Iterator[None]:
        """On the side stream."""
        if not self._is_cuda:
            yield
            return
        import torch

        with torch.cuda.device(self.device), torch.cuda.stream(self.stream), _unaffected_by_captures():
            yield

    def put(self, array: Array) -> Any:
        """A tensor."""
        import torch

        with self.entered():
            return torch.tensor(array, device=self.device)

    def upload(self, memory: NDArray[np.uint8]) -> Any:
        """A tensor of bytes."""
        import torch

        if not self._is_cuda:
            return torch.from_numpy(memory.copy())
        there = torch.empty(len(memory), dtype=torch.uint8, device=self.device)
        there.copy_(torch.from_numpy(memory), non_blocking=True)
        self._keep(memory)
        return there

    def _keep(self, memory: Array) -> None:
        """Keep host memory from being used again until it was copied, and let go of what was."""
        self._in_flight.append((self.stream.record_event(), memory))
        while True:
            try:
                copied, kept = self._in_flight.popleft()
            except IndexError:
                return
            if not copied.query():
                self._in_flight.appendleft((copied, kept))
                return

    def view(self, uploaded: Any, offset: int, array: Array) -> Any:
        """A tensor on the same memory."""
        return uploaded[offset : offset + array.nbytes].view(_torch_dtype(array.dtype)).view(array.shape)

    def counts(self, n: int) -> Any:
        """A tensor of int64."""
        import torch

        return torch.zeros(n, dtype=torch.int64, device=self.device)

    def make(self, target: Target, placed: Placed, batch: int) -> Any:
        """A tensor."""
        import torch

        n_rows = placed.bounds[batch + 1] - placed.bounds[batch]
        if self._compiler is None:
            return self._make_plainly(target, placed, batch, n_rows)
        rows = torch.empty((n_rows, target.width), dtype=_delivered_dtype(target), device=self.device)
        for piece, group, grid, tile, shared in _launches(target, placed, batch):
            kernel = gpu.compiled(target.kernel(group), self._compiler, self.device.index)
            kernel(grid, shared, _arguments(target, placed, batch, piece, tile, rows), self.stream)
        return rows.view(n_rows, *target.shape)

    @property
    def makes_csr(self) -> bool:
        """Where there are kernels."""
        return self._compiler is not None

    def make_csr(self, target: Target, placed: Placed, batch: int) -> Any:
        """A tensor in CSR format."""
        import torch

        matrix, n_rows = placed.matrices[target.number], placed.bounds[batch + 1] - placed.bounds[batch]
        first, n_entries = placed.bounds[batch] + batch, matrix.ends[batch]
        starts = matrix.starts[first : first + n_rows + 1]
        index = np.dtype(np.int32 if max(n_entries, target.n_columns) <= _MAX_INT32 else np.int64)
        values = torch.empty(n_entries, dtype=_delivered_dtype(target), device=self.device)
        columns = torch.empty(n_entries, dtype=_torch_dtype(index), device=self.device)
        for piece in matrix.pieces[batch] if n_entries else ():
            group = matrix.table.groups[piece.group]
            kernel = gpu.compiled(target.kernel(group, index), self._compiler or "torch", self.device.index)
            where = [placed.slab, matrix.value_at, matrix.column_at, matrix.lengths, matrix.rows, matrix.dest]
            arguments = [*where, piece.start, starts, float(target.form.target_sum or 0), values, columns]
            kernel((piece.stop - piece.start, 1), 0, arguments, self.stream)
        return csr_tensor(starts.to(columns.dtype), columns, values, (n_rows, target.n_columns))

    def _make_plainly(self, target: Target, placed: Placed, batch: int, n_rows: int) -> Any:
        """By operations of torch alone."""
        import torch

        matrix = placed.matrices[target.number]
        made, dest = [], []
        for piece in matrix.pieces[batch]:
            rows = matrix.rows[piece.start : piece.stop].long()
            dest.append(matrix.dest[piece.start : piece.stop].long())
            if matrix.table.groups[piece.group].columns is None:
                made.append(self._picked(target, placed, piece, rows))
                continue
            dense, n_outside = self._densified(target, placed, piece, rows)
            placed.n_outside[batch * len(placed.matrices) + target.number] += n_outside
            made.append(dense)
        if not made:
            return torch.empty((n_rows, *target.shape), dtype=_delivered_dtype(target), device=self.device)
        whole = made[0] if len(made) == 1 else torch.cat(made)[torch.cat(dest).argsort()]
        return whole.to(_delivered_dtype(target)).view(n_rows, *target.shape)

    def _densified(self, target: Target, placed: Placed, piece: Piece, rows: Any) -> tuple[Any, Any]:
        matrix = placed.matrices[target.number]
        group, lengths = matrix.table.groups[piece.group], matrix.lengths[rows].long()
        values = tensors.gather(placed.slab, matrix.value_at[rows], lengths, _torch_dtype(group.values))
        columns = tensors.gather(placed.slab, matrix.column_at[rows], lengths, _torch_dtype(group.columns))
        return tensors.densify(
            (values, columns, lengths),
            target.n_columns,
            target.width,
            _torch_dtype(target.sum_dtype),
            places=target.places,
            target_sum=target.form.target_sum,
        )

    def _picked(self, target: Target, placed: Placed, piece: Piece, rows: Any) -> Any:
        matrix = placed.matrices[target.number]
        group, lengths = matrix.table.groups[piece.group], rows.new_full((len(rows),), target.n_columns)
        flat = tensors.gather(placed.slab, matrix.value_at[rows], lengths, _torch_dtype(group.values))
        dense = flat.view(len(rows), target.n_columns)
        if target.form.target_sum is not None:
            dense = tensors.normalized(dense, target.form.target_sum)
        dense = dense.to(_torch_dtype(target.sum_dtype))
        return dense if target.columns is None else dense.index_select(1, target.columns)

    def deliver(self, built: CsrParts | Array, *, bfloat16: bool) -> Any:
        """Tensors, copied from pinned memory; a sparse one for CSR."""
        on_host = make_deliver("torch", on_gpu=False, bfloat16=bfloat16)(built)
        there = on_host.to(self.device, non_blocking=True)
        if self._is_cuda:
            for array in (built.values, built.columns, built.indptr) if isinstance(built, CsrParts) else (built,):
                self._keep(array)
        return there

    def hand_over(self, placed: Placed | None, batch: int) -> Handover | None:
        """To the stream of whoever takes it."""
        if not self._is_cuda:
            if placed is not None:
                placed.check(placed.n_outside[placed.counters(batch)].tolist())
            return None
        counted = None
        if placed is not None:
            import torch

            part = placed.n_outside[placed.counters(batch)]
            counted = torch.empty(len(part), dtype=torch.int64, pin_memory=True)
            counted.copy_(part, non_blocking=True)
        return _TorchHandover(self.device, self.stream.record_event(), placed, counted)


@dataclass(frozen=True)
class _TorchHandover:
    """A batch on the side stream, made when the event is there."""

    device: Any
    made: Any
    placed: Placed | None
    counted: Any

    def take(self, batch: Any) -> None:
        """The current stream waits; memory of the batch is not used again before what it then does with it is done."""
        import torch

        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self.made)
        for tensor in tensors_of(batch):
            if tensor.is_cuda:
                tensor.record_stream(stream)

    def check(self, *, wait: bool) -> bool:
        """Look at the counters, once they are there."""
        if wait:
            self.made.synchronize()
        elif not self.made.query():
            return False
        if self.placed is not None:
            self.placed.check(self.counted.tolist())
        return True


@contextmanager
def _unaffected_by_captures() -> Iterator[None]:
    """In the calling thread, allow what CUDA forbids all threads while one of them captures a graph.

    Capturing threads forbid it as nobody could know that it has nothing to do with the graph; this thread's work has
    not. See cuThreadExchangeStreamCaptureMode of CUDA's driver interface.
    """
    exchange = _driver().cuThreadExchangeStreamCaptureMode
    mode = ctypes.c_int(_RELAXED)
    exchange(ctypes.byref(mode))  # the mode before
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))


@cache
def _driver() -> Any:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _torch_dtype(dtype: np.dtype[Any] | None) -> Any:
    import torch

    return getattr(torch, np.dtype(dtype).name)


def _delivered_dtype(target: Target) -> Any:
    import torch

    return torch.bfloat16 if target.form.is_bfloat16 else _torch_dtype(target.dtype)


# -------------------------------------------------------------------------------------------------- cupy


class CupyDevice:
    """Batches of cupy's arrays, or of jax's over the same memory.

    A batch is finished before it is handed over, and belongs to the default stream. Its memory may be what a kernel
    queued there still reads, so the side stream waits for that before it writes.

    Parameters
    ----------
    index
        Of the device.
    to
        What batches are delivered as.
    """

    def __init__(self, index: int, to: Framework | None) -> None:
        import cupy

        self._device = cupy.cuda.Device(index)
        self._to = to
        with self._device:
            self.stream = cupy.cuda.Stream(non_blocking=True)

    def allocate(self, nbytes: int) -> NDArray[np.uint8]:
        """Pinned memory."""
        import cupyx

        with self._device:
            memory: NDArray[np.uint8] = cupyx.empty_pinned(nbytes, np.uint8)
        return memory

    @contextmanager
    def entered(self) -> Iterator[None]:
        """On the device. Arrays that are delivered are the default stream's, so it stays the current one."""
        with self._device:
            yield

    def put(self, array: Array) -> Any:
        """An array of cupy's."""
        import cupy

        with self._device:
            return cupy.asarray(array)

    def upload(self, memory: NDArray[np.uint8]) -> Any:
        """An array of bytes, of the side stream."""
        import cupy

        with self.stream:
            there = cupy.empty(len(memory), np.uint8)
            there.set(memory, stream=self.stream)
            self.stream.synchronize()
        return there

    def view(self, uploaded: Any, offset: int, array: Array) -> Any:
        """An array on the same memory."""
        return uploaded[offset : offset + array.nbytes].view(array.dtype).reshape(array.shape)

    def counts(self, n: int) -> Any:
        """An array of int64."""
        import cupy

        with self.stream:
            return cupy.zeros(n, np.int64)

    def make(self, target: Target, placed: Placed, batch: int) -> Any:
        """An array, queued on the side stream."""
        import cupy

        n_rows = placed.bounds[batch + 1] - placed.bounds[batch]
        rows = cupy.empty((n_rows, target.width), target.dtype)
        self.stream.wait_event(cupy.cuda.get_current_stream().record())
        for piece, group, grid, tile, shared in _launches(target, placed, batch):
            kernel = gpu.compiled(target.kernel(group), "cupy", self._device.id)
            kernel(grid, shared, _arguments(target, placed, batch, piece, tile, rows), self.stream)
        rows = rows.reshape(n_rows, *target.shape)
        if self._to == "jax":
            import jax

            self.stream.synchronize()
            return jax.dlpack.from_dlpack(rows)
        return rows

    @property
    def makes_csr(self) -> bool:
        """No: matrices of cupy's are made on the host, and copied."""
        return False

    def make_csr(self, target: Target, placed: Placed, batch: int) -> Any:
        """Not here."""
        raise NotImplementedError

    def deliver(self, built: CsrParts | Array, *, bfloat16: bool) -> Any:
        """By copies that are finished."""
        return make_deliver(self._to, on_gpu=True, bfloat16=bfloat16)(built)

    def hand_over(self, placed: Placed | None, batch: int) -> Handover | None:
        """Finished."""
        if placed is not None:
            with self.stream:
                counted = placed.n_outside[placed.counters(batch)].get()
            self.stream.synchronize()
            placed.check(counted.tolist())
        return None
