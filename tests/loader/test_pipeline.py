"""Threads, files and memory: read ahead, in order, bounded, and gone afterwards."""

from __future__ import annotations

import gc
import importlib.util
import multiprocessing
import re
import sys
import threading
import traceback
from functools import partial
from types import SimpleNamespace

import anndata as ad
import numba
import numpy as np
import pytest
import scipy.sparse as sp
import zarr

from annbatch_dask.chunks.reader import RangeReader
from annbatch_dask.errors import IntegrityError
from annbatch_dask.loader import Loader, helpers
from annbatch_dask.loader import fetch as fetch_module
from annbatch_dask.loader import requests as requests_module
from annbatch_dask.loader.backing import ArraySource, ZarrCsrSource
from annbatch_dask.loader.budget import ByteLimit
from annbatch_dask.loader.helpers import Closed
from tests.leaks import lasting_threads, loader_threads, open_files
from tests.loader.data import dense, matrix, quiet, write_collection
from tests.loader.loaders import check_epoch, csr, make
from tests.samplers.tools import Minimal

pytestmark = pytest.mark.timeout(240)  # a hang
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")


def clean(collection):
    """At once, as an iterator is over or closed."""
    return not loader_threads() and not open_files(collection.path)


def clean_soon(collection):
    """An iterator that is dropped waits for nothing."""
    return not lasting_threads() and not open_files(collection.path)


def test_nothing_is_left_after_an_epoch(collection):
    loader = make(collection, shuffle=True)
    iterator = iter(loader)
    next(iterator)
    assert loader_threads()
    for _ in iterator:
        pass
    assert clean(collection)


def test_nothing_is_left_after_an_early_end(collection):
    loader = make(collection, shuffle=True)
    for _ in loader:
        break
    assert clean_soon(collection)
    iterator = iter(loader)
    next(iterator)
    iterator.close()
    assert clean(collection)
    iterator = iter(loader)
    next(iterator)
    del iterator
    assert clean_soon(collection)
    with pytest.raises(ZeroDivisionError):
        for _ in loader:
            _ = 1 / 0
    assert clean_soon(collection)


def test_nothing_is_left_of_an_iterator_in_a_cycle(collection):
    cycle = [iter(make(collection))]
    cycle.append(cycle)
    next(cycle[0])
    del cycle
    gc.collect()
    assert clean_soon(collection)


def test_nothing_is_started_before_the_first_batch_is_asked_for(collection):
    iterator = iter(make(collection))
    assert clean(collection)
    iterator.close()


def test_two_iterators_at_once(collection):
    loader = make(collection, shuffle=True, seed=1)
    alone = [[batch["index"].tolist() for batch in epoch] for epoch in (loader, loader)]
    again = make(collection, shuffle=True, seed=1)
    together = [([a["index"].tolist(), b["index"].tolist()]) for a, b in zip(again, again, strict=True)]
    assert [list(epoch) for epoch in zip(*together, strict=True)] == alone


@pytest.mark.parametrize("n_threads", [1, 2, 4])
def test_order_does_not_depend_on_threads(collection, monkeypatch, n_threads):
    monkeypatch.setattr("annbatch_dask.loader.loader.count_threads", lambda: n_threads)
    found = [batch["index"].tolist() for batch in make(collection, shuffle=True, seed=1)]
    monkeypatch.undo()
    assert found == [batch["index"].tolist() for batch in make(collection, shuffle=True, seed=1)]


@pytest.mark.parametrize("prefetch_bytes", [1, 20_000, 10**9])
def test_any_prefetch_budget_works(collection, prefetch_bytes):
    check_epoch(make(collection, shuffle=True, prefetch_bytes=prefetch_bytes), collection)


def test_loading_runs_ahead_but_not_beyond_the_budget(collection, monkeypatch):
    fetched = []
    original = fetch_module.Pipeline._begin

    def fetch(self, request, begun):
        one = original(self, request, begun)
        fetched.append(len(one.window.rows))
        seen.set() if len(fetched) >= 3 else None
        return one

    monkeypatch.setattr(fetch_module.Pipeline, "_begin", fetch)
    seen = threading.Event()
    iterator = iter(make(collection))
    next(iterator)
    assert seen.wait(30)  # two windows more than the one being consumed
    iterator.close()

    fetched.clear()
    iterator = iter(make(collection, prefetch_bytes=1))
    next(iterator)
    assert len(fetched) == 1  # a second window is not begun while the first is in use
    iterator.close()


