"""A real cluster: scheduler and workers started by their command lines, used through the scheduler's address."""

import contextlib
import importlib
import io
import json
import logging
import os
import re
import subprocess
import sys
import urllib.request
from importlib.resources import files

import anndata as ad
import dask
import fsspec
import numpy as np
import psutil
import pytest
from dask import config
from distributed import Client

from annbatch_dask import DatasetCollection
from annbatch_dask.cli import main
from annbatch_dask.errors import MissingPackageError
from tests.etl.inputs import dense_x
from tests.lazy.files import assert_shuffled, preprocessed
from tests.lazy.files import write as write_three
from tests.s3.server import S3Server
from tests.s3.tools import contents
from tests.tools import Counter, rows_of, tree_digest

N_WORKERS = 2
TIMEOUT_S = 240  # a machine that does other work too


@contextlib.contextmanager
def process(*command):
    """A process, terminated at the end."""
    p = subprocess.Popen([sys.executable, "-m", *command], env=os.environ | {"PYTHONWARNINGS": "default"})
    try:
        yield p
    finally:
        p.terminate()
        p.wait(TIMEOUT_S)


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory):
    """Address of a scheduler with two workers, all of them processes of their own."""
    folder = tmp_path_factory.mktemp("cluster")
    contact = folder / "scheduler.json"
    worker = ("dask", "worker", "--scheduler-file", str(contact), "--nthreads", "1", "--local-directory", str(folder))
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            process(
                "dask",
                "scheduler",
                "--port",
                "0",
                "--dashboard-address",
                "127.0.0.1:0",
                "--host",
                "127.0.0.1",
                "--scheduler-file",
                str(contact),
            )
        )
        for _ in range(N_WORKERS):
            stack.enter_context(process(*worker, "--no-dashboard"))
        with Client(scheduler_file=str(contact), timeout=TIMEOUT_S, set_as_default=False) as client:
            client.wait_for_workers(N_WORKERS, timeout=TIMEOUT_S)
        yield json.loads(contact.read_text())["address"]


def pbmc():
    """The old-format file that scanpy ships: real cells, dense, with obs and var as compound arrays."""
    return str(files("scanpy") / "datasets" / "10x_pbmc68k_reduced.h5ad")


def local(out, paths, **options):
    with config.set(scheduler="synchronous"):
        return DatasetCollection(out).add_adatas(paths, **options)


def test_a_synthetic_pair_on_two_workers_equals_one_process(tmp_path, h5ad_pair, scheduler, monkeypatch):
    monkeypatch.setitem(dask.config.config, "annbatch_dask", {"block_size": 20_000})  # many tasks
    options = {"seed": 4, "dataset_size": 100}
    one = local(tmp_path / "a.zarr", h5ad_pair, **options)
    seen = Counter()
    with Client(scheduler, set_as_default=False) as client:
        two = DatasetCollection(tmp_path / "b.zarr").add_adatas(h5ad_pair, client=client, callbacks=[seen], **options)
        workers = {w for spans in client.who_has().values() for w in spans}
    assert seen.tasks["scatter"] >= 4
    assert seen.tasks["gather"] == 5
    assert tree_digest(one.path) == tree_digest(two.path)
    assert workers == set()  # nothing stays on the cluster


@pytest.mark.chaos  # slow; tests/s3 does it in one process
@pytest.mark.s3
def test_workers_write_to_s3_what_one_process_writes_to_a_disk(tmp_path, h5ad_pair, scheduler):
    server = S3Server()
    try:
        fs = fsspec.filesystem("s3", **server.options)
        fs.call_s3("create_bucket", Bucket="cluster")
        fs.put([str(path) for path in h5ad_pair], "cluster/in/")
        urls = [f"s3://cluster/in/{path.name}" for path in h5ad_pair]
        options = {"seed": 0, "dataset_size": 300, "storage_options": server.options}
        one = local(tmp_path / "o.zarr", urls, **options)
        with Client(scheduler, set_as_default=False) as client:
            DatasetCollection("s3://cluster/o.zarr", storage_options=server.options).add_adatas(
                urls, client=client, **options
            )
        assert contents(fs, "s3://cluster/o.zarr") == contents(fsspec.filesystem("file"), one.path)
    finally:
        server.stop()


