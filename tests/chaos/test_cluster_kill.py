"""A worker, its nanny or the scheduler of a real cluster is killed in the middle of a build."""

import contextlib
import functools
import os
import signal
import subprocess
import sys

import dask
import psutil
import pytest
from dask import config

from annbatch_dask import DatasetCollection
from annbatch_dask.errors import SchedulerError, WorkersDiedError
from annbatch_dask.events import Callback
from tests.chaos.victim import die_once, die_while
from tests.clusters import TIMEOUT_S, cluster
from tests.tools import Counter, tree_digest

OPTIONS = {"seed": 4, "dataset_size": 60}


class Reused(Callback):
    """The stage of each task that an earlier build had done."""

    def __init__(self):
        self.stages = []

    def on_task_end(self, event):
        if event.reused:
            self.stages.append(event.stage)


class Kill(Callback):
    """Kills some processes after the first task of a stage."""

    def __init__(self, stage, pids):
        self.stage, self.pids = stage, pids

    def on_task_end(self, event):
        if event.stage == self.stage and not event.reused:
            while self.pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pids.pop(), signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, h5ad_pair):
    """The same build in one process."""
    path = tmp_path_factory.mktemp("undisturbed") / "o.zarr"
    with pytest.MonkeyPatch.context() as patch, config.set(scheduler="synchronous"):
        patch.setitem(dask.config.config, "annbatch_dask", {"block_size": 20_000})
        DatasetCollection(path).add_adatas(h5ad_pair, **OPTIONS)
    return tree_digest(path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A cluster for two tests: one kills a worker, which its nanny starts again, and the last one the scheduler."""
    with cluster(tmp_path_factory.mktemp("shared") / "cluster") as started:
        yield started


@pytest.fixture(autouse=True)
def many_tasks(monkeypatch):
    monkeypatch.setitem(dask.config.config, "annbatch_dask", {"block_size": 20_000})


def killed(started, who, stage, path, files):
    """A build in which the first worker, or its nanny as well, is killed; its digest and its number of tasks."""
    client, (_, first, _) = started
    nanny = psutil.Process(first.pid)
    victims = [p.pid for p in nanny.children(recursive=True)] + [nanny.pid] * (who != "worker")
    seen = Counter()
    DatasetCollection(path).add_adatas(files, client=client, callbacks=[Kill(stage, victims), seen], **OPTIONS)
    assert victims == []
    return tree_digest(path), seen.tasks["gather"]


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("stage", "who"), [("scatter", "worker"), ("scatter", "nanny and worker"), ("gather", "nanny and worker")]
)
def test_a_killed_nanny_costs_its_tasks_only(tmp_path, h5ad_pair, undisturbed, who, stage):
    with cluster(tmp_path / "cluster") as started:
        found = killed(started, who, stage, tmp_path / "o.zarr", h5ad_pair)
    assert found == (undisturbed, 9)


def test_a_killed_worker_costs_its_tasks_only(tmp_path, h5ad_pair, undisturbed, shared):
    assert killed(shared, "worker", "gather", tmp_path / "o.zarr", h5ad_pair) == (undisturbed, 9)


@pytest.mark.chaos
@pytest.mark.parametrize("who", ["worker", "scheduler"])
def test_a_kill_during_the_scan(tmp_path, h5ad_pair, who):
    path, flag = tmp_path / "o.zarr", tmp_path / "flag"
    with cluster(tmp_path / "cluster") as (client, (scheduler, *_)):
        load = functools.partial(die_once, pid_of=scheduler.pid if who == "scheduler" else None, flag=flag)
        expected = pytest.raises(SchedulerError) if who == "scheduler" else contextlib.nullcontext()
        with expected:
            DatasetCollection(path).add_adatas(h5ad_pair, client=client, load_adata=load, **OPTIONS)
    assert flag.exists()
    assert path.exists() == (who == "worker")
    with config.set(scheduler="synchronous"):
        DatasetCollection(path).add_adatas(h5ad_pair, load_adata=load, **OPTIONS)  # done already, or done now
        DatasetCollection(tmp_path / "plain.zarr").add_adatas(h5ad_pair, load_adata=load, **OPTIONS)
    assert tree_digest(path) == tree_digest(tmp_path / "plain.zarr")


class Flag(Callback):
    """A file that is there from the first scatter task on, until so many tasks are done."""

    def __init__(self, path, until=None):
        self.path, self.left = path, until

    def on_stage_start(self, event):
        if event.stage == "scatter":
            self.path.touch()

    def on_task_end(self, event):
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                self.path.unlink()


@pytest.mark.parametrize("allowed_failures", [0, pytest.param(3, marks=pytest.mark.chaos)])
def test_a_file_that_kills_its_workers_is_named_after_all_else_is_done(
    tmp_path, h5ad_pair, allowed_failures, monkeypatch
):
    monkeypatch.setattr("annbatch_dask.engines.dask.DEATHS", 2)
    monkeypatch.setitem(dask.config.config, "annbatch_dask", {"block_size": 2**20})  # a task a file
    path, flag, bad = tmp_path / "o.zarr", tmp_path / "flag", str(h5ad_pair[0])
    load = functools.partial(die_while, flag=flag, victims=[bad])
    build = functools.partial(DatasetCollection(path).add_adatas, h5ad_pair, load_adata=load, **OPTIONS)
    seen, counter = Reused(), Counter()
    with cluster(tmp_path / "cluster", allowed_failures=allowed_failures) as (client, _):
        with pytest.raises(WorkersDiedError, match=rf"\d+ workers with {bad}, rows 0 to .* memory") as caught:
            build(client=client, callbacks=[Flag(flag), counter])
        assert isinstance(caught.value, RuntimeError)
        assert str(h5ad_pair[1]) not in str(caught.value)
        assert counter.tasks["scatter"] == 1
        flag.unlink()
        build(client=client, callbacks=[seen])
    assert seen.stages == ["scatter"]
    assert DatasetCollection(path, mode="r").n_obs == 500


def test_deaths_that_end_are_no_reason_to_give_up(tmp_path, h5ad_pair, monkeypatch):
    """More of them than Dask allows, with one file, while the other gets done."""
    monkeypatch.setitem(dask.config.config, "annbatch_dask", {"block_size": 2**20})
    path, flag = tmp_path / "o.zarr", tmp_path / "flag"
    load = functools.partial(die_while, flag=flag, victims=[str(h5ad_pair[0])])
    with cluster(tmp_path / "cluster", allowed_failures=0) as (client, _):
        DatasetCollection(path).add_adatas(
            h5ad_pair, client=client, load_adata=load, callbacks=[Flag(flag, until=1)], **OPTIONS
        )
    assert flag.with_name("died").exists()
    with config.set(scheduler="synchronous"):
        DatasetCollection(tmp_path / "plain.zarr").add_adatas(h5ad_pair, load_adata=load, **OPTIONS)
    assert tree_digest(path) == tree_digest(tmp_path / "plain.zarr")


CLIENT = """
import sys
from pathlib import Path
import dask
from distributed import Client
from tests.chaos import victim
address, out, reports, *paths = sys.argv[1:]
with dask.config.set(annbatch_dask={"block_size": 20_000}), Client(address):
    victim.add(out, paths, {"seed": 4, "dataset_size": 60}, Path(reports), ("gather", 1), None)
"""


@pytest.mark.chaos
def test_a_client_that_was_killed_is_followed_at_once(tmp_path, h5ad_pair, undisturbed, shared):
    """By another on the same cluster, which the tasks of the first one may still run on."""
    client, _ = shared
    path = tmp_path / "o.zarr"
    arguments = [client.scheduler.address, path, tmp_path / "reports", *h5ad_pair]
    died = subprocess.run([sys.executable, "-c", CLIENT, *map(str, arguments)], check=False, timeout=TIMEOUT_S)
    assert died.returncode == -signal.SIGKILL
    found = DatasetCollection(path).status()
    assert (found.state, found.holder) == ("interrupted", None)
    seen, counter = Reused(), Counter()
    DatasetCollection(path).add_adatas(h5ad_pair, client=client, callbacks=[seen, counter], **OPTIONS)
    assert tree_digest(path) == undisturbed
    assert seen.stages.count("scatter") == counter.tasks["scatter"] > 1
    assert 1 <= seen.stages.count("gather") < 9


def test_a_killed_scheduler_fails_the_build_and_the_next_call_goes_on(tmp_path, h5ad_pair, undisturbed, shared):
    path, (client, (scheduler, *workers)) = tmp_path / "o.zarr", shared
    # the worker that the test before killed: one that finds no scheduler as it starts would wait for one
    client.wait_for_workers(2, timeout=TIMEOUT_S)
    with pytest.raises(SchedulerError, match="was lost .* call again to go on"):
        DatasetCollection(path).add_adatas(
            h5ad_pair, client=client, callbacks=[Kill("gather", [scheduler.pid])], **OPTIONS
        )
    for worker in workers:
        worker.wait(TIMEOUT_S)  # each ends its task, and then itself
    assert not (path / "zarr.json").exists()
    seen, counter = Reused(), Counter()
    with config.set(scheduler="synchronous"):
        DatasetCollection(path).add_adatas(h5ad_pair, callbacks=[seen, counter], **OPTIONS)
    assert tree_digest(path) == undisturbed
    assert seen.stages.count("scatter") == counter.tasks["scatter"] > 1
    assert 1 <= seen.stages.count("gather") < 9
