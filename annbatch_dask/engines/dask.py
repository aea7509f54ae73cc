"""The engines: Dask's schedulers in this process, and a cluster whose workers may die."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import dask
import fsspec
from dask.base import compute, tokenize
from dask.callbacks import Callback as DaskCallback
from dask.delayed import delayed
from distributed import CancelledError, Client, as_completed, span
from distributed.comm.core import CommClosedError
from distributed.scheduler import KilledWorker, NoValidWorkerError, NoWorkerError

from annbatch_dask.engines.attempt import Failed, Unfit, attempt, leave_thread
from annbatch_dask.engines.base import Describe, OnResult, OnRetry
from annbatch_dask.engines.ends import DEATHS, check_modules, what_ended, workers_died
from annbatch_dask.engines.needs import NFS_PAUSES_S, Needs, workers_lacking
from annbatch_dask.engines.waiting import Left, missing_workers_said
from annbatch_dask.errors import (
    MissingPackageError,
    SchedulerError,
)
from annbatch_dask.formatting import plural
from annbatch_dask.plan.memory import Budget
from annbatch_dask.storage import transient
from annbatch_dask.storage.filesystems import check_parent
from annbatch_dask.storage.secrets import shown, without_secrets
from annbatch_dask.storage.transient import PAUSES_S, patiently

__all__ = ["ClusterEngine", "LocalEngine"]

logger = logging.getLogger(__name__)

_PLAIN_LINK = "{scheme}://{host}:{port}/status"
RETRIES = 2
"""How often a task that failed is handed out again, perhaps to another worker; our own errors last, and are not."""
UNFIT = 8
"""So many workers may turn out to be unfit while no task is done, until it is taken that no other kind will come."""


def _ignored(*_: Any) -> None:
    pass


def _delayed(name: str, fn: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> list[Any]:
    call = delayed(fn, pure=False)
    token = tokenize(name, time.time_ns())
    return [call(*args, dask_key_name=f"{name}-{token}-{i}") for i, args in enumerate(tasks)]


@dataclass(frozen=True)
class LocalEngine:
    """Dask's threaded or synchronous scheduler, in this process."""

    scheduler: str
    budget: Budget
    dashboard: str | None = None
    patient: bool = True
    """Try again what fails for a reason that passes."""

    @property
    def name(self) -> str:
        """Readable name of the engine."""
        return f"dask's {self.scheduler} scheduler"

    def needing(self, needs: Needs) -> LocalEngine:  # noqa: ARG002 - what this process has, it has
        """Itself: its tasks run in this process."""
        return self

    def count_workers(self) -> int | None:
        """None: there are no workers."""
        return None

    def reported(self, path: str) -> contextlib.AbstractContextManager[None]:
        """Refuse: there is no cluster to report of."""
        msg = f"{path} would be a report of a cluster, and {self.name} is none; give a client, or no performance_report"
        raise SchedulerError(msg)

    def run(
        self,
        name: str,
        fn: Callable[..., Any],
        tasks: Sequence[tuple[Any, ...]],
        on_result: OnResult,
        describe: Describe,  # noqa: ARG002 - who dies here cannot tell
        on_retry: OnRetry = _ignored,  # noqa: ARG002 - nor is anything handed out again
    ) -> list[Any]:
        """Run the tasks in this process; on any error, wait for those that run, and begin no other."""
        running = _Running(fn)
        graph = _delayed(name, functools.partial(patiently, running, is_first=True) if self.patient else running, tasks)
        index = {t.key: i for i, t in enumerate(graph)}

        def posttask(key: str, result: Any, *_: Any) -> None:
            if key in index:
                on_result(index[key], result)

        try:
            with DaskCallback(posttask=posttask):
                return list(compute(*graph, scheduler=self.scheduler, optimize_graph=False))
        finally:
            running.end()


