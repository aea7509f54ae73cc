"""What a build makes of a cluster: its budget, its client, and errors of its tasks."""

import asyncio
import contextlib
import errno
import os
import re
import subprocess
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import psutil
import pytest
from dask import config
from dask.local import get_sync
from dask.threaded import get as dask_threads
from distributed import Client, LocalCluster, get_client
from distributed.core import Status

from annbatch_dask import DatasetCollection
from annbatch_dask.engines import choose, dask, waiting
from annbatch_dask.engines.choose import choose_engine
from annbatch_dask.engines.dask import ClusterEngine, LocalEngine
from annbatch_dask.engines.local_cluster import local_client, workers_process
from annbatch_dask.engines.needs import Needs
from annbatch_dask.errors import MissingPackageError, SchedulerError, SourceError, StorageError
from annbatch_dask.etl import start
from annbatch_dask.events import Callback
from annbatch_dask.plan.memory import MIB, Budget

BUDGET = Budget(2**30, 1)


NEVER_FULL = {f"distributed.worker.memory.{what}": False for what in ("target", "spill", "pause", "terminate")}
"""Its workers would count what all tests before took as theirs, and pause."""


@contextlib.contextmanager
def cluster(**options):
    """One whose workers are threads of this process."""
    options = {"processes": False, "threads_per_worker": 2, "dashboard_address": "127.0.0.1:0"} | options
    with (
        config.set(NEVER_FULL),
        LocalCluster(**options) as started,
        Client(started, set_as_default=False) as client,
    ):
        yield started, client


@pytest.fixture(scope="module")
def client():
    with cluster(n_workers=2, memory_limit="600MiB") as (_, client):
        yield client


def test_the_first_worker_is_waited_for(caplog):
    """Of a cluster that starts workers for tasks alone."""
    with cluster(n_workers=0, memory_limit="600MiB") as (started, client):
        started.adapt(minimum=0, maximum=1, interval="50ms")
        assert choose_engine(client, None).budget == Budget(600 * MIB, 2)
    assert "no worker has joined" in caplog.text


def test_it_is_said_again_that_the_first_worker_is_waited_for(monkeypatch):
    monkeypatch.setattr(choose, "NO_WORKER_S", 0.05)
    messages, said_twice = [], threading.Event()

    def warn(message, *arguments):
        messages.append(message % arguments)
        if len(messages) == 2:
            said_twice.set()

    monkeypatch.setattr(choose.logger, "warning", warn)
    with cluster(n_workers=0, memory_limit="600MiB") as (started, client), ThreadPoolExecutor(1) as pool:
        choosing = pool.submit(choose_engine, client, None)
        assert said_twice.wait(60)
        started.scale(1)
        assert choosing.result(60).budget == Budget(600 * MIB, 2)
    assert all("waiting for the first" in message for message in messages)


def test_a_worker_that_does_not_come_is_an_error(monkeypatch):
    monkeypatch.setattr(choose, "WORKER_TIMEOUT_S", 0.1)
    with (
        cluster(n_workers=0) as (_, client),
        pytest.raises(SchedulerError, match=r"no worker has joined .* within 0.1 s; start some"),
    ):
        choose_engine(client, None)


@pytest.mark.parametrize("name", ["tcp://head:8786", "thread", "slurm", print])
def test_a_scheduler_that_dask_does_not_know_is_refused(tmp_path, h5ad_pair, name):
    """It would be a local cluster instead, of which nobody knows."""
    collection = DatasetCollection(tmp_path / "o.zarr")
    with config.set(scheduler=name):
        for call in (collection.plan_adatas, collection.add_adatas):
            with pytest.raises(
                SchedulerError, match=r"dask is set to use scheduler=.*, which is none of threads, sync"
            ):
                call(h5ad_pair)
    assert not (tmp_path / "o.zarr").exists()


def test_a_client_that_dask_is_set_to_use_has_to_be_there():
    with config.set(scheduler="distributed"), pytest.raises(SchedulerError, match="and there is no client; make one"):
        choose_engine(None, None)


@pytest.mark.parametrize(
    ("scheduler", "name"), [("Threads", "threads"), (dask_threads, "threads"), (get_sync, "sync"), ("sync", "sync")]
)
def test_schedulers_in_this_process_by_name_or_function(scheduler, name):
    with config.set(scheduler=scheduler):
        assert choose_engine(None, None).scanner.name == f"dask's {name} scheduler"


