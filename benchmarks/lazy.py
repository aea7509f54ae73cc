#!/usr/bin/env python3
"""Open many sparse files lazily and count cells by type: concat_lazy beside anndata.concat of read_lazy.

lazy.py WORK [--files 100] [--cells 50000] [--genes 30000] [--repeats 3] [--limit-s 600]

Each measurement is a process of its own, in turn, with a time limit; peak memory is that process's largest resident
set. X holds two values a cell, since nothing of it is read; obs names are read by both, or by neither. Tasks are those
of the graphs of X and of the column that is counted.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

PER_CELL = 2
SIDES = ("ours", "theirs")
N_TYPES = 60


def write(folder: Path, n_files: int, n_cells: int, n_genes: int) -> list[Path]:
    """Write the files that are not there yet; every file lacks other genes and cell types."""
    import anndata as ad
    import pandas as pd
    import scipy.sparse as sp

    paths = [folder / f"{n_cells}x{n_genes}_{k:03d}.h5ad" for k in range(n_files)]
    space = np.array([f"ENSG{i:011d}" for i in range(n_genes * 11 // 10)])
    types = np.array([f"cell type {i}" for i in range(N_TYPES)])
    for k, path in enumerate(paths):
        if path.exists():
            continue
        rng = np.random.default_rng(k)
        indices = rng.integers(0, n_genes, (n_cells, PER_CELL), np.int32).ravel()
        indptr = np.arange(n_cells + 1, dtype=np.int64) * PER_CELL
        X = sp.csr_matrix((np.ones(len(indices), np.float32), indices, indptr), (n_cells, n_genes))
        obs = pd.DataFrame(
            {
                "cell_type": pd.Categorical(rng.choice(types[rng.permutation(N_TYPES)[:30]], n_cells)),
                "n_counts": rng.random(n_cells),
            },
            index=[f"f{k}_{i}" for i in range(n_cells)],
        )
        genes = space[np.sort(rng.permutation(len(space))[:n_genes])]
        unfinished = path.with_suffix(".part")
        ad.AnnData(X, obs=obs, var=pd.DataFrame(index=genes)).write_h5ad(unfinished)
        unfinished.replace(path)
    return paths


def ours(paths: list[Path], *, names: bool) -> Any:
    """Return our view."""
    from annbatch_dask import concat_lazy

    return concat_lazy(paths, load_annotation_index=names)


def theirs(paths: list[Path], *, names: bool) -> Any:
    """Return anndata's."""
    import anndata as ad

    return ad.concat([ad.experimental.read_lazy(p, load_annotation_index=names) for p in paths], join="outer")


def measure(side: str, paths: list[Path], *, names: bool) -> None:
    """Open, count, and print one line of JSON."""
    import anndata  # noqa: F401 - both need it
    import dask.array  # noqa: F401
    import xarray  # noqa: F401

    start = time.perf_counter()
    view = {"ours": ours, "theirs": theirs}[side](paths, names=names)
    opened = time.perf_counter() - start
    counts = view.obs["cell_type"].to_series().value_counts()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    tasks = sum(len(lazy.__dask_graph__() or ()) for lazy in (view.X, view.obs["cell_type"]))
    found = {"open_s": opened, "count_s": seconds - opened, "tasks": tasks, "peak_nbytes": peak}
    print(json.dumps(found | {"types": len(counts), "cells": int(counts.sum())}))


def run(args: argparse.Namespace, side: str, *, names: bool) -> dict[str, float] | None:
    """Measure in a process of its own; None if it was not finished in time."""
    options = ["--side", side, *(["--names"] if names else [])]
    command = [sys.executable, __file__, args.work, "--files", args.files, "--cells", args.cells, "--genes", args.genes]
    try:
        done = subprocess.run(
            [*map(str, command), *options], check=True, stdout=subprocess.PIPE, text=True, timeout=args.limit_s
        )
    except subprocess.TimeoutExpired:
        return None
    found: dict[str, float] = json.loads(done.stdout)
    return found


def line(runs: list[dict[str, float] | None], limit_s: float) -> str:
    """Show medians, or that one was not finished, which was the last."""
    found = [run for run in runs if run is not None]
    if len(found) < len(runs):
        return f"not finished in {limit_s:,.0f} s"
    median = {k: statistics.median(run[k] for run in found) for k in found[0]}
    return (
        f"open {median['open_s']:6.1f} s   count {median['count_s']:5.1f} s   "
        f"{median['tasks']:7,.0f} tasks   {median['peak_nbytes'] / 1e9:5.2f} GB"
    )


def main() -> int:
    """Measure in turn and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--files", type=int, default=100)
    parser.add_argument("--cells", type=int, default=50_000)
    parser.add_argument("--genes", type=int, default=30_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit-s", type=float, default=600, help="for one measurement (default: 600)")
    parser.add_argument("--side", choices=SIDES, help="one measurement in this process")
    parser.add_argument("--names", action="store_true", help="read the obs names too, in that measurement")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    paths = write(args.work, args.files, args.cells, args.genes)
    if args.side:
        measure(args.side, paths, names=args.names)
        return 0
    for names in (False, True):
        found: dict[str, list[dict[str, float] | None]] = {side: [] for side in SIDES}
        for _ in range(args.repeats):
            for side, runs in found.items():
                if None not in runs:
                    runs.append(run(args, side, names=names))
        assert len({(m["types"], m["cells"]) for runs in found.values() for m in runs if m}) == 1
        print(f"{args.files} files of {args.cells:,} x {args.genes:,}, obs names {'read' if names else 'not read'}")
        for side, runs in found.items():
            print(f"  {side:<7} {line(runs, args.limit_s)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
