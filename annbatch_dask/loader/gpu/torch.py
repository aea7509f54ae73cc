"""torch's device."""

from __future__ import annotations

import ctypes
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.kernels import gpu, tensors
from annbatch_dask.loader.batch import CsrParts
from annbatch_dask.loader.gpu.builder import arguments, launches
from annbatch_dask.loader.gpu.device import Array, Handover, Placed, Target
from annbatch_dask.loader.gpu.slab import Piece
from annbatch_dask.loader.output import csr_tensor, make_deliver, tensors_of

__all__ = ["TorchDevice"]

_MAX_INT32 = np.iinfo(np.int32).max
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


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
        """Make the side stream current."""
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
        for piece, group, grid, tile, shared in launches(target, placed, batch):
            kernel = gpu.compiled(target.kernel(group), self._compiler, self.device.index)
            kernel(grid, shared, arguments(target, placed, batch, piece, tile, rows), self.stream)
        return rows.view(n_rows, *target.shape)

    @property
    def makes_csr(self) -> bool:
        """True if kernels are available."""
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
        """Make a batch with torch's own operations."""
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
        """Hand the batch to the consumer's stream."""
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
    """Allow, in the calling thread, operations that CUDA forbids while another thread captures a graph.

    Capturing threads forbid it because torch cannot know that it is unrelated to the graph; this thread's work has
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
