"""Builds on a real SLURM whose jobs end, are cancelled and are killed all the time."""

import contextlib
import json
import os
import random
import signal
import sys
import threading
from collections import Counter as Count
from pathlib import Path

import dask
import pytest
from distributed import Client

from annbatch_dask import DatasetCollection
from tests.chaos import slurm
from tests.tools import Counter, tree_digest

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.timeout(900),
    pytest.mark.skipif(slurm.missing() is not None, reason=str(slurm.missing())),
]
OPTIONS = {"seed": 4, "dataset_size": 100}
N_FILES, N_ROWS, N_WORKERS = 90, 50, 4
TASK_S = 3.0
KILL_S = 10.0
N_BETWEEN = 10


@pytest.fixture(scope="module")
def queue(tmp_path_factory):
    with slurm.slurm(tmp_path_factory.mktemp("slurm"), n_cpus=N_WORKERS) as config:
        yield config


@pytest.fixture(scope="module")
def inputs(many_inputs):
    return many_inputs(N_FILES)


class Killer(threading.Thread):
    """Every ten seconds kills a worker that has just begun a task, or cancels a job, until it is stopped.

    On a busy machine less often: where fewer than ten tasks were begun since, each death would weigh more.
    """

    def __init__(self, starts, seed):
        super().__init__(daemon=True)
        self.starts, self.random, self.over, self.done = starts, random.Random(seed), threading.Event(), Count()

    def run(self):
        n_starts = 0
        while not self.over.wait(KILL_S):
            if len(lines_of(self.starts)) < n_starts + N_BETWEEN:
                continue
            n_starts = len(lines_of(self.starts))
            if self.random.random() < 0.3 and (jobs := running_jobs()):
                slurm.call("scancel", self.random.choice(jobs))
                self.done["cancelled"] += 1
                continue
            pids = [line["pid"] for line in lines_of(self.starts)[-N_WORKERS:]]
            with contextlib.suppress(ProcessLookupError, IndexError):
                os.kill(self.random.choice(pids), signal.SIGKILL)
                self.done["killed"] += 1

    def stop(self):
        self.over.set()
        self.join()


def running_jobs():
    return slurm.call("squeue", "--noheader", "--states=R", "--format=%i").split()


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@contextlib.contextmanager
def adaptive(folder):
    """A client of a cluster whose workers are jobs of a minute, and which asks for others where they are lost."""
    import dask_jobqueue

    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "2s"}),
        dask_jobqueue.SLURMCluster(
            queue="regular",
            cores=1,
            processes=1,
            memory="900MB",
            walltime="00:01:00",
            python=sys.executable,
            log_directory=str(folder / "logs"),
            local_directory=str(folder),
            worker_extra_args=["--preload", "tests.chaos.starts"],
            scheduler_options={"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"},
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        cluster.adapt(minimum=N_WORKERS, maximum=N_WORKERS)
        yield client


def test_a_build_ends_whatever_becomes_of_its_jobs(tmp_path, queue, inputs, monkeypatch):
    starts = tmp_path / "starts"
    monkeypatch.setenv("SLURM_CONF", str(queue))
    monkeypatch.setenv("TEST_STARTS", str(starts))
    monkeypatch.setenv("TEST_SECONDS", str(TASK_S))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    seen, killer = Counter(), Killer(starts, seed=0)
    with adaptive(tmp_path) as client:
        killer.start()
        try:
            DatasetCollection(tmp_path / "o.zarr").add_adatas(
                inputs, client=client, memory_limit="800MB", callbacks=[seen], **OPTIONS
            )
        finally:
            killer.stop()
    n_starts = Count(line["task"] for line in lines_of(starts))
    n_tasks = {stage: seen.tasks[stage] for stage in ("scatter", "gather")}
    redone = sum(n_starts[stage] - n for stage, n in n_tasks.items())
    print(f"{n_tasks}, begun {dict(n_starts)}, redone {redone}; {dict(killer.done)}")
    assert n_tasks == {"scatter": N_FILES, "gather": N_FILES * N_ROWS // 100}
    assert killer.done["killed"] > 2
    assert redone <= 0.15 * sum(n_tasks.values())
    with dask.config.set(scheduler="synchronous"):
        DatasetCollection(tmp_path / "plain.zarr").add_adatas(inputs, memory_limit="800MB", **OPTIONS)
    assert tree_digest(tmp_path / "o.zarr") == tree_digest(tmp_path / "plain.zarr")
