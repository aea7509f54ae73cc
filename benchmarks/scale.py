#!/usr/bin/env python3
"""Rehearse builds that no machine here can run: everything but the cells, and what it costs beside numbers set before.

    python benchmarks/scale.py plan --cells 1e9       the plan, the job file and what follows from them, as JSON lines
    python benchmarks/scale.py root --datasets 10000  a collection's root document, written and opened
    python benchmarks/scale.py tasks --tasks 50000    as many tasks on a real scheduler, which only write receipts
    python benchmarks/scale.py build --cells 4e6      a real build of made-up files, as large as the disk allows

What was asked for, in the order in which it is measured. The atlas is 10^9 cells of 1,500 values in 10,000 files with
1,000 distinct lists of 30,000 genes; a worker has 16 GiB and 4 threads, and a dataset is 2 GiB.

=====================  ============================================================  =================================
what                   it may take                                                   how it grows
=====================  ============================================================  =================================
planning               300 s, 4 GB                                                   files, and distinct gene lists
job file               128 MB                                                        files, distinct lists, categories
scatter receipts       1 kB each                                                     blocks
gather receipts        32 kB each                                                    datasets
tables of spill files  2 % of the spilled bytes                                      blocks x parts
reads of a gather      4 a block                                                     blocks
root document          500 bytes a dataset, 400 a file                               datasets + files
opening it             5 s, 500 MB                                                   datasets + files
scheduler and client   5 ms of CPU and 20 kB a task                                  tasks
=====================  ============================================================  =================================
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import os
import pickle
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from annbatch_dask import DatasetCollection
from annbatch_dask.engines.base import EngineChoice
from annbatch_dask.etl.job import Job, load_job, save_job
from annbatch_dask.etl.prepare import Prepared, prepare
from annbatch_dask.etl.receipts import GatherReceipt, ScatterReceipt
from annbatch_dask.etl.request import make_request
from annbatch_dask.plan.costs import bounds_of
from annbatch_dask.plan.dtypes import ValueRange
from annbatch_dask.plan.memory import Budget
from annbatch_dask.plan.reads import expected_reads
from annbatch_dask.plan.schema import Categories, ColumnSchema, MatrixSchema, SourceSchema, shared_names
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.private import make_private
from annbatch_dask.storage.root import Root

NNZ_PER_CELL, N_GENES, N_SPACE, ROW_STEP = 1500, 30_000, 42_000, 64
WORKER_NBYTES, N_THREADS = 2**34, 4
N_DATASET_FILES = 155
"""Files of a dataset with 31 columns of obs, as counted of one."""


@dataclass(frozen=True)
class Atlas:
    """A made-up atlas; ``n_lists``: distinct gene lists, as files of one release of an annotation share theirs."""

    n_cells: int
    n_files: int
    n_lists: int


def bounds_for(atlas: Atlas, tasks: tuple[int, int]) -> dict[str, float]:
    """Return what each figure may be; the first ones are those of 10^9 cells, whatever the atlas."""
    n_blocks, n_datasets = tasks
    return {
        "plan_s": 300,
        "plan_peak_nbytes": 4e9,
        "job_nbytes": 128e6,
        "scatter_receipts_nbytes": 1e3 * n_blocks,
        "gather_receipts_nbytes": 32e3 * n_datasets,
        "tables_share": 0.02,
        "reads_of_a_gather": 4 * n_blocks,
        "root_nbytes": 500 * n_datasets + 400 * atlas.n_files,
    }


def report(figures: dict[str, Any], bounds: dict[str, float]) -> bool:
    """Print figures, each beside its bound, as one line of JSON; return whether all are within."""
    too_much = [name for name, most in bounds.items() if name in figures and figures[name] > most]
    print(json.dumps({**figures, "bounds": bounds, "too_much": too_much}), flush=True)
    return not too_much


def peak_nbytes(pid: int | str = "self") -> int:
    """Return the largest resident set of a process so far; ru_maxrss of a new one begins with that of its parent."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")), 0)


# --- the plan ------------------------------------------------------------------------------------------------------


