"""Says that a build waits for workers, and for which; Dask waits without a word."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from annbatch_dask.formatting import format_bytes, plural
from annbatch_dask.plan.memory import Budget

__all__ = ["NO_WORKER_S", "Left", "missing_workers_said"]

logger = logging.getLogger(__name__)

NO_WORKER_S = 60.0
"""How often it is looked whether any worker is there, to say so where none is."""


@dataclass(frozen=True)
class Left:
    """What is left of a stage.

    Attributes
    ----------
    peak
        Bytes that a task needs; 0 where that is not known.
    """

    n_left: int
    n_tasks: int
    peak: int = 0

    def words(self) -> str:
        """What waits, and for which worker."""
        which = f" with {format_bytes(Budget(0, 1).worker_nbytes_for(self.peak))} a thread" if self.peak else ""
        verb = "waits" if self.n_left == 1 else "wait"
        return f"{self.n_left:,} of {plural(self.n_tasks, 'task')} {verb} for one{which}"


@contextlib.contextmanager
def missing_workers_said(
    name: str, states: Callable[[], Mapping[str, int] | None], left: Callable[[], Left]
) -> Iterator[None]:
    """Meanwhile, warn again and again while no worker takes tasks.

    A LocalCluster of Dask's, for one, may give up workers that died, and starts no others. A worker whose memory is
    nearly full takes none either, perhaps while it goes on with what it has.

    Parameters
    ----------
    states
        Number of workers by their state as Dask calls it; None where the scheduler does not answer.
    """
    is_over = threading.Event()

    def look() -> None:
        since, n_left = time.monotonic(), left().n_left
        while not is_over.wait(NO_WORKER_S):
            found = states()
            if found is None:  # it is the tasks that tell whether the scheduler is lost
                continue
            now = left()
            if found.get("running") or (found and now.n_left < n_left):
                since, n_left = time.monotonic(), now.n_left
                continue
            logger.warning(
                "%s: %s for up to %.0f s, and %s; start workers, or interrupt the build: finished tasks are kept, and "
                "the same call goes on",
                name,
                _absence(found),
                time.monotonic() - since,
                now.words(),
            )

    watcher = threading.Thread(target=look, name="annbatch-dask-workers", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()


def _absence(states: Mapping[str, int]) -> str:
    if not states:
        return "no worker has been there"
    return f"no worker has taken tasks ({', '.join(f'{n} {state}' for state, n in sorted(states.items()))})"
