"""cupy's device, for batches of cupy and jax."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.kernels import gpu
from annbatch_dask.loader.batch import CsrParts
from annbatch_dask.loader.gpu.builder import arguments, launches
from annbatch_dask.loader.gpu.device import Array, Handover, Placed, Target
from annbatch_dask.loader.output import Framework, make_deliver

__all__ = ["CupyDevice"]


class CupyDevice:
    """Batches of cupy's arrays, or of jax's over the same memory.

    A batch is finished before it is handed over, and belongs to the default stream. Its memory may be what a kernel
    queued there still reads, so the side stream waits for that before it writes.

    Parameters
    ----------
    index
        Index of the device.
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
        """Make the device current. Delivered arrays belong to the default stream, so it stays the current one."""
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
        for piece, group, grid, tile, shared in launches(target, placed, batch):
            kernel = gpu.compiled(target.kernel(group), "cupy", self._device.id)
            kernel(grid, shared, arguments(target, placed, batch, piece, tile, rows), self.stream)
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
        """Deliver by synchronous copies."""
        return make_deliver(self._to, on_gpu=True, bfloat16=bfloat16)(built)

    def hand_over(self, placed: Placed | None, batch: int) -> Handover | None:
        """Finished."""
        if placed is not None:
            with self.stream:
                counted = placed.n_outside[placed.counters(batch)].get()
            self.stream.synchronize()
            placed.check(counted.tolist())
        return None