def test_kept_batches_are_never_overwritten(tmp_path):
    """Batches large enough for the pool; all kept, all still right at the end."""
    x = np.random.default_rng(0).random((300, 4000)).astype(np.float32)
    for kwargs in ({}, {"dense": True}):
        loader = Loader(
            batch_size=50,
            chunk_size=50,
            preload_nchunks=2,
            shuffle=True,
            preload_to_gpu=False,
            return_index=True,
            **kwargs,
        )
        loader.add_dataset(sp.csr_matrix(x) if kwargs else x)
        kept = [(batch["index"], batch["X"]) for _ in range(3) for batch in loader]
        for index, rows in kept:
            np.testing.assert_array_equal(dense(rows), x[index])


def test_dropped_batches_are_used_again():
    x = np.zeros((1000, 4000), np.float32)
    # Batches of 0.8 MB: two or three may lie ready, one is made and two are in the consumer's hands.
    loader = Loader(
        batch_size=50, chunk_size=50, preload_nchunks=2, preload_to_gpu=False, prefetch_bytes=4_000_000
    ).add_dataset(x)
    addresses = [batch["X"].__array_interface__["data"][0] for batch in loader]
    assert len(addresses) == 20
    assert len(set(addresses)) <= 8


def test_errors_reach_the_consumer_in_their_turn(tmp_path):
    stored = write_collection(tmp_path / "c.zarr", sizes=(40, 40))
    data = stored.path / "dataset_1" / "X" / "data" / "c" / "0"
    raw = bytearray(data.read_bytes())
    raw[-10] ^= 1
    data.write_bytes(raw)
    iterator = iter(make(stored))
    got = [next(iterator)["index"][0] for _ in range(5)]
    assert got == [0, 8, 16, 24, 32]
    with pytest.raises(IntegrityError, match="is damaged") as caught:
        next(iterator)
    assert "_read_index" in "".join(traceback.format_tb(caught.value.__traceback__))
    assert clean(stored)


def test_errors_of_a_task_reach_the_consumer(collection, monkeypatch):
    def broken(self, spans, out):
        def task():
            message = "disk on fire"
            raise OSError(message)

        return [task] * 5

    monkeypatch.setattr(RangeReader, "tasks", broken)
    with pytest.raises(OSError, match="disk on fire"):
        list(make(collection))
    assert clean(collection)


class Windows:
    """Reading of a matrix in memory, window by window of ten rows, as the test has it."""

    def __init__(self, monkeypatch, tasks, **kwargs):
        original, submit = ArraySource.open, fetch_module.Pipeline.submit
        self.begun, n_asked, are_asked = [], [], threading.Event()

        def asked(pipeline, request):
            submit(pipeline, request)
            n_asked.append(request)
            if len(n_asked) == 3:  # as many as are handed in before the first batch is waited for
                are_asked.set()

        def opened(source, located, pool):
            assert are_asked.wait(30)
            block, _ = original(source, located, pool)
            self.begun.append(len(self.begun))
            return block, [partial(tasks, self.begun[-1]), int]  # a second one, so that a second thread helps

        monkeypatch.setattr(fetch_module.Pipeline, "submit", asked)
        monkeypatch.setattr(ArraySource, "open", opened)
        monkeypatch.setattr("annbatch_dask.loader.loader.count_threads", lambda: 4)
        loader = Loader(
            batch_size=5, chunk_size=10, preload_nchunks=1, preload_to_gpu=False, return_index=True, **kwargs
        )
        self.iterator = iter(loader.add_dataset(matrix(60)))

    def first_rows(self):
        """Of the batches to come, up to an error or the end."""
        for batch in self.iterator:
            yield int(batch["index"][0])