def test_the_address_that_dask_is_set_to_use(monkeypatch):
    monkeypatch.setattr(choose, "_clients", {})
    with cluster(n_workers=1, memory_limit="600MiB", protocol="tcp://") as (started, _):
        with config.set({"scheduler-address": started.scheduler_address}):
            with contextlib.closing(choose_engine(None, None).scanner.client) as client:
                assert client.scheduler.address == started.scheduler_address
                assert choose_engine(None, None).scanner.client is client
                with config.set(scheduler="threads"):
                    assert isinstance(choose_engine(None, None).scanner, LocalEngine)
            with contextlib.closing(choose_engine(None, None).scanner.client) as another:  # the first one was closed
                assert another.status == "running"
    with (
        config.set({"scheduler-address": "tcp://127.0.0.1:9"}),
        pytest.raises(SchedulerError, match="no Dask scheduler answers at tcp://127.0.0.1:9"),
    ):
        choose_engine(None, None)


def test_tasks_in_threads_end_before_an_error_is_told():
    """Their build is about to give up the lock under which they write."""
    runs, may_end, ended = threading.Event(), threading.Event(), []

    def task(kind):
        if kind == "fails":
            assert runs.wait(60)
            threading.Thread(target=may_end.set).start()
            raise SourceError("a task")
        runs.set()
        assert may_end.wait(60)
        ended.append(kind)

    with config.set(num_workers=2), pytest.raises(SourceError, match="a task"):
        LocalEngine("threads", BUDGET).run("tasks", task, [("runs",), ("fails",)], lambda *_: None, str)
    assert ended == ["runs"]


class Said:
    """What is warned of, of which the first can be waited for."""

    def __init__(self, monkeypatch):
        self.messages, self.is_said = [], threading.Event()
        monkeypatch.setattr(waiting, "NO_WORKER_S", 0.05)
        monkeypatch.setattr(waiting.logger, "warning", self.warn)

    def warn(self, message, *arguments):
        self.messages.append(message % arguments)
        self.is_said.set()


def test_it_is_said_that_no_worker_is_there_and_which_is_waited_for(monkeypatch):
    said = Said(monkeypatch)
    with cluster(n_workers=1) as (started, client), ThreadPoolExecutor(1) as pool:
        started.scale(0)
        while client.scheduler_info(n_workers=-1)["workers"]:
            client.sync(asyncio.sleep, 0.01)
        engine = ClusterEngine(client, BUDGET).needing(Needs(peaks={"scatter": 100 * MIB}))
        doing = pool.submit(engine.run, "scatter", abs, [(-3,)], lambda *_: None, str)
        assert said.is_said.wait(60)
        started.scale(1)
        assert doing.result(60) == [3]
    assert "scatter: no worker has been there for up to" in said.messages[0]
    assert "1 of 1 task waits for one with 545 MB a thread; start workers, or interrupt the build" in said.messages[0]


async def pause(dask_worker):
    dask_worker.status = Status.paused


async def unpause(dask_worker):
    dask_worker.status = Status.running


def test_it_is_said_that_all_workers_are_paused(monkeypatch):
    """As they are where their memory is full: Dask then waits without a word, too."""
    said = Said(monkeypatch)
    with cluster(n_workers=1) as (_, client), ThreadPoolExecutor(1) as pool:
        client.run(pause)
        doing = pool.submit(ClusterEngine(client, BUDGET).run, "gather", abs, [(-3,)], lambda *_: None, str)
        assert said.is_said.wait(60)
        client.run(unpause)
        assert doing.result(60) == [3]
    assert "gather: no worker has taken tasks (1 paused) for up to" in said.messages[0]


def test_a_scheduler_that_gives_up_waiting_is_named():
    with config.set({"distributed.scheduler.no-workers-timeout": "100ms"}), cluster(n_workers=1) as (started, client):
        started.scale(0)
        while client.scheduler_info(n_workers=-1)["workers"]:
            client.sync(asyncio.sleep, 0.01)
        with pytest.raises(
            SchedulerError, match=r"no worker took a task for 0 s.*no-workers-timeout gives it up; set that"
        ):
            ClusterEngine(client, BUDGET).run("scatter", abs, [(-3,)], lambda *_: None, str)


