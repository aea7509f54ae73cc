"""Inputs stored by columns that are larger than a task: read once, and the same as if they were stored by rows."""

import contextlib
from collections import Counter as Count
from pathlib import Path

import anndata as ad
import dask
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

from annbatch_dask import QC, DatasetCollection
from annbatch_dask.engines.base import EngineChoice
from annbatch_dask.engines.dask import LocalEngine
from annbatch_dask.errors import SchemaError
from annbatch_dask.etl import scan
from annbatch_dask.etl import transpose as stage
from annbatch_dask.events import Callback
from annbatch_dask.plan import layout, transposing
from annbatch_dask.plan.memory import MIB, RESERVED_NBYTES, Budget
from annbatch_dask.sources import matrices, transposed
from tests.clusters import cluster, kill
from tests.tools import At, Counter, tree_digest

N_OBS, N_VARS, PER_ROW = 2500, 400, 150
OPTIONS = {"seed": 3, "dataset_size": 900}


def matrix(dtype, *, whole=True):
    """Rows of genes in no pattern, of which some rows are empty."""
    rng = np.random.default_rng(0)
    counts = np.where(np.arange(N_OBS) % 97, PER_ROW, 0)
    genes = [np.sort(rng.permutation(N_VARS)[:n]) for n in counts]
    values = rng.integers(1, 90, counts.sum()) + (0 if whole else 0.5)
    indptr = np.append(0, np.cumsum(counts))
    return sp.csr_matrix((values.astype(dtype), np.concatenate(genes), indptr), shape=(N_OBS, N_VARS))


def written(folder, kind, x, *, suffix="h5ad", chunks=20_000, **more):
    """A file of the same name wherever it is."""
    folder.mkdir()
    obs = pd.DataFrame({"n": np.arange(N_OBS)}, index=[f"c{i}" for i in range(N_OBS)])
    a = ad.AnnData(x.asformat(kind), obs=obs, var=pd.DataFrame(index=[f"g{j}" for j in range(N_VARS)]), **more)
    path = folder / f"a.{suffix}"
    is_h5 = suffix == "h5ad"
    with ad.settings.override(auto_shard_zarr_v3=False):
        if is_h5:
            a.write_h5ad(path)
        with h5py.File(path, "r+") if is_h5 else contextlib.nullcontext(zarr.open_group(path, mode="w")) as file:
            if not is_h5:
                ad.io.write_elem(file, "/", a)
            options = {"chunks": (chunks,)} | ({"compression": "gzip"} if is_h5 else {})
            ad.io.write_elem(file, "X", a.X, dataset_kwargs=options)
    return path


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    """One file of counts by columns, and by rows."""
    folder, x = tmp_path_factory.mktemp("counts"), matrix("float32")
    return {kind: written(folder / kind, kind, x) for kind in ("csc", "csr")}


@pytest.fixture
def small(monkeypatch):
    """Workers in whose memory such a file is not; a call with False gives as much as anybody needs."""

    def room(*, small=True):
        budget = Budget(RESERVED_NBYTES + (50 if small else 1000) * MIB, block_nbytes=300_000 if small else 100 * MIB)
        engine = LocalEngine("synchronous", budget)
        choice = EngineChoice(engine, budget, lambda _: contextlib.nullcontext(engine))
        monkeypatch.setattr("annbatch_dask.collection.choose_engine", lambda *_: choice)
        monkeypatch.setitem(dask.config.config, "annbatch_dask", {"block_size": budget.block_nbytes})

    monkeypatch.setattr(transposing, "_LEAST", 2**10)
    room()
    return room


@pytest.fixture
def read(monkeypatch):
    """How many entries of which array of a matrix of columns were read."""
    found = Count()

    def counted(array, start, stop):
        found[array.name.rpartition("/")[2]] += stop - start
        return plain(array, start, stop)

    plain = matrices.read_flat
    for module in (matrices, transposed):
        monkeypatch.setattr(module, "read_flat", counted)
    return found


def build(path, source, monkeypatch, **options):
    monkeypatch.chdir(source.parent)
    return DatasetCollection(path).add_adatas([source.name], **OPTIONS | options)


def datasets(path):
    """Arrays of all datasets: the document of one names its plan, which knows how inputs are stored."""
    return tree_digest(path, only=lambda name: name.parts[0].startswith("dataset_") and len(name.parts) > 2)


