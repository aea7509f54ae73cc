"""How a stage on a cluster ends, other than by its tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from distributed.comm.core import CommClosedError

from annbatch_dask.errors import MissingPackageError, WorkersDiedError
from annbatch_dask.formatting import format_bytes
from annbatch_dask.plan.memory import Budget

if TYPE_CHECKING:
    from distributed import CancelledError, Client

__all__ = ["DEATHS", "check_modules", "what_ended", "workers_died"]

DEATHS = 8
"""So many workers may die on a task that had the cluster to itself, until they are taken to die of it."""


def what_ended(client: Client, error: CancelledError | CommClosedError) -> tuple[str, str]:
    """Why Dask gave up a stage, and what to do."""
    reason = getattr(error, "reason", "")
    if isinstance(error, CommClosedError) or reason == "scheduler-connection-lost":
        return "the scheduler was lost", "start it anew and call again"
    if reason == "scheduler-restart":
        return "the cluster was restarted", "call again"
    if client.status != "running":
        return f"the client is {client.status} (it was closed, or lost its scheduler)", "call again with a new client"
    return "tasks were cancelled", "call again"


def check_modules(name: str, error: Exception) -> None:
    """Say which module a cluster does not find, where that is an error's cause: Dask's own may blame the graph.

    Raises
    ------
    MissingPackageError
        With what to do.
    """
    missing = error if isinstance(error, ModuleNotFoundError) else error.__cause__
    if isinstance(missing, ModuleNotFoundError) and missing.name is not None:
        msg = (
            f"{name}: the cluster does not find the module {missing.name!r}, of which a function of yours is, as "
            "load_adata; send it there (client.upload_file), install it, or define the function in your script itself"
        )
        raise MissingPackageError(msg) from error


def workers_died(name: str, deaths: Mapping[str, int], budget: Budget) -> WorkersDiedError:
    """The error that names tasks whose workers all died."""
    what = "; ".join(f"{n} workers with {task}" for task, n in deaths.items())
    return WorkersDiedError(
        f"{name}: {what} died, the last {DEATHS} or more with nothing else to do. All other tasks are done, and kept. "
        f"Mostly it is memory that they lack: they had {format_bytes(budget.worker_nbytes)} for {budget.n_threads} "
        "threads each. Start workers with more memory or fewer threads, or leave the input out, and call again"
    )