def test_the_next_window_is_begun_before_one_is_whole(monkeypatch):
    begun = [threading.Event() for _ in range(6)]

    def task(number):
        begun[number].set()
        assert number > 1 or begun[number + 1].wait(30)

    assert list(Windows(monkeypatch, task).first_rows()) == list(range(0, 60, 5))


def test_without_room_windows_are_read_one_by_one(monkeypatch):
    under_way = []

    def task(number):
        under_way.append(number)
        assert under_way == [number]
        under_way.remove(number)

    monkeypatch.setattr(ArraySource, "_is_direct", False)  # it takes memory
    assert list(Windows(monkeypatch, task, prefetch_bytes=1).first_rows()) == list(range(0, 60, 5))


@pytest.mark.parametrize("failing", [(1,), (1, 2), (0, 1), (5,)])
def test_of_two_windows_that_fail_the_first_has_its_say(monkeypatch, failing):
    """Whichever fails first; those before are delivered, none after."""
    ended = [threading.Event() for _ in range(8)]
    ended[6].set()

    def task(number):
        try:
            if number in failing:
                if number + 1 in failing:
                    ended[number + 1].wait(30)  # the one behind has failed by now
                message = f"window {number}"
                raise OSError(message)
        finally:
            ended[number].set()

    rows = Windows(monkeypatch, task).first_rows()
    assert [next(rows) for _ in range(2 * failing[0])] == list(range(0, 10 * failing[0], 5))
    with pytest.raises(OSError, match=f"window {failing[0]}"):
        next(rows)


def test_errors_of_a_sampler_come_after_its_batches():
    class Failing(Minimal):
        def _sample(self, n_obs):
            yield from self.requests
            message = "no more ideas"
            raise LookupError(message)

    sampler = Failing([{"requests": [slice(0, 5)]}] * 3, 5, shuffle=False)
    iterator = iter(Loader(batch_sampler=sampler, preload_to_gpu=False).add_dataset(csr()))
    assert len([next(iterator) for _ in range(3)]) == 3
    with pytest.raises(LookupError, match="no more ideas"):
        next(iterator)


def test_adding_is_refused_while_iterating():
    loader = Loader(batch_size=5, preload_to_gpu=False).add_dataset(matrix(20))
    iterator = iter(loader)
    next(iterator)
    with pytest.raises(RuntimeError, match="while the loader is being iterated"):
        loader.add_dataset(matrix(20))
    iterator.close()
    assert loader.add_dataset(matrix(20)).n_obs == 40


def test_requests_without_batches_are_skipped():
    nothing = {"requests": [slice(0, 5)], "splits": []}
    some = {"requests": [slice(5, 8)], "splits": [np.arange(3), np.arange(0)]}
    sampler = Minimal([nothing, some, nothing])
    loader = Loader(batch_sampler=sampler, preload_to_gpu=False, return_index=True).add_dataset(csr())
    assert [batch["index"].tolist() for batch in loader] == [[5, 6, 7], []]


def test_a_reservation_that_turns_out_too_large_leaves_room():
    budget = ByteLimit(10)
    budget.reserve(9)
    assert not budget.has_room(9)
    budget.shrink(8)
    assert budget.has_room(9)
    budget.reserve(9)
    budget.release(1)
    budget.release(9)
    assert budget.has_room(10)


def test_budget():
    budget = ByteLimit(10)
    budget.reserve(50)  # more than there is, but alone
    waiting = threading.Thread(target=budget.reserve, args=(1,))
    waiting.start()
    budget.release(50)
    waiting.join(10)
    budget.reserve(9)
    blocked = []

    def reserve():
        try:
            budget.reserve(1)
        except Closed:
            blocked.append(True)

    waiting = threading.Thread(target=reserve)
    waiting.start()
    budget.close()
    waiting.join(10)
    assert blocked == [True]


def test_a_transform_that_returns_nothing_is_named():
    def scale(batch):
        batch["X"] *= 2

    loader = Loader(batch_size=5, preload_to_gpu=False, transform=[scale, dict]).add_dataset(matrix(20))
    with pytest.raises(TypeError, match=r"scale returned None; return the batch"):
        list(loader)


