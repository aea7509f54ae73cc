"""Status of builds, as another process sees it: while one runs, after a crash, and where none runs."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta

import dask
import fsspec
import pytest

from annbatch_dask import DatasetCollection
from annbatch_dask.cli import main
from annbatch_dask.errors import CollectionError
from annbatch_dask.etl import watch
from annbatch_dask.etl.log import log_folder
from annbatch_dask.etl.status import status_of
from annbatch_dask.events import Callback
from annbatch_dask.storage import claims
from annbatch_dask.storage.claims import find_claims
from annbatch_dask.storage.folder import Folder

OPTIONS = {"seed": 4, "dataset_size": 100}


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setitem(dask.config.config, "annbatch_dask", {"block_size": 20_000})  # many tasks
    with dask.config.set(scheduler="synchronous"):
        yield


def seen_by_others(path):
    """What the command says in a process of its own."""
    command = [sys.executable, "-m", "annbatch_dask.cli", "status", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class Look(Callback):
    """Looks at a stage's start and end, and may crash there."""

    def __init__(self, look, *at, then=lambda: None):
        self.look, self.at, self.then, self.seen = look, at, then, {}

    def on_stage_start(self, event):
        self._do("start", event.stage)

    def on_stage_end(self, event):
        self._do("end", event.stage)

    def _do(self, *at):
        if at in self.at:
            self.seen[at] = self.look()
            self.then()


class CrashError(Exception):
    pass


def crash():
    raise CrashError("no https://key:secret@host/in.h5ad?sig=1")


def test_a_running_build_as_another_process_sees_it(tmp_path, h5ad_pair):
    path = tmp_path / "o.zarr"
    at = Look(lambda: seen_by_others(path), ("start", "gather"))
    DatasetCollection(path).add_adatas(h5ad_pair, callbacks=[at], **OPTIONS)
    (seen,) = at.seen.values()
    assert (seen["command"], seen["state"], seen["n_obs"]) == ("status", "running", None)
    assert seen["holder"] == f"process {os.getpid()} on {os.uname().nodename}"
    (build,) = seen["builds"]
    assert (build["state"], build["pid"], build["error"]) == ("running", os.getpid(), None)
    scatter, gather = build["stages"]
    assert scatter["is_over"]
    assert scatter["n_done"] == scatter["n_tasks"] > 4
    assert scatter["n_obs_done"] == scatter["n_obs"] == 500
    assert scatter["n_bytes_done"] == scatter["n_bytes"] > 0
    assert scatter["seconds_left"] == 0
    assert (gather["name"], gather["n_tasks"], gather["n_done"], gather["n_obs"]) == ("gather", 5, 0, 500)
    assert gather["seconds_left"] is None
    over = seen_by_others(path)
    assert (over["state"], over["builds"], over["holder"]) == ("idle", [], None)
    assert over["n_obs"] == 500
    assert [s["name"] for s in over["last"][0]["stages"]] == ["scatter", "gather", "commit"]
    assert over["last"][0]["plan"] == DatasetCollection(path).manifest.builds[0].plan
    limit = over["last"][0]["limit"]
    assert limit in ("inflate", "spill", "write")
    assert f"most of it to {limit}, on dask's synchronous scheduler" in str(DatasetCollection(path).status())


def test_it_says_the_slowest_input_and_what_is_left(tmp_path, h5ad_pair, monkeypatch):
    path, pages = tmp_path / "o.zarr", []

    class Each(Callback):
        def on_task_end(self, event):
            pages.append((event, DatasetCollection(path).status()))

    write = watch.Watch.on_task_end
    monkeypatch.setattr(watch.Watch, "on_task_end", lambda self, event: (write(self, event), self._write()))
    DatasetCollection(path).add_adatas(h5ad_pair, callbacks=[Each()], **OPTIONS)
    events, looks = zip(*[p for p in pages if p[0].stage == "scatter"], strict=True)
    for n, look in enumerate(looks, 1):
        (stage,) = look.builds[0].progress.stages
        assert stage.n_done == n
        assert stage.seconds_left == pytest.approx((500 - stage.n_obs_done) * stage.seconds / stage.n_obs_done)
        slowest = max(events[:n], key=lambda e: e.seconds / e.n_rows)
        assert look.builds[0].progress.slowest.what == slowest.what
    assert slowest.what.startswith(tuple(map(str, h5ad_pair)))
    words = str(looks[0])
    assert f"slowest: {events[0].what}: " in words
    assert f"of {len(events)} tasks" in words
    assert " s left" in words


