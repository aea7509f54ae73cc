"""Converts assembled arrays to the requested types."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from annbatch_dask.errors import MissingPackageError
from annbatch_dask.loader.batch import CsrParts

__all__ = ["INSTALL_CUPY", "Framework", "check_framework", "csr_tensor", "deliver_as", "make_deliver", "tensors_of"]

Framework = Literal["torch", "jax"]
Array = NDArray[Any]

INSTALL_CUPY = "pip install 'annbatch-dask[cupy-cuda13]', or [cupy-cuda12] where that is your CUDA"


def check_framework(to: Framework | None, *, preload_to_gpu: bool) -> None:
    """MissingPackageError where what was asked for is not installed; ValueError for an unknown name."""
    if to not in (None, "torch", "jax"):
        msg = f"to must be None, 'torch' or 'jax', got {to!r}"
        raise ValueError(msg)
    if to is not None and find_spec(to) is None:
        msg = f"Could not find {to}, which to={to!r} needs: pip install 'annbatch-dask[{to}]'"
        raise MissingPackageError(msg)
    if preload_to_gpu and find_spec("cupy") is None and not _has_cuda(to):
        msg = f"Could not find cupy, which preload_to_gpu=True needs: {INSTALL_CUPY}"
        raise MissingPackageError(msg)


def _has_cuda(to: Framework | None) -> bool:
    """True if torch alone delivers on a GPU."""
    return to == "torch" and bool(_import_torch().cuda.is_available())


def make_deliver(to: Framework | None, *, on_gpu: bool, bfloat16: bool = False) -> Callable[[CsrParts | Array], Any]:
    """The function that turns an assembled matrix into what is yielded, on the GPU that is current now.

    With ``bfloat16`` the values are the bits of such numbers; only torch can read them.
    """
    if bfloat16:
        return _to_torch_bfloat16
    if on_gpu and to != "jax":
        return _to_current_cupy() if to is None else _to_current_cuda()
    return {None: _to_scipy, "torch": _to_torch, "jax": _to_jax}[to]


def deliver_as(matrix: Any, to: Framework, *, on_gpu: bool) -> Any:
    """A CSR matrix or array as another library's; TypeError for anything else."""
    if isinstance(matrix, sp.csr_matrix | sp.csr_array):
        matrix = CsrParts(matrix.data, matrix.indices, matrix.indptr, matrix.shape)
    elif not isinstance(matrix, np.ndarray):
        msg = f"Cannot convert {type(matrix)} to {to}; give a csr_matrix or a numpy array"
        raise TypeError(msg)
    return make_deliver(to, on_gpu=on_gpu)(matrix)


def tensors_of(value: Any, depth: int = 6) -> Iterator[Any]:
    """The strided tensors of torch in a batch, whatever a transform made of it: in mappings, sequences, attributes."""
    torch: Any = _import_torch()
    if isinstance(value, torch.Tensor):
        if value.layout is torch.strided:
            yield value
        else:
            yield from _parts_of(value)
    elif depth and isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_of(part, depth - 1)
    elif depth and isinstance(value, list | tuple):
        for part in value:
            yield from tensors_of(part, depth - 1)
    elif depth and hasattr(value, "__dict__") and not isinstance(value, pd.DataFrame | type):
        yield from tensors_of(vars(value), depth - 1)


def _parts_of(sparse: Any) -> Iterator[Any]:
    """Component arrays of a sparse tensor."""
    torch: Any = _import_torch()
    if sparse.layout is torch.sparse_coo:
        yield from (sparse._indices(), sparse._values())
    elif sparse.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (sparse.crow_indices(), sparse.col_indices(), sparse.values())
    elif sparse.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (sparse.ccol_indices(), sparse.row_indices(), sparse.values())


def _to_scipy(batch: CsrParts | Array) -> Any:
    if isinstance(batch, CsrParts):
        return _csr_matrix(batch)
    return batch


