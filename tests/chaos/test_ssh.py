"""Builds on hosts that Dask's SSHCluster starts workers on, through a real SSH server, as pipelines/preprocess.py does."""

import contextlib
import json
import sys
from collections import Counter as Count
from pathlib import Path

import dask
import psutil
import pytest

from annbatch_dask import DatasetCollection
from tests.chaos import ssh
from tests.clusters import TIMEOUT_S
from tests.tools import At, Counter, tree_digest

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.timeout(600),
    pytest.mark.skipif(ssh.missing() is not None, reason=str(ssh.missing())),
]
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "pipelines"))

import preprocess  # noqa: E402

OPTIONS = {"seed": 4, "dataset_size": 50, "memory_limit": "800MB"}
N_FILES, N_HOSTS = 20, 2


@pytest.fixture
def hosts(tmp_path, monkeypatch):
    """Part of a file for preprocess.py: hosts that run a scheduler and two workers, which tell of their tasks."""
    environment = {"PYTHONPATH": ROOT, "TEST_STARTS": tmp_path / "starts", "TEST_SECONDS": "0.3"}
    monkeypatch.chdir(tmp_path)
    with ssh.server(tmp_path / "ssh", **environment) as options:
        worker = {
            "nthreads": 1,
            "memory_limit": "900MB",
            "local_directory": str(tmp_path),
            "preload": "tests.chaos.starts",
        }
        yield {
            "kind": "ssh",
            "options": {
                "hosts": ["127.0.0.1"] * (1 + N_HOSTS),
                "connect_options": options,
                "worker_options": worker | {"dashboard_address": "127.0.0.1:0"},
                "scheduler_options": {"port": 0, "dashboard_address": "127.0.0.1:0"},
            },
        }


def kill_worker(client):
    """Kill one worker: its nanny starts another."""
    worker, *_ = client.run(lambda: None)
    psutil.Process(client.run(lambda: __import__("os").getpid(), workers=[worker])[worker]).kill()


def kill_host(client):
    """Kill one worker with its nanny, whom nobody replaces."""
    pid = next(iter(client.run(lambda: __import__("os").getppid()).values()))
    ssh.end([psutil.Process(pid)])


@pytest.mark.parametrize("harm", [kill_worker, kill_host])
def test_a_worker_dies(tmp_path, many_inputs, hosts, harm):
    inputs, seen = many_inputs(N_FILES), Counter()
    with contextlib.ExitStack() as stack:
        client = preprocess.connect(hosts, stack)
        client.wait_for_workers(N_HOSTS, timeout=TIMEOUT_S)
        harms = [At(stage, 4, lambda: harm(client)) for stage in ("scatter",)]
        DatasetCollection("o.zarr").add_adatas(inputs, client=client, callbacks=[seen, *harms], **OPTIONS)
        n_left = len(client.scheduler_info(n_workers=-1)["workers"])
    n_tasks = {stage: seen.tasks[stage] for stage in ("scatter", "gather")}
    begun = Count(json.loads(line)["task"] for line in (tmp_path / "starts").read_text().splitlines())
    redone = sum(begun[stage] - n for stage, n in n_tasks.items())
    print(f"tasks {n_tasks}, begun {dict(begun)}, redone {redone}; {n_left} workers left")
    assert n_tasks == {"scatter": N_FILES, "gather": N_FILES}
    assert redone <= 2  # what the one that died had begun
    assert n_left >= 1
    with dask.config.set(scheduler="synchronous"):
        DatasetCollection("plain.zarr").add_adatas(inputs, **OPTIONS)
    assert tree_digest("o.zarr") == tree_digest("plain.zarr")
