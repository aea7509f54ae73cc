"""The interface of an engine: it runs independent tasks and reports each one that finishes."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from annbatch_dask.activities import measured
from annbatch_dask.engines.needs import Needs
from annbatch_dask.events import Callback, StageEnd, StageStart, TaskEnd, TaskRetry
from annbatch_dask.plan.memory import Budget

__all__ = ["Describe", "Engine", "EngineChoice", "OnResult", "OnRetry", "Timed", "run_stage"]

logger = logging.getLogger(__name__)

Describe = Callable[[int], str]
OnResult = Callable[[int, Any], None]
OnRetry = Callable[[int, str], None]


class Engine(Protocol):
    """Something that runs independent tasks."""

    @property
    def name(self) -> str:
        """Readable name of the engine."""

    @property
    def dashboard(self) -> str | None:
        """Address of Dask's dashboard."""

    @property
    def budget(self) -> Budget:
        """Memory of a worker."""

    def needing(self, needs: Needs) -> Engine:
        """An engine for tasks that need this of their workers.

        Raises
        ------
        SchedulerError
            If a worker lacks something.
        """

    def count_workers(self) -> int | None:
        """Workers that are there now; None where that is not known, or there are none in principle."""

    def reported(self, path: str) -> AbstractContextManager[None]:
        """Write Dask's performance report of the block to a path or URL.

        Raises
        ------
        SchedulerError
            If there is no cluster to report of.
        MissingPackageError
            If its scheduler lacks bokeh.
        """

    def run(
        self,
        name: str,
        fn: Callable[..., Any],
        tasks: Sequence[tuple[Any, ...]],
        on_result: OnResult,
        describe: Describe,
        on_retry: OnRetry = ...,
    ) -> list[Any]:
        """Call ``fn(*args)`` for each; results in order. ``on_result(i, result)`` is called as each is done.

        ``describe(i)`` says what a task works on, ``on_retry(i, reason)`` is called where it is handed out again.
        """


@dataclass(frozen=True)
class EngineChoice:
    """An engine that may still have to be started.

    Attributes
    ----------
    scanner
        Runs the scan: the cluster where there is one, else threads of this process.
    budget
        Memory of a worker.
    start
        The engine for a build, given its number of tasks, as a context manager.
    ahead
        A context manager for all that leads to a build: what takes long about ``start`` begins meanwhile.
    is_apart
        Whether tasks run in processes that the build starts, which do not see this one's memory.
    """

    scanner: Engine
    budget: Budget
    start: Callable[[int], AbstractContextManager[Engine]]
    ahead: Callable[[], AbstractContextManager[None]] = nullcontext
    is_apart: bool = False


@dataclass(frozen=True)
class Timed:
    """Result of a task, its seconds, and the activities they went to."""

    result: Any
    seconds: float
    activities: dict[str, float]


def _timed(fn: Callable[..., Any], *args: Any) -> Timed:
    start = time.perf_counter()
    with measured() as activities:
        result = fn(*args)
    return Timed(result, time.perf_counter() - start, activities)


def run_stage(  # noqa: PLR0913 - mostly keywords
    engine: Engine,
    stage: str,
    fn: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    callback: Callback,
    *,
    size: tuple[int, int],
    measure: Callable[[int, Any], tuple[int, int]],
    describe: Describe,
) -> list[Any]:
    """Run one stage and emit its events.

    Parameters
    ----------
    size
        Rows and bytes of the whole stage.
    measure
        Rows and bytes of task ``i``, given its result.
    describe
        What task ``i`` works on.
    """
    start = time.perf_counter()
    callback.on_stage_start(StageStart(stage, len(tasks), *size))

    def on_result(i: int, timed: Timed) -> None:
        reused = bool(getattr(timed.result, "reused", False))
        size = measure(i, timed.result)
        callback.on_task_end(TaskEnd(stage, i, *size, reused, describe(i), timed.seconds, timed.activities))

    def on_retry(i: int, reason: str) -> None:
        callback.on_task_retry(TaskRetry(stage, i, describe(i), reason))

    timed = engine.run(stage, functools.partial(_timed, fn), tasks, on_result, describe, on_retry)
    results = [t.result for t in timed]
    seconds = time.perf_counter() - start
    callback.on_stage_end(StageEnd(stage, seconds))
    logger.info("%s: %d tasks in %.1f s", stage, len(tasks), seconds)
    return results
