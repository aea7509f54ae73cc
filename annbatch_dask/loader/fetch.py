"""Loading ahead of the consumer: two coordinating threads and their helpers, for one iteration.

``requests -> [fetch] -> windows -> [assemble] -> batches -> consumer``

Each arrow is a queue. Requests are handed in by the consumer's own thread, so the order of batches, and the
state of the sampler at each of them, is the same whatever the threads do. The fetching thread reserves a
window's bytes, then lets its helpers read and decode; the assembling thread does the same for batches. The
two budgets make up ``prefetch_bytes``; one window and one batch are always allowed, so nothing can get stuck.

An error travels down the queues in its place: batches before it are delivered, then the consumer gets it.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.loader.batch import BatchBuilder
from annbatch_dask.loader.contents import Contents, Matrix
from annbatch_dask.loader.device import DeviceBuilder
from annbatch_dask.loader.pool import BufferPool
from annbatch_dask.loader.requests import Assignment, Loaded, Window, assign, resolve_rows, resolve_splits
from annbatch_dask.loader.sources import Located, Source
from annbatch_dask.storage.ranges import Task
from annbatch_dask.types import LoaderOutput, LoadRequest

__all__ = ["Budget", "Pipeline", "PipelineOptions", "count_threads"]

T = TypeVar("T")

THREAD_PREFIX = "annbatch-dask"
_MAX_THREADS = 16
_N_REMOTE_THREADS = 32  # requests under way to an object store; a window has more
_WINDOW_SHARE = 0.75


class Closed(Exception):  # noqa: N818
    """The iteration is over; a thread that waits for something stops waiting."""


class Budget:
    """Bytes that may exist at a time. Whatever its size, one reservation is always granted."""

    def __init__(self, limit_nbytes: int) -> None:
        self._limit = limit_nbytes
        self._used = 0
        self._n_held = 0
        self._is_closed = False
        self._changed = threading.Condition()

    def reserve(self, nbytes: int) -> None:
        """Wait until ``nbytes`` more fit; raises Closed when the iteration ends meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._n_held == 0 or self._used + nbytes <= self._limit)
            if self._is_closed:
                raise Closed
            self._used += nbytes
            self._n_held += 1

    def release(self, nbytes: int) -> None:
        """Give back a reservation."""
        with self._changed:
            self._used -= nbytes
            self._n_held -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """Wake whoever waits."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


@dataclass(frozen=True)
class _Failure:
    error: BaseException


class _End:
    """Nothing follows."""


_END = _End()


@dataclass(frozen=True)
class _Ready(Generic[T]):
    value: T
    nbytes: int


@dataclass(frozen=True)
class PipelineOptions:
    """How an iteration is run.

    Attributes
    ----------
    prefetch_nbytes
        Bytes of windows and batches that may lie ready or be under way.
    n_threads
        Helpers of each of the two stages. More of them fetch from an object store, where they wait.
    """

    prefetch_nbytes: int
    n_threads: int


def count_threads() -> int:
    """Helper threads of one stage: the cores this process may use, shared among torch workers."""
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch: Any = sys.modules.get("torch")
    info = None if torch is None else torch.utils.data.get_worker_info()
    n_workers = 1 if info is None else info.num_workers
    return max(1, min(n_cores // n_workers, _MAX_THREADS))


class Pipeline:
    """Loads requests in the background; hand them in with :meth:`submit`, take batches with :meth:`get`.

    Parameters
    ----------
    contents
        What batches are made of.
    options
        Threads and bytes.
    """

    def __init__(self, contents: Contents, options: PipelineOptions) -> None:
        self._contents = contents
        self._bounds = np.cumsum([0, *(source.n_obs for source in contents.matrices[0].sources)]).astype(np.int64)
        self._pool = BufferPool()
        self._builders = [_make_builder(matrix, self._pool, 4 * options.n_threads) for matrix in contents.matrices]
        window_nbytes = int(options.prefetch_nbytes * _WINDOW_SHARE)
        self._window_budget = Budget(window_nbytes)
        self._batch_budget = Budget(options.prefetch_nbytes - window_nbytes)
        self._is_closed = False

        self._requests: SimpleQueue[LoadRequest | _Failure | _End] = SimpleQueue()
        self._windows: SimpleQueue[Window | _Failure | _End] = SimpleQueue()
        self._batches: SimpleQueue[_Ready[LoaderOutput] | _Failure | _End] = SimpleQueue()
        is_remote = any(source.is_remote for matrix in contents.matrices for source in matrix.sources)
        n_fetching = max(options.n_threads, _N_REMOTE_THREADS) if is_remote else options.n_threads
        self._helpers = [
            ThreadPoolExecutor(n_threads, thread_name_prefix=f"{THREAD_PREFIX}-{stage}-helper")
            for stage, n_threads in (("fetch", n_fetching), ("assemble", options.n_threads))
        ]
        # Daemons, so that an iterator that is still open when the interpreter ends does not keep it alive.
        self._threads = [
            threading.Thread(target=target, name=f"{THREAD_PREFIX}-{stage}", daemon=True)
            for stage, target in (("fetch", self._fetch_all), ("assemble", self._assemble_all))
        ]
        for thread in self._threads:
            thread.start()

    # --- the consumer's side

    def submit(self, request: LoadRequest) -> None:
        """Queue a request for loading."""
        self._requests.put(request)

    def fail(self, error: BaseException) -> None:
        """Let the consumer have this error after the batches queued so far."""
        self._requests.put(_Failure(error))

    def finish(self) -> None:
        """No more requests will come."""
        self._requests.put(_END)

    def get(self) -> LoaderOutput | None:
        """The next batch; None after the last one. Raises what went wrong in the background."""
        item = self._batches.get()
        if isinstance(item, _Ready):
            self._batch_budget.release(item.nbytes)
            return item.value
        if isinstance(item, _Failure):
            raise item.error
        return None

    def close(self) -> None:
        """Stop all threads and let go of all memory; waits for work that is under way."""
        self._is_closed = True
        self._window_budget.close()
        self._batch_budget.close()
        self._requests.put(_END)
        self._windows.put(_END)
        for helpers in self._helpers:
            helpers.shutdown(wait=False, cancel_futures=True)
        # The garbage collector may run this in one of our own threads, which cannot wait for itself.
        is_own = threading.current_thread().name.startswith(THREAD_PREFIX)
        if not is_own:
            for thread in self._threads:
                thread.join()
            for helpers in self._helpers:
                helpers.shutdown(wait=True)
        self._pool.close()

    # --- fetching

    def _fetch_all(self) -> None:
        try:
            while not isinstance(item := self._requests.get(), _End):
                if isinstance(item, _Failure):
                    self._windows.put(item)
                    return
                self._windows.put(self._fetch(item))
            self._windows.put(_END)
        except Closed:
            pass
        except BaseException as error:  # noqa: BLE001
            self._windows.put(_Failure(error))

    def _fetch(self, request: LoadRequest) -> Window:
        rows = resolve_rows(request, int(self._bounds[-1]))
        splits = resolve_splits(request, len(rows))
        assignments = assign(rows, self._bounds)
        located = [self._locate(matrix, assignments) for matrix in self._contents.matrices]
        nbytes = sum(part.nbytes for parts in located for part in parts)
        self._window_budget.reserve(nbytes)

        block, position = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        for number, assignment in enumerate(assignments):
            block[assignment.places] = number
            position[assignment.places] = np.arange(len(assignment.places))
        matrices: list[Loaded] = []
        tasks: list[Task] = []
        for matrix, parts in zip(self._contents.matrices, located, strict=True):
            blocks, lengths = [], np.empty(len(rows), np.int64)
            for assignment, part in zip(assignments, parts, strict=True):
                opened, its_tasks = matrix.sources[assignment.dataset].open(part, self._pool)
                blocks.append(opened)
                tasks.extend(its_tasks)
                lengths[assignment.places] = part.lengths
            matrices.append(Loaded(blocks, block, position, lengths, _common_dtype(matrix.sources, assignments)))
        futures = self._start(0, tasks)
        obs, labels = self._contents.obs, self._contents.labels
        taken = None if obs is None else obs.take(assignments, len(rows))
        codes = {} if labels is None else labels.take(assignments, len(rows))
        self._wait(futures)
        return Window(rows, splits, matrices, taken, codes, nbytes)

    def _locate(self, matrix: Matrix, assignments: Sequence[Assignment]) -> list[Located]:
        """Find the rows and their chunks; for the first ones, files are read."""
        sources = [matrix.sources[a.dataset] for a in assignments]
        found = self._wait(
            self._start(0, [partial(s.locate, a.rows) for s, a in zip(sources, assignments, strict=True)])
        )
        self._wait(self._start(0, [task for s, part in zip(sources, found, strict=True) for task in s.prepare(part)]))
        return found

    # --- assembling

    def _assemble_all(self) -> None:
        try:
            while not isinstance(item := self._windows.get(), _End):
                if isinstance(item, _Failure):
                    self._batches.put(item)
                    return
                for split in item.splits:
                    self._batches.put(self._assemble(item, split))
                self._window_budget.release(item.nbytes)
                # Frees the window's buffers for the next one before waiting for it.
                del item
            self._batches.put(_END)
        except Closed:
            pass
        except BaseException as error:  # noqa: BLE001
            self._batches.put(_Failure(error))

    def _assemble(self, window: Window, split: NDArray[np.int64]) -> _Ready[LoaderOutput]:
        parts = list(zip(self._builders, window.matrices, strict=True))
        nbytes = sum(builder.nbytes(loaded, split) for builder, loaded in parts)
        self._batch_budget.reserve(nbytes)
        built = [builder.build(loaded, split, self._run_all) for builder, loaded in parts]
        return _Ready(self._contents.batch(window, split, built), nbytes)

    def _run_all(self, tasks: list[Task]) -> None:
        self._wait(self._start(1, tasks))

    # --- helpers

    def _start(self, stage: int, tasks: Sequence[Callable[[], T]]) -> list[Future[T]]:
        if len(tasks) == 1 and stage == 1:
            tasks[0]()  # small batches: not worth waking a thread
            return []
        try:
            return [self._helpers[stage].submit(task) for task in tasks]
        except RuntimeError:
            if self._is_closed:
                raise Closed from None
            raise

    def _wait(self, futures: Sequence[Future[T]]) -> list[T]:
        # All of them, even after a failure: a task still running writes into buffers of this window.
        # One by one: concurrent.futures.wait never returns for a future that a shutdown cancelled.
        results: list[T] = []
        errors: list[Exception] = []
        for future in futures:
            try:
                results.append(future.result())
            except CancelledError:
                errors.append(Closed())
            except Exception as error:  # noqa: BLE001
                errors.append(error)
        if errors:
            raise errors[0]
        return results


def _make_builder(matrix: Matrix, pool: BufferPool, n_parts: int) -> BatchBuilder | DeviceBuilder:
    form, first = matrix.form, matrix.sources[0]
    width = form.width_of(first.shape)
    if matrix.device is None:
        return BatchBuilder(form, width, first.is_sparse, pool, n_parts)
    return DeviceBuilder.of(form, width, matrix.device, is_sparse=first.is_sparse, n_parts=n_parts)


def _common_dtype(sources: Sequence[Source], assignments: Sequence[Assignment]) -> np.dtype[Any]:
    """The dtype that holds the values of all datasets a window is from."""
    return np.result_type(*([sources[a.dataset].dtype for a in assignments] or [sources[0].dtype]))