def test_a_build_that_failed_is_interrupted_and_its_secrets_stay_its_own(tmp_path, h5ad_pair, capsys):
    path = tmp_path / "o.zarr"
    with pytest.raises(CrashError):
        DatasetCollection(path).add_adatas(h5ad_pair, callbacks=[Look(dict, ("end", "scatter"), then=crash)], **OPTIONS)
    found = DatasetCollection(path).status()
    assert found.state == "interrupted"
    assert found.holder is None
    assert main(["status", str(path)]) == 0
    words = capsys.readouterr().out
    assert "interrupted: process" in words
    assert "call again to resume" in words
    assert "CrashError: no https://host/in.h5ad" in words
    (record,) = log_folder(Folder(str(path))).names()
    told = log_folder(Folder(str(path))).read(record).decode()
    assert "secret" not in told + words
    assert "sig=1" not in told + words
    DatasetCollection(path).add_adatas(h5ad_pair, **OPTIONS)
    assert DatasetCollection(path).status().state == "idle"
    assert not [n for n in log_folder(Folder(str(path))).names() if n.startswith("running")]


def test_a_build_that_was_killed_is_interrupted(tmp_path, h5ad_pair):
    path = tmp_path / "o.zarr"
    script = (
        "import sys, dask; from pathlib import Path; from tests.chaos import victim\n"
        "victim.add(sys.argv[1], sys.argv[3:], {'seed': 4, 'dataset_size': 100}, Path(sys.argv[2]),"
        " ('gather', 'start'), 'synchronous')"
    )
    reports = str(tmp_path / "reports")
    done = subprocess.run([sys.executable, "-c", script, str(path), reports, *map(str, h5ad_pair)], check=False)
    assert done.returncode == -9
    found = DatasetCollection(path).status()
    assert (found.state, found.holder, found.n_obs) == ("interrupted", None, None)
    assert [s.name for s in found.builds[0].progress.stages] == ["scatter", "gather"]
    assert found.builds[0].progress.error is None
    assert "call again to resume" in str(found)
    DatasetCollection(path).gc()
    assert DatasetCollection(path).status().state == "none"
    assert not (tmp_path / "o.zarr.log").exists()


def test_while_it_plans_the_lock_says_who(tmp_path, h5ad_pair, monkeypatch):
    from annbatch_dask.etl import start

    path, seen = tmp_path / "o.zarr", []
    prepare = start.prepare
    monkeypatch.setattr(start, "prepare", lambda *a: (seen.append(seen_by_others(path)), prepare(*a))[1])
    DatasetCollection(path).add_adatas(h5ad_pair, **OPTIONS)
    assert (seen[0]["state"], seen[0]["builds"]) == ("preparing", [])
    assert seen[0]["holder"].startswith(f"process {os.getpid()} on ")


def test_looking_keeps_no_build_from_its_lock(tmp_path, h5ad_pair, monkeypatch):
    """It takes no lock itself, not even for a moment."""
    import fcntl

    path = tmp_path / "o.zarr"

    def look():
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "flock", lambda *_: pytest.fail("locked"))
            return DatasetCollection(path).status()

    at = Look(look, ("start", "scatter"))
    DatasetCollection(path).add_adatas(h5ad_pair, callbacks=[at], **OPTIONS)
    assert at.seen["start", "scatter"].state == "running"


