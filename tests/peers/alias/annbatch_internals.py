"""Private names that annbatch's own tests import or replace, so that these can run on this package."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import NamedTuple

import annbatch_dask.samplers.sampler
from annbatch_dask import samplers, utils
from annbatch_dask.loader import reading
from annbatch_dask.order.share import Worker, current_worker


class WorkerInfo(NamedTuple):
    """What annbatch's samplers ask torch for."""

    id: int
    num_workers: int


def install() -> None:
    """Make them known."""
    utils._read_backed = reading._backed
    for name in ("_utils", "_chunk_sampler", "_distributed_sampler", "_class_samplers"):
        _module(f"samplers.{name}")
    _module("samplers._class_samplers._class_sampler")
    sys.modules["annbatch.samplers._utils"].WorkerInfo = WorkerInfo
    sys.modules["annbatch.samplers._distributed_sampler"].DistributedSampler = samplers.DistributedSampler
    annbatch_dask.samplers.sampler.current_worker = _worker


def _module(name: str) -> None:
    made = ModuleType(f"annbatch.{name}")
    made.get_torch_worker_info = lambda: None
    parent, _, leaf = name.rpartition(".")
    setattr(sys.modules[f"annbatch.{parent}"], leaf, made)
    sys.modules[made.__name__] = made


def _worker() -> Worker | None:
    """Where a test says that it runs, else where it does."""
    for name in ("_chunk_sampler", "_class_samplers._class_sampler"):
        info = sys.modules[f"annbatch.samplers.{name}"].get_torch_worker_info()
        if info is not None:
            return Worker(info.id, info.num_workers, 0)
    return current_worker()
