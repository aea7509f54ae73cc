#!/usr/bin/env python3
"""Measure shuffling and streaming on your own files, beside annbatch where it is importable (Python 3.12 or newer).

benchmark.py FILES... [--work DIR]        shuffles the files, and streams what came out
benchmark.py OUT.zarr [--by COLUMN]       streams a collection

Both packages run in turn in this process; the table has medians and ranges. What is streamed are whole epochs in random
order, in batches of 4,096 cells, after a first batch that is not counted. The entropy of the values of COLUMN in a
batch, as a share of that of cells drawn at random, says how well batches are mixed: 1 is ideal.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import zarr

from annbatch_dask import DatasetCollection
from annbatch_dask.errors import AnnbatchDaskError, CollectionError
from annbatch_dask.mixing import measure_mixing

OURS, THEIRS = "annbatch_dask", "annbatch"
SIZES: dict[str, Any] = {"batch_size": 4096, "chunk_size": 512, "preload_nchunks": 32}
DATASET_SIZE = "2GiB"
N_GENES = 2_000
SHUFFLE, MIXING = "shuffle, s", "entropy of batches"
CSR, DENSE, GENES = (
    "CSR batches, cells/s",
    "dense float32 batches, cells/s",
    f"dense batches of {N_GENES:,} genes, cells/s",
)
Found = dict[str, dict[str, list[float]]]  # measurements, by row of the table and package


def packages() -> list[Any]:
    """Return annbatch_dask, and annbatch where it is importable."""
    found = [importlib.import_module(OURS)]
    try:
        found.append(importlib.import_module(THEIRS))
    except ImportError as error:
        print(f"{THEIRS} is left out: {error}")
    return found


@contextmanager
def at_its_best(package: Any) -> Iterator[None]:
    """Give annbatch the codecs that its tutorial recommends, and keep its warnings from the table."""
    if package.__name__ == OURS:
        yield
        return
    with warnings.catch_warnings(), zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        warnings.simplefilter("ignore")
        yield


def shuffle(package: Any, files: list[str], path: Path) -> float:
    """Build a collection of the files; return seconds."""
    start = time.perf_counter()
    collection = package.DatasetCollection(path)
    collection.add_adatas(files, dataset_size=DATASET_SIZE, rng=np.random.default_rng(0))
    return time.perf_counter() - start


def stream(package: Any, path: str | Path, output: str, genes: list[str], column: str) -> tuple[float, list[pd.Series]]:
    """Stream an epoch; return cells per second, and the values of the column batch by batch."""
    make = ours if package.__name__ == OURS else theirs
    loader, finish = make(package, path, output, genes, column)
    finish(next(iter(loader))["X"])  # compiles what is compiled on first use
    values = []
    start = time.perf_counter()
    for batch in loader:
        finish(batch["X"])
        values.append(batch["obs"][column])
    return sum(map(len, values)) / (time.perf_counter() - start), values


def ours(package: Any, path: str | Path, output: str, genes: list[str], column: str) -> tuple[Any, Any]:
    """Return our loader, which yields the output itself."""
    form = {CSR: {}, DENSE: {"dense": True}, GENES: {"dense": True, "var_names": genes}}[output]
    loader = package.Loader(
        **SIZES, **form, dtype=np.float32, shuffle=True, preload_to_gpu=False, layers=[], obsm=[], obs_columns=[column]
    )
    return loader.use_collection(package.DatasetCollection(path, mode="r")), lambda X: X


def theirs(package: Any, path: str | Path, output: str, genes: list[str], column: str) -> tuple[Any, Any]:
    """Return annbatch's loader, and what makes the output of its X."""
    loader = package.Loader(**SIZES, shuffle=True, preload_to_gpu=False)
    loader.use_collection(
        package.DatasetCollection(zarr.open_group(path, mode="r")), load_adata=partial(backed, column=column)
    )
    where = loader.var.index.get_indexer(genes)
    return loader, {CSR: as_float32, DENSE: as_dense, GENES: lambda X: as_dense(X[:, where])}[output]


def backed(group: zarr.Group, column: str) -> ad.AnnData:
    """Open a dataset with X on disk, and one column of obs."""
    X = ad.io.sparse_dataset(group["X"]) if isinstance(group["X"], zarr.Group) else group["X"]
    obs = pd.DataFrame({column: ad.io.read_elem(group[f"obs/{column}"])})
    obs.index = obs.index.astype(str)
    return ad.AnnData(X, obs=obs, var=ad.io.read_elem(group["var"])[[]])