@pytest.fixture
def elsewhere(tmp_path, h5ad_pair):
    """The folder of a build of another machine, and a function that sets its last sign of life, in seconds ago."""
    path = tmp_path / "o.zarr"
    with pytest.raises(CrashError):
        DatasetCollection(path).add_adatas(h5ad_pair, callbacks=[Look(dict, ("end", "scatter"), then=crash)], **OPTIONS)
    target = Folder(str(path))
    (claim,) = find_claims(target)
    claim = replace(claim, owner=dict(claim.owner) | {"host": "node-7"})
    target.write(claim.name, claim.payload())
    progress = watch.find_progress(target, claim)

    def said(seconds):
        updated = (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat(timespec="seconds")
        values = asdict(replace(progress, error=None, updated=updated))
        log_folder(target).write(f"running-{claim.first}.json", json.dumps(values).encode())

    return target, said


def test_a_build_of_another_machine_runs_as_long_as_it_says_so(elsewhere):
    target, said = elsewhere
    said(5)
    found = status_of(target, target.url, None, None)
    assert (found.state, found.builds[0].host) == ("running", "node-7")
    said(600)
    found = status_of(target, target.url, None, None)
    assert (found.state, found.builds[0].state) == ("silent", "silent")
    assert 590 < found.builds[0].silence < 700
    assert "that machine cannot be asked" in str(found)
    assert "if clocks differ by that, it may run" in str(found)


def test_a_clock_that_is_ahead_is_said(elsewhere):
    """By a day: else a build that was interrupted would run until tomorrow."""
    target, said = elsewhere
    said(-86_400)
    found = status_of(target, target.url, None, None)
    assert (found.state, found.builds[0].state) == ("silent", "silent")
    assert "s from now: the clocks of its machine and of this one differ; set them" in str(found)


def test_a_build_says_how_many_workers_are_there(tmp_path, h5ad_pair, monkeypatch):
    monkeypatch.setattr(watch, "BEAT_S", 0.01)
    counts, seen = iter([2, 0, 0, 3]), {}
    path = tmp_path / "o.zarr"

    def count(_):
        if enough.is_set():
            return 3
        n = next(counts)
        found = DatasetCollection(path).status()
        seen[found.builds[0].progress.n_workers, found.builds[0].progress.no_worker_since is None] = str(found)
        if n == 3:
            enough.set()
        return n

    enough = threading.Event()
    monkeypatch.setattr("annbatch_dask.engines.dask.LocalEngine.count_workers", count)
    waiting = Look(dict, ("start", "gather"), then=lambda: enough.wait(60))
    DatasetCollection(path).add_adatas(h5ad_pair, callbacks=[waiting], **OPTIONS)
    assert {(2, True), (0, False)} <= set(seen)
    assert "    2 workers" in seen[2, True]
    assert "no worker has been there since 20" in seen[0, False]


def test_what_says_nothing_or_nonsense_is_a_build_all_the_same(elsewhere):
    target, _ = elsewhere
    (claim,) = find_claims(target)
    for document in (b"", b"[]", b'{"nonce": 1}'):
        log_folder(target).write(f"running-{claim.first}.json", document)
        found = status_of(target, target.url, None, None)
        assert (found.state, found.builds[0].progress) == ("silent", None)
        assert "has not said how far it is" in str(found)
        json.dumps(found.to_json())


def test_the_lock_of_a_process_that_was_killed_is_nobodys(tmp_path):
    from annbatch_dask.storage.lock import holder_of

    target = Folder(str(tmp_path / "o.zarr"))
    assert holder_of(target) is None
    lock = tmp_path / "o.zarr.lock"
    lock.write_text(f"process {os.getpid()} on {os.uname().nodename}")
    assert holder_of(target) is None  # it holds none
    lock.write_text("process 12 on node-7")
    assert holder_of(target) == "process 12 on node-7"
    lock.write_text("somebody's")
    assert holder_of(target) is None


def test_a_folder_that_cannot_be_written_stops_no_build(tmp_path, h5ad_pair, caplog):
    (tmp_path / "o.zarr.log").write_text("in the way")
    DatasetCollection(tmp_path / "o.zarr").add_adatas(h5ad_pair, **OPTIONS)
    assert DatasetCollection(tmp_path / "o.zarr").n_obs == 500
    assert caplog.text.count("cannot be written for others") == 1


def test_nothing_is_there(tmp_path, capsys):
    assert main(["status", str(tmp_path / "o.zarr")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/o.zarr: nothing is there yet\n"
    assert not list(tmp_path.iterdir())


def test_a_collection_in_memory_has_none():
    import zarr

    with pytest.raises(CollectionError, match="has no builds to tell of"):
        DatasetCollection(zarr.create_group({})).status()


def test_on_a_store(h5ad_pair):
    """A crash, seen by another process's claim; and one whose machine is not known."""
    url = "memory://status/o.zarr"
    try:
        at = Look(lambda: DatasetCollection(url).status(), ("start", "gather"), then=crash)
        with pytest.raises(CrashError):
            DatasetCollection(url).add_adatas(h5ad_pair, callbacks=[at], **OPTIONS)
        assert at.seen["start", "gather"].state == "running"
        assert at.seen["start", "gather"].holder is None
        assert DatasetCollection(url).status().state == "interrupted"
        DatasetCollection(url).add_adatas(h5ad_pair, **OPTIONS)
        assert DatasetCollection(url).status().state == "idle"
    finally:
        fsspec.filesystem("memory").store.clear()
        claims._running.clear()
