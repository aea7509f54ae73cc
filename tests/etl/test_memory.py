"""Peak memory of a task, measured in a process of its own, is within the figure of the plan."""

import contextlib
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import anndata as ad
import cloudpickle
import dask
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from annbatch_dask import DatasetCollection
from annbatch_dask.engines.base import EngineChoice
from annbatch_dask.engines.dask import LocalEngine
from annbatch_dask.errors import MemoryBudgetError
from annbatch_dask.plan.memory import MIB, RESERVED_NBYTES, SMALL_NBYTES, Budget
from annbatch_dask.sources import adata
from annbatch_dask.sources.adata import read_legacy

CHILD = """
import sys, cloudpickle
fn, args = cloudpickle.load(sys.stdin.buffer)
result = fn(*args)
status = open("/proc/self/status").read().splitlines()
peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
sys.stdout.buffer.write(cloudpickle.dumps((result, peak)))
"""


class FreshProcesses(LocalEngine):
    """Runs the first task of each stage, as large as any, in a process of its own, and notes its peak."""

    def run(self, name, fn, tasks, on_result, describe, on_retry=None):
        if name == "commit":
            return super().run(name, fn, tasks, on_result, describe)
        payload = cloudpickle.dumps((fn, tasks[0]))
        done = subprocess.run([sys.executable, "-c", CHILD], input=payload, stdout=subprocess.PIPE, check=True)
        first, peaks[name] = cloudpickle.loads(done.stdout)
        on_result(0, first)
        rest = super().run(name, fn, tasks[1:], lambda i, r: on_result(i + 1, r), lambda i: describe(i + 1))
        return [first, *rest]


peaks: dict[str, int] = {}


def sparse(n_obs, n_vars, per_row, *, whole):
    """A CSR matrix of evenly spread columns."""
    step = n_vars // per_row
    cols = (np.arange(per_row) * step + np.arange(n_obs)[:, None] % step).astype(np.int32)
    values = (np.arange(cols.size) % 50 + 1).astype(np.float32) + (0 if whole else 0.5)
    return sp.csr_matrix((values, cols.reshape(-1), np.arange(n_obs + 1) * per_row), shape=(n_obs, n_vars))


def named(X, k=0, **columns):
    """An AnnData whose cells and genes have names of their own; some obs."""
    n_obs, n_vars = X.shape
    obs = {"n": np.arange(n_obs), "kind": pd.Categorical(["a"] * n_obs), **columns}
    genes = pd.DataFrame(index=[f"g{i}" for i in range(n_vars)])
    return ad.AnnData(X=X, obs=pd.DataFrame(obs, index=[f"{k}-{i}" for i in range(n_obs)]), var=genes)


def wide():
    yield named(sparse(400, 60_000, 30_000, whole=True))


def deep():
    yield named(sparse(200_000, 500, 50, whole=False))


def dense():
    yield named(np.arange(6000 * 4000, dtype=np.float32).reshape(6000, 4000) / 3)


def many():
    for k in range(20):
        yield named(sparse(300, 5000, 1000, whole=True), k)


def many_dense():
    for k in range(20):
        yield named(np.arange(300 * 5000, dtype=np.float32).reshape(300, 5000) / 3, k)


def dense_among_sparse():
    yield named(np.arange(12_000 * 2000, dtype=np.float32).reshape(12_000, 2000) + 0.5)
    yield named(sparse(100, 2000, 10, whole=False), 1)


def narrow_dense():
    yield named(np.arange(15_000 * 200, dtype=np.float32).reshape(15_000, 200) / 3)
    other = named(np.arange(300 * 5000, dtype=np.float32).reshape(300, 5000) / 3, 1)
    other.var_names = [f"h{i}" for i in range(5000)]
    yield other


def other_order():
    yield named(sparse(30_000, 20_000, 500, whole=False))
    other = named(sparse(30_000, 20_000, 500, whole=False), 1)
    other.var_names = [f"g{i}" for i in reversed(range(20_001)) if i != 7]
    yield other


def strings():
    n = 100_000
    columns = {f"c{j}": np.array([f"{j:03d}-{i:09d}-{'x' * 90}" for i in range(n)], object) for j in range(6)}
    yield named(sparse(n, 20, 10, whole=True), **columns)


def barcodes():
    n = 100_000
    columns = {f"c{j}": pd.Categorical([f"{j}-{i:09d}-{'x' * 20}" for i in range(n)]) for j in range(4)}
    yield named(sparse(n, 500, 20, whole=True), **columns)


def many_categories():
    n = 100_000
    columns = {f"c{j}": pd.Categorical([f"{j}-{i // 3:09d}-{'x' * 90}" for i in range(n)]) for j in range(4)}
    yield named(sparse(n, 500, 20, whole=True), **columns)


def column_wise():
    yield named(sparse(12_000, 4000, 1000, whole=False).tocsc())


def column_wise_64():
    X = sparse(12_000, 4000, 1000, whole=False).tocsc()
    X.indices, X.indptr = X.indices.astype(np.int64), X.indptr.astype(np.int64)
    yield named(X)


def column_wise_many():
    yield named(sparse(36_000, 4000, 1000, whole=False).tocsc())


def uneven():
    yield named(sparse(200_000, 20_000, 10, whole=False))
    yield named(sparse(4000, 20_000, 5000, whole=False), 1, kind=pd.Categorical(["b"] * 4000))


USUAL = (wide, dense_among_sparse)
SLOW = (
    *(many, deep, dense, many_dense, narrow_dense, other_order, strings, barcodes, many_categories),
    *(column_wise, column_wise_64, column_wise_many, uneven),
)
OPTIONS = {
    "shuffle": {"shuffle": False},
    "groupby": {"groupby": "kind"},
    "chunks": {"n_obs_per_chunk": 8192},
    "loaded": {"load_adata": ad.read_h5ad},
}


