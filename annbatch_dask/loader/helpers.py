"""Threads of one iteration, and tasks that several of them share.

The garbage collector drops an iterator in any thread, in the middle of anything: in a thread of that iterator, or in
one that holds a lock of threading's own. So what a dropped iterator does takes no lock and joins no thread. Threads
wait at queues alone (``SimpleQueue.put`` may interrupt itself), and end by a flag and a mark in the queue.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from annbatch_dask.storage.machine import n_cpus

__all__ = ["THREAD_PREFIX", "Closed", "Helpers", "LoaderThread", "SharedJob", "count_threads"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

THREAD_PREFIX = "annbatch-dask"
_MAX_THREADS = 16
_N_WOKEN = 2  # by each helper that begins with a job; to wake one takes as long as some short tasks
_PATIENCE_S = 10.0
_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_TASKS_PER_NODE")
"""Where torchrun, Open MPI, MPICH and srun say how many processes of a job there are on a machine."""


class Closed(Exception):  # noqa: N818
    """The iteration is over; a thread that waits for something stops waiting."""


class LoaderThread(threading.Thread):
    """A thread of an iteration, which ends before the interpreter does, whether or not the iteration is over.

    Parameters
    ----------
    name
        Follows the prefix that all of them have.
    work
        What it does.
    stop
        Lets it end soon, without waiting.
    """

    def __init__(self, name: str, work: Callable[[], None], stop: Callable[[], None]) -> None:
        super().__init__(target=work, name=f"{THREAD_PREFIX}-{name}", daemon=True)
        self.stop = stop

    def run(self) -> None:
        """Work, then forget the iteration and its memory."""
        try:
            super().run()
        finally:
            self.stop = _nothing


def _nothing() -> None:
    pass


@atexit.register
def _end_threads() -> None:
    """A daemon that lives on would be cut off in the middle of compiled code, which may abort the process.

    One that does not come back from a user's function, or from a store, is left to that fate after a while.
    """
    threads = [thread for thread in threading.enumerate() if isinstance(thread, LoaderThread)]
    for thread in threads:
        thread.stop()
    until = time.monotonic() + _PATIENCE_S
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))


class SharedJob(Generic[T]):
    """Tasks that any number of threads take from, each the next one that is left."""

    def __init__(self, tasks: Sequence[Callable[[], T]], is_stopped: Callable[[], bool]) -> None:
        self._left = deque(enumerate(tasks))
        self._results: list[Any] = [None] * len(tasks)
        self._errors: list[tuple[int, BaseException]] = []
        self._ended: list[int] = []
        self._all_ended: SimpleQueue[None] = SimpleQueue()
        self._is_stopped = is_stopped
        self._calls: deque[None] = deque()

    def allow(self, n_helpers: int) -> None:
        """Let so many helpers be woken."""
        self._calls.extend([None] * n_helpers)

    def needs_another(self) -> bool:
        """True once for each helper that may be woken, as long as tasks are left."""
        if not self._left:
            return False
        try:
            self._calls.pop()
        except IndexError:
            return False
        return True

    @property
    def n_left(self) -> int:
        """Tasks that have not ended."""
        return len(self._results) - len(self._ended) if self._results else 0

    def work(self) -> None:
        """Run tasks until none is left; those that are left when the iteration ends are passed over."""
        while True:
            try:
                number, task = self._left.popleft()
            except IndexError:
                return
            try:
                if self._is_stopped():
                    raise Closed  # noqa: TRY301
                self._results[number] = task()
            except BaseException as error:  # noqa: BLE001 - for the thread that waits
                self._errors.append((number, error))
            self._ended.append(number)
            if len(self._ended) == len(self._results):
                self._all_ended.put(None)

    def wait(self) -> list[T]:
        """Wait until all have ended; returns what they returned, or raises the error of the first that failed.

        All of them, even after a failure: a task still running writes into buffers of this window.
        """
        self.settle()
        results, self._results = self._results, []
        errors, self._errors = self._errors, []
        if errors:
            try:
                raise min(errors, key=lambda found: found[0])[1]
            finally:
                del errors  # refers to this frame, and with it to all buffers
        return results

    def settle(self) -> None:
        """Do what is left, and wait until all have ended, well or not; once, and not before :meth:`wait`."""
        self.work()
        if self._results:
            self._all_ended.get()


class Helpers:
    """Threads for the tasks of one other thread, which works as well while it waits: waking a thread costs the most.

    Parameters
    ----------
    stage
        What they are named after.
    n_threads
        How many there are at most, with the one that waits; they are started when there is work.
    """

    def __init__(self, stage: str, n_threads: int) -> None:
        self._stage = stage
        self._n_helpers = n_threads - 1
        self._jobs: SimpleQueue[SharedJob[Any] | None] = SimpleQueue()
        self._threads: list[LoaderThread] = []
        self._under_way: list[weakref.ref[SharedJob[Any]]] = []
        self._is_stopped = False

    def start(self, tasks: Sequence[Callable[[], T]], n_kept: int = 0) -> SharedJob[T]:
        """Let helpers begin with tasks, which are then to be waited for, and worked on; raises Closed once stopped.

        ``n_kept`` of them are left to the thread that waits.
        """
        if self._is_stopped:
            raise Closed
        job = SharedJob(tasks, self._ask_stopped)
        n_asked = min(self._n_helpers, len(tasks) - n_kept)
        if len(self._threads) < self._n_helpers:  # those of jobs before are busy, perhaps with waiting
            before = [ref for ref in self._under_way if (other := ref()) is not None and other.n_left]
            n_busy = sum(other.n_left for ref in before if (other := ref()) is not None)
            n_asked = min(n_asked, self._hire(min(self._n_helpers, n_asked + n_busy)))
            self._under_way = [*before, weakref.ref(job)]
        job.allow(n_asked)
        self._wake_for(job, 1)
        return job

    def _wake_for(self, job: SharedJob[Any], n_helpers: int) -> None:
        """Wake so many helpers, which wake others before they begin, if tasks are left for those."""
        for _ in range(n_helpers):
            if not job.needs_another():
                return
            self._jobs.put(job)

    def _hire(self, n_threads: int) -> int:
        """Start threads until there are so many; returns how many there are."""
        try:
            while len(self._threads) < n_threads:
                thread = LoaderThread(f"{self._stage}-helper_{len(self._threads)}", self._serve, self.stop)
                thread.start()
                self._threads.append(thread)
        except RuntimeError as error:  # a container's limit, or the main thread has ended (Python 3.12)
            self._n_helpers = len(self._threads)
            # Its text: a record that somebody keeps would keep the error's frames, and with them a window's files.
            logger.warning("a loader goes on with %d of %d helper threads: %s", self._n_helpers, n_threads, str(error))
        return len(self._threads)

    def run(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """Run tasks, and return what they returned."""
        if len(tasks) <= 1:
            return [task() for task in tasks]  # not worth waking a thread
        return self.start(tasks, n_kept=1).wait()

    def stop(self) -> None:
        """End soon. Takes no lock."""
        self._is_stopped = True
        for _ in range(self._n_helpers):
            self._jobs.put(None)

    def join(self) -> None:
        """Wait for the end, once the thread that asks for work has ended."""
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _ask_stopped(self) -> bool:
        return self._is_stopped

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._wake_for(job, _N_WOKEN)
            job.work()
            del job  # or it would live until the next one


def count_threads() -> int:
    """Threads of one stage: this process's share of the cores, which ranks of its node and torch's workers use too.

    A rank that was bound to cores of its own has no need to share them.
    """
    n_cores, n_ranks, n_there = n_cpus(), _n_local_ranks(), os.cpu_count() or 1
    n_allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else n_there
    is_bound = n_cores == n_allowed and n_cores * n_ranks <= n_there
    if not is_bound:
        n_cores //= n_ranks
    torch: Any = sys.modules.get("torch")
    info = None if torch is None else torch.utils.data.get_worker_info()
    n_workers = 1 if info is None else info.num_workers
    return max(1, min(n_cores // n_workers, _MAX_THREADS))


def _n_local_ranks() -> int:
    """Processes of a job on this machine, where what started them says how many."""
    said = next((os.environ[name] for name in _LOCAL_SIZES if name in os.environ), "")
    first = said.partition(",")[0].partition("(")[0]  # Slurm's is of all nodes, such as 8(x3),4
    return max(1, int(first)) if first.isdecimal() else 1
