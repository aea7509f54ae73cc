"""A build killed at any instant leaves the old collection or the new one, and the same call goes on where it was."""

import contextlib
import json
import multiprocessing
import os
import signal
import tempfile
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from annbatch_dask import DatasetCollection
from annbatch_dask.errors import CollectionBusyError
from annbatch_dask.testing import make_adata
from tests.chaos import victim
from tests.tools import tree_digest

SERVER = multiprocessing.get_context("forkserver")  # its processes have all imports behind them
SERVER.set_forkserver_preload(["tests.chaos.warm"])
GENES = [f"g{i}" for i in range(40)]
MODES = ("create", "extend", "append", "reshuffle")
OPTIONS = {"seed": 5, "dataset_size": 40, "memory_limit": "1GB"}
INSTANTS = [
    ("scan", 0),
    ("scan", 1),
    ("scatter", "start"),
    ("scatter", 1),
    ("scatter", "end"),
    ("gather", "start"),
    ("gather", 2),
    ("gather", "end"),
    ("commit", "start"),
    ("commit", "rename"),
    ("commit", "end"),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Three files."""
    folder = tmp_path_factory.mktemp("chaos")
    paths = [folder / f"{i}.h5ad" for i in range(3)]
    for i, path in enumerate(paths):
        make_adata(100 - 20 * i, GENES[i : 35 + i], seed=i).write_h5ad(path)
    return paths


@contextlib.contextmanager
def build(out, paths, mode, *, kill=None, scheduler="synchronous"):
    """A build in a process of its own, and the file of its tasks' reports."""
    options = OPTIONS | ({} if mode == "create" else {"mode": mode})
    with tempfile.TemporaryDirectory() as tmp:
        reports = Path(tmp) / "reports"
        reports.touch()
        process = SERVER.Process(target=victim.add, args=(out, paths, options, reports, kill, scheduler))
        process.start()
        try:
            yield process, reports
        finally:
            process.kill()
            process.join()


def run(*args, **kwargs):
    """Run a build; returns its exit code and its tasks' reports."""
    with build(*args, **kwargs) as (process, reports):
        process.join(500)
        assert process.exitcode in (0, -signal.SIGKILL)
        return process.exitcode, [json.loads(line) for line in reports.read_text().splitlines()]


def prepare(out, inputs, mode):
    """The collection before the build that is killed, and that build's inputs."""
    if mode == "create":
        return inputs
    assert run(out, inputs[:1], "create")[0] == 0
    return inputs[1:]


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    """Of an undisturbed build in a mode: digest of the collection before and after, and the number of its tasks."""

    @cache
    def build(mode):
        path = tmp_path_factory.mktemp(mode) / "o.zarr"
        paths = prepare(path, inputs, mode)
        before = None if mode == "create" else tree_digest(path)
        code, tasks = run(path, paths, mode)
        assert code == 0
        return before, tree_digest(path), len(tasks)

    return build


def published(path):
    """Digest of what a reader sees: files that the root names; None where there is no collection."""
    if not (path / "zarr.json").exists():
        return None
    collection = DatasetCollection(path, mode="r")
    found = collection.verify()
    assert found.ok, found.problems
    names = {d.name for d in collection.manifest.datasets}
    return tree_digest(path, only=lambda p: p.parts[0] in names or p.name == "zarr.json" and len(p.parts) == 1)


def check_leftovers(path):
    """Nothing but the collection and the logs of its builds lies there."""
    assert {p.name for p in path.parent.iterdir()} - {f"{path.name}.log"} == {path.name}
    names = {d.name for d in DatasetCollection(path, mode="r").manifest.datasets}
    assert {p.name for p in path.iterdir()} == names | {"zarr.json"}


def cases():
    """Every instant in every mode; in the usual run each state of a creation once, and what publishes an extension."""
    again = {("scan", 0), ("scatter", "start"), ("gather", "start")}  # what the end of the stage before left
    for mode in MODES:
        for instant in INSTANTS:
            usual = mode == "create" and instant not in again or (mode == "extend" and instant in INSTANTS[-2:])
            marks = () if usual else (pytest.mark.chaos,)
            yield pytest.param(mode, instant, marks=marks, id="-".join(map(str, (mode, *instant))))


@pytest.mark.parametrize(("mode", "instant"), list(cases()))
def test_a_killed_client(tmp_path, inputs, undisturbed, mode, instant):
    before, after, n_tasks = undisturbed(mode)
    path = tmp_path / "o.zarr"
    paths = prepare(path, inputs, mode)
    code, first = run(path, paths, mode, kill=instant)
    assert code == -signal.SIGKILL
    assert published(path) == (after if instant == ("commit", "end") else before)
    code, second = run(path, paths, mode)
    assert code == 0
    assert tree_digest(path) == after
    check_leftovers(path)
    if instant == ("commit", "end"):
        assert second == []  # it was done
    else:
        done = {(t["stage"], t["task"]) for t in first}
        assert {(t["stage"], t["task"]) for t in second if t["reused"]} == done
        assert len(second) == n_tasks


@pytest.mark.chaos
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(8))
def test_killed_at_random_again_and_again(tmp_path, inputs, undisturbed, mode, seed):
    before, after, _ = undisturbed(mode)
    path = tmp_path / "o.zarr"
    paths = prepare(path, inputs, mode)
    rng = np.random.default_rng(seed)
    started = time.perf_counter()
    assert run(tmp_path / "other" / "o.zarr", inputs, "create", scheduler="threads")[0] == 0
    usual = time.perf_counter() - started
    for _ in range(4):
        with build(path, paths, mode, scheduler="threads") as (process, _):
            process.join(float(rng.uniform(0.1, 1.1)) * usual)
        assert published(path) in (before, after)
    assert run(path, paths, mode)[0] == 0
    assert tree_digest(path) == after


def test_a_second_build_is_refused_while_one_runs(tmp_path, inputs):
    path = tmp_path / "o.zarr"
    with build(path, inputs, "create") as (process, reports):
        while not reports.read_text():  # until its first task is done
            process.join(0.01)
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(CollectionBusyError, match=f"is being built by process {process.pid} on .*; wait until"):
            DatasetCollection(path).add_adatas(inputs, **OPTIONS)
        with pytest.raises(CollectionBusyError):
            DatasetCollection(path).gc()
    assert run(path, inputs, "create")[0] == 0  # the dead process's lock does not block
    check_leftovers(path)
