"""A local cluster of subprocesses, sized to this machine.

Workers are started by command line, so they never import the caller's ``__main__``: a script without a main guard,
``python -c``, standard input and notebooks all work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from dask.utils import parse_bytes
from distributed import Client
from distributed.deploy.subprocess import SubprocessCluster

from annbatch_dask.errors import AnnbatchDaskError

__all__ = ["connect", "local_client"]

CONNECT_TIMEOUT_S = 10


class SchedulerError(AnnbatchDaskError, ConnectionError):
    """No Dask scheduler answers at an address."""


@contextlib.contextmanager
def connect(address: str) -> Iterator[Client]:
    """A client of a running cluster, closed at the end; the cluster stays.

    Raises
    ------
    SchedulerError
        If no scheduler answers.
    """
    try:
        client = Client(address, timeout=CONNECT_TIMEOUT_S, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as e:
        msg = f"no Dask scheduler answers at {address} ({e}); start one with `dask scheduler`, or check the address"
        raise SchedulerError(msg) from e
    with client:
        yield client


@contextlib.contextmanager
def local_client(
    *, n_workers: int | None = None, threads_per_worker: int | None = None, memory_limit: int | str | None = None
) -> Iterator[Client]:
    """A client of a new local cluster; both are closed at the end.

    Parameters
    ----------
    n_workers, threads_per_worker
        As Dask's ``LocalCluster``: by default as many as the machine's processors allow.
    memory_limit
        Of each worker; by default an equal share of the machine's memory.
    """
    worker_kwargs: dict[str, object] = {"preload": ["annbatch_dask.etl.preload"]}
    if memory_limit is not None:
        worker_kwargs["memory_limit"] = parse_bytes(memory_limit)
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(
            SubprocessCluster(
                n_workers=n_workers,
                threads_per_worker=threads_per_worker,
                worker_kwargs=worker_kwargs,
                dashboard_address="127.0.0.1:0",
            )
        )
        client = stack.enter_context(Client(cluster, set_as_default=False))
        client.wait_for_workers(len(cluster.workers))
        yield client