def test_it_is_read_once_whatever_its_number_of_blocks(tmp_path, counts, small, read, monkeypatch):
    monkeypatch.chdir(counts["csc"].parent)
    plan = DatasetCollection(tmp_path / "planned.zarr").plan_adatas(["a.h5ad"], **OPTIONS)
    assert len(plan.blocks) > 4
    assert len(plan.strips) > 2
    assert "1 input stored by columns (CSC), and read once: " in plan.summary()
    assert f"{len(plan.strips)} transpose + {len(plan.blocks)} scatter" in plan.summary()
    assert max(s.peak_nbytes for s in plan.strips) <= plan.peak_nbytes[0] <= plan.budget.task_nbytes
    read.clear()
    seen = Counter()
    build(tmp_path / "csc.zarr", counts["csc"], monkeypatch, callbacks=[seen])
    with h5py.File(counts["csc"]) as file:
        n = file["X/data"].shape[0]
    assert read == {"data": n, "indices": n}
    assert seen.tasks["transpose"] == len(plan.strips)
    assert seen.bytes["transpose"] == seen.announced["transpose"][2] == 8 * n
    build(tmp_path / "csr.zarr", counts["csr"], monkeypatch)
    assert datasets(tmp_path / "csc.zarr") == datasets(tmp_path / "csr.zarr")
    small(small=False)  # all in one block
    seen = Counter()
    build(tmp_path / "whole.zarr", counts["csc"], monkeypatch, callbacks=[seen])
    assert "transpose" not in seen.tasks
    assert tree_digest(tmp_path / "whole.zarr") == tree_digest(tmp_path / "csc.zarr")
    assert not list(tmp_path.glob("*scratch*"))


CHOSEN = {
    "where": {"where": "n > 70 and n < 2321"},
    "groupby": {"groupby": "n"},
    "both": {"where": "n > 70", "qc": QC(min_genes=1)},
}


@pytest.mark.parametrize("options", CHOSEN.values(), ids=CHOSEN)
def test_rows_that_are_chosen(tmp_path, counts, small, monkeypatch, options):
    seen = Counter()
    build(tmp_path / "small.zarr", counts["csc"], monkeypatch, callbacks=[seen], **options)
    assert seen.tasks["transpose"] > 2
    small(small=False)
    build(tmp_path / "large.zarr", counts["csc"], monkeypatch, **options)
    assert tree_digest(tmp_path / "small.zarr") == tree_digest(tmp_path / "large.zarr")


def backed(path):
    return ad.read_h5ad(path, backed="r")


@pytest.mark.parametrize(
    ("how", "dtype"),
    [
        ("h5ad", "float64"),
        ("h5ad", "int16"),
        ("h5ad", "bool"),
        ("zarr", "float32"),
        ("backed", "float32"),
        ("layer", "float32"),
    ],
)
def test_other_matrices(tmp_path, small, monkeypatch, how, dtype):
    for module in (layout, transposing):  # a bool takes few bytes
        monkeypatch.setattr(module, "MAX_READS", 1)
    x = matrix(dtype, whole=how != "h5ad")
    suffix = "zarr" if how == "zarr" else "h5ad"
    layers = {"b": x.tocsc()} if how == "layer" else {}
    paths = [written(tmp_path / kind, kind, x, suffix=suffix, layers=dict(layers)) for kind in ("csc", "csr")]
    options = {"load_adata": backed} if how == "backed" else {}
    seen = Counter()
    for path in paths:
        build(path.parent / "o.zarr", path, monkeypatch, callbacks=[seen], **options)
    assert seen.tasks["transpose"] > 2
    assert datasets(paths[0].parent / "o.zarr") == datasets(paths[1].parent / "o.zarr")


@pytest.mark.parametrize("chunks", [100, 700_000])
def test_chunks_of_any_size(tmp_path, small, read, monkeypatch, chunks):
    x = matrix("float32")
    paths = [written(tmp_path / kind, kind, x, chunks=chunks) for kind in ("csc", "csr")]
    for path in paths:
        build(path.parent / "o.zarr", path, monkeypatch)
    assert set(read.values()) == {x.nnz}
    assert datasets(paths[0].parent / "o.zarr") == datasets(paths[1].parent / "o.zarr")


class Before(Callback):
    """Does something before the tasks of a stage."""

    def __init__(self, name, do):
        self.name, self.do = name, do

    def on_stage_start(self, event):
        if event.stage == self.name:
            self.do()


class StoppedError(Exception):
    """Ends a build."""


def stop():
    raise StoppedError


@pytest.mark.parametrize(("name", "number"), [("transpose", 2), ("scatter", 3), ("gather", 1)])
def test_a_build_that_was_stopped_goes_on(tmp_path, counts, small, read, monkeypatch, name, number):
    path = tmp_path / "o.zarr"
    with pytest.raises(StoppedError):
        build(path, counts["csc"], monkeypatch, callbacks=[At(name, number, stop)])
    before = read["data"]
    seen = Counter()
    build(path, counts["csc"], monkeypatch, callbacks=[seen])
    assert seen.reused >= number
    assert name == "transpose" or read["data"] == before
    build(tmp_path / "csr.zarr", counts["csr"], monkeypatch)
    assert datasets(path) == datasets(tmp_path / "csr.zarr")