class _Running:
    """A function whose calls in other threads can be ended: Dask leaves them alone when one of them has failed.

    The caller is about to give up the lock under which they write.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._fn, self._n, self._is_over, self._changed = fn, 0, False, threading.Condition()

    def __call__(self, *args: Any) -> Any:
        with self._changed:
            if self._is_over:
                return None  # nobody asks for it
            self._n += 1
        try:
            return self._fn(*args)
        finally:
            with self._changed:
                self._n -= 1
                self._changed.notify_all()

    def end(self) -> None:
        """Wait for the calls that run; later ones do nothing."""
        with self._changed:
            self._is_over = True
            self._changed.wait_for(lambda: not self._n)


@dataclass(frozen=True)
class ClusterEngine:
    """A Dask cluster.

    Attributes
    ----------
    needs
        What workers must have; None where they are known to have it.
    is_own
        Whether it is a local cluster of this process, and all workers are as it is.
    """

    client: Client
    budget: Budget
    needs: Needs | None = None
    is_own: bool = False

    @property
    def name(self) -> str:
        """Readable name of the engine."""
        info = self.client.scheduler_info(n_workers=-1)
        workers = info["workers"].values()
        n_threads = sum(w["nthreads"] for w in workers)
        return f"{info['address']}, {plural(len(workers), 'worker')}, {plural(n_threads, 'thread')}"

    @property
    def dashboard(self) -> str | None:
        """Address of the dashboard."""
        try:
            return self.client.dashboard_link or None
        except KeyError:  # dask's configuration makes it of a variable that is not set, as those of JupyterHub in a job
            with dask.config.set({"distributed.dashboard.link": _PLAIN_LINK}):
                return self.client.dashboard_link or None

    def needing(self, needs: Needs) -> ClusterEngine:
        """An engine for tasks that need this of their workers, once all that are there have it.

        Raises
        ------
        SchedulerError
            With the workers that lack something, and what.
        """
        if self.is_own:
            return self
        _check_workers(self.client, needs)
        return replace(self, needs=needs)

    def count_workers(self) -> int | None:
        """Workers that are there now; None where the scheduler does not answer."""
        states = self.states_of_workers()
        return None if states is None else states.total()

    def states_of_workers(self) -> Counter[str] | None:
        """How many are "running", "paused" and so on, as Dask says; None where the scheduler does not answer."""
        try:
            return Counter(w["status"] for w in self.client.scheduler_info(n_workers=-1)["workers"].values())
        except Exception:  # noqa: BLE001 - who waits for tasks has to say what happened
            return None

    @contextlib.contextmanager
    def reported(self, path: str) -> Iterator[None]:
        """Write Dask's performance report of the block, however it ends, without the caller's code.

        That might hold credentials, and is what ``distributed.performance_report`` begins with.
        """
        client = self.client
        _check_report(client, path)
        client.get_task_stream(start=0, stop=0)  # from now on it is kept
        start, count = client.run_on_scheduler(_time_and_monitor_count)  # by its own clock
        try:
            yield
        finally:
            try:
                page = client.sync(
                    client.scheduler.performance_report, start=start, last_count=count, code="", mode=None
                )
                with fsspec.open(path, "w") as f:
                    f.write(page)
            except Exception as e:  # noqa: BLE001 - the build has ended, and that is what its caller wants to know
                logger.warning("the performance report could not be written to %s: %s", shown(path), e)

    def run(
        self,
        name: str,
        fn: Callable[..., Any],
        tasks: Sequence[tuple[Any, ...]],
        on_result: OnResult,
        describe: Describe,
        on_retry: OnRetry = _ignored,
    ) -> list[Any]:
        """Run the tasks on the cluster; on any error, cancel what is left."""
        run = _ClusterRun(self.client, name, fn, tasks, on_result, describe, on_retry, self.needs)
        try:
            leave_thread(self.client)
            with missing_workers_said(name, self.states_of_workers, run.left):
                run.all()
        except (CancelledError, CommClosedError) as e:
            what, remedy = what_ended(self.client, e)
            msg = f"{what} in {name} ({type(e).__name__}); finished tasks are kept: {remedy} to go on"
            raise SchedulerError(msg) from e
        except (NoWorkerError, NoValidWorkerError) as e:
            msg = (
                f"{name}: no worker took a task for {e.timeout:.0f} s, after which this scheduler's "
                "distributed.scheduler.no-workers-timeout gives it up; set that to null where workers may be away "
                "longer. Finished tasks are kept: call again to go on"
            )
            raise SchedulerError(msg) from e
        if run.lost:
            raise workers_died(name, {describe(i): run.deaths[i] for i in run.lost}, self.budget)
        return run.results


def _time_and_monitor_count(dask_scheduler: Any) -> tuple[float, int]:
    return time.time(), int(dask_scheduler.monitor.count)


def _has_bokeh() -> bool:
    return importlib.util.find_spec("bokeh") is not None


def _check_report(client: Client, path: str) -> None:
    """Refuse, before any work, a report that cannot be made, or has no place."""
    if not client.run_on_scheduler(_has_bokeh):
        msg = f'{shown(path)} cannot be made: the scheduler has no bokeh: pip install "annbatch-dask[dashboard]" there'
        raise MissingPackageError(msg)
    if "://" not in path:
        check_parent(path)


def _check_workers(client: Client, needs: Needs) -> None:
    """Refuse a cluster some of whose workers lack something, after a minute in which files may appear."""
    for pause in (*NFS_PAUSES_S, None):
        lacks = workers_lacking(client, needs)
        if not lacks:
            return
        address, lack = next(iter(lacks.items()))
        others = f"; {len(lacks) - 1} more lack something, too" if len(lacks) > 1 else ""
        if pause is None or not needs.files:
            msg = f"worker {address} {lack}{others}; mend or stop such workers, and call again: nothing was begun"
            raise SchedulerError(msg)
        logger.warning("worker %s %s%s; looked at again in %.0f s", address, lack, others, pause)
        transient.sleep(pause)


@dataclass
class _ClusterRun:
    """The tasks of a stage on a cluster whose workers may die.

    Dask gives up a task when some workers died that had it, be it of the task, of a neighbour, or because their time
    was up. Here it waits until the others are done, and is tried again: with all that wait, as long as one of these
    gets through, and else alone, so that none is blamed for another.
    """

    client: Client
    name: str
    fn: Callable[..., Any]
    tasks: Sequence[tuple[Any, ...]]
    on_result: OnResult
    describe: Describe
    on_retry: OnRetry
    needs: Needs | None
    results: list[Any] = field(init=False)
    deaths: Counter[int] = field(default_factory=Counter)
    lost: list[int] = field(default_factory=list)
    sent_away: set[str] = field(default_factory=set)
    n_done: int = 0
    n_unfit: int = 0
    """Workers that were sent away since the last task that was done."""

    def __post_init__(self) -> None:
        self.results = [None] * len(self.tasks)

    def left(self) -> Left:
        """What is not done yet."""
        peak = 0 if self.needs is None else self.needs.peaks.get(self.name, 0)
        return Left(len(self.tasks) - self.n_done, len(self.tasks), peak)

    def all(self) -> None:
        """Run all tasks but those that are ``lost``: all their workers died."""
        left = list(range(len(self.tasks)))
        for turn in itertools.count():
            died = self._some(left)
            if not died:
                return
            if len(died) < len(left):
                left = sorted(died)
                self._wait(turn, left)
                continue
            while left and not self._alone(left[0]):
                self.lost.append(left.pop(0))
            left = left[1:]

    def _alone(self, i: int) -> bool:
        """Run a task while no other runs, until too many workers died of it; whether it was done."""
        until = self.deaths[i] + DEATHS
        for turn in itertools.count():
            self._wait(turn, [i])
            if not self._some([i]):
                return True
            if self.deaths[i] >= until:
                break
        return False

    def _wait(self, turn: int, which: Sequence[int]) -> None:
        pause = PAUSES_S[min(turn, len(PAUSES_S) - 1)]
        words = f"{self.describe(which[0])}{f' and {len(which) - 1} more' if len(which) > 1 else ''}"
        logger.warning("%s: workers died that had %s; tried again in %.0f s", self.name, words, pause)
        transient.sleep(pause)

    def _some(self, which: Sequence[int]) -> set[int]:
        """Run some tasks; returns those that Dask gave up."""
        index: dict[Any, int] = {}
        left = self._submit(which, index)
        running = as_completed(left.values(), loop=self.client.loop)
        tries: Counter[int] = Counter()
        died: set[int] = set()
        try:
            for future in running:
                i = index[future.key]
                try:
                    result = self._result(future)
                except KilledWorker as e:
                    self.deaths[i] += e.allowed_failures + 1
                    died.add(i)
                    self.on_retry(i, f"{e.allowed_failures + 1} workers died that had it")
                    continue
                finally:  # what its worker kept would be done again when that leaves
                    left.pop(future.key).release()
                if not isinstance(result, Failed | Unfit):
                    self.n_unfit = 0
                    self.n_done += 1
                    self.results[i] = result
                    self.on_result(i, result)
                    continue
                if isinstance(result, Failed):
                    if result.lasts or tries[i] == RETRIES:
                        raise result.error
                    tries[i] += 1
                    self.on_retry(i, without_secrets(f"{type(result.error).__name__}: {result.error}"))
                left |= (again := self._submit([i], index))
                running.update(again.values())
        except (CancelledError, CommClosedError):
            raise
        except BaseException:
            self.client.cancel(list(left.values()))
            raise
        return died

    def _result(self, future: Any) -> Any:
        """What came of a task; where its worker lacks something, that is sent away first."""
        try:
            result = future.result()
        except (KilledWorker, CancelledError, CommClosedError):
            raise
        except Exception as e:  # of a worker that cannot read what it is sent
            lacks = {} if self.needs is None else workers_lacking(self.client, self.needs)
            if not lacks:
                check_modules(self.name, e)
                raise
            for address, lack in lacks.items():
                self._send_away(address, lack)
            return Unfit("", str(e))
        if isinstance(result, Unfit):
            self._send_away(result.address, result.lack)
        return result

    def _send_away(self, address: str, lack: str) -> None:
        """Close a worker that can do no task of this build, and would take one after the other.

        Raises
        ------
        SchedulerError
            If it is one of many, and no other did anything since the first of them.
        """
        if address in self.sent_away:
            return
        self.sent_away.add(address)
        self.n_unfit += 1
        logger.warning("%s: worker %s %s; it is sent away", self.name, address, lack)
        if self.n_unfit > UNFIT:
            msg = f"{self.name}: {self.n_unfit} workers joined that cannot take part; the last one {lack}"
            raise SchedulerError(msg)
        self.client.retire_workers([address])

    def _submit(self, which: Sequence[int], index: dict[Any, int]) -> dict[Any, Any]:
        with span("annbatch_dask", self.name):
            tasks = [(self.needs, self.name, self.fn, *self.tasks[i]) for i in which]
            graph = _delayed(self.name, attempt, tasks)
            futures: list[Any] = self.client.compute(graph, optimize_graph=False)
        index.update((f.key, i) for f, i in zip(futures, which, strict=True))
        return {f.key: f for f in futures}