def test_workers_without_a_limit_share_their_host(caplog, monkeypatch):
    monkeypatch.setattr(choose, "memory_nbytes", lambda: 3000 * MIB)
    with cluster(n_workers=3, memory_limit=0) as (_, client):
        assert choose_engine(client, None).budget == Budget(1000 * MIB, 2)
        assert "3 of 3 workers have no memory limit: each is taken to have an equal share" in caplog.text
        assert "1.0 GB" in caplog.text
        assert choose_engine(client, "500MiB").budget.worker_nbytes == 500 * MIB


def test_limits_of_workers_are_what_they_say(client, caplog):
    assert choose_engine(client, None).budget == Budget(600 * MIB, 2)
    assert [r for r in caplog.records if r.levelname == "WARNING"] == []


def test_an_asynchronous_client_is_refused_and_served_in_a_thread(tmp_path, h5ad_pair):
    async def build():
        async with (
            LocalCluster(n_workers=1, processes=False, asynchronous=True, dashboard_address="127.0.0.1:0") as started,
            Client(started, asynchronous=True, set_as_default=False) as client,
        ):
            collection = DatasetCollection(tmp_path / "o.zarr")
            with pytest.raises(SchedulerError, match=r"asynchronous .*await asyncio\.to_thread"):
                collection.add_adatas(h5ad_pair, client=client, seed=0)
            await asyncio.to_thread(collection.add_adatas, h5ad_pair, client=client, seed=0)

    asyncio.run(build())
    assert DatasetCollection(tmp_path / "o.zarr", mode="r").n_obs == 500


def test_a_client_that_leads_nowhere_is_refused_with_the_remedy(tmp_path, h5ad_pair):
    collection = DatasetCollection(tmp_path / "o.zarr")
    with LocalCluster(n_workers=1, processes=False, dashboard_address="127.0.0.1:0") as cluster:
        client = Client(cluster, set_as_default=False)
        with config.set(scheduler=client):
            assert collection.add_adatas(h5ad_pair).status().last[0].engine.startswith(cluster.scheduler_address)
        client.close()
        for given in ({"client": client}, {}):
            with config.set(scheduler=client), pytest.raises(SchedulerError, match="is closed.*make a new client"):
                collection.add_adatas(h5ad_pair, seed=1, **given)
    with pytest.raises(TypeError, match="client is a str; give a distributed.Client"):
        collection.add_adatas(h5ad_pair, seed=1, client=cluster.scheduler_address)


def build_in_a_task(path, inputs):
    collection = DatasetCollection(path)
    for seed in (0, 1):  # of which the second finds that the thread was given back
        collection.add_adatas(inputs, client=get_client(), seed=seed, on_duplicate_source="warn")
    get_client().close()  # the worker is in this process, whose current client it would stay
    return collection.n_obs


@pytest.mark.filterwarnings("ignore:.* is in .* already")
def test_a_build_in_a_task_leaves_its_thread_to_the_build_s_own(tmp_path, h5ad_pair):
    with cluster(n_workers=1, threads_per_worker=1) as (_, client):
        assert client.submit(build_in_a_task, tmp_path / "o.zarr", h5ad_pair).result(60) == 1000


BEGUN, OVER = threading.Event(), threading.Event()


def begin():
    BEGUN.set()
    OVER.wait(60)


def restart(client):
    client.restart(wait_for_workers=False)


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (restart, "the cluster was restarted in scatter .*: call again to go on"),
        (Client.close, "the client is clos.* .it was closed, .* call again with a new client"),
    ],
)
def test_what_ends_all_tasks_is_said(end, words):
    BEGUN.clear()
    OVER.clear()
    with cluster(n_workers=1) as (_, client), ThreadPoolExecutor(1) as pool:
        doing = pool.submit(ClusterEngine(client, BUDGET).run, "scatter", begin, [()], lambda *_: None, str)
        assert BEGUN.wait(60)
        ending = threading.Thread(target=end, args=(client,))
        ending.start()
        with pytest.raises(SchedulerError, match=words):
            doing.result(60)
        OVER.set()
        ending.join()


def engines(client):
    yield ClusterEngine(client, BUDGET)
    yield LocalEngine("threads", BUDGET)
    yield LocalEngine("synchronous", BUDGET)


class Log:
    """Calls of a task, over all threads of this process."""

    def __init__(self):
        self.calls = []

    def __reduce__(self):
        return logged, ()


LOG = Log()


def logged():
    return LOG


def fail_at_first(log, i, make, times):
    log.calls.append(i)
    if log.calls.count(i) <= times and i == 1:
        raise make()
    return 10 * i


