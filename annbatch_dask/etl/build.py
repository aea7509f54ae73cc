"""The build as Dask runs it: two stages of independent tasks with a small barrier between them."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import pickle
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import cloudpickle
import dask
import dask.system
import numpy as np
from dask.base import compute, tokenize
from dask.callbacks import Callback as DaskCallback
from dask.delayed import delayed
from dask.utils import parse_bytes
from distributed import CancelledError, Client, as_completed
from distributed.comm.core import CommClosedError
from distributed.scheduler import KilledWorker
from distributed.system import MEMORY_LIMIT

from annbatch_dask.engines.local_cluster import local_client
from annbatch_dask.errors import (
    AnnbatchDaskError,
    CollectionBusyError,
    IntegrityError,
    SchedulerError,
    WorkersDiedError,
)
from annbatch_dask.etl.commit import commit, make_manifest, merged_range, source_fingerprints
from annbatch_dask.etl.gather import GatherTask, gather
from annbatch_dask.etl.group import count_groups, with_groups
from annbatch_dask.etl.inputs import forget_inputs_of
from annbatch_dask.etl.job import Job, forget_job, save_job
from annbatch_dask.etl.scatter import forget_task, scatter
from annbatch_dask.etl.sweep import clean_up, withdraw
from annbatch_dask.etl.totals import Totals
from annbatch_dask.events import BuildEnd, BuildStart, Callback, StageEnd, StageStart, TaskEnd
from annbatch_dask.formatting import format_bytes
from annbatch_dask.manifest import DATASET_PREFIX, Manifest
from annbatch_dask.plan.dtypes import index_dtype, smallest_dtype
from annbatch_dask.plan.memory import Budget
from annbatch_dask.plan.plan import Plan
from annbatch_dask.sources.identity import has_many_files, raise_if_changed
from annbatch_dask.storage import transient
from annbatch_dask.storage.claims import end_claim
from annbatch_dask.storage.lock import check_unchanged
from annbatch_dask.storage.private import make_private
from annbatch_dask.storage.transient import PAUSES_S, is_transient, patiently

__all__ = ["Engine", "EngineRoom", "build", "choose_engine", "run_stage"]

logger = logging.getLogger(__name__)

_LOCAL = ("synchronous", "sync", "single-threaded", "threads", "threading", "threaded")
RETRIES = 2
"""How often a task that failed is handed out again, perhaps to another worker; our own errors last, and are not."""
DEATHS = 8
"""So many workers may die on a task that had the cluster to itself, until they are taken to die of it."""
NO_WORKER_S = 60.0
"""How often a stage looks whether any worker is there, to say so where none is."""
_Describe = Callable[[int], str]
_WORKER_NBYTES = 2**30
"""Of a worker of the local cluster, at least. As many workers as cores where memory allows, so that none shares
Python's lock, or HDF5's (measured, two cores: a seventh faster than one process of two threads)."""
WORKER_TIMEOUT_S = 86_400
"""For the first worker of a cluster, which may stand in a queue."""
OnResult = Callable[[int, Any], None]


class Engine(Protocol):
    """Something that runs independent tasks."""

    @property
    def name(self) -> str:
        """In words."""

    @property
    def dashboard(self) -> str | None:
        """Address of Dask's dashboard."""

    @property
    def budget(self) -> Budget:
        """Memory of a worker."""

    def run(
        self,
        name: str,
        fn: Callable[..., Any],
        tasks: Sequence[tuple[Any, ...]],
        on_result: OnResult,
        describe: _Describe,
    ) -> list[Any]:
        """Call ``fn(*args)`` for each; results in order. ``on_result(i, result)`` is called as each is done.

        ``describe(i)`` says what a task works on.
        """


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
        """In words."""
        return f"dask's {self.scheduler} scheduler"

    def run(
        self,
        name: str,
        fn: Callable[..., Any],
        tasks: Sequence[tuple[Any, ...]],
        on_result: OnResult,
        describe: _Describe,  # noqa: ARG002 - who dies here cannot tell
    ) -> list[Any]:
        """Run the tasks in this process."""
        call = functools.partial(patiently, fn) if self.patient else fn
        graph = _delayed(name, call, tasks)
        index = {t.key: i for i, t in enumerate(graph)}

        def posttask(key: str, result: Any, *_: Any) -> None:
            if key in index:
                on_result(index[key], result)

        with DaskCallback(posttask=posttask):
            return list(compute(*graph, scheduler=self.scheduler, optimize_graph=False))