def test_stop_iteration_does_not_end_an_epoch():
    """Raised by the user's code, it would look like the end to a for loop."""

    def stop(batch):
        raise StopIteration

    with pytest.raises(RuntimeError, match="raised StopIteration"):
        list(Loader(batch_size=5, preload_to_gpu=False, transform=stop).add_dataset(matrix(20)))

    class Stopping(Minimal):
        def n_batches(self, n_obs):
            return 1

        def resume_requests(self, n_obs, epoch, n_done):
            raise StopIteration

    sampler = Stopping([{"requests": [slice(0, 5)]}], 5, shuffle=False)
    with pytest.raises(RuntimeError, match="raised StopIteration"):
        list(Loader(batch_sampler=sampler, preload_to_gpu=False).add_dataset(csr()))


def test_an_error_frees_the_window_with_it():
    """Not only once the garbage collector looks: buffers are large."""
    x = np.zeros((64, 4000), np.float32)

    def fail(batch):
        message = "not this one"
        raise LookupError(message)

    gc.collect()
    gc.disable()
    try:
        loader = Loader(batch_size=8, chunk_size=8, preload_nchunks=1, preload_to_gpu=False, transform=fail)
        iterator = iter(loader.add_dataset(x))
        with pytest.raises(LookupError, match="not this one"):
            next(iterator)
        pipelines = [one for one in gc.get_objects() if type(one) is fetch_module.Pipeline]
        assert not pipelines
    finally:
        gc.enable()


def test_two_threads_take_turns_with_an_iterator():
    at, go = threading.Event(), threading.Event()

    def wait(batch):
        at.set()
        go.wait(30)
        return batch

    iterator = iter(Loader(batch_size=5, preload_to_gpu=False, transform=wait).add_dataset(matrix(20)))
    first = threading.Thread(target=next, args=(iterator,))
    first.start()
    assert at.wait(30)
    for use in (iterator.close, partial(next, iterator)):
        with pytest.raises(ValueError, match="in use by another thread"):
            use()
    go.set()
    first.join()
    assert len(list(iterator)) == 3


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_an_iterator_is_of_no_use_in_a_forked_process(collection):
    """Its threads are not there: it says so, and can be closed and dropped; the loader makes another."""
    loader = make(collection)
    iterator = iter(loader)
    next(iterator)

    def use(connection):
        try:
            next(iterator)
        except RuntimeError as error:
            connection.send(str(error))
        iterator.close()
        connection.send(len(list(loader)))

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=use, args=(theirs,))
    process.start()
    assert ours.poll(30)
    assert "was forked since; iterate over the loader anew" in ours.recv()
    assert ours.poll(30)
    assert ours.recv() == len(loader)
    process.join()
    iterator.close()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_a_fork_while_row_pointers_are_read(collection, monkeypatch):
    """A DataLoader forks its workers while an iterator of the parent reads: no lock of that time reaches them."""
    at, go = threading.Event(), threading.Event()
    read = ZarrCsrSource._read_indptr

    def wait(source):
        at.set()
        go.wait(30)
        return read(source)

    monkeypatch.setattr(ZarrCsrSource, "_read_indptr", wait)
    loader = make(collection)
    busy = threading.Thread(target=list, args=(loader,))
    busy.start()
    assert at.wait(30)
    monkeypatch.undo()
    ours, theirs = multiprocessing.Pipe()
    target = lambda: theirs.send(len(list(loader)))  # noqa: E731
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    came = ours.poll(30)
    process.kill()
    process.join()
    go.set()
    busy.join()
    assert came


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_a_fork_while_kernels_are_compiled():
    """A loader's first batch compiles in its threads; a worker forked then compiles kernels of its own."""
    from numba.core.compiler_lock import global_compiler_lock

    def add_one(x):
        return x + 1

    at = threading.Event()

    def compile_here():
        with global_compiler_lock:
            at.set()
            numba.njit(add_one)(1)

    compiling = threading.Thread(target=compile_here)
    compiling.start()
    assert at.wait(30)
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=lambda: theirs.send(numba.njit(add_one)(1.5)))
    process.start()
    came = ours.poll(30)
    process.kill()
    process.join()
    compiling.join()
    assert came