def _csr_matrix(batch: CsrParts) -> sp.csr_matrix:
    """What ``scipy.sparse.csr_matrix((values, columns, indptr), shape=shape)`` makes, of parts that need no check.

    An empty matrix of scipy's own, to which it gave all that one of this shape has, lends everything but the entries.
    """
    matrix: sp.csr_matrix = sp.csr_matrix.__new__(sp.csr_matrix)
    vars(matrix).update(_attributes_of(batch.shape))
    matrix.data, matrix.indices, matrix.indptr = batch.values, batch.columns, batch.indptr
    return matrix


@lru_cache(maxsize=16)
def _attributes_of(shape: tuple[int, int]) -> dict[str, Any]:
    """What scipy knows of an empty matrix, but its entries; the same for any."""
    known = vars(sp.csr_matrix(shape))
    return {name: value for name, value in known.items() if name not in ("data", "indices", "indptr")}


def _to_torch(batch: CsrParts | Array) -> Any:
    torch: Any = _import_torch()
    if isinstance(batch, CsrParts):
        indptr, columns, values = (torch.from_numpy(part) for part in (batch.indptr, batch.columns, batch.values))
        return csr_tensor(indptr, columns, values, batch.shape)
    return torch.from_numpy(batch)


def csr_tensor(starts: Any, columns: Any, values: Any, shape: tuple[int, int]) -> Any:
    """A sparse tensor of its parts, which are not looked at."""
    return _import_torch().sparse_csr_tensor(starts, columns, values, size=shape, check_invariants=False)


def _to_torch_bfloat16(batch: CsrParts | Array) -> Any:
    torch: Any = _import_torch()
    if isinstance(batch, CsrParts):
        indptr, columns, bits = (torch.from_numpy(part) for part in (batch.indptr, batch.columns, batch.values))
        return csr_tensor(indptr, columns, bits.view(torch.bfloat16), batch.shape)
    return torch.from_numpy(batch).view(torch.bfloat16)


@cache
def _import_torch() -> Any:
    import torch

    with warnings.catch_warnings():
        # torch says once per process that sparse CSR is in beta; it is triggered here, where it is suppressed.
        warnings.simplefilter("ignore", UserWarning)
        index = torch.zeros(2, dtype=torch.int32)
        torch.sparse_csr_tensor(index, index[:0], torch.zeros(0), size=(1, 1))
    return torch


def _to_current_cuda() -> Callable[[CsrParts | Array], Any]:
    # Batches are delivered in a thread, whose own current device is the first one.
    device = _import_torch().cuda.current_device()
    return lambda batch: _to_torch(batch).cuda(device)


def _to_jax(batch: CsrParts | Array) -> Any:
    import jax.numpy as jnp
    from jax.experimental import sparse

    # Copies: jax arrays are immutable and may share memory with numpy's, which is used again.
    if isinstance(batch, CsrParts):
        parts = tuple(jnp.array(part, copy=True) for part in (batch.values, batch.columns, batch.indptr))
        return sparse.CSR(parts, shape=batch.shape)
    return jnp.array(batch, copy=True)


def _to_current_cupy() -> Callable[[CsrParts | Array], Any]:
    import cupy

    device = cupy.cuda.Device()  # the current one

    def deliver(batch: CsrParts | Array) -> Any:
        with device:
            return _to_cupy(batch)

    return deliver


def _to_cupy(batch: CsrParts | Array) -> Any:
    import cupy

    if isinstance(batch, CsrParts):
        import cupyx.scipy.sparse as cusparse

        if batch.values.dtype not in (np.dtype(t) for t in ("bool", "f4", "f8", "c8", "c16")):
            msg = f"cupy has no sparse matrices of {batch.values.dtype}; pass dtype='float32' to the Loader"
            raise TypeError(msg)
        parts = tuple(cupy.asarray(part) for part in (batch.values, batch.columns, batch.indptr))
        return cusparse.csr_matrix(parts, shape=batch.shape)
    return cupy.asarray(batch)