def run_three(engine, make, times):
    LOG.calls.clear()
    seen = []
    tasks = [(LOG, i, make, times) for i in range(3)]
    found = engine.run("scatter", fail_at_first, tasks, lambda *of: seen.append(of), "task {}".format)
    assert sorted(seen) == list(enumerate(found))
    return found


def stale():
    return OSError(errno.ESTALE, os.strerror(errno.ESTALE), "/data/a.h5ad")


def test_what_passes_is_tried_again_by_every_engine(client):
    for engine in engines(client):
        assert run_three(engine, stale, times=5) == [0, 10, 20]
        assert LOG.calls.count(1) == 6


def test_what_does_not_pass_after_all_is_said_as_it_is(client):
    for engine in engines(client):
        with pytest.raises(StorageError, match=r"Stale file handle: '/data/a.h5ad': so it was in 8 tries"):
            run_three(engine, stale, times=99)


def full():
    error = StorageError("/scratch cannot be written: 0 bytes are free")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    return error


def test_a_full_disk_is_not_tried_again(client):
    for engine in engines(client):
        with pytest.raises(StorageError, match="0 bytes are free"):
            run_three(engine, full, times=99)
        assert LOG.calls.count(1) == 1


class Odd(Exception):  # noqa: N818
    """Cannot be unpickled: its arguments are others than it is made of."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [(partial(KeyError, "obs"), KeyError, "obs"), (partial(Odd, 1, 2), RuntimeError, "Odd: 1 and 2")],
)
def test_an_error_of_others_comes_with_the_worker_s_traceback_after_three_tries(client, make, kind, text, caplog):
    with pytest.raises(kind, match=text) as caught:
        run_three(ClusterEngine(client, BUDGET), make, times=99)
    assert LOG.calls.count(1) == 1 + dask.RETRIES
    assert "in fail_at_first" in str(caught.value.__cause__)
    assert "Traceback" not in caplog.text  # as Dask's workers log it


def test_a_stale_input_does_not_end_a_build(tmp_path, h5ad_pair, monkeypatch):
    """Nor one that is not there for a while: NFS shows both."""
    import h5py

    failed = []

    class File(h5py.File):
        def __init__(self, name, *args):
            if scanned and len(failed) < 2 and "part_1" in str(name):
                failed.append(name)
                raise stale()
            super().__init__(name, *args)

    stat = os.stat

    def missing(path, **options):
        if scanned and len(failed) < 3 and "part_0.h5ad" in str(path):
            failed.append(path)
            raise FileNotFoundError(path)
        return stat(path, **options)

    class Scanned(Callback):
        def on_build_start(self, _):
            scanned.append(True)

    scanned = []
    monkeypatch.setattr(h5py, "File", File)
    monkeypatch.setattr("annbatch_dask.sources.open.os.stat", missing)
    with config.set(scheduler="synchronous"):
        DatasetCollection(tmp_path / "o.zarr").add_adatas(h5ad_pair, seed=0, callbacks=[Scanned()])
    assert len(failed) == 3
    assert DatasetCollection(tmp_path / "o.zarr", mode="r").n_obs == 500


def test_without_bokeh_the_dashboard_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed.dashboard.scheduler", None)
    with (
        local_client(n_workers=1, threads_per_worker=1, memory_limit=2**30) as client,
        urllib.request.urlopen(client.dashboard_link, timeout=60) as page,
    ):
        assert "pip install" in (text := page.read().decode())
        assert "bokeh" in text


def test_bokeh_is_imported_once_somebody_looks():
    code = """
import sys, urllib.request
from annbatch_dask.engines.local_cluster import local_client
if __name__ == "__main__":
    with local_client(n_workers=1, threads_per_worker=1, memory_limit=2**30) as client:
        found = ["bokeh" in sys.modules]
        for _ in range(2):
            with urllib.request.urlopen(client.dashboard_link, timeout=60) as page:
                found.append("bokeh" in sys.modules and "bokeh" in page.read().decode())
    print(found)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[False, True, True]"


def test_workers_that_are_not_needed_after_all_are_gone_without_a_word(tmp_path, h5ad_pair, capfd):
    """Their imports begin while inputs are scanned, and these may be refused."""
    bad = tmp_path / "bad.h5ad"
    bad.write_bytes(b"no HDF5")
    children = set(psutil.Process().children(recursive=True))
    with pytest.raises(SourceError):
        DatasetCollection(tmp_path / "o.zarr").add_adatas([h5ad_pair[0], bad], seed=0)
    assert set(psutil.Process().children(recursive=True)) <= children
    with workers_process() as process:
        process.communicate(timeout=240)  # the end of its input: whoever started it is gone
    assert process.returncode == 0
    assert capfd.readouterr() == ("", "")