def describe(atlas: Atlas, number: int, rng: np.random.Generator, names: np.ndarray) -> SourceSchema:
    """Return what a scan says of a file: its genes, counts per cell that vary, obs with its own donors."""
    n_obs = atlas.n_cells // atlas.n_files
    edges = np.minimum(np.arange(-(-n_obs // ROW_STEP) + 1) * ROW_STEP, n_obs)
    nnz = np.concatenate([[0], np.cumsum(rng.poisson(NNZ_PER_CELL * np.diff(edges)))])
    x = MatrixSchema("X", "csr", "float32", "int32", N_GENES, ROW_STEP, nnz, integral=True)
    donors = tuple(f"donor_{number}_{i}" for i in range(20))
    types = tuple(sorted({f"cell type {i}" for i in rng.integers(0, 800, 60)}))
    assays = ("10x 3' v2", "10x 3' v3")[: 1 + number % 2]
    columns = (
        ColumnSchema("cell_type", "categorical", categories=Categories(types, "str")),
        ColumnSchema("donor", "categorical", categories=Categories(donors, "str")),
        ColumnSchema("tissue", "categorical", categories=Categories((f"tissue {number % 60}",), "str")),
        ColumnSchema("assay", "categorical", categories=Categories(assays, "str")),
        ColumnSchema("n_counts", "numeric", "float32"),
        ColumnSchema("is_primary", "numeric", "bool"),
        ColumnSchema("barcode", "string", width=20),
    )
    return SourceSchema(path_of(number), n_obs, names, (x,), columns, identity=f"{number}/0", name_width=20)


def scans(atlas: Atlas) -> Iterator[bytes]:
    """Yield what workers send of each file."""
    rng = np.random.default_rng(0)
    space = np.array([f"ENSG{i:011d}" for i in range(N_SPACE)], object)
    picks = [np.sort(rng.permutation(N_SPACE)[:N_GENES]) for _ in range(atlas.n_lists)]
    for i in range(atlas.n_files):
        names = shared_names(space[picks[i % atlas.n_lists]])
        yield pickle.dumps(describe(atlas, i, rng, names), protocol=5)


@dataclass(frozen=True)
class MadeUpScans:
    """An engine that has scanned all files already."""

    atlas: Atlas

    def run(self, name: str, *_: Any) -> list[Any]:
        """Return what is known of each file."""
        from annbatch_dask.etl.scan import Scanned

        assert name == "scan", name  # X is of one dtype, so that nothing else is looked at
        return [Scanned(pickle.loads(sent), None) for sent in scans(self.atlas)]  # noqa: S301 - made above


def path_of(number: int) -> str:
    """Return the path of a file of the atlas."""
    return f"/data/study_{number:05d}.h5ad"


def prepared(atlas: Atlas, folder: str) -> Prepared:
    """Return the plan of the atlas, as a build has it that knows what its files hold."""
    defaults = {n: p.default for n, p in inspect.signature(DatasetCollection.add_adatas).parameters.items()}
    given = {"adata_paths": [path_of(i) for i in range(atlas.n_files)], "seed": 0, "dataset_size": "2GiB"}
    room: Any = EngineChoice(MadeUpScans(atlas), Budget(WORKER_NBYTES, N_THREADS), nothing)  # type: ignore[arg-type]
    return prepare(Root(None, Folder(f"{folder}/o.zarr")), make_request(defaults | given), room)


def nothing(_: int) -> Any:
    """Start no engine."""


def rehearse_plan(atlas: Atlas) -> bool:
    """Print what the plan says and what it cost."""
    with tempfile.TemporaryDirectory() as folder:
        return _rehearse_plan(atlas, folder)


def _rehearse_plan(atlas: Atlas, folder: str) -> bool:
    start, cpu = time.perf_counter(), time.process_time()
    found = prepared(atlas, folder)
    made = found.plan
    fingerprint, _ = made.fingerprint, made.work_key
    figures: dict[str, Any] = {
        "cells": made.n_obs,
        "files": atlas.n_files,
        "gene_lists": atlas.n_lists,
        "genes": made.n_vars,
        "tasks": [len(made.blocks), made.n_datasets],
        "parts_a_dataset": round(made.layout.n_parts / made.n_datasets, 1),
        "plan_s": round(time.perf_counter() - start, 2),
        "plan_cpu_s": round(time.process_time() - cpu, 2),
        "plan_peak_nbytes": peak_nbytes(),
        "fingerprint": fingerprint,
        "task_nbytes": [*made.peak_nbytes, made.budget.task_nbytes],
    }
    figures |= follows(found, folder)
    return report(figures, bounds_for(atlas, (len(made.blocks), made.n_datasets)))


def follows(planned: Prepared, folder: str) -> dict[str, Any]:
    """Return the sizes that follow from a plan: measured of real records of ours, times their number."""
    made = planned.plan
    job = Job(made, planned.refs, make_private(Folder(f"{folder}/scratch")), Folder(f"{folder}/o.zarr"))
    file = save_job(job)
    before, start = psutil.Process().memory_info().rss, time.perf_counter()
    loaded = load_job(file)
    job_s, job_held = time.perf_counter() - start, psutil.Process().memory_info().rss - before
    assert loaded.plan.n_obs == made.n_obs
    found = ValueRange(integral=True, low=0, high=1e4, single=True)
    receipt = ScatterReceipt(100_000, 10**9, 10**9, {"X": found}, {"X": 10**8}, "0123456789abcdef")
    files = {f"obs/column_{k}/codes/zarr.json": (1234, "01234567") for k in range(N_DATASET_FILES)}
    gathered = GatherReceipt("dataset_1234", files, 177_000, 265_500_000, "0123456789abcdef", 10**9, "dataset_1234")
    n_reads, n_bytes = expected_reads(made)
    spilled = bounds_of(made.sources, 0).spill_nbytes
    line = 8 * (6 + 2 * 4)  # of a table: X's columns and values, names of cells, barcodes
    return {
        "job_nbytes": file.scratch.size(file.name),
        "job_load_s": round(job_s, 2),
        "job_held_nbytes": job_held,
        "scatter_receipts_nbytes": len(json.dumps(receipt.to_json())) * len(made.blocks),
        "gather_receipts_nbytes": len(json.dumps(gathered.to_json())) * made.n_datasets,
        "spilled_nbytes": int(spilled),
        "tables_nbytes": line * len(made.blocks) * made.layout.n_parts,
        "tables_share": round(line * len(made.blocks) * made.layout.n_parts / spilled, 4),
        "reads_of_a_gather": n_reads,
        "read_nbytes": int(n_bytes),
        "reads": n_reads * made.n_datasets,
    }


# --- the root document ---------------------------------------------------------------------------------------------


def rehearse_root(n_datasets: int, n_files: int) -> bool:
    """Write a root document as a commit does, and open it."""
    from annbatch_dask.manifest import (
        ANNBATCH_ENCODING,
        MANIFEST_KEY,
        BuildRecord,
        DatasetRecord,
        Manifest,
        MatrixRecord,
        SourceRecord,
    )
    from annbatch_dask.storage.metadata import group_document

    datasets = tuple(
        DatasetRecord(f"dataset_{k}", 177_000, 265_500_000, f"{k:016x}", (95_000, f"{k:08x}"), 155, 10**9)
        for k in range(n_datasets)
    )
    paths = tuple(map(path_of, range(n_files)))
    sources = tuple(SourceRecord(p, 100_000, 150_000_000, f"{k:016x}", "X", 30_000) for k, p in enumerate(paths))
    overlaps = {f"{(1 << n_files) - k:x}": k for k in range(1, 65)}
    build = BuildRecord("create", 0, {"name": "swap-or-not", "version": 1}, "0" * 32, paths, genes=overlaps)
    matrices = {"X": MatrixRecord("csr", "uint16", "float32", integral=True, low=0, high=9999)}
    manifest = Manifest(10**9, 42_000, matrices, datasets, sources, (build,), n_datasets - 1, id="0" * 16)
    with tempfile.TemporaryDirectory(suffix=".zarr") as folder:
        document = group_document(ANNBATCH_ENCODING | {MANIFEST_KEY: manifest.to_json()}, None)
        Path(folder, "zarr.json").write_bytes(document)
        del datasets, sources, manifest
        before, start = psutil.Process().memory_info().rss, time.perf_counter()
        collection = DatasetCollection(folder, mode="r")
        assert (len(collection), collection.n_obs) == (n_datasets, 10**9)
        seconds, held = time.perf_counter() - start, psutil.Process().memory_info().rss - before
    figures = {
        "datasets": n_datasets,
        "files": n_files,
        "root_nbytes": len(document),
        "open_s": round(seconds, 2),
        "open_nbytes": held,
    }
    return report(figures, {"root_nbytes": 500 * n_datasets + 400 * n_files, "open_s": 5, "open_nbytes": 500e6})


# --- the task graph ------------------------------------------------------------------------------------------------


def receipt_only(folder: Any, index: int) -> Any:
    """Be a scatter task that has nothing to read."""
    from annbatch_dask.plan.dtypes import NOTHING
    from annbatch_dask.storage.scratch import find_receipt, write_receipt

    task = f"scatter-{index:06d}"
    if (found := find_receipt(folder, task)) is not None:
        return ScatterReceipt.from_json(found)
    receipt = ScatterReceipt(100_000, 10**9, 10**9, {"X": NOTHING}, {"X": 10**8}, f"{index:016x}")
    write_receipt(folder, task, receipt.to_json())
    return receipt


def rehearse_tasks(n_tasks: int, n_workers: int) -> bool:
    """Run a stage of tasks that only write receipts: what the scheduler and the client take for each."""
    from distributed import Client, LocalCluster

    from annbatch_dask.engines.base import run_stage
    from annbatch_dask.engines.dask import ClusterEngine
    from annbatch_dask.events import Callbacks

    with (
        tempfile.TemporaryDirectory() as scratch,
        LocalCluster(n_workers=n_workers, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        engine, folder = ClusterEngine(client, Budget(2**31)), Folder(scratch)
        client.run(lambda: __import__("annbatch_dask.etl.scatter"))
        before = psutil.Process().memory_info().rss
        start, cpu = time.perf_counter(), time.process_time()
        done = run_stage(
            engine,
            "scatter",
            receipt_only,
            [(folder, i) for i in range(n_tasks)],
            Callbacks([]),
            size=(n_tasks, n_tasks),
            measure=lambda _, r: (r.n_rows, r.n_bytes),
            describe=str,
        )
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        assert [int(r.fingerprint, 16) for r in done] == list(range(n_tasks))
        stored = sum(Folder(scratch).sizes().values())
    figures = {
        "tasks": n_tasks,
        "workers": n_workers,
        "seconds": round(seconds, 1),
        "ms_a_task": round(1e3 * seconds / n_tasks, 3),
        "scheduler_and_client_cpu_ms_a_task": round(1e3 * cpu / n_tasks, 3),
        "scheduler_and_client_nbytes_a_task": round((peak_nbytes() - before) / n_tasks),
        "receipt_nbytes": round(stored / n_tasks),
    }
    return report(
        figures,
        {"scheduler_and_client_cpu_ms_a_task": 5, "scheduler_and_client_nbytes_a_task": 20e3, "receipt_nbytes": 1e3},
    )


# --- a real build --------------------------------------------------------------------------------------------------


def rehearse_build(
    n_cells: int, work: Path, *, per_file: int, n_values: int, workers: int, memory: str, one_core: bool
) -> bool:
    """Build a collection of files that are links to one, in the memory of small workers: its rate and its peak."""
    one = work / f"cells_{per_file}_{n_values}.h5ad"
    if not one.exists():
        make_file(one, per_file, n_values)
    links = work / "links"
    shutil.rmtree(links, ignore_errors=True)
    links.mkdir()
    paths = []
    for k in range(-(-n_cells // per_file)):
        os.link(one, path := links / f"{k:05d}.h5ad")
        paths.append(str(path))
    out = work / "scale.zarr"
    shutil.rmtree(out, ignore_errors=True)
    with peak_of_children() as peak, cluster_of(workers, memory, one_core=one_core):
        start = time.perf_counter()
        collection = DatasetCollection(out).add_adatas(paths, seed=0, dataset_size=100_000)
        seconds = time.perf_counter() - start
    figures = {
        "cells": collection.n_obs,
        "values_a_cell": n_values,
        "workers": workers,
        "one_core_each": one_core,
        "seconds": round(seconds, 1),
        "cells_per_s": round(collection.n_obs / seconds),
        "worker_peak_nbytes": peak[0],
        "collection_nbytes": sum(d.n_bytes for d in collection.manifest.datasets),
    }
    shutil.rmtree(out)
    shutil.rmtree(links)
    return report(figures, {})


def make_file(path: Path, n_obs: int, n_values: int) -> None:
    """Write a file of counts with the statistics of single cells: a few genes have most of them."""
    import anndata as ad
    import pandas as pd
    import scipy.sparse as sp

    rng = np.random.default_rng(0)
    counts = rng.poisson(n_values, n_obs)
    indptr = np.concatenate([[0], np.cumsum(counts)])
    share = rng.gamma(0.3, size=N_GENES)
    indices = rng.choice(N_GENES, int(indptr[-1]), p=share / share.sum()).astype(np.int32)
    values = rng.geometric(0.5, len(indices)).astype(np.float32)
    x = sp.csr_matrix((values, indices, indptr), (n_obs, N_GENES))
    x.sum_duplicates()
    obs = pd.DataFrame({"cell_type": pd.Categorical(rng.integers(0, 60, n_obs).astype(str))})
    obs.index = [f"cell{i}" for i in range(n_obs)]
    var = pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(N_GENES)])
    ad.AnnData(x, obs=obs, var=var).write_h5ad(path, compression="gzip", compression_opts=1)


@contextlib.contextmanager
def cluster_of(n_workers: int, memory: str, *, one_core: bool) -> Iterator[None]:
    """Have a cluster of small workers, which a build uses; with `one_core`, each may use a core of its own alone."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=n_workers, threads_per_worker=1, memory_limit=memory, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        if one_core:
            cores = sorted(os.sched_getaffinity(0))
            for k, worker in enumerate(client.scheduler_info(n_workers=-1)["workers"]):
                client.run(stay_on_core, cores[k % len(cores)], workers=[worker])
        yield


def stay_on_core(core: int) -> None:
    """Keep all threads of this process, and those that they start, on one core: a worker has more than its task's."""
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), {core})


@contextlib.contextmanager
def peak_of_children() -> Iterator[list[int]]:
    """Watch the child processes meanwhile; the largest resident set that one of them had."""
    import threading

    peak, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(OSError):
                    peak[0] = max(peak[0], peak_nbytes(child.pid))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def main() -> int:
    """Read the command line, measure, print a line of JSON; 1 where a figure is beyond its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["plan", "root", "tasks", "build"])
    parser.add_argument("--cells", type=float, default=1e9, help="of plan and build")
    parser.add_argument("--files", type=int, default=None, help="one for 100,000 cells if not given")
    parser.add_argument("--gene-lists", type=int, default=None, help="distinct ones; one for 10 files if not given")
    parser.add_argument("--datasets", type=int, default=10_000)
    parser.add_argument("--tasks", type=int, default=5_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--one-core", action="store_true", help="a worker of build may use one core alone")
    parser.add_argument("--memory", default="2GiB", help="of a worker of build")
    parser.add_argument("--values", type=int, default=2_000, help="of a cell of build")
    parser.add_argument("--per-file", type=int, default=43_000, help="cells of a file of build")
    parser.add_argument("--work", type=Path, default=Path("bench_data"), help="folder for what build writes")
    args = parser.parse_args()
    n_cells = int(args.cells)
    n_files = args.files or max(1, n_cells // 100_000)
    if args.what == "plan":
        return 1 - rehearse_plan(Atlas(n_cells, n_files, args.gene_lists or max(1, n_files // 10)))
    if args.what == "root":
        return 1 - rehearse_root(args.datasets, args.files or 10_000)
    if args.what == "tasks":
        return 1 - rehearse_tasks(args.tasks, args.workers)
    args.work.mkdir(parents=True, exist_ok=True)
    given = {"per_file": args.per_file, "n_values": args.values, "workers": args.workers, "memory": args.memory}
    given["one_core"] = args.one_core
    return 1 - rehearse_build(n_cells, args.work, **given)


if __name__ == "__main__":
    sys.exit(main())