def test_what_builds_nothing_reads_it_no_more_than_before(tmp_path, counts, small, read, monkeypatch):
    """Verification and views have no scratch folder; values are looked at as they lie."""
    with h5py.File(counts["csc"]) as file:
        n = file["X/data"].shape[0]
    build(tmp_path / "o.zarr", counts["csc"], monkeypatch)
    read.clear()
    assert DatasetCollection(tmp_path / "o.zarr").verify(against=["a.h5ad"]).ok
    assert read == {"data": n, "indices": n}
    read.clear()
    monkeypatch.setattr(scan, "_READ_NBYTES", 10_000)
    plan = DatasetCollection(tmp_path / "p.zarr").plan_adatas(["a.h5ad"], read_values=True, **OPTIONS)
    assert read == {"data": n}
    assert "X        stored as uint8" in plan.summary()
    read.clear()
    chosen = DatasetCollection(tmp_path / "p.zarr").plan_adatas(["a.h5ad"], read_values=True, where="n > 70", **OPTIONS)
    assert read == {"data": n, "indices": n}
    assert chosen.values == plan.values


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_values_of_all_files_are_looked_at(tmp_path, monkeypatch, suffix):
    """Of int64 by the plan alone, as other dtypes may not hold them; of what extends a collection likewise."""
    x = matrix("int64")
    paths = [written(tmp_path / kind, kind, x, suffix=suffix) for kind in ("csc", "csr")]
    options = {"read_values": True} | OPTIONS
    plans = [DatasetCollection(tmp_path / "p.zarr").plan_adatas([p], where="n > 70", **options) for p in paths]
    assert plans[0].values == plans[1].values
    with dask.config.set(scheduler="synchronous"):
        c = build(tmp_path / "o.zarr", paths[1], monkeypatch)
        c.add_adatas([paths[0]], on_duplicate_source="warn", seed=4)
    assert c.n_obs == 2 * N_OBS
    assert c.verify(against=paths).ok


@pytest.mark.chaos
def test_a_worker_dies_of_a_cluster(tmp_path, counts, monkeypatch):
    monkeypatch.setitem(dask.config.config, "annbatch_dask", {"block_size": 300_000})
    monkeypatch.setattr(transposing, "_LEAST", 2**10)
    seen = Counter()
    with cluster(tmp_path / "cluster") as (client, (_, *workers)):
        harm = At("transpose", 3, lambda: kill(workers[0]))
        options = {"client": client, "memory_limit": RESERVED_NBYTES + 50 * MIB, "callbacks": [seen, harm]}
        build(tmp_path / "csc.zarr", counts["csc"], monkeypatch, **options)
    assert seen.tasks["transpose"] > 4
    build(tmp_path / "csr.zarr", counts["csr"], monkeypatch, memory_limit=RESERVED_NBYTES + 50 * MIB)
    assert datasets(tmp_path / "csc.zarr") == datasets(tmp_path / "csr.zarr")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


CHOICE = {"where": "n > 70", "qc": QC(min_genes=1)}


@pytest.mark.parametrize(("damage", "options"), [(flip, {}), (Path.unlink, {}), (empty, {}), (flip, CHOICE)])
def test_a_damaged_strip_is_read_anew(tmp_path, counts, small, monkeypatch, damage, options):
    scratch, path = tmp_path / "scratch", tmp_path / "o.zarr"
    done = []

    def harm():
        [strip] = scratch.rglob("strip-000001.bin")
        damage(strip)
        done.append(strip)

    again = []
    plain = stage.write_strip
    monkeypatch.setattr(
        stage, "write_strip", lambda folder, index, *args: (again.append(index), plain(folder, index, *args))[1]
    )
    build(path, counts["csc"], monkeypatch, callbacks=[At("scatter", 1, harm)], scratch=scratch, **options)
    assert done
    assert sorted(again)[:3] == [0, 1, 1]
    assert len(again) == len(set(again)) + 1
    small(small=False)
    build(tmp_path / "large.zarr", counts["csc"], monkeypatch, **options)
    assert tree_digest(path) == tree_digest(tmp_path / "large.zarr")


def test_a_row_index_outside_is_refused(tmp_path, small, monkeypatch):
    path = written(tmp_path / "csc", "csc", matrix("float32"))

    def harm():
        with h5py.File(path, "r+") as file:
            file["X/indices"][5] = N_OBS

    monkeypatch.setattr(stage, "unchanged", lambda *_: contextlib.nullcontext())
    with pytest.raises(SchemaError, match=rf"row indices run from \d+ to {N_OBS:,} in a matrix of {N_OBS:,} rows"):
        build(tmp_path / "o.zarr", path, monkeypatch, callbacks=[Before("transpose", harm)])
