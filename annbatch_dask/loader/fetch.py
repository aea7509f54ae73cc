"""Loading ahead of the consumer: two coordinating threads and their helpers, for one iteration.

``requests -> [fetch] -> windows -> [assemble] -> batches -> consumer``

Each arrow is a queue. Requests are handed in by the consumer's own thread, so the order of batches, and the
state of the sampler at each of them, is the same whatever the threads do. The fetching thread reserves a
window's bytes, then lets its helpers read and decode; where there are room and threads it begins the next one before
they are done. The assembling thread does the same for batches, one at a time. The two budgets make up
``prefetch_bytes``; one window and one batch are always allowed, so nothing can get stuck.

An error travels down the queues in its place: batches before it are delivered, then the consumer gets it.

Whoever drops an iteration only leaves marks in its queues: see :mod:`annbatch_dask.loader.helpers`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from queue import SimpleQueue
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.chunks.dealing import Task, deal
from annbatch_dask.loader.backing import Located, RowSource
from annbatch_dask.loader.batch import BatchBuilder
from annbatch_dask.loader.blocks import Block, DealtRows, Loaded, PickedBlock
from annbatch_dask.loader.budget import END, ByteLimit, End
from annbatch_dask.loader.contents import Contents, Matrix
from annbatch_dask.loader.gpu.builder import DeviceBuilder
from annbatch_dask.loader.gpu.device import Handover, Placed
from annbatch_dask.loader.gpu.place import place
from annbatch_dask.loader.gpu.slab import Slab, room_for, room_of, stage
from annbatch_dask.loader.helpers import Closed, Helpers, LoaderThread, SharedJob
from annbatch_dask.loader.pool import BufferPool, SparePool
from annbatch_dask.loader.requests import Assignment, Resolved, Window, cut_frame
from annbatch_dask.loader.tokens import TokenBuilder
from annbatch_dask.types import LoaderOutput, LoadRequest

__all__ = ["Pipeline", "PipelineOptions"]

T = TypeVar("T")

_WINDOW_SHARE = 0.75
_N_AHEAD_ON_DEVICE = 2
_N_WINDOWS = 2  # under way at a time, where threads would stand still at the end of one
_N_REMOTE_WINDOWS = 6  # one request that takes seconds holds up its own alone
_MIN_IDLE_THREADS = 4  # fewer have enough to do: batches are put together on the same cores


@dataclass(frozen=True)
class _Failure:
    error: BaseException


@dataclass(frozen=True)
class _Begun:
    """A window that is whole once its reading has ended."""

    window: Window
    reading: SharedJob[object]


@dataclass(frozen=True)
class _Ready(Generic[T]):
    value: T
    nbytes: int
    handover: Handover | None


@dataclass(frozen=True)
class PipelineOptions:
    """Options of the pipeline of an iteration.

    Attributes
    ----------
    prefetch_nbytes
        Bytes of windows and batches that may be ready or be under way.
    n_threads, n_requests
        Helpers of each of the two stages, and of the first where they wait for an object store.
    """

    prefetch_nbytes: int
    n_threads: int
    n_requests: int


class Pipeline:
    """Loads requests in the background; hand them in with :meth:`submit`, take batches with :meth:`get`.

    Parameters
    ----------
    contents
        What batches are made of.
    options
        Threads and bytes.
    at_end
        Called in the fetching thread once nothing more is read.
    spare
        Keeps memory of ordinary buffers from one pass to the next.
    """

    def __init__(
        self, contents: Contents, options: PipelineOptions, at_end: Callable[[], None], spare: SparePool
    ) -> None:
        self._contents = contents
        self._at_end = at_end
        self._bounds = np.cumsum([0, *(source.n_obs for source in contents.matrices[0].sources)]).astype(np.int64)
        device = contents.device
        self._spare = spare if device is None else None
        self._pool = spare.take() if device is None else BufferPool(device.allocate)
        self._kept_nbytes = options.prefetch_nbytes
        self._builders, self._device_builders = [], []
        if device is not None and contents.is_made_there:
            self._device_builders = [
                DeviceBuilder.of(matrix.form, matrix.sources[0], device, number)
                for number, matrix in enumerate(contents.matrices)
            ]
        else:
            self._builders = [_make_builder(matrix, self._pool, 4 * options.n_threads) for matrix in contents.matrices]
        window_nbytes = int(options.prefetch_nbytes * _WINDOW_SHARE)
        self._window_budget = ByteLimit(window_nbytes)
        # Batches on a device take none of the host's memory; the next one is begun while one is ready.
        n_granted = 1 if device is None else _N_AHEAD_ON_DEVICE
        self._batch_budget = ByteLimit(options.prefetch_nbytes - window_nbytes, n_granted)

        self._requests: SimpleQueue[LoadRequest | _Failure | End] = SimpleQueue()
        self._windows: SimpleQueue[Window | _Failure | End] = SimpleQueue()
        self._batches: SimpleQueue[_Ready[LoaderOutput] | _Failure | End] = SimpleQueue()
        is_remote = any(source.is_remote for matrix in contents.matrices for source in matrix.sources)
        n_fetching = options.n_requests if is_remote else options.n_threads
        self._n_threads = options.n_threads
        several = _N_REMOTE_WINDOWS if is_remote else _N_WINDOWS
        self._n_windows = several if n_fetching >= _MIN_IDLE_THREADS else 1
        self._fetchers = Helpers("fetch", n_fetching)
        self._locators = Helpers("locate", n_fetching)
        self._assemblers = Helpers("assemble", options.n_threads)
        self._threads = [
            LoaderThread("fetch", self._fetch_all, self.stop),
            LoaderThread("assemble", self._assemble_all, self.stop),
        ]
        self._unchecked: deque[Handover] = deque()
        self._is_stopped = False
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:  # no more threads are allowed, or the user interrupts
            self.stop()
            raise

    # --- the consumer's side

    def submit(self, request: LoadRequest) -> None:
        """Queue a request for loading."""
        self._requests.put(request)

    def fail(self, error: BaseException) -> None:
        """Let the consumer have this error after the batches queued so far."""
        self._requests.put(_Failure(error))

    def finish(self) -> None:
        """No more requests will come."""
        self._requests.put(END)

    def get(self) -> LoaderOutput | End:
        """The next batch; END after the last one. Raises what went wrong in the background."""
        if self._is_stopped and self._batches.empty():
            if threading.current_thread().daemon:
                threading.Event().wait()  # the interpreter ends, and stops this thread where it stands
            msg = "the threads of this iterator have ended, as the interpreter does; load what is needed before"
            raise RuntimeError(msg)
        self._check_taken(wait=False)
        item = self._batches.get()
        if isinstance(item, _Ready):
            if item.handover is not None:
                item.handover.take(item.value)
                self._unchecked.append(item.handover)
            self._batch_budget.release(item.nbytes)
            return item.value
        self._check_taken(wait=True)
        if isinstance(item, _Failure):
            try:
                raise item.error
            finally:
                del item  # refers to this frame
        return item

    def _check_taken(self, *, wait: bool) -> None:
        """Find out whether batches that the consumer has are sound; a device says so later."""
        while self._unchecked and self._unchecked[0].check(wait=wait):
            self._unchecked.popleft()

    def stop(self) -> None:
        """Let all threads end soon, and their memory with them. Takes no lock, waits for nothing."""
        self._end_threads()
        self._pool.close()

    def _end_threads(self) -> None:
        self._is_stopped = True
        self._fetchers.stop()
        self._locators.stop()
        self._assemblers.stop()
        self._window_budget.close()
        self._batch_budget.close()
        self._requests.put(END)
        self._windows.put(END)

    def close(self) -> None:
        """Stop all threads, and wait for work that is under way."""
        self._end_threads()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._fetchers.join()
        self._locators.join()
        self._assemblers.join()
        if self._spare is None or isinstance(threading.current_thread(), LoaderThread):  # which is still at work
            self._pool.close()
        else:
            self._spare.keep(self._pool, self._kept_nbytes)

    # --- fetching

    def _fetch_all(self) -> None:
        try:
            try:
                last = self._fetch_until_end()
            finally:
                self._at_end()
            self._windows.put(last)
        except Closed:
            pass
        except BaseException as error:  # noqa: BLE001
            self._windows.put(_Failure(error))

    def _fetch_until_end(self) -> _Failure | End:
        begun: deque[_Begun] = deque()
        try:
            while not isinstance(item := self._next_request(begun), _Failure | End):
                begun.append(self._begin(item, begun))
                if len(begun) == self._n_windows:
                    self._end(begun)
            return item
        finally:  # an error has its turn after them
            while begun:
                self._end(begun)

    def _next_request(self, begun: deque[_Begun]) -> LoadRequest | _Failure | End:
        """The next request; what was begun does not wait for one."""
        while begun and self._requests.empty():
            self._end(begun)
        return self._requests.get()

    def _end(self, begun: deque[_Begun]) -> None:
        """Hand on the first window that was begun; if it fails, none follows."""
        first = begun.popleft()
        try:
            first.reading.wait()
        except BaseException:
            while begun:
                begun.popleft().reading.settle()
            raise
        self._windows.put(self._without_spare(first.window))

    def _without_spare(self, window: Window) -> Window:
        """Give back what was reserved for entries that were left out."""
        blocks = [block for loaded in window.matrices for block in loaded.blocks]
        spare_nbytes = sum(block.spare_nbytes for block in blocks if isinstance(block, PickedBlock))
        if not spare_nbytes:
            return window
        self._window_budget.shrink(spare_nbytes)
        return replace(window, nbytes=window.nbytes - spare_nbytes)

    def _begin(self, request: LoadRequest, begun: deque[_Begun]) -> _Begun:
        """Let helpers read a window, in its turn where there is no room beside those before."""
        asked = Resolved.of(request, self._bounds)
        rows, splits, assignments, places = asked.rows, asked.splits, asked.assignments, asked.places
        located = [self._locate(matrix, assignments) for matrix in self._contents.matrices]
        nbytes = self._room_of(located, assignments)
        while begun and not self._window_budget.has_room(nbytes):
            self._end(begun)
        self._window_budget.reserve(nbytes)
        slab = Slab(self._pool.empty(nbytes, np.uint8)) if self._contents.is_made_there else None

        blocks: list[list[Block]] = []
        tasks: list[Task] = []
        for matrix, parts in zip(self._contents.matrices, located, strict=True):
            pairs = zip(assignments, parts, strict=True)
            opened = [self._open(matrix, matrix.sources[a.dataset], part, slab) for a, part in pairs]
            blocks.append([block for block, _ in opened])
            tasks.extend(task for _, its_tasks in opened for task in its_tasks)
        reading = self._fetchers.start(deal(tasks, self._n_threads))
        obs, labels = self._contents.obs, self._contents.labels
        # One frame for all batches, which are stretches of it: to take each of them costs as much as to take all.
        try:
            taken = None if obs is None else obs.take(assignments, rows, asked.dealt, asked.taken)
            frames = [] if taken is None else cut_frame(taken, splits)
            codes = {} if labels is None else labels.take(asked.taken)
        except BaseException:
            reading.settle()
            raise
        batches = None
        if slab is None:
            n_each = [len(assignment.rows) for assignment in assignments]
            batches = DealtRows.of(asked.dealt, list(map(len, splits)), places, n_each)
        matrices = [
            Loaded(its_blocks, *places, _lengths_of(parts, assignments, slab), matrix.dtype, rows, batches)
            for matrix, its_blocks, parts in zip(self._contents.matrices, blocks, located, strict=True)
        ]
        return _Begun(Window(rows, splits, matrices, taken, codes, nbytes, slab, batches or (), frames), reading)

    def _open(self, matrix: Matrix, source: RowSource, part: Located, slab: Slab | None) -> tuple[Block, list[Task]]:
        """A block of a window, in the slab if it is to go to a device at once, and what fills it."""
        if slab is not None:
            opened, tasks = source.open(part, slab)
            staged, copies = stage(opened, slab)
            return staged, [*tasks, *copies]
        form = matrix.form
        if form.wanted is None:
            return source.open(part, self._pool)
        return source.open_wanted(part, self._pool, form.wanted, with_totals=form.target_sum is not None)

    def _room_of(self, located: Sequence[Sequence[Located]], assignments: Sequence[Assignment]) -> int:
        """Bytes of a window; in one piece where it goes to a device."""
        if not self._contents.is_made_there:
            return sum(part.nbytes for parts in located for part in parts)
        return room_of(
            1
            + sum(
                room_for(matrix.sources[a.dataset], part)
                for matrix, parts in zip(self._contents.matrices, located, strict=True)
                for a, part in zip(assignments, parts, strict=True)
            )
        )

    def _locate(self, matrix: Matrix, assignments: Sequence[Assignment]) -> list[Located]:
        """Find the rows and their chunks; for the first ones, files are read."""
        sources = [matrix.sources[a.dataset] for a in assignments]
        run = _run if all(source.is_ready for source in sources) else self._locators.run
        found = run([partial(s.locate, a.rows) for s, a in zip(sources, assignments, strict=True)])
        self._locators.run([task for s, part in zip(sources, found, strict=True) for task in s.prepare(part)])
        return found

    # --- assembling

    def _assemble_all(self) -> None:
        device = self._contents.device
        try:
            with nullcontext() if device is None else device.entered():
                self._assemble_until_end()
        except Closed:
            pass
        except BaseException as error:  # noqa: BLE001
            self._batches.put(_Failure(error))

    def _assemble_until_end(self) -> None:
        while not isinstance(item := self._windows.get(), End):
            if isinstance(item, _Failure):
                self._batches.put(item)
                return
            window, placed = self._place(item)
            del item
            for number in range(len(window.splits)):
                self._batches.put(self._assemble(window, number, placed))
            if placed is None:
                self._window_budget.release(window.nbytes)
            # Frees the window's buffers for the next one before waiting for it.
            del window, placed
        if not self._is_stopped:  # else there may be more to come
            self._batches.put(END)

    def _place(self, window: Window) -> tuple[Window, Placed | None]:
        """Begin to bring a window to the device, if it is to go there; then the host is done with its bytes."""
        device = self._contents.device
        if window.slab is None or device is None:
            return window, None
        placed = place(window, window.slab, self._device_builders, device, self._pool)
        self._window_budget.release(window.nbytes)
        return window.without_blocks(), placed

    def _assemble(self, window: Window, number: int, placed: Placed | None) -> _Ready[LoaderOutput]:
        contents = self._contents
        if placed is not None:
            split = window.splits[number]
            on_device = list(zip(self._device_builders, window.matrices, strict=True))
            nbytes = sum(builder.nbytes(loaded, split) for builder, loaded in on_device)
            self._batch_budget.reserve(nbytes)
            built = [builder.build(loaded, placed, number) for builder, loaded in on_device]
        else:
            on_host = list(zip(self._builders, window.matrices, strict=True))
            rows = window.batches[number]
            nbytes = sum(builder.nbytes(loaded, rows) for builder, loaded in on_host)
            self._batch_budget.reserve(nbytes)
            parts = [builder.build(loaded, rows, self._assemblers.run) for builder, loaded in on_host]
            built = [m.deliver(part) for m, part in zip(contents.matrices, parts, strict=True)]
        batch = contents.batch(window, number, built, placed)
        handover = None if contents.device is None else contents.device.hand_over(placed, number)
        return _Ready(batch, nbytes, handover)


def _lengths_of(parts: Sequence[Located], assignments: Sequence[Assignment], slab: Slab | None) -> NDArray[np.int64]:
    """Entries of each row of a window that goes to a device; of another, blocks say so."""
    lengths = np.zeros(0 if slab is None else sum(len(a.rows) for a in assignments), np.int64)
    if slab is not None:
        for assignment, part in zip(assignments, parts, strict=True):
            lengths[assignment.places] = part.lengths
    return lengths


def _run(tasks: Sequence[Callable[[], T]]) -> list[T]:
    return [task() for task in tasks]


def _make_builder(matrix: Matrix, pool: BufferPool, n_parts: int) -> BatchBuilder | TokenBuilder:
    form = matrix.form
    if matrix.tokens is not None:
        return TokenBuilder(matrix.tokens, pool, n_parts)
    return BatchBuilder(form, form.width_of(matrix.shape), matrix.sources[0].is_sparse, pool, n_parts)