@pytest.mark.filterwarnings("ignore:left out")
def test_a_view_of_three_files_is_preprocessed_lazily_and_shuffled_by_workers(tmp_path, scheduler):
    paths = write_three(tmp_path, "h5ad", n_obs=200)
    lazy, expected = preprocessed(paths)
    with Client(scheduler, set_as_default=False) as client:
        collection = DatasetCollection(tmp_path / "c.zarr").add_adatas([lazy], client=client, seed=0, dataset_size=200)
    assert_shuffled(collection, expected)
    assert collection.obs()["file"].cat.categories.tolist() == [str(p) for p in paths]


def test_pbmc68k_through_the_command_line(tmp_path, scheduler):
    assert (
        main(
            [
                "shuffle",
                pbmc(),
                "-o",
                str(tmp_path / "a.zarr"),
                "--scheduler",
                scheduler,
                "--seed",
                "7",
                "--dataset-size",
                "400",
                "--elements=-obsp",
            ]
        )
        == 0
    )
    out = DatasetCollection(tmp_path / "a.zarr")
    assert rows_of(out) == rows_of(local(tmp_path / "b.zarr", [pbmc()], seed=7, dataset_size=400, elements=["-obsp"]))
    assert tree_digest(tmp_path / "a.zarr") == tree_digest(tmp_path / "b.zarr")


def test_pbmc68k_is_conserved(tmp_path):
    from annbatch_dask.sources.adata import read_legacy

    want = read_legacy(pbmc())
    with pytest.warns(UserWarning, match=r"left out: obsp/connectivities \(1 of 1 inputs\), obsp/distances"):
        out = local(tmp_path / "b.zarr", [pbmc()], seed=7, dataset_size=400)
    got = ad.concat([ad.io.read_zarr(g) for g in out])
    assert sorted(got.obs_names) == sorted(want.obs_names)
    want = want[got.obs_names]
    np.testing.assert_array_equal(dense_x(got), dense_x(want))
    np.testing.assert_array_equal(got.obsm["X_umap"], want.obsm["X_umap"])
    for name in want.obs.columns:
        assert got.obs[name].astype(str).tolist() == want.obs[name].astype(str).tolist()


def test_the_current_client_is_used(tmp_path, h5ad_pair, scheduler):
    seen = []

    class Engine(Counter):
        def on_build_start(self, event):
            seen.append(event.engine)

    with Client(scheduler):
        DatasetCollection(tmp_path / "a.zarr").add_adatas(h5ad_pair, seed=0, callbacks=[Engine()])
    assert seen == [f"{scheduler}, 2 workers, 2 threads"]


def test_a_local_cluster_equals_one_process_and_is_closed(tmp_path, h5ad_pair):
    children = set(psutil.Process().children(recursive=True))
    options = {"seed": 4, "dataset_size": 100}
    seen = []

    class Engine(Counter):
        def on_build_start(self, event):
            with urllib.request.urlopen(event.dashboard, timeout=TIMEOUT_S) as page:
                seen.append((event.engine, event.dashboard, page.status))

    two = DatasetCollection(tmp_path / "b.zarr").add_adatas(h5ad_pair, callbacks=[Engine()], **options)
    assert set(psutil.Process().children(recursive=True)) <= children
    assert seen[0][0].startswith("tcp://127.0.0.1")
    assert seen[0][1].startswith("http://127.0.0.1")
    assert seen[0][2] == 200
    one = local(tmp_path / "a.zarr", h5ad_pair, **options)
    assert tree_digest(one.path) == tree_digest(two.path)