def test_workers_start_while_inputs_are_scanned(tmp_path, h5ad_pair, monkeypatch):
    seen = []
    prepare = start.prepare

    def prepared(*args):
        seen.extend(" ".join(c.cmdline()) for c in psutil.Process().children())
        return prepare(*args)

    monkeypatch.setattr(start, "prepare", prepared)
    DatasetCollection(tmp_path / "o.zarr").add_adatas(h5ad_pair, seed=0)
    assert any("annbatch_dask.engines.workers" in command for command in seen)


_SCRIPT = """
import sys
from beside import load
from annbatch_dask import DatasetCollection

print(DatasetCollection(sys.argv[1]).add_adatas([sys.argv[2]], load_adata=load).n_obs)
"""


def test_workers_find_modules_where_the_script_does(tmp_path, h5ad_pair):
    """In the folder of the script, and not in the one where it was started, which has modules of other kinds."""
    script, here = tmp_path / "script", tmp_path / "here"
    script.mkdir()
    here.mkdir()
    (script / "run.py").write_text(_SCRIPT)
    (script / "beside.py").write_text("import anndata as ad\n\ndef load(path):\n    return ad.read_h5ad(path)[:5]\n")
    for name in ("random", "queue", "dask", "zarr"):
        (here / f"{name}.py").write_text("raise SystemExit('this is another module of that name')")
    command = [sys.executable, str(script / "run.py"), str(tmp_path / "o.zarr"), str(h5ad_pair[0])]
    run = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    assert run.stdout == "5\n", run.stderr