def as_float32(X: Any) -> Any:
    """Convert where another dtype is stored."""
    return X.astype(np.float32, copy=False)


def as_dense(X: Any) -> np.ndarray:
    """Fill in the zeros."""
    return as_float32(X.toarray() if hasattr(X, "toarray") else X)


def mixing(values: list[pd.Series]) -> float:
    """Return the batches' entropy as a share of the ideal."""
    codes = pd.factorize(pd.concat(values, ignore_index=True), use_na_sentinel=False)[0]
    return measure_mixing(np.split(codes, np.cumsum([len(v) for v in values])[:-1])).share


def choose(collection: DatasetCollection, by: str | None) -> tuple[str, list[str]]:
    """Return the column of obs to judge mixing by, and genes chosen at random."""
    obs = collection.obs_dataset()
    found = [str(c) for c in obs if isinstance(obs[c].dtype, pd.CategoricalDtype) and c != "src_path"]
    column = by or next((c for c in ("cell_type", *found, "src_path") if c in obs), "")
    if column not in obs:
        sys.exit(f"benchmark: obs has no column {column!r}; give --by one of: {', '.join(map(str, obs))}")
    genes = collection.var.index.to_numpy()
    return column, np.random.default_rng(0).choice(genes, min(N_GENES, len(genes)), replace=False).tolist()


def measure(paths: list[str], work: Path, by: str | None, repeats: int) -> Found:
    """Measure everything, one package after the other in each round."""
    sides, found = packages(), defaultdict(lambda: defaultdict(list))
    stores: dict[str, Any] = dict.fromkeys((package.__name__ for package in sides), paths[0])
    if not is_collection(paths):
        for k, package in in_turn(sides, repeats):
            stores[package.__name__] = work / f"{package.__name__}_{k}.zarr"
            found[SHUFFLE][package.__name__].append(shuffle(package, paths, stores[package.__name__]))
    collection = DatasetCollection(stores[OURS], mode="r")
    column, genes = choose(collection, by)
    print(f"{collection.n_obs:,} cells x {collection.n_vars:,} genes; batches judged by {column}")
    for output in (CSR, DENSE, GENES):
        for _, package in in_turn(sides, repeats):
            rate, values = stream(package, stores[package.__name__], output, genes, column)
            found[output][package.__name__].append(rate)
            if output == CSR:
                found[MIXING][package.__name__].append(mixing(values))
    return found


def in_turn(sides: list[Any], repeats: int) -> Iterator[tuple[int, Any]]:
    """Yield each package in each round, with its own settings in force."""
    for k in range(repeats):
        for package in sides:
            with at_its_best(package):
                yield k, package


def is_collection(paths: list[str]) -> bool:
    """Say whether the path is a collection's, and not one of AnnData files."""
    if len(paths) > 1 or not paths[0].rstrip("/").endswith(".zarr"):
        return False
    try:
        return not DatasetCollection(paths[0], mode="r").is_empty
    except CollectionError:
        return False


def table(found: Found) -> pd.DataFrame:
    """Return medians with their ranges, and how many times better ours are."""
    rows = {}
    for what, values in found.items():
        rows[what] = {name: spread(v) for name, v in values.items()}
        if THEIRS in values and what != MIXING:
            quotient = median(values[OURS]) / median(values[THEIRS])
            rows[what]["times better"] = f"{1 / quotient if what == SHUFFLE else quotient:.2f}"
    return pd.DataFrame.from_dict(rows, orient="index").fillna("")


def spread(values: list[float]) -> str:
    """Show median and range."""
    low, middle, high = (f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in (min(values), median(values), max(values)))
    return f"{middle} ({low}-{high})"


def main() -> int:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="AnnData files, or one collection")
    parser.add_argument("--by", metavar="COLUMN", help="of obs (default: cell_type, or the first categorical one)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="of each measurement (default: 3)")
    parser.add_argument(
        "--work", type=Path, default=Path(), metavar="DIR", help="has room for all collections built (default: .)"
    )
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="benchmark-", dir=args.work) as work:
            found = measure(args.paths, Path(work), args.by, args.repeats)
    except AnnbatchDaskError as error:
        sys.exit(f"benchmark: {error}")
    print(f"\n{table(found).to_string()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