# --- threads


@pytest.mark.parametrize(
    ("allowed", "there", "ranks", "workers", "expected"),
    [
        (4, 8, None, 1, 4),
        (16, 16, "8", 1, 2),
        (16, 16, "8", 4, 1),
        (2, 16, "8", 1, 2),  # bound to cores of its own
        (64, 64, None, 1, 16),
        (4, 8, "many", 1, 4),
    ],
)
def test_threads_share_the_cores(monkeypatch, allowed, there, ranks, workers, expected):  # noqa: PLR0913
    monkeypatch.setattr("annbatch_dask.loader.helpers.n_cpus", lambda: allowed)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(allowed)))
    monkeypatch.setattr("os.cpu_count", lambda: there)
    for name in helpers._LOCAL_SIZES:
        monkeypatch.delenv(name, raising=False)
    if ranks:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    info = SimpleNamespace(num_workers=workers)
    data = SimpleNamespace(get_worker_info=lambda: info)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(utils=SimpleNamespace(data=data)))
    assert helpers.count_threads() == expected


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "8"),
        ("MPI_LOCALNRANKS", "8"),
        ("SLURM_STEP_TASKS_PER_NODE", "8"),
        ("SLURM_STEP_TASKS_PER_NODE", "8(x3),4"),
        ("SLURM_STEP_TASKS_PER_NODE", "8,4"),
    ],
)
def test_ranks_share_the_cores_whatever_started_them(monkeypatch, name, said):
    monkeypatch.setattr("annbatch_dask.loader.helpers.n_cpus", lambda: 16)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    for other in helpers._LOCAL_SIZES:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, said)
    assert helpers.count_threads() == 2


