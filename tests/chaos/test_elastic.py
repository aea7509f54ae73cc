"""Builds on real clusters whose workers come for the work, leave when their time is up, and may all be away."""

import asyncio
import contextlib
import functools
import json
import logging
from collections import Counter as Count

import dask
import pytest
from distributed import Client, LocalCluster

from annbatch_dask import DatasetCollection
from tests.clusters import TIMEOUT_S, cluster, kill, worker
from tests.tools import At, Counter, tree_digest

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]
OPTIONS = {"seed": 4, "dataset_size": 50, "memory_limit": "800MB"}
N_FILES, N_ROWS = 40, 50
TASKS = {"scatter": N_FILES, "gather": N_FILES * N_ROWS // 50}
MAX_REDONE = 0.15


@pytest.fixture(scope="module")
def inputs(many_inputs):
    return many_inputs(N_FILES)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, inputs):
    """The same build in one process."""
    path = tmp_path_factory.mktemp("undisturbed") / "o.zarr"
    with dask.config.set(scheduler="synchronous"):
        DatasetCollection(path).add_adatas(inputs, **OPTIONS)
    return tree_digest(path)


@pytest.fixture
def starts(tmp_path, monkeypatch):
    """A file that tells of each task that a worker begins."""
    monkeypatch.setenv("TEST_STARTS", str(tmp_path / "starts"))
    monkeypatch.setenv("TEST_SECONDS", "0.2")
    return tmp_path / "starts"


def build(path, inputs, client, starts, callbacks=()):
    """A build; how many tasks were done more than once, and by how many processes."""
    seen = Counter()
    DatasetCollection(path).add_adatas(inputs, client=client, callbacks=[seen, *callbacks], progress=False, **OPTIONS)
    assert {stage: seen.tasks[stage] for stage in TASKS} == TASKS
    lines = [json.loads(line) for line in starts.read_text().splitlines()]
    begun = Count(line["task"] for line in lines)
    redone, n_processes = sum(begun[stage] - n for stage, n in TASKS.items()), len({line["pid"] for line in lines})
    print(f"tasks {TASKS}, begun {dict(begun)} by {n_processes} processes, redone {redone}")
    assert redone >= 0
    return redone, n_processes


def test_a_cluster_that_adapts_starts_from_none_and_ends_with_none(tmp_path, inputs, undisturbed, starts):
    options = {"threads_per_worker": 1, "memory_limit": "900MB", "dashboard_address": "127.0.0.1:0"}
    with (
        LocalCluster(n_workers=0, preload=["tests.chaos.starts"], local_directory=str(tmp_path), **options) as started,
        Client(started, set_as_default=False) as client,
    ):
        started.adapt(minimum=0, maximum=2, interval="200ms")
        assert client.scheduler_info(n_workers=-1)["workers"] == {}
        redone, _ = build(tmp_path / "o.zarr", inputs, client, starts)
        wait_for_none(client)
    assert redone <= MAX_REDONE * sum(TASKS.values())
    assert tree_digest(tmp_path / "o.zarr") == undisturbed


def wait_for_none(client):
    async def gone():
        while (await client.scheduler.identity(n_workers=-1))["workers"]:
            await asyncio.sleep(0.02)

    client.sync(gone, callback_timeout=TIMEOUT_S)


def test_workers_whose_lifetime_is_a_part_of_the_build_s(tmp_path, inputs, undisturbed, starts, monkeypatch):
    """Each leaves in good order, loses no more than the task that it has begun, and another takes its place.

    What share of all tasks that is follows from how many tasks a life is long, and so from how busy the machine is.
    """
    monkeypatch.setenv("TEST_SECONDS", "1.0")
    lives = ("--lifetime", "30s", "--lifetime-stagger", "6s", "--lifetime-restart", "--preload", "tests.chaos.starts")
    with cluster(tmp_path / "cluster", *lives) as (client, _):
        redone, n_processes = build(tmp_path / "o.zarr", inputs, client, starts)
    assert n_processes >= 4  # each of both left once, at least
    assert redone <= n_processes
    assert tree_digest(tmp_path / "o.zarr") == undisturbed


class Waits(logging.Handler):
    """Does something once it was said for the second time that the build waits for a worker."""

    def __init__(self, text, then):
        super().__init__(logging.WARNING)
        self.text, self.then, self.messages = text, then, []

    def emit(self, record):
        if self.text in record.getMessage():
            self.messages.append(record.getMessage())
            if len(self.messages) == 2:
                self.then()


@contextlib.contextmanager
def listening(*handlers):
    logger = logging.getLogger("annbatch_dask")
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            logger.removeHandler(handler)


def test_workers_that_come_late_leave_and_come_back(tmp_path, inputs, undisturbed, starts, monkeypatch):
    """Nobody is there at first, nor in the middle of scatter, until that was said twice."""
    for module in ("waiting", "choose"):
        monkeypatch.setattr(f"annbatch_dask.engines.{module}.NO_WORKER_S", 0.2)
    there = []
    with cluster(tmp_path / "cluster", n_workers=0) as (client, _), contextlib.ExitStack() as stack:

        def come(n=1):
            for _ in range(n):
                start = worker(tmp_path / "cluster", "--preload", "tests.chaos.starts")
                there.append(stack.enter_context(start))

        def leave():
            there[1].terminate()  # in good order

        first = Waits("no worker has joined", come)
        again = Waits("no worker has been there", functools.partial(come, 2))
        turns = [
            At("scatter", 5, lambda: kill(there[0])),  # with its nanny
            At("gather", 5, leave),
            At("gather", 10, come),
        ]
        with listening(first, again):
            redone, _ = build(tmp_path / "o.zarr", inputs, client, starts, turns)
    assert len(there) == 4
    assert redone <= 2  # what the two had that left
    assert "waiting for the first" in first.messages[1]
    assert f"of {N_FILES} tasks wait for one" in again.messages[1]
    assert tree_digest(tmp_path / "o.zarr") == undisturbed
