"""Chooses the engine of a build and finds the memory of its workers."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dask
import dask.system
from dask.base import named_schedulers
from distributed import Client

from annbatch_dask.engines.base import Engine, EngineChoice
from annbatch_dask.engines.dask import ClusterEngine, LocalEngine
from annbatch_dask.engines.local_cluster import client_at, local_client, workers_process
from annbatch_dask.engines.needs import SILENT_S, Needs, answers
from annbatch_dask.engines.waiting import NO_WORKER_S
from annbatch_dask.errors import SchedulerError
from annbatch_dask.formatting import format_bytes
from annbatch_dask.plan.memory import Budget
from annbatch_dask.sizes import parse_nbytes
from annbatch_dask.storage.machine import memory_nbytes

if TYPE_CHECKING:
    import subprocess

__all__ = ["choose_engine"]

logger = logging.getLogger(__name__)

_LOCAL = ("synchronous", "sync", "single-threaded", "threads", "threading")
_PROCESSES = ("processes", "multiprocessing")
"""Those of a local cluster."""
_DISTRIBUTED = ("distributed", "dask.distributed")
_clients: dict[str, Client] = {}
"""By the address that dask is set to use, for as long as this process is there."""
_WORKER_NBYTES = 2**30
"""Of a worker of the local cluster, at least. As many workers as cores where memory allows, so that none shares
Python's lock, or HDF5's (measured, two cores: a seventh faster than one process of two threads)."""
WORKER_TIMEOUT_S = 86_400
"""For the first worker of a cluster, which may stand in a queue."""


def choose_engine(client: Client | None, memory_limit: int | str | None) -> EngineChoice:
    """The engine to use.

    The client given; else what dask is set to use, which is a client, a scheduler in this process, or the address of a
    cluster; else the current client, or a new local cluster.

    Raises
    ------
    SchedulerError
        If dask is set to use what it does not know, or a cluster is not there.
    """
    if client is None:
        scheduler = _configured_scheduler()
        if scheduler in _LOCAL:
            n_threads = 1 if scheduler.startswith("s") else dask.system.CPU_COUNT
            local = LocalEngine(scheduler, Budget(_nbytes(memory_limit, n_workers=1), n_threads))
            return EngineChoice(local, local.budget, lambda _: contextlib.nullcontext(local))
        client = None if scheduler in _PROCESSES else _configured_client(scheduler)
    if client is not None:
        _check_usable(client)
        cluster = ClusterEngine(client, _cluster_budget(client, memory_limit)).needing(Needs())
        return EngineChoice(cluster, cluster.budget, lambda _: contextlib.nullcontext(cluster))
    n_workers = max(1, min(dask.system.CPU_COUNT, memory_nbytes() // _WORKER_NBYTES))
    budget = Budget(_nbytes(memory_limit, n_workers=n_workers), dask.system.CPU_COUNT // n_workers)
    own = _OwnCluster(n_workers, budget)
    return EngineChoice(LocalEngine("threads", budget), budget, own.start, own.ahead, is_apart=True)


@dataclass
class _OwnCluster:
    """A local cluster of a build's own; its number of workers is known once the tasks are."""

    max_workers: int
    budget: Budget
    process: subprocess.Popen[str] | None = None

    @contextlib.contextmanager
    def ahead(self) -> Iterator[None]:
        """Let the workers' imports begin."""
        with workers_process() as process:
            self.process = process
            try:
                yield
            finally:
                self.process = None

    @contextlib.contextmanager
    def start(self, n_tasks: int) -> Iterator[Engine]:
        """The engine, whose cluster is closed at the end."""
        process, self.process = self.process, None  # which serves one cluster
        with local_client(
            n_workers=max(1, min(self.max_workers, -(-n_tasks // self.budget.n_threads))),
            threads_per_worker=self.budget.n_threads,
            memory_limit=self.budget.worker_nbytes,
            process=process,
        ) as client:
            yield ClusterEngine(client, self.budget, is_own=True)


def _configured_scheduler() -> str:
    """Name of the scheduler that dask is set to use, as for :func:`dask.compute`; "" where it is not set."""
    found = dask.config.get("scheduler", None)
    if not found or isinstance(found, Client):
        return ""
    names: list[str] = [name for name, get in named_schedulers.items() if get is found] or [str(found).lower()]
    if names[0] not in (*_LOCAL, *_PROCESSES, *_DISTRIBUTED):
        msg = (
            f"dask is set to use scheduler={found!r} (dask.config, or DASK_SCHEDULER), which is none of threads, "
            "synchronous, processes, distributed; correct it, or for a running cluster give its address: "
            "client=distributed.Client(address), or --scheduler"
        )
        raise SchedulerError(msg)
    return names[0]


def _configured_client(scheduler: str) -> Client | None:
    """The client that dask is set to use, the current one, or one of the address that it is set to use; else None."""
    found = dask.config.get("scheduler", None)
    if isinstance(found, Client):
        return found
    with contextlib.suppress(ValueError):
        return Client.current(allow_global=True)
    if address := dask.config.get("scheduler-address", None):
        client = _clients.get(address)
        if client is None or client.status != "running":
            client = _clients[address] = client_at(address)
        return client
    if scheduler:
        msg = (
            f"dask is set to use scheduler={scheduler!r}, and there is no client; make one with "
            "distributed.Client(address), or unset it to build on a cluster of this machine"
        )
        raise SchedulerError(msg)
    return None


def _nbytes(memory_limit: int | str | None, *, n_workers: int) -> int:
    """Memory of each of ``n_workers`` on this machine: what was asked for, or an equal share."""
    if memory_limit is not None:
        return parse_nbytes("memory_limit", memory_limit)
    return memory_nbytes() // n_workers


def _check_usable(client: Client) -> None:
    """Refuse what is no client, or one that this call could only wait for in vain."""
    if not isinstance(client, Client):
        msg = f"client is a {type(client).__name__}; give a distributed.Client, such as distributed.Client(address)"
        raise TypeError(msg)
    if client.asynchronous:
        msg = (
            "the client is asynchronous and this call would block the event loop that it needs; make the call in a "
            "thread, as in `await asyncio.to_thread(collection.add_adatas, files, client=client)`"
        )
        raise SchedulerError(msg)
    if client.status != "running":
        msg = f"the client is {client.status}: it was closed, or its scheduler was lost; make a new client"
        raise SchedulerError(msg)


def _cluster_budget(client: Client, memory_limit: int | str | None) -> Budget:
    """Memory and threads of the smallest worker of a cluster; waits for the first worker."""
    workers = _workers(client)
    if not workers:
        _wait_for_a_worker(client)
        workers = _workers(client)
    limit = min(_worker_limits(client, workers))
    if memory_limit is not None:
        limit = min(limit, parse_nbytes("memory_limit", memory_limit))
    return Budget(limit, max(w["nthreads"] for w in workers.values()))


def _workers(client: Client) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = client.scheduler_info(n_workers=-1)["workers"]
    return found


def _wait_for_a_worker(client: Client) -> None:
    """Wait for a task to be run: clusters that adapt start no worker before there is one.

    Raises
    ------
    SchedulerError
        If no worker came.
    """
    address, since = client.scheduler_info(n_workers=-1)["address"], time.monotonic()
    first = client.submit(int, pure=False)
    try:
        while (waited := time.monotonic() - since) < WORKER_TIMEOUT_S:
            left = WORKER_TIMEOUT_S - waited
            logger.warning("no worker has joined %s yet: waiting for the first, %.0f s at most", address, left)
            with contextlib.suppress(TimeoutError):
                first.result(timeout=min(NO_WORKER_S, left))
                return
    finally:
        first.cancel()
    msg = (
        f"no worker has joined {address} within {WORKER_TIMEOUT_S} s; start some, as with `dask worker {address}`, and "
        "call again"
    )
    raise SchedulerError(msg)


def _worker_limits(client: Client, workers: Mapping[str, Mapping[str, Any]]) -> list[int]:
    """Memory of each worker: its limit, or where it has none an equal share of its host's."""
    limits = [w["memory_limit"] for w in workers.values() if w["memory_limit"]]
    unlimited = [address for address, w in workers.items() if not w["memory_limit"]]
    if unlimited:
        n_on = Counter(w["host"] for w in workers.values())
        memory = answers(client, memory_nbytes, workers=unlimited, seconds=SILENT_S)
        shares = [n // n_on[workers[address]["host"]] for address, n in memory.items() if isinstance(n, int)]
        if not (limits or shares):
            msg = f"none of {len(workers)} workers answers within {SILENT_S:.0f} s; stop them, and start others"
            raise SchedulerError(msg)
        logger.warning(
            "%d of %d workers have no memory limit: each is taken to have an equal share of its host's memory, %s or "
            "more; start workers with --memory-limit, or give memory_limit",
            len(unlimited),
            len(workers),
            format_bytes(min(shares, default=0)),
        )
        limits += shares
    return limits