def test_threads_know_the_share_of_a_container(monkeypatch):
    """16 cores to see, of which a quota gives 4 to the container, where 2 ranks run."""
    monkeypatch.setattr("dask.system._try_extract_cgroup_cpu_quota", lambda: (400_000, 100_000))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    monkeypatch.setattr("psutil.Process.cpu_affinity", lambda _: list(range(16)))
    monkeypatch.setattr("os.process_cpu_count", lambda: 16, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert helpers.count_threads() == 2


def test_where_no_thread_can_be_started_nothing_is_left(collection, monkeypatch):
    """Containers limit their number."""
    start = threading.Thread.start

    def limited(thread):
        if thread.name.endswith("assemble"):
            message = "can't start new thread"
            raise RuntimeError(message)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    loader = make(collection)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        next(iter(loader))
    monkeypatch.undo()
    assert clean_soon(collection)
    assert len(list(loader)) == len(loader)


def test_a_loader_goes_on_with_the_threads_it_gets(collection, monkeypatch, caplog):
    start = threading.Thread.start

    def limited(thread):
        if thread.name.endswith("-helper_1"):
            message = "can't start new thread"
            raise RuntimeError(message)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    monkeypatch.setattr("annbatch_dask.loader.loader.count_threads", lambda: 4)
    check_epoch(make(collection, shuffle=True), collection)
    assert re.search(r"goes on with 1 of \d helper threads: can't start new thread", caplog.text)


def test_an_iterator_that_outlives_its_threads_says_so(collection):
    """One that is used in an atexit handler of the user's."""
    iterator = iter(make(collection, prefetch_bytes=1))
    next(iterator)
    helpers._end_threads()
    with pytest.raises(RuntimeError, match="have ended, as the interpreter does"):
        list(iterator)


def test_the_first_error_of_a_job_is_raised_once_all_tasks_have_ended():
    crew = helpers.Helpers("test", 3)
    ended = []

    def fail(number):
        ended.append(number)
        raise OSError(number)

    tasks = [partial(ended.append, 0), partial(fail, 1), partial(fail, 2), partial(ended.append, 3)]
    for _ in range(20):
        ended.clear()
        with pytest.raises(OSError, match="1"):
            crew.run(tasks)
        assert sorted(ended) == [0, 1, 2, 3]
    assert crew.run([lambda k=k: k for k in range(10)]) == list(range(10))
    crew.stop()
    with pytest.raises(Closed):
        crew.run(tasks)
    crew.join()


@pytest.mark.parametrize("n_threads", [2, 3, 8, 17])
def test_all_threads_come_for_a_long_job(n_threads):
    """Each that comes wakes others, the one that waits is one of them."""
    crew, meeting = helpers.Helpers("test", n_threads), threading.Barrier(n_threads, timeout=60)
    for _ in range(5):
        crew.run([meeting.wait] * n_threads)
    job = crew.start([meeting.wait] * (n_threads - 1))  # without the one that waits
    meeting.wait()
    job.wait()
    crew.stop()
    crew.join()


def test_threads_of_a_job_that_waits_are_not_those_of_the_next():
    """As with windows from a store: all requests of several are under way, as far as there may be so many."""
    crew, together = helpers.Helpers("test", 8), threading.Barrier(7)
    jobs = [crew.start([partial(together.wait, 20)] * 3) for _ in range(2)]
    assert together.wait(20) in range(7)
    for job in jobs:
        job.wait()
    assert len(crew._threads) == 6
    crew.stop()
    crew.join()


@pytest.mark.parametrize("at_once", [0, 64])
def test_frames_of_batches_are_their_rows(collection, monkeypatch, at_once):
    """Those of few are cut at once, those of many one by one."""
    monkeypatch.setattr(requests_module, "_MAX_FRAMES", at_once)
    for sizes in ({}, {"drop_last": True}, {"batch_size": 1}):
        loader = make(collection, shuffle=True, **sizes)
        check_epoch(loader, collection, loader.batch_sampler.batch_size * len(loader) if "drop_last" in sizes else None)


# --- torch's DataLoader


def plain(batch):
    """What may cross to another process without shared memory."""
    return batch["index"].tolist(), dense(batch["X"]).tolist()


class Plain:
    """Collates single rows of a loader of batch size 1."""

    def __call__(self, batches):
        return [plain(batch) for batch in batches]


@needs_torch
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("n_workers", "context"),
    [
        (0, None),
        (1, "fork"),
        (2, "fork"),
        # Slow; test_resume.py has a spawn that is always run.
        pytest.param(2, "forkserver", marks=pytest.mark.chaos),
        pytest.param(2, "spawn", marks=pytest.mark.chaos),
    ],
)
@pytest.mark.timeout(600)  # new interpreters take their time; a worker that hangs is found by DataLoader's own limit
def test_dataloader(collection, n_workers, context):
    from torch.utils.data import DataLoader

    loader = make(collection, batch_size=1, shuffle=True, seed=0)
    busy = iter(make(collection))
    next(busy)  # threads run while workers are forked
    workers = {"num_workers": n_workers, "multiprocessing_context": context, "timeout": 240} if n_workers else {}
    found = [row for rows in DataLoader(loader, batch_size=16, collate_fn=Plain(), **workers) for row in rows]
    busy.close()
    assert sorted(index for (index,), _ in found) == list(range(221))
    for (index,), (x,) in found:
        assert x == collection.x[index].tolist()


@needs_torch
def test_dataloader_passes_batches_through(collection):
    from torch.utils.data import DataLoader

    loader = make(collection, shuffle=True, to="torch")
    assert len(list(DataLoader(loader, batch_size=None))) == len(loader)


def test_stores_other_than_local(collection):
    """Through zarr's own reading, threads and all."""

    class InMemory:
        is_empty = False

        def __iter__(self):
            root = zarr.open_group(collection.path, mode="r")
            for name in sorted(root.keys()):
                group = zarr.create_group({})
                for array in ("data", "indices", "indptr"):
                    values = root[name]["X"][array]
                    group.create_array(f"X/{array}", data=values[:], chunks=(40,))
                group["X"].attrs.update(root[name]["X"].attrs)
                with quiet():
                    for frame in ("obs", "var"):
                        ad.io.write_elem(group, frame, ad.io.read_elem(root[name][frame]))
                yield group

    check_epoch(make(InMemory(), shuffle=True), collection)
