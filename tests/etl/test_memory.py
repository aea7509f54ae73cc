"""Peak memory of a task, measured in a process of its own, is within the figure of the plan."""

import contextlib
import subprocess
import sys

import anndata as ad
import cloudpickle
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from annbatch_dask import DatasetCollection
from annbatch_dask.errors import MemoryBudgetError
from annbatch_dask.etl import run
from annbatch_dask.plan.memory import MIB, RESERVED_NBYTES, Budget

CHILD = """
import sys, cloudpickle
fn, args = cloudpickle.load(sys.stdin.buffer)
result = fn(*args)
status = open("/proc/self/status").read().splitlines()
peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
sys.stdout.buffer.write(cloudpickle.dumps((result, peak)))
"""


class FreshProcesses(run.LocalEngine):
    """Runs the first task of each stage, as large as any, in a process of its own, and notes its peak."""

    def run(self, name, fn, tasks, on_result):
        if name == "commit":
            return super().run(name, fn, tasks, on_result)
        payload = cloudpickle.dumps((fn, tasks[0]))
        done = subprocess.run([sys.executable, "-c", CHILD], input=payload, stdout=subprocess.PIPE, check=True)
        first, peaks[name] = cloudpickle.loads(done.stdout)
        on_result(0, first)
        return [first, *super().run(name, fn, tasks[1:], lambda i, result: on_result(i + 1, result))]


peaks: dict[str, int] = {}


def sparse(n_obs, n_vars, per_row, *, whole):
    """A CSR matrix of evenly spread columns."""
    step = n_vars // per_row
    cols = (np.arange(per_row) * step + np.arange(n_obs)[:, None] % step).astype(np.int32)
    values = (np.arange(cols.size) % 50 + 1).astype(np.float32) + (0 if whole else 0.5)
    return sp.csr_matrix((values, cols.reshape(-1), np.arange(n_obs + 1) * per_row), shape=(n_obs, n_vars))


def wide():
    yield sparse(400, 60_000, 30_000, whole=True)


def deep():
    yield sparse(200_000, 500, 50, whole=False)


def dense():
    yield np.arange(6000 * 4000, dtype=np.float32).reshape(6000, 4000) / 3


def many():
    for _ in range(20):
        yield sparse(300, 5000, 1000, whole=True)


@pytest.mark.parametrize(
    "shape",
    [wide, *(pytest.param(shape, marks=pytest.mark.chaos) for shape in (many, deep, dense))],
    ids=lambda shape: shape.__name__,
)
def test_a_task_stays_within_the_figure_of_the_plan(tmp_path, monkeypatch, shape):
    paths, n_obs = [], 0
    for k, X in enumerate(shape()):
        index = [f"{k}-{i}" for i in range(X.shape[0])]
        obs = pd.DataFrame({"n": np.arange(X.shape[0]), "kind": pd.Categorical(["a"] * len(index))}, index=index)
        n_obs += X.shape[0]
        paths.append(tmp_path / f"{k}.h5ad")
        ad.AnnData(X=X, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(X.shape[1])])).write_h5ad(paths[-1])
    engine = FreshProcesses("synchronous", Budget(RESERVED_NBYTES + 300 * MIB))
    room = run.EngineRoom(
        run.LocalEngine("threads", engine.budget), engine.budget, lambda _: contextlib.nullcontext(engine)
    )
    monkeypatch.setattr("annbatch_dask.collection.choose_engine", lambda *_: room)
    collection = DatasetCollection(tmp_path / "o.zarr")
    options = {"seed": 0, "dataset_size": n_obs // 2}
    plan = collection.plan_adatas(paths, **options)
    assert len(plan.blocks) > 1
    assert max(b.n_bytes for b in plan.blocks) > 0.7 * 32 * MIB or len(paths) > 1
    collection.add_adatas(paths, **options)
    for stage, figure in zip(("scatter", "gather"), plan.peak_nbytes, strict=True):
        assert peaks[stage] <= RESERVED_NBYTES + figure, f"{stage}: {peaks[stage] / MIB:.0f} MiB"
    with pytest.raises(MemoryBudgetError, match=r"needs .* MiB and a worker thread has"):
        tight = Budget(RESERVED_NBYTES + 4 * MIB)
        small = run.EngineRoom(room.scanner, tight, room.start)
        monkeypatch.setattr("annbatch_dask.collection.choose_engine", lambda *_: small)
        collection.plan_adatas(paths, **options)
