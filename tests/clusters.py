"""Clusters of real processes: a scheduler, and workers with their nannies, started by their command lines."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import psutil
from distributed import Client

TIMEOUT_S = 240  # a machine that does other work too
SCHEDULER = ("dask", "scheduler", "--port", "0", "--dashboard-address", "127.0.0.1:0")
WORKER = ("dask", "worker", "--nthreads", "1", "--no-dashboard")


def kill(process):
    """Kill a process and all it started."""
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for child in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(family)


@contextlib.contextmanager
def process(*command, before=(), **environment):
    """A process of Python's, killed at the end with all it started. ``before``: what comes before the interpreter."""
    environment = os.environ | {"PYTHONWARNINGS": "default"} | environment
    started = subprocess.Popen([*before, sys.executable, "-m", *command], env=environment)
    try:
        yield started
    finally:
        kill(started)


def scheduler(folder, *options, host="127.0.0.1", **more):
    """A scheduler, which says in ``scheduler.json`` of a folder where it is."""
    contact = ("--scheduler-file", str(folder / "scheduler.json"))
    return process(*SCHEDULER, "--host", host, *contact, *options, **more)


def worker(folder, *options, **more):
    """A worker of the scheduler of a folder, with its nanny."""
    contact = ("--scheduler-file", str(folder / "scheduler.json"))
    return process(*WORKER, *contact, "--local-directory", str(folder), *options, **more)


@contextlib.contextmanager
def cluster(folder, *options, n_workers=2, allowed_failures=3):
    """Its client, and the processes: scheduler and workers."""
    folder.mkdir()
    patience = {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": str(allowed_failures)}
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(scheduler(folder, **patience))]
        started += [stack.enter_context(worker(folder, *options)) for _ in range(n_workers)]
        contact = str(folder / "scheduler.json")
        with Client(scheduler_file=contact, timeout=TIMEOUT_S, set_as_default=False) as client:
            if n_workers:
                client.wait_for_workers(n_workers, timeout=TIMEOUT_S)
            yield client, started