@pytest.mark.parametrize(
    ("shape", "how"),
    [
        *((shape, "") for shape in USUAL),
        *(pytest.param(shape, "", marks=pytest.mark.chaos) for shape in SLOW),
        *(pytest.param(uneven, how, marks=pytest.mark.chaos) for how in ("shuffle", "groupby")),
        *(pytest.param(deep, how, marks=pytest.mark.chaos) for how in ("chunks", "loaded")),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_task_stays_within_the_figure_of_the_plan(tmp_path, monkeypatch, shape, how):
    paths = written(tmp_path, shape())
    plan = build_measured(tmp_path, monkeypatch, paths, **OPTIONS.get(how, {}))
    if shape in (wide, dense):
        assert len(plan.blocks) > 1
        assert max(b.n_bytes for b in plan.blocks) > 0.7 * 32 * MIB


@pytest.mark.chaos
def test_a_chunk_that_is_read_whole_is_counted(tmp_path, monkeypatch):
    paths = written(tmp_path, [named(sparse(60_000, 5000, 300, whole=False))])
    with h5py.File(paths[0], "r+") as file:
        for name in ("data", "indices"):
            values = file["X"][name][:]
            del file["X"][name]
            file["X"].create_dataset(name, data=values, chunks=values.shape, compression="gzip", compression_opts=1)
    build_measured(tmp_path, monkeypatch, paths)
    chunk = 4 * 60_000 * 300
    with pytest.raises(MemoryBudgetError, match=r"0\.h5ad, whose chunks take .* MB, needs .* with smaller chunks"):
        room_of(monkeypatch, Budget(RESERVED_NBYTES + chunk))
        DatasetCollection(tmp_path / "p.zarr").plan_adatas(paths, seed=0)


@pytest.mark.parametrize("how", ["loaded", "old"])
def test_what_is_read_whole_is_counted_and_read_once_a_thread(tmp_path, monkeypatch, how):
    options = {"seed": 0, "elements": ["-obsp"]}
    if how == "loaded":
        [path] = written(tmp_path, [named(sparse(4000, 500, 50, whole=False))])
        options |= {"load_adata": read_counted}
    else:
        path = pbmc()
        with h5py.File(path) as file:
            if "encoding-type" in file["obs"].attrs:
                pytest.skip("this release of scanpy ships the file in today's format")
        monkeypatch.setattr(adata, "read_legacy", read_counted)
    monkeypatch.setitem(dask.config.config, "annbatch_dask", {"block_size": 200_000})
    collection = DatasetCollection(tmp_path / "o.zarr")
    with dask.config.set(scheduler="synchronous"):
        plan = collection.plan_adatas([path], **options)
        assert len(plan.blocks) > 1
        assert plan.peak_nbytes[0] > plan.sources[0].resident_nbytes > 100_000
        were_read.clear()
        collection.add_adatas([path], **options)
    assert len(were_read) == 2  # by the scan, and for all blocks
    room_of(monkeypatch, Budget(RESERVED_NBYTES + SMALL_NBYTES))
    with pytest.raises(MemoryBudgetError, match=r"in memory, needs .* and a worker thread has .*; return a backed"):
        DatasetCollection(tmp_path / "p.zarr").plan_adatas([path], **options)


were_read: list[str] = []


def read_counted(item):
    """A file of any format, in memory; what is read is noted."""
    were_read.append(item)
    return read_legacy(item)


def pbmc():
    """A file of an old format, which anndata has to read whole."""
    return Path(find_spec("scanpy").submodule_search_locations[0]) / "datasets" / "10x_pbmc68k_reduced.h5ad"


def written(folder, adatas):
    """Files of some AnnData objects."""
    paths = []
    for k, a in enumerate(adatas):
        paths.append(folder / f"{k}.h5ad")
        a.write_h5ad(paths[-1])
    return paths


def room_of(monkeypatch, budget):
    """Let builds run each stage's first task in a process of its own."""
    engine = FreshProcesses("synchronous", budget)
    room = EngineChoice(LocalEngine("threads", budget), budget, lambda _: contextlib.nullcontext(engine))
    monkeypatch.setattr("annbatch_dask.collection.choose_engine", lambda *_: room)


def build_measured(tmp_path, monkeypatch, paths, **options):
    """Build a collection; no task needs more than the plan says. Returns the plan."""
    room_of(monkeypatch, Budget(RESERVED_NBYTES + 300 * MIB))
    peaks.clear()
    collection = DatasetCollection(tmp_path / "o.zarr")
    options = {"seed": 0, "dataset_size": sum(map(n_rows, paths)) // 2} | options
    plan = collection.plan_adatas(paths, **options)
    collection.add_adatas(paths, **options)
    scatter, gather = plan.peak_nbytes
    for stage, figure in {"transpose": scatter, "scatter": scatter, "gather": gather}.items():
        assert stage in peaks or (stage == "transpose" and not plan.strips)
        assert stage not in peaks or peaks[stage] <= RESERVED_NBYTES + figure, f"{stage}: {peaks[stage] / MIB:.0f} MiB"
    room_of(monkeypatch, Budget(RESERVED_NBYTES + 4 * MIB))
    with pytest.raises(MemoryBudgetError, match=r"needs .* MB and a worker thread has"):
        DatasetCollection(tmp_path / "p.zarr").plan_adatas(paths, **options)
    return plan


def n_rows(path):
    """Cells of a file."""
    with h5py.File(path) as file:
        names = file["obs"]["_index"]
        return len(names["values"] if isinstance(names, h5py.Group) else names)  # pandas 3 has a mask beside them
