"""One pass over a loader's rows: what a for loop holds."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator

from annbatch_dask.loader.budget import END, End
from annbatch_dask.loader.fetch import Pipeline
from annbatch_dask.loader.state import Progress
from annbatch_dask.types import LoaderOutput, LoadRequest

__all__ = ["Iteration"]

_REQUESTS_AHEAD = 6  # of the one whose batches are handed out; prefetch_bytes may allow fewer windows
_FIRST_REQUESTS = 3  # which the first batch waits for the sampler to draw
_MORE_REQUESTS = 2  # at each batch, until so many are ahead


class Iteration(Iterator[LoaderOutput]):
    """Batches of one pass. A few requests are kept under way; the sampler runs in the consumer's thread.

    Nothing is begun before the first batch is asked for. An iterator that is dropped lets its threads end without
    waiting for them: the garbage collector may drop it in any thread.

    Parameters
    ----------
    progress
        Counts what is handed out.
    begin
        Gives the requests of the pass, and what loads them.
    passes
        The passes under way, of which this is to be one from its first batch to its end.
    """

    def __init__(
        self,
        progress: Progress,
        begin: Callable[[Progress], tuple[Iterator[LoadRequest], Pipeline]],
        passes: set[object],
    ) -> None:
        self._progress, self._begin, self._passes = progress, begin, passes
        self._mark = object()
        self._requests: Iterator[LoadRequest] = iter(())
        self._pipeline: Pipeline | None = None
        self._pending: deque[int] = deque()  # batches of each request that is under way
        self._are_more = True
        self._is_over = False
        self._pid = os.getpid()
        self._in_use = threading.Lock()

    def __next__(self) -> LoaderOutput:
        self._enter()
        try:
            batch = self._next_batch()
            if isinstance(batch, End):
                self._end()
        except BaseException as error:
            self._end()
            if isinstance(error, StopIteration):
                msg = "a sampler or a transform raised StopIteration, which would have ended the epoch silently"
                raise RuntimeError(msg) from error
            raise
        finally:
            self._in_use.release()
        if isinstance(batch, End):
            raise StopIteration
        return batch

    def close(self) -> None:
        """End the pass and its threads, and wait for work that is under way."""
        self._enter()
        try:
            self._end()
        finally:
            self._in_use.release()

    def __del__(self) -> None:
        """Let the threads end: no lock may be taken here, and no thread waited for."""
        self._is_over = True
        self._passes.discard(self._mark)
        if self._pipeline is not None:
            self._pipeline.stop()

    def _enter(self) -> None:
        if not self._in_use.acquire(blocking=False):
            msg = "this iterator is in use by another thread; make one for each, or take turns"
            raise ValueError(msg)

    def _next_batch(self) -> LoaderOutput | End:
        if self._is_over:
            return END
        pipeline = self._find_pipeline()
        n_wanted = max(_FIRST_REQUESTS, min(len(self._pending) + _MORE_REQUESTS, _REQUESTS_AHEAD + 1))
        while self._are_more and len(self._pending) < n_wanted:
            self._submit_next(pipeline)
        batch = pipeline.get()
        if isinstance(batch, End):
            self._progress.is_over = True
            return batch
        self._pending[0] -= 1
        if self._pending[0] == 0:
            self._pending.popleft()
        self._progress.n_batches += 1
        return batch

    def _find_pipeline(self) -> Pipeline:
        if self._pipeline is None:
            self._passes.add(self._mark)
            self._pid = os.getpid()
            self._requests, self._pipeline = self._begin(self._progress)
        elif self._pid != os.getpid():
            msg = (
                f"this iterator was begun in process {self._pid}, and its threads are not in this one, {os.getpid()}, "
                "which was forked since; iterate over the loader anew"
            )
            raise RuntimeError(msg)
        return self._pipeline

    def _submit_next(self, pipeline: Pipeline) -> None:
        """Hand the next request in, if there is one. An error waits for its turn."""
        try:
            request = next(self._requests, None)
            n_batches = 0 if request is None else len(request["splits"])
        except Exception as error:  # noqa: BLE001
            self._are_more = False
            pipeline.fail(error)
            return
        if request is None:
            self._are_more = False
            pipeline.finish()
        elif n_batches:
            self._pending.append(n_batches)
            pipeline.submit(request)

    def _end(self) -> None:
        self._is_over = True
        self._passes.discard(self._mark)
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None  # not before: where closing is interrupted, threads are still to be ended
        requests, self._requests = self._requests, iter(())
        close = getattr(requests, "close", None)
        if close is not None:
            close()
