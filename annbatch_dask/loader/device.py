"""Dense batches made on a GPU: rows go there as they are stored, a tenth of the dense bytes, and are spread out there.

``window -> [gather] -> pinned memory -> [copy on a side stream] -> compact rows -> [one kernel] -> batch``

A device is cupy's, or torch's where cupy is absent. The latter takes any device of torch, so the same code runs on a
CPU in tests. Both finish a batch before they hand it over, in the assembling thread: nobody has to know their streams.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from annbatch_dask.errors import DeviceError
from annbatch_dask.kernels import gpu, tensors
from annbatch_dask.kernels.assemble import copy_rows
from annbatch_dask.loader.batch import CsrParts, Form, RunTasks, check_columns, count_parts, row_parts, sparse_parts
from annbatch_dask.loader.output import Framework
from annbatch_dask.loader.requests import Loaded
from annbatch_dask.loader.sources import DenseBlock, SparseBlock
from annbatch_dask.storage.ranges import Task

__all__ = ["Device", "DeviceBuilder", "TorchDevice", "check_device", "find_device"]

Array = NDArray[Any]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Target:
    """What rows become on a device.

    Attributes
    ----------
    form
        As asked for.
    dtype
        Of the result; uint16 for bfloat16.
    width
        Columns of the result.
    columns, places
        The selection of the form, on the device; None for all columns.
    """

    form: Form
    dtype: np.dtype[Any]
    width: int = 0
    columns: Any | None = None
    places: Any | None = None

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


class Device(Protocol):
    """Where batches are made. One belongs to one iteration."""

    def empty(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> Array:
        """Host memory that the device reads fast."""

    def put(self, array: Array) -> Any:
        """A copy on the device, to work with."""

    def densify(self, staged: CsrParts, target: Target) -> Any:
        """Sparse rows as dense ones."""

    def finish(self, staged: Array, target: Target) -> Any:
        """Dense rows with chosen columns, normalised, cast."""


# ------------------------------------------------------------------------------------------- finding one


def check_device(to: Framework | None) -> None:
    """ImportError or DeviceError where no batch can be made on a GPU."""
    has_cupy = find_spec("cupy") is not None
    if not has_cupy and to != "torch":
        msg = f"Could not find cupy, which dense='gpu' needs with to={to!r}; install it, or deliver to='torch'"
        raise ImportError(msg)
    found = {}
    if to == "torch":
        import torch

        found[f"torch {torch.__version__}"] = torch.cuda.device_count()
    if has_cupy:
        found["cupy"] = _count_cupy_devices()
    for library, n_devices in found.items():
        if not n_devices:
            msg = (
                f"dense='gpu' needs a CUDA device, {library} finds 0; pass dense='cpu', and preload_to_gpu=False "
                "where cupy is installed"
            )
            raise DeviceError(msg)


def _count_cupy_devices() -> int:
    import cupy

    try:
        return int(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError:  # no driver
        return 0


def find_device(to: Framework | None) -> Device:
    """The current device of the calling thread: that of the consumer, since new threads begin with the first one."""
    if find_spec("cupy") is None:
        import torch

        return TorchDevice(torch.device("cuda", torch.cuda.current_device()))
    return CupyDevice(to)


# ---------------------------------------------------------------------------------------- building batches


@dataclass(frozen=True)
class DeviceBuilder:
    """Makes dense batches of one matrix on a device; what :class:`annbatch_dask.loader.batch.BatchBuilder` is on a CPU.

    Attributes
    ----------
    form, width, is_sparse, n_parts
        As there.
    device
        Where batches are made.
    columns, places
        The selection of the form, on the device.
    """

    form: Form
    width: tuple[int, ...]
    is_sparse: bool
    device: Device
    n_parts: int
    columns: Any | None
    places: Any | None

    @classmethod
    def of(cls, form: Form, width: tuple[int, ...], device: Device, *, is_sparse: bool, n_parts: int) -> DeviceBuilder:
        """Bring the selection to the device."""
        chosen = form.selection
        columns, places = (None, None) if chosen is None else (device.put(chosen.columns), device.put(chosen.places))
        return cls(form, width, is_sparse, device, n_parts, columns, places)

    def nbytes(self, loaded: Loaded, split: Ints) -> int:
        """Memory the batch will take, on the device."""
        return len(split) * math.prod(self.width) * self.form.dtype_of(loaded).itemsize

    def build(self, loaded: Loaded, split: Ints, run: RunTasks) -> Any:
        """Gather the rows of one batch in pinned memory, ``run`` in pieces; the device does the rest."""
        target = Target(self.form, self.form.dtype_of(loaded), math.prod(self.width), self.columns, self.places)
        if self.is_sparse:
            return self.device.densify(self._stage_sparse(loaded, split, run), target)
        return self.device.finish(self._stage_dense(loaded, split, run), target)

    def _stage_sparse(self, loaded: Loaded, split: Ints, run: RunTasks) -> CsrParts:
        n_columns = self.width[0] if self.form.selection is None else len(self.form.selection.places)
        indptr = self.device.empty(len(split) + 1, np.int64)
        indptr[0] = 0
        np.cumsum(loaded.lengths[split], out=indptr[1:])
        nnz = int(indptr[-1])
        blocks = [block for block in loaded.blocks if isinstance(block, SparseBlock)]
        values = self.device.empty(nnz, _common([block.values for block in blocks]))
        columns = self.device.empty(nnz, _common([block.columns for block in blocks]))
        tasks: list[Task] = []
        for block, places, starts, lengths in sparse_parts(
            loaded, split, count_parts(self.n_parts, values.nbytes + columns.nbytes)
        ):
            dest = indptr[places]
            tasks += [
                partial(copy_rows, block.values, starts, lengths, values, dest),
                partial(copy_rows, block.columns, starts, lengths, columns, dest),
            ]
        run(tasks)
        return CsrParts(values, columns, indptr, (len(split), n_columns))

    def _stage_dense(self, loaded: Loaded, split: Ints, run: RunTasks) -> Array:
        blocks = [block for block in loaded.blocks if isinstance(block, DenseBlock)]
        shape = blocks[0].values.shape[1:]
        rows = self.device.empty((len(split), *shape), _common([block.values for block in blocks]))
        run(list(_dense_tasks(loaded, split, rows, count_parts(self.n_parts, rows.nbytes))))
        return rows


def _dense_tasks(loaded: Loaded, split: Ints, out: Array, n_parts: int) -> Iterator[Task]:
    width = math.prod(out.shape[1:])
    for number, places in row_parts(loaded, split, n_parts):
        block = loaded.blocks[number]
        assert isinstance(block, DenseBlock)  # noqa: S101
        starts = block.positions[loaded.position[split[places]]] * width
        lengths = np.full(len(places), width, np.int64)
        yield partial(copy_rows, block.values.reshape(-1), starts, lengths, out.reshape(-1), places * width)


def _common(arrays: list[Array]) -> np.dtype[Any]:
    """A dtype that holds the stored values of all blocks, and that CUDA can read."""
    common = np.result_type(*(array.dtype for array in arrays)).newbyteorder("=")
    return np.dtype(np.float32) if common == np.float16 else common


# ------------------------------------------------------------------------------------------------- torch


class TorchDevice:
    """Batches by operations of torch, delivered as tensors.

    Parameters
    ----------
    device
        A ``torch.device``. On a CPU the same operations run without streams.
    """

    def __init__(self, device: Any) -> None:
        import torch

        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def empty(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> Array:
        """Pinned memory."""
        import torch

        kind = np.dtype(dtype)
        shape = (shape,) if isinstance(shape, int) else shape
        nbytes = math.prod(shape) * kind.itemsize
        memory: Array = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._stream is not None).numpy()
        return memory.view(kind).reshape(shape)

    def put(self, array: Array) -> Any:
        """A tensor."""
        import torch

        return torch.tensor(array, device=self._device)

    def densify(self, staged: CsrParts, target: Target) -> Any:
        """Sparse rows as a dense tensor."""
        n_columns = staged.shape[1]
        with self._aside():
            rows, n_outside = tensors.densify(
                tuple(self._copy(part) for part in (staged.values, staged.columns, staged.indptr)),
                n_columns,
                target.width,
                _torch_dtype(target.sum_dtype),
                places=target.places,
                target_sum=target.form.target_sum,
            )
            rows = rows.to(_delivered_dtype(target))
        check_columns(int(n_outside), n_columns)
        return self._handed_over(rows)

    def finish(self, staged: Array, target: Target) -> Any:
        """Dense rows as a tensor."""
        with self._aside():
            rows = self._copy(staged)
            if target.form.target_sum is not None:
                rows = tensors.normalized(rows, target.form.target_sum)
            if target.columns is not None:
                rows = rows.to(_torch_dtype(target.sum_dtype)).index_select(1, target.columns)
            rows = rows.to(_delivered_dtype(target))
        return self._handed_over(rows)

    def _copy(self, array: Array) -> Any:
        import torch

        return torch.from_numpy(array).to(self._device, non_blocking=True)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Work on the side stream, all done at the end."""
        if self._stream is None:
            yield
            return
        import torch

        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            self._stream.synchronize()

    def _handed_over(self, rows: Any) -> Any:
        """Keep memory of the side stream from being used again before the consumer's kernels have read it."""
        if self._stream is not None:
            import torch

            rows.record_stream(torch.cuda.default_stream(self._device))
        return rows


