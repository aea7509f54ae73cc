"""Workers of real clusters that cannot take part: another version of this package, folders that they do not see."""

import contextlib
import logging
import re
import shutil
import subprocess
from functools import partial
from glob import glob
from pathlib import Path

import dask
import pytest

import annbatch_dask
from annbatch_dask import DatasetCollection
from annbatch_dask.errors import SchedulerError
from annbatch_dask.events import Callback
from tests.clusters import TIMEOUT_S, cluster, worker
from tests.tools import tree_digest

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]
OPTIONS = {"seed": 4, "dataset_size": 60}
FAKETIME = next(iter(glob("/usr/lib/*/faketime/libfaketime.so.1")), "")
_UNSHARE = subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode
own_mounts = pytest.mark.skipif(_UNSHARE != 0, reason="mount namespaces are not permitted here: run as root")


@pytest.fixture(autouse=True)
def many_tasks(monkeypatch):
    monkeypatch.setitem(dask.config.config, "annbatch_dask", {"block_size": 20_000})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, h5ad_pair):
    """The same build in one process."""
    path = tmp_path_factory.mktemp("undisturbed") / "o.zarr"
    with pytest.MonkeyPatch.context() as patch, dask.config.set(scheduler="synchronous"):
        patch.setitem(dask.config.config, "annbatch_dask", {"block_size": 20_000})
        DatasetCollection(path).add_adatas(h5ad_pair, **OPTIONS)
    return tree_digest(path)


def another_package(folder, *, older):
    """A copy of this package, of another version; of one before it had all modules."""
    copy = folder / "other" / "annbatch_dask"
    shutil.copytree(Path(annbatch_dask.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    init = copy / "__init__.py"
    init.write_text(init.read_text().replace(f'"{annbatch_dask.__version__}"', '"0.0.9"'))
    if older:
        (copy / "engines" / "needs.py").unlink()
    return {"PYTHONPATH": str(copy.parent), "PYTHONSAFEPATH": "1"}  # before this folder's


def blind(folder):
    """What starts a process that sees another, empty folder in place of this one."""
    return ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {folder} && exec "$@"', "sh")


class Joins(Callback):
    """A worker that joins at the start of scatter, and is there before the first task is handed out."""

    def __init__(self, stack, client, start):
        self.stack, self.client, self.start = stack, client, start

    def on_stage_start(self, event):
        if event.stage == "scatter":
            self.process = self.stack.enter_context(self.start())
            self.client.wait_for_workers(2, timeout=TIMEOUT_S)


@pytest.mark.parametrize("older", [False, True])
def test_workers_of_another_version_are_refused_and_sent_away(tmp_path, h5ad_pair, undisturbed, caplog, older):
    environment, path = another_package(tmp_path, older=older), tmp_path / "o.zarr"
    words = r"has another annbatch_dask, or none .*No module named" if older else r"has annbatch_dask 0\.0\.9"
    with cluster(tmp_path / "cluster", n_workers=1) as (client, _), contextlib.ExitStack() as stack:
        start = partial(worker, tmp_path / "cluster", **environment)
        joins = Joins(stack, client, start)
        with caplog.at_level(logging.WARNING, "annbatch_dask"):
            DatasetCollection(path).add_adatas(h5ad_pair, client=client, callbacks=[joins], **OPTIONS)
        joins.process.wait(TIMEOUT_S)  # it is gone
        with start():
            client.wait_for_workers(2, timeout=TIMEOUT_S)
            with pytest.raises(SchedulerError, match=words):
                DatasetCollection(tmp_path / "refused.zarr").add_adatas(h5ad_pair, client=client, **OPTIONS)
    assert tree_digest(path) == undisturbed
    said = [r.getMessage() for r in caplog.records if "sent away" in r.getMessage()]
    assert older or [re.search(words, message) is not None for message in said] == [True]  # an older one may just end
    assert not (tmp_path / "refused.zarr").exists()


@own_mounts
@pytest.mark.parametrize("hidden", ["output", "scratch"])
def test_workers_that_do_not_see_a_folder_are_refused_and_sent_away(tmp_path, h5ad_pair, undisturbed, caplog, hidden):
    for name in ("output", "scratch"):
        (tmp_path / name).mkdir()
    scratch, path = tmp_path / "scratch", tmp_path / "output" / "o.zarr"
    with cluster(tmp_path / "cluster", n_workers=1) as (client, _), contextlib.ExitStack() as stack:
        start = partial(worker, tmp_path / "cluster", "--preload", "tests.chaos.hasty", before=blind(tmp_path / hidden))
        joins = Joins(stack, client, start)
        with caplog.at_level(logging.WARNING, "annbatch_dask"):
            DatasetCollection(path).add_adatas(h5ad_pair, client=client, callbacks=[joins], scratch=scratch, **OPTIONS)
        joins.process.wait(TIMEOUT_S)
        with start():
            client.wait_for_workers(2, timeout=TIMEOUT_S)
            refused = tmp_path / "output" / "refused.zarr"
            with pytest.raises(SchedulerError, match=f"does not see {tmp_path / hidden}.* nothing was begun"):
                DatasetCollection(refused).add_adatas(h5ad_pair, client=client, scratch=scratch, **OPTIONS)
    assert tree_digest(path) == undisturbed
    (said,) = [r.getMessage() for r in caplog.records if "sent away" in r.getMessage()]
    assert f"does not see {tmp_path / hidden}" in said
    assert not (refused / "zarr.json").exists()


@pytest.mark.skipif(not FAKETIME, reason="no libfaketime: apt-get install libfaketime")
def test_clocks_that_are_a_day_wrong_change_nothing(tmp_path, h5ad_pair, undisturbed):
    path = tmp_path / "o.zarr"
    with cluster(tmp_path / "cluster", n_workers=1) as (client, _), contextlib.ExitStack() as stack:
        for offset in ("-1d", "+1d"):
            wrong = {"LD_PRELOAD": FAKETIME, "FAKETIME": offset, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
            stack.enter_context(worker(tmp_path / "cluster", **wrong))
        client.wait_for_workers(3, timeout=TIMEOUT_S)
        DatasetCollection(path).add_adatas(h5ad_pair, client=client, **OPTIONS)
        assert len(client.scheduler_info(n_workers=-1)["workers"]) == 3
    assert tree_digest(path) == undisturbed