def test_workers_start_where_temporary_files_have_long_names(tmp_path, h5ad_pair):
    """The folder of a job may have one that no socket can have."""
    folder = tmp_path / ("a_folder_of_a_job_" * 6)
    folder.mkdir()
    code = f"from annbatch_dask import DatasetCollection as C; C('a.zarr').add_adatas([{str(h5ad_pair[0])!r}])"
    environment = os.environ | {"TMPDIR": str(folder)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert DatasetCollection(tmp_path / "a.zarr").n_obs


def test_workers_that_end_at_once_are_not_waited_for(tmp_path, h5ad_pair, monkeypatch):
    monkeypatch.setattr("annbatch_dask.engines.local_cluster._START_WORKERS", "raise SystemExit(1)")
    monkeypatch.setattr("annbatch_dask.engines.local_cluster.START_TIMEOUT_S", 10_000)
    with pytest.raises(SchedulerError, match="workers 0 started within"):
        DatasetCollection(tmp_path / "a.zarr").add_adatas(h5ad_pair, seed=0)


def test_a_link_to_the_dashboard_of_a_variable_that_is_not_set():
    """As the configuration of a JupyterHub has it, in a job beside."""
    with config.set({"distributed.dashboard.link": "{PREFIX_OF_NO_HUB}/proxy/{port}/status"}), cluster() as (_, client):
        assert re.fullmatch(r"http://.*:\d+/status", ClusterEngine(client, BUDGET).dashboard)


def test_a_machine_without_a_network_is_named(tmp_path, h5ad_pair, monkeypatch):
    """Not even to itself, as in a sandbox."""

    def fail(**_):
        raise RuntimeError from OSError("Timed out")

    monkeypatch.setattr("annbatch_dask.engines.local_cluster.SpecCluster", fail)
    with pytest.raises(SchedulerError, match=r"no cluster .* on 127.0.0.1 .*Timed out.; .*scheduler='threads'"):
        DatasetCollection(tmp_path / "a.zarr").add_adatas(h5ad_pair, seed=0)


def test_a_worker_that_leaves_takes_nothing_with_it_that_is_done(client):
    """Results that stayed in its memory would be computed again."""
    engine = ClusterEngine(client, BUDGET)
    kept = []

    def on_result(i, result):
        if len(kept) < 5:
            kept.append(i)
            return
        for _ in range(1000):  # each is let go of by a message of its own
            held = [key for key, workers in client.who_has().items() if key.startswith("scatter") and workers]
            if len(held) <= 1:  # the last one itself
                return
            client.sync(asyncio.sleep, 0.01)
        pytest.fail(f"{len(held)} results stay on the workers")

    assert engine.run("scatter", abs, [(-i,) for i in range(6)], on_result, str) == list(range(6))


# --- what Dask shows of a build ------------------------------------------------------------------------------------


def spans_of(dask_scheduler):
    """Name, number of tasks and seconds by activity of each span of ours."""
    found = dask_scheduler.extensions["spans"].spans.values()
    return {
        s.name: (
            sum(sum(g.all_durations.values()) > 0 for g in s.groups),
            {
                key[2]: n
                for key, n in s.cumulative_worker_metrics.items()
                if key[0] == "execute" and key[-1] == "seconds"
            },
        )
        for s in found
        if s.name[0] == "annbatch_dask"
    }


def test_dask_sums_the_time_of_tasks_by_stage_and_activity(tmp_path, h5ad_pair):
    wanted = {"scatter": {"read", "inflate", "hash", "spill"}, "gather": {"wait", "hash", "encode", "write"}}
    with cluster(n_workers=1, memory_limit="600MiB") as (_, client):
        DatasetCollection(tmp_path / "o.zarr").add_adatas(h5ad_pair, client=client, seed=0)
        while True:  # they travel with the workers' heartbeats
            found = client.run_on_scheduler(spans_of)
            stages = {name[-1]: (n, set(seconds)) for name, (n, seconds) in found.items()}
            if all(wanted[s] <= stages.get(s, (0, set()))[1] for s in wanted):
                break
            client.sync(asyncio.sleep, 0.05)
        prefixes = client.run_on_scheduler(lambda dask_scheduler: set(dask_scheduler.task_prefixes))
    assert {("annbatch_dask", "scatter"), ("annbatch_dask", "gather")} <= set(found)
    assert {"scatter", "gather"} <= prefixes  # the labels that Prometheus gets
    assert all(s >= 0 for _, seconds in found.values() for s in seconds.values())


def test_a_performance_report_without_the_callers_code(tmp_path, h5ad_pair):
    secret = "hunter" + "2"  # noqa: S105
    page = tmp_path / "report.html"
    with cluster(n_workers=1, memory_limit="600MiB") as (_, client):
        DatasetCollection(tmp_path / "o.zarr").add_adatas(
            h5ad_pair, client=client, seed=0, performance_report=page, storage_options={"password": "hunter2"}
        )
    text = page.read_text()
    assert text.lstrip().lower().startswith("<!doctype html>")
    assert "scatter" in text
    assert "gather" in text
    assert secret not in text
    assert "add_adatas" not in text


def test_a_report_is_written_of_a_build_that_failed(tmp_path, h5ad_pair):
    class Stop(Callback):
        def on_stage_start(self, event):
            if event.stage == "gather":
                raise KeyError

    with cluster(n_workers=1, memory_limit="600MiB") as (_, client), pytest.raises(KeyError):
        DatasetCollection(tmp_path / "o.zarr").add_adatas(
            h5ad_pair, client=client, seed=0, callbacks=[Stop()], performance_report=tmp_path / "report.html"
        )
    assert "scatter" in (tmp_path / "report.html").read_text()


def test_a_report_that_cannot_be_made_is_refused_before_any_work(tmp_path, h5ad_pair, client, monkeypatch):
    class Never(Callback):
        def on_build_start(self, event):
            pytest.fail("began")

    def build(path, **options):
        return DatasetCollection(tmp_path / "o.zarr").add_adatas(
            h5ad_pair, seed=0, callbacks=[Never()], performance_report=path, **options
        )

    with (
        config.set(scheduler="synchronous"),
        pytest.raises(SchedulerError, match="dask's synchronous scheduler is none"),
    ):
        build(tmp_path / "report.html")
    with pytest.raises(StorageError, match="there is no folder .*nowhere; make it"):
        build(tmp_path / "nowhere" / "report.html", client=client)
    monkeypatch.setattr(dask.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        MissingPackageError, match=r"scheduler has no bokeh: pip install \"annbatch-dask\[dashboard\]\""
    ):
        build(tmp_path / "report.html", client=client)


def test_a_task_that_is_tried_again_is_told_of(client):
    told = []
    engine = ClusterEngine(client, BUDGET)
    tasks = [(LOG, i, lambda: ValueError("no https://me:secret@host/x"), 1) for i in range(3)]
    LOG.calls.clear()
    engine.run("scatter", fail_at_first, tasks, lambda *_: None, str, lambda *of: told.append(of))
    assert told == [(1, "ValueError: no https://host/x")]
