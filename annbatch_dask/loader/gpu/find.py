"""Finds the device on which batches are made."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from annbatch_dask.errors import DeviceError, MissingPackageError
from annbatch_dask.loader.gpu.cupy import CupyDevice
from annbatch_dask.loader.gpu.device import Device
from annbatch_dask.loader.gpu.torch import TorchDevice
from annbatch_dask.loader.output import INSTALL_CUPY, Framework

__all__ = ["check_device", "find_device", "has_device"]


def check_device(to: Framework | None) -> None:
    """MissingPackageError or DeviceError where no batch can be made on a GPU."""
    if to == "torch":
        import torch

        library, n_devices = f"torch {torch.__version__}", torch.cuda.device_count()
    elif find_spec("cupy") is None:
        msg = f"Could not find cupy, which dense='gpu' needs with to={to!r}: {INSTALL_CUPY}; or deliver to='torch'"
        raise MissingPackageError(msg)
    else:
        library, n_devices = "cupy", _count_cupy_devices()
    if not n_devices:
        msg = (
            f"dense='gpu' needs a CUDA device, {library} finds 0; pass dense='cpu', and preload_to_gpu=False "
            "where cupy is installed"
        )
        raise DeviceError(msg)


def has_device(to: Framework | None) -> bool:
    """True if :func:`check_device` finds nothing amiss."""
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
