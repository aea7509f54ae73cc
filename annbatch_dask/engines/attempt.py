"""A task as a worker runs it: whatever comes of it is a value, which the client looks at."""

from __future__ import annotations

import contextlib
import pickle
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cloudpickle
from distributed import Client, get_worker, secede
from distributed.metrics import context_meter

from annbatch_dask.engines.base import Timed
from annbatch_dask.engines.needs import Needs, lacking_in_task
from annbatch_dask.errors import AnnbatchDaskError
from annbatch_dask.storage.transient import is_transient, patiently

__all__ = ["Failed", "Unfit", "attempt", "leave_thread"]

_PLACE = "workers must see inputs under the same paths as the process that builds, or as URLs of a store"


@dataclass(frozen=True)
class Failed:
    """Return value of a failed task. If it raised, Dask would log the traceback on the worker and retry at once.

    ``lasts``: trying again cannot help.
    """

    error: Exception
    lasts: bool


@dataclass(frozen=True)
class Unfit:
    """Return value of a task that was not begun: its worker lacks something."""

    address: str
    lack: str


def attempt(needs: Needs | None, stage: str, fn: Callable[..., Any], *args: Any) -> Any:
    """Call ``fn(*args)`` on a worker that has what it needs; what it returns, or :class:`Unfit` or :class:`Failed`."""
    if needs is not None and (lack := lacking_in_task(needs, stage)) is not None:
        return Unfit(*lack)
    try:
        result = patiently(fn, *args)
    except Exception as e:  # noqa: BLE001 - all of them travel to the client
        if needs is not None and isinstance(e, FileNotFoundError):
            e.add_note(f"on worker {get_worker().address}: {_PLACE}")
        return Failed(_portable(e), isinstance(e, AnnbatchDaskError) and not is_transient(e))
    if isinstance(result, Timed):  # Dask's fine performance metrics, which it sums by span and activity
        for name, seconds in result.activities.items():
            context_meter.digest_metric(name, seconds, "seconds")
    return result


def leave_thread(client: Client) -> None:
    """Where this is a task of that cluster, let its worker's thread take others, as those it is about to wait for."""
    with contextlib.suppress(ValueError):  # no worker
        if get_worker().scheduler.address == client.scheduler.address:
            with contextlib.suppress(KeyError):  # it has done so before
                secede()


class _WorkerTracebackError(Exception):
    """Traceback of a worker, as the cause of the error in the client."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _portable(error: Exception) -> Exception:
    """An error as it can be sent, without what cannot be pickled; one of others' with the worker's traceback."""
    try:
        copy: Exception = pickle.loads(cloudpickle.dumps(error))
    except Exception:  # noqa: BLE001 - classes of users and of libraries may do anything
        copy = RuntimeError(f"{type(error).__name__}: {error}")
        for note in getattr(error, "__notes__", ()):
            copy.add_note(note)
    if not isinstance(copy, AnnbatchDaskError):
        copy.__cause__ = _WorkerTracebackError("".join(traceback.format_exception(error)))
    return copy
