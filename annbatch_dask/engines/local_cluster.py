"""Clusters to build on: one of subprocesses on this machine, or a running one by its address.

Workers of the local cluster are started by command line, so they never import the caller's ``__main__``: a script
without a main guard, ``python -c``, standard input and notebooks all work. The scheduler lives in the caller's process.
Their imports take most of the time until they are there, and begin before it is known how many there will be.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import dask
import psutil
from distributed import Client, Scheduler, SpecCluster
from distributed.comm import parse_address, parse_host_port
from distributed.deploy.subprocess import SubprocessWorker
from distributed.http.utils import get_handlers
from distributed.utils import silence_logging_cmgr

from annbatch_dask.errors import SchedulerError
from annbatch_dask.storage.transient import causes

__all__ = ["client_at", "connect", "local_client", "workers_process"]

CONNECT_TIMEOUT_S = 10
START_TIMEOUT_S = 120
_HOST = "127.0.0.1"
_IN_THREADS = "to build in this process, use dask.config.set(scheduler='threads')"
_LOOK_S = 2
"""After so long it is seen that the process of the workers has ended."""
_START_WORKERS = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop()); import annbatch_dask.engines.workers as w; w.main()"
)


@contextlib.contextmanager
def connect(address: str) -> Iterator[Client]:
    """A client of a running cluster, closed at the end; the cluster stays.

    Raises
    ------
    SchedulerError
        If no scheduler answers.
    """
    with client_at(address) as client:
        yield client


def client_at(address: str) -> Client:
    """A client of a running cluster, which the caller closes.

    Raises
    ------
    SchedulerError
        If no scheduler answers.
    """
    try:
        parse_host_port(parse_address(address)[1])  # a client of what is no address would be waited for when it is gone
        return Client(address, timeout=CONNECT_TIMEOUT_S, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as e:
        msg = f"no Dask scheduler answers at {address} ({e}); start one with `dask scheduler`, or check the address"
        raise SchedulerError(msg) from e


class _LateDashboard:
    """Dask's pages of a running scheduler, which has them once the first is asked for, but for those it needs itself.

    Importing bokeh takes half a second of a core, which the workers of a build have more use for. Without bokeh the
    page says what to install.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    def find_handler(self, request: Any, **kwargs: Any) -> Any:
        """Add the pages, as ``Scheduler(dashboard=True)`` does before it starts; the handler of one of them."""
        application = self._scheduler.http_application
        application.applications.remove(self)
        try:
            from distributed.dashboard.scheduler import connect as connect_dashboard
        except ImportError:
            missing = get_handlers(self._scheduler, ["distributed.http.scheduler.missing_bokeh"])
            application.add_handlers(".*", missing)
        else:
            connect_dashboard(application, self._scheduler.http_server, self._scheduler, prefix="")
        return application.find_handler(request, **kwargs)


@contextlib.contextmanager
def workers_process() -> Iterator[subprocess.Popen[str]]:
    """The process of a local cluster's workers, which imports what they need; killed at the end.

    It finds modules where this process does: functions of users may be of modules beside their script. Nothing is
    looked for in the current folder, unless it is here: it may have a ``random.py`` of somebody's.
    """
    environ = dask.config.get("distributed.nanny.pre-spawn-environ")  # which must be set before numpy is imported
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _START_WORKERS, json.dumps([p for p in sys.path if isinstance(p, str)])],
        stdin=subprocess.PIPE,
        text=True,
        env=os.environ | {k: str(v) for k, v in environ.items()},
    )
    try:
        yield process
    finally:
        _kill(process)


def _kill(process: subprocess.Popen[str]) -> None:
    """Kill them all, the nannies first: they would say of each worker that it died."""
    if process.poll() is None:
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
    process.communicate()


class _Workers(SubprocessWorker):  # type: ignore[misc] # Dask's types are not followed
    """Several workers of one process."""

    def __init__(
        self, scheduler: str, name: int, started: subprocess.Popen[str], n_workers: int, options: dict[str, Any]
    ) -> None:
        super().__init__(scheduler, name=str(name))
        nanny = {"cls": "distributed.Nanny", "opts": options}
        self._started, self._spec = started, {str(k): nanny for k in range(n_workers)}

    async def _start(self) -> None:
        assert self._started.stdin is not None  # a pipe
        with contextlib.suppress(BrokenPipeError):  # it died: its workers will be waited for in vain, and it said why
            self._started.stdin.write(json.dumps([self.scheduler, self._spec]) + "\n")
            self._started.stdin.flush()

    async def close(self) -> None:
        """Kill them."""
        _kill(self._started)
        await super().close()


@contextlib.contextmanager
def local_client(
    *,
    n_workers: int,
    threads_per_worker: int,
    memory_limit: int,
    process: subprocess.Popen[str] | None = None,
) -> Iterator[Client]:
    """A client of a new local cluster; both are closed at the end.

    Parameters
    ----------
    n_workers, threads_per_worker
        Worker processes, and tasks that run in each at once.
    memory_limit
        Bytes of each worker.
    process
        What :func:`workers_process` has started before; None starts one.

    Raises
    ------
    SchedulerError
        If workers do not start.
    """
    options = {
        "host": _HOST,
        "nthreads": threads_per_worker,
        "memory_limit": memory_limit,
        "death_timeout": START_TIMEOUT_S,  # a worker that starts as its client dies would wait for a scheduler for ever
        "preload": ["annbatch_dask.preload"],
        "silence_logs": logging.WARNING,
    }
    with (
        workers_process() if process is None else contextlib.nullcontext(process) as started,
        # The cluster ends its own silence before its last connections, which then tell of their end with a traceback.
        silence_logging_cmgr(logging.WARNING),
        _cluster({"started": started, "n_workers": n_workers, "options": options}) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        cluster.scheduler.http_application.add_application(_LateDashboard(cluster.scheduler))
        importlib.import_module("cryptography.hazmat.primitives.ciphers.aead")  # for later, while workers start
        _wait_for(n_workers, client, started)
        yield client


def _cluster(options: dict[str, Any]) -> SpecCluster:
    """A cluster whose only part has these options, as :class:`_Workers` takes them."""
    scheduler = {"host": _HOST, "port": 0, "dashboard": False, "dashboard_address": f"{_HOST}:0"}
    try:
        return SpecCluster(
            workers={0: {"cls": _Workers, "options": options}},
            scheduler={"cls": Scheduler, "options": scheduler},
            name="annbatch-dask",
            silence_logs=logging.WARNING,
        )
    except (OSError, RuntimeError) as e:  # no network at all, not even to this machine
        *_, first = causes(e)  # Dask's own say less and less
        msg = f"no cluster can be started on {_HOST} ({first}); {_IN_THREADS}"
        raise SchedulerError(msg) from e


def _wait_for(n_workers: int, client: Client, started: subprocess.Popen[str]) -> None:
    """Wait until workers are there, as long as their process is."""
    since = time.monotonic()
    while True:
        try:
            client.wait_for_workers(n_workers, timeout=_LOOK_S)
            return
        except TimeoutError as e:
            passed = time.monotonic() - since
            if started.poll() is None and passed < START_TIMEOUT_S:
                continue
            n_there = len(client.scheduler_info(n_workers=-1)["workers"])
            msg = (
                f"of {n_workers} workers {n_there} started within {passed:.0f} s; what they print above says why; "
                f"{_IN_THREADS}"
            )
            raise SchedulerError(msg) from e
