"""Two machines, with a scheduler and a worker on one and a worker on the other, and a cut between them in a build.

What they share is a folder, or an object store on a third machine.
"""

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
from tests.chaos.store import BUCKET, serve
from tests.clusters import kill, process, scheduler, worker
from tests.tools import tree_digest

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.timeout(900),
    pytest.mark.skipif(nodes.missing() is not None, reason=str(nodes.missing())),
]
OPTIONS = {"seed": 4, "dataset_size": 60}
BLOCK = 20_000
TASK_S = "1.0"
UNTIL_S = 300
TIMEOUTS = {
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "30s",
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "30s",
    "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "30s",
}
"""After a cut of more than half a minute, scheduler and worker give each other up. On a busy machine they may be silent
for some seconds without one."""
PATIENCE = {"connect_timeout": 5, "read_timeout": 5, "retries": {"max_attempts": 1}}
"""So long a client waits for a store that does not answer; then it is ours to try again."""
CLIENT = """
import json, sys
from pathlib import Path
import dask
from distributed import Client
from annbatch_dask import DatasetCollection
from tests.chaos.victim import Killer
contact, out, reports, store, options, *paths = sys.argv[1:]
with dask.config.set(annbatch_dask={"block_size": 20_000}), Client(scheduler_file=contact):
    store, options = json.loads(store), json.loads(options)
    collection = DatasetCollection(out, storage_options=store)
    collection.add_adatas(paths, storage_options=store, callbacks=[Killer(None, Path(reports))], progress=False, **options)
"""
COPY = """
import json, sys
import fsspec
out, folder, store = sys.argv[1:]
fsspec.filesystem("s3", **json.loads(store)).get(out, folder, recursive=True)
"""


@pytest.fixture
def two():
    with nodes.nodes(2) as found:
        yield found


@pytest.fixture
def three():
    with nodes.nodes(3) as found:
        yield found


def wait_for(condition):
    until = time.monotonic() + UNTIL_S
    while not condition():
        assert time.monotonic() < until, "it did not come to pass"
        threading.Event().wait(0.02)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


class Build:
    """A build whose client and scheduler are on the first machine, with a worker on each.

    The other machine keeps its first task of a stage until it is let go.
    """

    def __init__(self, folder, two, stage, stack):
        self.folder, (self.here, self.there), self.stage = folder, two, stage
        self.reports, self.starts, self.log, self.go = (folder / name for name in ("reports", "starts", "log", "go"))
        self.stack = stack
        stack.enter_context(scheduler(folder, host=self.here.address, before=self.before(self.here), **TIMEOUTS))
        for node in two:
            self.add_worker(node)

    def before(self, node):
        """Start on a machine; what the processes say goes to a file."""
        return (*node.before, "sh", "-c", f'exec "$@" 2>> {self.log}', "sh")

    def add_worker(self, node):
        held = {"task": self.stage, "node": self.there.name, "file": str(self.go)}
        environment = {"TEST_STARTS": str(self.starts), "TEST_SECONDS": TASK_S, "TEST_NODE": node.name}
        environment["TEST_HELD"] = json.dumps(held)
        options = ("--host", node.address, "--preload", "tests.chaos.starts")
        process = worker(self.folder, *options, before=self.before(node), **environment, **TIMEOUTS)
        return self.stack.enter_context(process)

    def n_workers(self):
        return self.log.read_text().count("Register worker addr") if self.log.exists() else 0

    def start(self, out, paths, store, **options):
        wait_for(lambda: self.n_workers() == 2)
        arguments = [self.folder / "scheduler.json", out, self.reports, json.dumps(store), json.dumps(options), *paths]
        command = [*self.here.before, sys.executable, "-c", CLIENT, *map(str, arguments)]
        self.client = subprocess.Popen(command)
        self.stack.callback(kill, self.client)

    def add_store(self, node, paths):
        """An object store that holds some files; how to reach it."""
        command = ("tests.chaos.store", node.address, str(self.folder), *map(str, paths))
        self.stack.enter_context(process(*command, before=node.before))
        contact = self.folder / "store.json"
        wait_for(contact.exists)
        return json.loads(contact.read_text()) | {"config_kwargs": PATIENCE}

    def begun(self, node):
        return sum((line["task"], line["node"]) == (self.stage, node.name) for line in lines_of(self.starts))

    def done(self):
        return sum(line["stage"] == self.stage for line in lines_of(self.reports))

    def wait_for_middle(self):
        """Until the other machine has a task of the stage, and one is done."""
        wait_for(lambda: self.begun(self.there) and self.done() >= 1 or self.client.poll() is not None)
        assert self.client.poll() is None

    def cut(self, *, is_long):
        """Cut the other machine off while it has a task of the stage, which this one goes on with; then heal."""
        self.wait_for_middle()
        self.there.cut()
        was = self.done()
        self.go.touch()
        if is_long:
            address = f"Remove worker addr: tcp://{self.there.address}"
            wait_for(lambda: address in self.log.read_text())
        else:
            wait_for(lambda: self.done() > was or self.client.poll() is not None)
        self.there.heal()
        if is_long:  # as a queue would: a worker that lost its scheduler ends
            self.add_worker(self.there)


@contextlib.contextmanager
def build(folder, two, stage):
    with contextlib.ExitStack() as stack:
        yield Build(folder, two, stage, stack)


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
    with build(tmp_path, two, stage) as running:
        running.start(out, h5ad_pair, {}, **OPTIONS)
        running.cut(is_long=is_long)
        assert running.client.wait(UNTIL_S) == 0
    assert tree_digest(out) == tree_digest(undisturbed)


@pytest.fixture(scope="module")
def undisturbed_from_store(tmp_path_factory, h5ad_pair):
    """The same build in one process, of files in a store."""
    server, path = serve("127.0.0.1", h5ad_pair), tmp_path_factory.mktemp("from_store") / "o.zarr"
    try:
        with pytest.MonkeyPatch.context() as patch, dask.config.set(scheduler="synchronous"):
            patch.setitem(dask.config.config, "annbatch_dask", {"block_size": BLOCK})
            DatasetCollection(path).add_adatas(urls(h5ad_pair), storage_options=server.options, **OPTIONS)
    finally:
        server.stop()
    return path


def urls(paths):
    return [f"s3://{BUCKET}/in/{path.name}" for path in paths]


def copied(node, out, folder, store):
    """A folder of a store, as a machine that reaches it sees it, on this one's disk."""
    command = [*node.before, sys.executable, "-c", COPY, out, str(folder), json.dumps(store)]
    subprocess.run(command, check=True, timeout=UNTIL_S)
    return folder


@pytest.mark.parametrize("how", ["short", "long", "store"])
@pytest.mark.parametrize("stage", ["scatter", "gather"])
def test_a_cut_from_a_store_costs_no_more_than_time(tmp_path, three, h5ad_pair, undisturbed_from_store, stage, how):
    """Of a machine from scheduler and store, or of the store from all."""
    *two, far = three
    out = f"s3://{BUCKET}/o.zarr"
    with build(tmp_path, two, stage) as running:
        store = running.add_store(far, h5ad_pair)
        running.start(out, urls(h5ad_pair), store, **OPTIONS)
        if how == "store":
            running.wait_for_middle()
            far.cut()
            running.go.touch()
            wait_for(lambda: "tried again in" in running.log.read_text())
            far.heal()
        else:
            running.cut(is_long=how == "long")
        assert running.client.wait(UNTIL_S) == 0
        found = copied(far, out, tmp_path / "o.zarr", store)
    assert tree_digest(found) == tree_digest(undisturbed_from_store)
