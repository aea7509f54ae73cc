"""Two machines, with a scheduler and a worker on one and a worker on the other, and a cut between them in a build."""

import contextlib
import json
import subprocess
import sys
import threading
import time

import dask
import pytest

from annbatch_dask import DatasetCollection
from tests.chaos import nodes
from tests.clusters import kill, scheduler, worker
from tests.tools import tree_digest

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.timeout(300),
    pytest.mark.skipif(nodes.missing() is not None, reason=str(nodes.missing())),
]
OPTIONS = {"seed": 4, "dataset_size": 60}
BLOCK = 20_000
TASK_S = "1.0"
UNTIL_S = 120
TIMEOUTS = {
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "12s",
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "12s",
    "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "12s",
}
"""After a cut of more than twelve seconds, scheduler and worker give each other up."""
CLIENT = """
import json, sys
from pathlib import Path
import dask
from distributed import Client
from annbatch_dask import DatasetCollection
from tests.chaos.victim import Killer
contact, out, reports, store, options, *paths = sys.argv[1:]
with dask.config.set(annbatch_dask={"block_size": 20_000}), Client(scheduler_file=contact):
    collection = DatasetCollection(out, storage_options=json.loads(store))
    collection.add_adatas(paths, callbacks=[Killer(None, Path(reports))], progress=False, **json.loads(options))
"""


@pytest.fixture
def two():
    with nodes.nodes(2) as found:
        yield found


def wait_for(condition):
    until = time.monotonic() + UNTIL_S
    while not condition():
        assert time.monotonic() < until, "it did not come to pass"
        threading.Event().wait(0.02)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


class Build:
    """A build whose client and scheduler are on the first machine, with a worker on each."""

    def __init__(self, folder, two, stack):
        self.folder, (self.here, self.there) = folder, two
        self.reports, self.starts, self.log = (folder / name for name in ("reports", "starts", "scheduler.log"))
        self.stack = stack
        stack.enter_context(scheduler(folder, host=self.here.address, before=self.before(self.here), **TIMEOUTS))
        for node in two:
            self.add_worker(node)

    def before(self, node):
        """Start on a machine; what a scheduler says goes to a file."""
        return (*node.before, "sh", "-c", f'exec "$@" 2>> {self.log}', "sh")

    def add_worker(self, node):
        environment = {"TEST_STARTS": str(self.starts), "TEST_SECONDS": TASK_S, "TEST_NODE": node.name}
        options = ("--host", node.address, "--preload", "tests.chaos.starts")
        process = worker(self.folder, *options, before=node.before, **environment, **TIMEOUTS)
        return self.stack.enter_context(process)

    def n_workers(self):
        return self.log.read_text().count("Register worker addr") if self.log.exists() else 0

    def start(self, out, paths, store, **options):
        wait_for(lambda: self.n_workers() == 2)
        arguments = [self.folder / "scheduler.json", out, self.reports, json.dumps(store), json.dumps(options), *paths]
        command = [*self.here.before, sys.executable, "-c", CLIENT, *map(str, arguments)]
        self.client = subprocess.Popen(command)
        self.stack.callback(kill, self.client)

    def begun(self, stage, node):
        return sum((line["task"], line["node"]) == (stage, node.name) for line in lines_of(self.starts))

    def done(self, stage):
        return sum(line["stage"] == stage for line in lines_of(self.reports))

    def cut(self, stage, *, is_long):
        """Cut the other machine off while it has a task of a stage, which this one goes on with; then heal."""
        wait_for(lambda: self.begun(stage, self.there) and self.done(stage) >= 1 or self.client.poll() is not None)
        assert self.client.poll() is None
        self.there.cut()
        was = self.done(stage)
        if is_long:
            address = f"Remove worker addr: tcp://{self.there.address}"
            wait_for(lambda: address in self.log.read_text())
        else:
            wait_for(lambda: self.done(stage) > was or self.client.poll() is not None)
        self.there.heal()
        if is_long:  # as a queue would: a worker that lost its scheduler ends
            self.add_worker(self.there)


@contextlib.contextmanager
def build(folder, two):
    with contextlib.ExitStack() as stack:
        yield Build(folder, two, stack)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, h5ad_pair):
    """The same build in one process."""
    path = tmp_path_factory.mktemp("undisturbed") / "o.zarr"
    with pytest.MonkeyPatch.context() as patch, dask.config.set(scheduler="synchronous"):
        patch.setitem(dask.config.config, "annbatch_dask", {"block_size": BLOCK})
        DatasetCollection(path).add_adatas(h5ad_pair, **OPTIONS)
    return path


@pytest.mark.parametrize("is_long", [False, True], ids=["short", "long"])
@pytest.mark.parametrize("stage", ["scatter", "gather"])
def test_a_cut_costs_no_more_than_time(tmp_path, two, h5ad_pair, undisturbed, stage, is_long):
    out = tmp_path / "o.zarr"
    with build(tmp_path, two) as running:
        running.start(out, h5ad_pair, {}, **OPTIONS)
        running.cut(stage, is_long=is_long)
        assert running.client.wait(UNTIL_S) == 0
    assert tree_digest(out) == tree_digest(undisturbed)