@dataclass(frozen=True)
class _Failed:
    """What a task returns instead of raising: Dask would log the traceback on the worker, and try again at once.

    ``lasts``: trying again cannot help.
    """

    error: Exception
    lasts: bool


def _attempt(fn: Callable[..., Any], *args: Any) -> Any:
    try:
        return patiently(fn, *args)
    except Exception as e:  # noqa: BLE001 - all of them travel to the client
        return _Failed(_portable(e), isinstance(e, AnnbatchDaskError) and not is_transient(e))


class _WorkerTracebackError(Exception):
    """What a worker would have printed: the cause of an error in the client's traceback."""

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


@dataclass(frozen=True)
class ClusterEngine:
    """A Dask cluster."""

    client: Client
    budget: Budget

    @property
    def name(self) -> str:
        """In words."""
        info = self.client.scheduler_info(n_workers=-1)
        workers = info["workers"].values()
        return f"{info['address']}, {len(workers)} workers, {sum(w['nthreads'] for w in workers)} threads"

    @property
    def dashboard(self) -> str | None:
        """Address of the dashboard."""
        return self.client.dashboard_link or None

    def run(
        self,
        name: str,
        fn: Callable[..., Any],
        tasks: Sequence[tuple[Any, ...]],
        on_result: OnResult,
        describe: _Describe,
    ) -> list[Any]:
        """Run the tasks on the cluster; on any error, cancel what is left."""
        run = _ClusterRun(self.client, name, fn, tasks, on_result, describe)
        try:
            with _missing_workers_said(self.client, name):
                run.all()
        except (CancelledError, CommClosedError) as e:
            msg = (
                f"the scheduler was lost in {name} ({type(e).__name__}); finished "
                "tasks are kept: start it anew and call again to go on"
            )
            raise SchedulerError(msg) from e
        if run.lost:
            raise _workers_died(name, {describe(i): run.deaths[i] for i in run.lost}, self.budget)
        return run.results


