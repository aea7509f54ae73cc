"""What workers must have: those that lack something are refused at the start, and sent away later."""

import asyncio

import pytest
from dask import config
from distributed import Client, LocalCluster

from annbatch_dask import DatasetCollection
from annbatch_dask.engines import choose
from annbatch_dask.engines import needs as module
from annbatch_dask.engines.choose import choose_engine
from annbatch_dask.engines.dask import UNFIT, ClusterEngine
from annbatch_dask.engines.needs import Needs, SharedFile, installed
from annbatch_dask.errors import SchedulerError
from annbatch_dask.plan.memory import MIB, Budget
from annbatch_dask.storage.folder import Folder

BUDGET = Budget(600 * MIB, 2)
NEVER_FULL = {f"distributed.worker.memory.{what}": False for what in ("target", "spill", "pause", "terminate")}


@pytest.fixture
def cluster():
    """Two workers that are threads of this process, and their client."""
    options = {"processes": False, "threads_per_worker": 2, "dashboard_address": "127.0.0.1:0"}
    with (
        config.set(NEVER_FULL),
        LocalCluster(n_workers=2, memory_limit="600MiB", **options) as started,
        Client(started, set_as_default=False) as client,
    ):
        yield started, client


def wait_for(condition, client):
    for _ in range(2000):
        if condition():
            return
        client.sync(asyncio.sleep, 0.01)
    pytest.fail("it did not come to pass")


def another(monkeypatch, **versions):
    """Workers find these versions, the client those that are there."""
    here = installed()
    monkeypatch.setattr(module, "installed", lambda: here | versions)
    return Needs(versions=here)


@pytest.mark.parametrize("package", ["annbatch_dask", "anndata", "zarr", "numcodecs"])
def test_workers_with_another_version_are_refused(cluster, monkeypatch, package):
    needs = another(monkeypatch, **{package: "0.0.9"})
    with pytest.raises(SchedulerError, match=rf"has {package} 0\.0\.9, .* 1 more lack something") as caught:
        ClusterEngine(cluster[1], BUDGET).needing(needs)
    assert f"has {package} {installed() and needs.versions[package]}: install" in str(caught.value)


def test_a_cluster_of_another_version_is_refused_before_the_scan(cluster, monkeypatch, tmp_path, h5ad_pair):
    monkeypatch.setattr(module, "workers_lacking", None)  # not from here
    monkeypatch.setattr("annbatch_dask.engines.dask.workers_lacking", lambda *_: {"tcp://a": "has zarr 1"})
    with pytest.raises(SchedulerError, match=r"worker tcp://a has zarr 1; mend .* nothing was begun"):
        DatasetCollection(tmp_path / "o.zarr").add_adatas(h5ad_pair, client=cluster[1])
    assert not (tmp_path / "o.zarr").exists()


def test_a_folder_that_workers_do_not_see_is_said_after_a_while(cluster, tmp_path, caplog):
    needs = Needs(files=(SharedFile(Folder(str(tmp_path / "there")), "job"),))
    with pytest.raises(SchedulerError, match=rf"does not see {tmp_path}/there, .* written job.* same path"):
        ClusterEngine(cluster[1], BUDGET).needing(needs)
    assert caplog.text.count("looked at again") == len(module.NFS_PAUSES_S)


def test_a_folder_that_appears_in_time_is_seen(cluster, tmp_path, monkeypatch):
    needs = Needs(files=(SharedFile(Folder(str(tmp_path)), "job", "nonce"),))
    (tmp_path / "job").write_text("a job of another")
    monkeypatch.setattr(
        "annbatch_dask.storage.transient.sleep", lambda _: (tmp_path / "job").write_text("of this nonce")
    )
    engine = ClusterEngine(cluster[1], BUDGET).needing(needs)
    assert engine.run("scatter", abs, [(-3,)], lambda *_: None, str) == [3]


def test_a_store_that_fails_is_named_with_its_error(cluster):
    needs = Needs(files=(SharedFile(Folder("nosuch://bucket"), "job"),))
    with pytest.raises(SchedulerError, match=r"does not see nosuch://bucket.*\(\w+: .*nosuch"):
        ClusterEngine(cluster[1], BUDGET).needing(needs)


def test_a_worker_that_joins_and_is_too_small_is_sent_away(cluster, caplog):
    started, client = cluster
    engine = ClusterEngine(client, BUDGET).needing(Needs(peaks={"scatter": 80 * MIB}))
    small = client.sync(_small_worker, started.scheduler_address)
    try:
        wait_for(lambda: len(client.scheduler_info(n_workers=-1)["workers"]) == 3, client)
        assert engine.run("scatter", abs, [(-i,) for i in range(40)], lambda *_: None, str) == list(range(40))
        wait_for(lambda: small.status.name == "closed", client)
    finally:
        client.sync(small.close)
    (said,) = (r.message for r in caplog.records if "sent away" in r.message)
    assert "has 523 MB for 1 thread, and a scatter task needs 83.9 MB: start workers with 524 MB or more" in said
    assert len(client.scheduler_info(n_workers=-1)["workers"]) == 2


async def _small_worker(address):
    from distributed import Worker

    return await Worker(address, nthreads=1, memory_limit=499 * MIB, dashboard=False)


def test_a_stage_that_every_worker_is_too_small_for_ends_with_what_it_needs(cluster, monkeypatch):
    """Sooner or later: each may be replaced by another that is no larger."""
    monkeypatch.setattr("annbatch_dask.engines.dask.UNFIT", 1)
    engine = ClusterEngine(cluster[1], BUDGET).needing(Needs(peaks={"gather": 1000 * MIB}))
    with pytest.raises(SchedulerError, match=r"2 workers joined that cannot take part; .* start workers with 2\.5 GB"):
        engine.run("gather", abs, [(-i,) for i in range(40)], lambda *_: None, str)
    assert UNFIT == 8


def test_an_own_cluster_is_not_asked():
    engine = ClusterEngine(None, BUDGET, is_own=True)
    assert engine.needing(Needs()) is engine


def test_versions_are_checked_where_an_engine_is_chosen(cluster):
    assert choose_engine(cluster[1], None).scanner.needs.versions == installed()


async def never(*_):
    await asyncio.Event().wait()


def test_a_worker_that_does_not_answer_is_not_waited_for(cluster, monkeypatch, caplog):
    """As one that is frozen: Dask would wait for minutes, until it takes it for dead."""
    _, client = cluster
    first, second = client.scheduler_info(n_workers=-1)["workers"]
    found = module.answers(client, never, workers=[first], seconds=0.1)
    assert isinstance(found[first], TimeoutError)
    assert f"worker {first} does not answer within 0 s" in caplog.text
    monkeypatch.setattr(module, "_lacking", never)
    monkeypatch.setattr(module, "SILENT_S", 0.1)
    assert module.workers_lacking(client, Needs()) == {}
    assert second in caplog.text


def test_workers_without_a_limit_of_which_none_answers(monkeypatch):
    monkeypatch.setattr(choose, "memory_nbytes", never)
    monkeypatch.setattr(choose, "SILENT_S", 0.1)
    options = {"processes": False, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"}
    with (
        config.set(NEVER_FULL),
        LocalCluster(n_workers=1, memory_limit=0, **options) as started,
        Client(started, set_as_default=False) as client,
        pytest.raises(SchedulerError, match="none of 1 workers answers within 0 s"),
    ):
        choose_engine(client, None)
