"""A made-up atlas of 1,000 files and 100 million cells, as a scan describes it: what planning alone costs."""

from __future__ import annotations

import json
import resource
import sys
import time

import cloudpickle
import numpy as np

from annbatch_dask.plan.build import build_plan
from annbatch_dask.plan.memory import Budget
from annbatch_dask.plan.options import Options
from annbatch_dask.plan.plan import Plan
from annbatch_dask.plan.schema import Categories, ColumnSchema, MatrixSchema, SourceSchema, shared_names

N_FILES, N_CELLS, NNZ_PER_CELL = 1000, 100_000_000, 1500
N_PANELS = 100
"""Distinct gene lists: files of one release of an annotation share theirs."""
N_GENES, N_SPACE, ROW_STEP = 30_000, 42_000, 64
WORKER_NBYTES, N_THREADS = 2**34, 4


def describe(number: int, rng: np.random.Generator, panel: np.ndarray) -> SourceSchema:
    """Return what a scan says of a file: its genes, counts per cell that vary, obs with its own donors."""
    n_obs = N_CELLS // N_FILES
    edges = np.minimum(np.arange(-(-n_obs // ROW_STEP) + 1) * ROW_STEP, n_obs)
    nnz = np.concatenate([[0], np.cumsum(rng.poisson(NNZ_PER_CELL * np.diff(edges)))])
    x = MatrixSchema("X", "csr", "float32", "int32", N_GENES, ROW_STEP, nnz)
    donors = tuple(f"donor_{number}_{i}" for i in range(20))
    types = tuple(sorted({f"cell type {i}" for i in rng.integers(0, 800, 60)}))
    columns = (
        ColumnSchema("cell_type", "categorical", categories=Categories(types, "str")),
        ColumnSchema("donor", "categorical", categories=Categories(donors, "str")),
        ColumnSchema("tissue", "categorical", categories=Categories((f"tissue {number % 60}",), "str")),
        ColumnSchema(
            "assay", "categorical", categories=Categories(("10x 3' v2", "10x 3' v3")[: 1 + number % 2], "str")
        ),
        ColumnSchema("n_counts", "numeric", "float32"),
        ColumnSchema("is_primary", "numeric", "bool"),
        ColumnSchema("barcode", "string"),
    )
    names = shared_names(panel)  # as a scan hands them over
    return SourceSchema(f"/data/study_{number:04d}.h5ad", n_obs, names, (x,), columns, identity=f"{number}/0")


def panels(rng: np.random.Generator) -> list[np.ndarray]:
    """Return the gene lists, each out of one space."""
    space = np.array([f"ENSG{i:011d}" for i in range(N_SPACE)], object)
    return [space[np.sort(rng.permutation(N_SPACE)[:N_GENES])] for _ in range(N_PANELS)]


def plan() -> Plan:
    """Return the plan of the atlas."""
    rng = np.random.default_rng(0)
    lists = panels(rng)
    sources = [describe(i, rng, lists[i % N_PANELS]) for i in range(N_FILES)]
    return build_plan(sources, Options(seed=0, dataset_nbytes=2**31), budget=Budget(WORKER_NBYTES, N_THREADS))


def main() -> int:
    """Print what the plan says and what it cost, as one line of JSON."""
    start = time.perf_counter()
    made = plan()
    nbytes = len(cloudpickle.dumps(made))
    report = {
        "tasks": [len(made.blocks), made.n_datasets],
        "n_obs": made.n_obs,
        "n_vars": made.n_vars,
        "task_nbytes": [*made.peak_nbytes, made.budget.task_nbytes],
        "plan_nbytes": nbytes,
        "fingerprint": made.fingerprint,
        "seconds": time.perf_counter() - start,
        "peak_nbytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