def _torch_dtype(dtype: np.dtype[Any]) -> Any:
    import torch

    return getattr(torch, dtype.name)


def _delivered_dtype(target: Target) -> Any:
    import torch

    return torch.bfloat16 if target.form.is_bfloat16 else _torch_dtype(target.dtype)


# -------------------------------------------------------------------------------------------------- cupy


class CupyDevice:
    """Batches by one kernel each; delivered as cupy arrays, or torch's or jax's over the same memory.

    A batch belongs to the default stream, as the consumer's work does. Its memory may be what a kernel queued there
    still reads, so the side stream waits for that before it writes.

    Parameters
    ----------
    to
        What batches are delivered as.
    """

    def __init__(self, to: Framework | None) -> None:
        import cupy

        index = cupy.cuda.runtime.getDevice()
        if to == "torch":
            import torch

            index = torch.cuda.current_device()
        self._device = cupy.cuda.Device(index)
        self._to = to
        with self._device:
            self._stream = cupy.cuda.Stream(non_blocking=True)

    def empty(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> Array:
        """Pinned memory."""
        import cupyx

        memory: Array = cupyx.empty_pinned(shape, dtype)
        return memory

    def put(self, array: Array) -> Any:
        """An array of cupy's."""
        import cupy

        with self._device:
            return cupy.asarray(array)

    def densify(self, staged: CsrParts, target: Target) -> Any:
        """Sparse rows as a dense array."""
        import cupy

        n_columns = staged.shape[1]
        with self._device:
            rows = cupy.empty((staged.shape[0], target.width), target.sum_dtype)
            with self._aside() as is_free:
                values, columns, indptr = (
                    self._copy(part, cupy.empty(part.shape, part.dtype))
                    for part in (staged.values, staged.columns, staged.indptr)
                )
                self._stream.wait_event(is_free)
                n_outside = gpu.densify(
                    (values, columns, indptr),
                    n_columns,
                    rows,
                    places=target.places,
                    target_sum=target.form.target_sum,
                )
            check_columns(int(n_outside[0]), n_columns)
            return self._delivered(rows, target)

    def finish(self, staged: Array, target: Target) -> Any:
        """Dense rows as an array."""
        import cupy

        with self._device:
            rows = cupy.empty(staged.shape, staged.dtype)
            with self._aside() as is_free:
                self._stream.wait_event(is_free)
                self._copy(staged, rows)
            if target.form.target_sum is not None:
                rows = gpu.normalized(rows, target.form.target_sum)
            if target.columns is not None:
                rows = rows.astype(target.sum_dtype, copy=False)[:, target.columns]
            return self._delivered(rows, target)

    def _copy(self, array: Array, dest: Any) -> Any:
        dest.set(np.ascontiguousarray(array), stream=self._stream)
        return dest

    @contextmanager
    def _aside(self) -> Iterator[Any]:
        """Work on the side stream, all done at the end; yields when the default stream is done with what it has now."""
        import cupy

        is_free = cupy.cuda.get_current_stream().record()
        with self._stream:
            try:
                yield is_free
            finally:
                self._stream.synchronize()

    def _delivered(self, rows: Any, target: Target) -> Any:
        if self._to == "torch":
            import torch

            return torch.from_dlpack(rows).to(_delivered_dtype(target))
        rows = rows.astype(target.dtype, copy=False)
        if self._to == "jax":
            import jax

            return jax.dlpack.from_dlpack(rows)
        return rows