@contextlib.contextmanager
def _missing_workers_said(client: Client, name: str) -> Iterator[None]:
    """Meanwhile, warn again and again while no worker is there: Dask waits for one without a word.

    A LocalCluster of Dask's, for one, may give up workers that died, and starts no others.
    """
    is_over = threading.Event()

    def look() -> None:
        since = time.monotonic()
        while not is_over.wait(NO_WORKER_S):
            try:
                is_there = bool(client.scheduler_info(n_workers=-1)["workers"])
            except Exception:  # noqa: BLE001 - the thread that waits for tasks has to say what happened
                return
            if is_there:
                since = time.monotonic()
                continue
            logger.warning(
                "%s: no worker has been there for up to %.0f s, and the build waits for one; start workers, or "
                "interrupt the build: finished tasks are kept, and the same call goes on",
                name,
                time.monotonic() - since,
            )

    watcher = threading.Thread(target=look, name="annbatch-dask-workers", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()


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
    describe: _Describe
    results: list[Any] = field(init=False)
    deaths: Counter[int] = field(default_factory=Counter)
    lost: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.results = [None] * len(self.tasks)

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
        futures = self._submit(which, index)
        running = as_completed(futures, loop=self.client.loop)
        tries: Counter[int] = Counter()
        died: set[int] = set()
        try:
            for future in running:
                i = index[future.key]
                try:
                    result = future.result()
                except KilledWorker as e:
                    self.deaths[i] += e.allowed_failures + 1
                    died.add(i)
                    continue
                if not isinstance(result, _Failed):
                    self.results[i] = result
                    self.on_result(i, result)
                elif result.lasts or tries[i] == RETRIES:
                    raise result.error
                else:
                    tries[i] += 1
                    futures += (again := self._submit([i], index))
                    running.update(again)
        except (CancelledError, CommClosedError):
            raise
        except BaseException:
            self.client.cancel(futures)
            raise
        return died

    def _submit(self, which: Sequence[int], index: dict[Any, int]) -> list[Any]:
        graph = _delayed(self.name, _attempt, [(self.fn, *self.tasks[i]) for i in which])
        futures: list[Any] = self.client.compute(graph, optimize_graph=False)
        index.update((f.key, i) for f, i in zip(futures, which, strict=True))
        return futures


def _workers_died(name: str, deaths: Mapping[str, int], budget: Budget) -> WorkersDiedError:
    what = "; ".join(f"{n} workers with {task}" for task, n in deaths.items())
    return WorkersDiedError(
        f"{name}: {what} died, the last {DEATHS} or more with nothing else to do. All other tasks are done, and kept. "
        f"Mostly it is memory that they lack: they had {format_bytes(budget.worker_nbytes)} for {budget.n_threads} "
        "threads each. Start workers with more memory or fewer threads, or leave the input out, and call again"
    )


@dataclass(frozen=True)
class EngineRoom:
    """An engine that may still have to be started.

    Attributes
    ----------
    scanner
        Runs the scan: the cluster where there is one, else threads of this process, so that bad input is
        found before a cluster is started.
    budget
        Memory of a worker.
    start
        The engine for a build, given its number of tasks, as a context manager.
    """

    scanner: Engine
    budget: Budget
    start: Callable[[int], contextlib.AbstractContextManager[Engine]]


def choose_engine(client: Client | None, memory_limit: int | str | None) -> EngineRoom:
    """The engine to use: the client given, dask's configured scheduler, the current client, or a new local cluster."""
    scheduler = dask.config.get("scheduler", None)
    if client is None and isinstance(scheduler, str) and scheduler in _LOCAL:
        n_threads = 1 if scheduler.startswith("s") else dask.system.CPU_COUNT
        local = LocalEngine(scheduler, Budget(_nbytes(memory_limit, n_workers=1), n_threads))
        return EngineRoom(local, local.budget, lambda _: contextlib.nullcontext(local))
    if client is None:
        with contextlib.suppress(ValueError):
            client = Client.current(allow_global=True)
    if client is not None:
        _refuse_asynchronous(client)
        cluster = ClusterEngine(client, _cluster_budget(client, memory_limit))
        return EngineRoom(cluster, cluster.budget, lambda _: contextlib.nullcontext(cluster))
    n_workers = max(1, min(dask.system.CPU_COUNT, int(MEMORY_LIMIT) // _WORKER_NBYTES))
    budget = Budget(_nbytes(memory_limit, n_workers=n_workers), dask.system.CPU_COUNT // n_workers)
    return EngineRoom(LocalEngine("threads", budget), budget, functools.partial(_own_cluster, n_workers, budget))


@contextlib.contextmanager
def _own_cluster(max_workers: int, budget: Budget, n_tasks: int) -> Iterator[Engine]:
    n_workers = max(1, min(max_workers, -(-n_tasks // budget.n_threads)))
    with local_client(
        n_workers=n_workers, threads_per_worker=budget.n_threads, memory_limit=budget.worker_nbytes
    ) as client:
        yield ClusterEngine(client, budget)


def _nbytes(memory_limit: int | str | None, *, n_workers: int) -> int:
    """Memory of each of ``n_workers`` on this machine: what was asked for, or an equal share."""
    if memory_limit is not None:
        return int(parse_bytes(memory_limit))
    return int(MEMORY_LIMIT) // n_workers


def _refuse_asynchronous(client: Client) -> None:
    if client.asynchronous:
        msg = (
            "the client is asynchronous and this call would block the event loop that it needs; make the call in a "
            "thread, as in `await asyncio.to_thread(collection.add_adatas, files, client=client)`"
        )
        raise SchedulerError(msg)


def _cluster_budget(client: Client, memory_limit: int | str | None) -> Budget:
    """What the smallest worker of a cluster can give; the first one is waited for."""
    workers = _workers(client)
    if not workers:
        _wait_for_a_worker(client)
        workers = _workers(client)
    limit = min(_worker_limits(client, workers))
    if memory_limit is not None:
        limit = min(limit, int(parse_bytes(memory_limit)))
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
    address = client.scheduler_info(n_workers=-1)["address"]
    logger.warning("no worker has joined %s yet: waiting for the first, %d s at most", address, WORKER_TIMEOUT_S)
    first = client.submit(int, pure=False)
    try:
        first.result(timeout=WORKER_TIMEOUT_S)
    except TimeoutError as e:
        msg = f"no worker has joined {address} within {WORKER_TIMEOUT_S} s; start some, as with `dask worker {address}`"
        raise SchedulerError(msg) from e
    finally:
        first.cancel()


def _worker_limits(client: Client, workers: Mapping[str, Mapping[str, Any]]) -> list[int]:
    """Memory of each worker: its limit, or where it has none an equal share of its host's."""
    limits = [w["memory_limit"] for w in workers.values() if w["memory_limit"]]
    unlimited = [address for address, w in workers.items() if not w["memory_limit"]]
    if unlimited:
        n_on = Counter(w["host"] for w in workers.values())
        memory = client.run(_host_memory, workers=unlimited)
        shares = [n_bytes // n_on[workers[address]["host"]] for address, n_bytes in memory.items()]
        logger.warning(
            "%d of %d workers have no memory limit: each is taken to have an equal share of its host's memory, %s or "
            "more; start workers with --memory-limit, or give memory_limit",
            len(unlimited),
            len(workers),
            format_bytes(min(shares)),
        )
        limits += shares
    return limits


def _host_memory() -> int:
    return int(MEMORY_LIMIT)


def run_stage(  # noqa: PLR0913 - mostly keywords
    engine: Engine,
    stage: str,
    fn: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    callback: Callback,
    *,
    size: tuple[int, int],
    measure: Callable[[int, Any], tuple[int, int]],
    describe: _Describe,
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

    def on_result(i: int, result: Any) -> None:
        reused = isinstance(result, Mapping) and bool(result.get("reused"))
        callback.on_task_end(TaskEnd(stage, i, *measure(i, result), reused=reused))

    results = engine.run(stage, fn, tasks, on_result, describe)
    seconds = time.perf_counter() - start
    callback.on_stage_end(StageEnd(stage, seconds))
    logger.info("%s: %d tasks in %.1f s", stage, len(tasks), seconds)
    return results


def build(job: Job, engine: Engine, callback: Callback) -> Manifest:
    """Run a plan and commit its result.

    Each task leaves a receipt in the scratch folder, so a build that was interrupted goes on where it stopped when it
    is called again with the same plan. The scratch folder is removed after the commit.
    """
    plan = job.plan
    callback.on_build_start(BuildStart(job.target.url, engine.name, engine.dashboard))
    error: BaseException | None = None
    committed = False
    try:
        job = replace(job, scratch=make_private(job.scratch))
        if plan.options.groupby:
            job = group(job, engine, callback)
            plan = job.plan
        file = save_job(job)
        totals = Totals(plan.n_datasets)
        scattered = run_stage(
            engine,
            "scatter",
            scatter,
            [(file, i) for i in range(len(plan.blocks))],
            callback,
            size=(plan.n_obs, plan.n_bytes_read),
            measure=functools.partial(_take, totals),
            describe=functools.partial(_block, plan),
        )
        check_inputs(job, engine)
        check_old_rows(job, scattered)
        tasks = gather_tasks(plan, scattered, totals)
        gathered = run_stage(
            engine,
            "gather",
            gather,
            [(file, t) for t in tasks],
            callback,
            size=(plan.n_obs, _gather_nbytes(plan, tasks)),
            measure=lambda _, r: (r["n_rows"], r["n_bytes"]),
            describe=lambda k: f"{DATASET_PREFIX}_{job.first_dataset + k}",
        )
        manifest = make_manifest(job, scattered, gathered, tasks)
        written = {r["name"]: r["folder"] for r in gathered}
        run_stage(
            LocalEngine("synchronous", engine.budget, patient=False),  # who wrote a root may not write it again
            "commit",
            commit,
            [(job, manifest, written)],
            callback,
            size=(plan.n_obs, 0),
            measure=lambda *_: (plan.n_obs, 0),
            describe=lambda _: job.target.url,
        )
        committed = True
        if job.base is not None:
            forget_inputs_of(job.target, job.base)
        clean_up(job)
    except BaseException as e:
        error = e
        busy = None if committed or not isinstance(e, Exception) else _overtaken(job)
        if busy is None:
            _end(job)
            raise
        withdraw(job)
        error = busy
        raise busy from e
    else:
        return manifest
    finally:
        forget_job()
        callback.on_build_end(BuildEnd(error))


def _take(totals: Totals, _: int, receipt: dict[str, Any]) -> tuple[int, int]:
    """Rows and bytes of a scatter task, whose receipt is let go of but for its sums."""
    totals.take(receipt)
    return receipt["n_rows"], receipt["n_bytes"]


def _end(job: Job) -> None:
    """Say that the build runs no more; where that cannot be said, its claim is left alone."""
    if job.claim is not None:
        try:
            end_claim(job.target, job.claim)
        except Exception as e:  # noqa: BLE001 - another error is on its way, and says more
            logger.warning("%s: %s", job.target.url, e)


def group(job: Job, engine: Engine, callback: Callback) -> Job:
    """Count the groups, and make a job of it whose parts follow them."""
    plan = job.plan
    first = replace(job, scratch=job.scratch / "group")
    file = save_job(first)
    counted = run_stage(
        engine,
        "group",
        count_groups,
        [(file, i) for i in range(len(plan.blocks))],
        callback,
        size=(plan.n_obs, 0),
        measure=lambda i, _: (plan.blocks[i].n_rows, 0),
        describe=functools.partial(_block, plan),
    )
    return with_groups(job, counted)


def _block(plan: Plan, index: int) -> str:
    block = plan.blocks[index]
    return f"{plan.sources[block.source].path}, rows {block.start:,} to {block.stop:,}"


def _overtaken(job: Job) -> CollectionBusyError | None:
    """Whether another build published something meanwhile, and removed what this one wrote: then that is the error."""
    try:
        check_unchanged(job.target, job.base_version)
    except CollectionBusyError as busy:
        return busy
    return None


def run_check(
    engine: Engine,
    stage: str,
    fn: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    callback: Callback,
    size: tuple[int, int],
    names: Sequence[str],
) -> list[Any]:
    """Run checks, whose results hold ``problems``, of what has these names; returns all of the problems."""
    results = run_stage(
        engine,
        stage,
        fn,
        tasks,
        callback,
        size=size,
        measure=lambda _, r: (r["n_rows"], r["n_bytes"]),
        describe=names.__getitem__,
    )
    return [problem for r in results for problem in r["problems"]]


def check_inputs(job: Job, engine: Engine) -> None:
    """Refuse inputs that were changed while they were read, where their tasks have not looked: see :func:`unchanged`.

    Raises
    ------
    SourceError
        With the name of one.
    """
    sources = job.plan.sources
    tasks = [
        (replace(ref, load_adata=None), sources[k].identity)
        for k, ref in enumerate(job.refs)
        if has_many_files(sources[k].identity)
    ]
    if tasks:
        engine.run("check", raise_if_changed, tasks, lambda *_: None, lambda i: tasks[i][0].label)


def check_old_rows(job: Job, scattered: Sequence[Mapping[str, Any]]) -> None:
    """Refuse to carry over rows of the collection that are not what its manifest says.

    Raises
    ------
    IntegrityError
        With the dataset's name.
    """
    if job.base is None or job.plan.extension is None or job.plan.extension.n_kept:
        return
    found = source_fingerprints(job.plan, scattered)
    for record, fingerprint in zip(job.base.datasets, found, strict=False):
        if record.fingerprint not in ("", fingerprint):
            _forget_dataset(job, record.name)
            msg = (
                f"{record.name}: its rows have fingerprint {fingerprint} and were written with {record.fingerprint}; "
                "verify() says which file is damaged"
            )
            raise IntegrityError(msg)


def _forget_dataset(job: Job, name: str) -> None:
    """Let a dataset's rows be read again by the next call, when its files have been restored."""
    for k, block in enumerate(job.plan.blocks):
        if job.plan.sources[block.source].path == name and job.plan.sources[block.source].tagged:
            forget_task(job.scratch, k)


def gather_tasks(plan: Plan, scattered: Sequence[Mapping[str, Any]], totals: Totals) -> list[GatherTask]:
    """The barrier: what all scatter tasks together say about dtypes, sizes and fingerprints."""
    dtypes = {}
    for m in plan.matrices:
        dtypes[m.name] = smallest_dtype(merged_range(scattered, m.name), np.dtype(m.source_dtype)).name
    return [
        GatherTask(
            dataset=k,
            dtypes=dtypes,
            nnz={name: int(n[k]) for name, n in totals.nnz.items()},
            fingerprint=int(totals.fingerprint[k]),
        )
        for k in range(plan.n_datasets)
    ]


def _gather_nbytes(plan: Plan, tasks: Sequence[GatherTask]) -> int:
    """What the gather tasks will report as written, to the byte: the length of the progress bar."""
    total = 0
    for m in plan.matrices:
        item = np.dtype(tasks[0].dtypes[m.name]).itemsize
        if m.kind == "dense":
            total += plan.n_obs * m.n_cols * item
        else:
            nnz = sum(t.nnz[m.name] for t in tasks)
            total += nnz * (item + index_dtype(m.n_cols).itemsize) + 8 * plan.n_obs
    return total