def test_a_local_cluster_is_silent_to_the_end(caplog, monkeypatch):
    """Connections close after the cluster, and Dask tells of it on standard error."""
    from distributed.deploy.cluster import Cluster

    from annbatch_dask.engines.local_cluster import local_client

    close = Cluster._close

    async def last(self):
        logging.getLogger("distributed.batched").info("Batched Comm Closed")
        await close(self)

    logger, shown = logging.getLogger("distributed"), io.StringIO()
    handler = logging.StreamHandler(shown)  # as Dask's own, which it leaves away under pytest
    # Where Dask is imported before pytest listens, pytest's own handlers are among these, and silent too.
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(Cluster, "_close", last)
    with caplog.at_level(logging.INFO, logger="distributed"):
        with local_client(n_workers=1, threads_per_worker=1, memory_limit=2**30) as client:
            client.submit(int, pure=False).result()
        assert "Batched Comm Closed" in caplog.text
        assert shown.getvalue() == ""
        logging.getLogger("distributed.batched").info("heard again")
    assert shown.getvalue() == "heard again\n"


def test_an_error_on_a_worker_names_the_file_and_reaches_the_caller(tmp_path, h5ad_pair, scheduler):
    import h5py

    from annbatch_dask.errors import SchemaError, SourceNotFoundError

    bad = tmp_path / "bad.h5ad"
    bad.write_bytes(h5ad_pair[0].read_bytes())
    with h5py.File(bad, "r+") as f:
        f["X/indices"][5] = 999
    with Client(scheduler, set_as_default=False) as client, pytest.raises(SchemaError, match="999") as caught:
        DatasetCollection(tmp_path / "a.zarr").add_adatas([bad], client=client, seed=0)
    assert any("bad.h5ad" in note for note in caught.value.__notes__)
    with Client(scheduler, set_as_default=False) as client, pytest.raises(SourceNotFoundError) as caught:
        DatasetCollection(tmp_path / "a.zarr").add_adatas([tmp_path / "elsewhere.h5ad"], client=client, seed=0)
    assert re.fullmatch(r"on worker tcp://.*: workers must see inputs under the same .*", caught.value.__notes__[-1])


def test_a_module_that_the_cluster_does_not_find_is_named(tmp_path, h5ad_pair, scheduler, monkeypatch):
    (tmp_path / "module_of_mine.py").write_text(
        "import anndata\n\n\ndef load(path):\n    return anndata.read_h5ad(path)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    load = importlib.import_module("module_of_mine").load
    with Client(scheduler, set_as_default=False) as client:
        with pytest.raises(MissingPackageError, match="does not find the module 'module_of_mine'.*upload_file"):
            DatasetCollection(tmp_path / "a.zarr").add_adatas(h5ad_pair[:1], load_adata=load, client=client)
    with Client(scheduler, set_as_default=False) as client:  # Dask closes the other's connection
        client.upload_file(str(tmp_path / "module_of_mine.py"))
        assert DatasetCollection(tmp_path / "a.zarr").add_adatas(h5ad_pair[:1], load_adata=load, client=client).n_obs


def test_nobody_answers(tmp_path, h5ad_pair, capsys, monkeypatch):
    monkeypatch.setattr("annbatch_dask.engines.local_cluster.CONNECT_TIMEOUT_S", 1)
    with config.set({"distributed.comm.timeouts.connect": "1s"}):
        code = main(["shuffle", str(h5ad_pair[0]), "-o", str(tmp_path / "a.zarr"), "--scheduler", "tcp://127.0.0.1:9"])
    assert code == 1
    assert "no Dask scheduler answers at tcp://127.0.0.1:9" in capsys.readouterr().err


def test_an_address_without_a_port_begins_no_client(tmp_path, h5ad_pair, capsys, monkeypatch):
    monkeypatch.setattr("annbatch_dask.engines.local_cluster.Client", None)
    assert main(["shuffle", str(h5ad_pair[0]), "-o", str(tmp_path / "a.zarr"), "--scheduler", "head-node"]) == 1
    assert "no Dask scheduler answers at head-node (missing port number" in capsys.readouterr().err
