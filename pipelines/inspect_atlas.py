#!/usr/bin/env python3
"""Look at AnnData files or a collection without loading them: categories, genes, values per cell.

inspect_atlas.py FILES... | OUT.zarr [--by COLUMN] [--plot atlas.png]
inspect_atlas.py https://host/atlas.h5ad --blocks 4                      reads four row blocks of X, evenly spread
inspect_atlas.py s3://bucket/*.h5ad --scheduler tcp://head-node:8786     the reading is done on that cluster

Several files are joined as anndata.concat(join="outer") does it. Of obs one column is read, of X each row block once.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import dask
import numpy as np
import pandas as pd
import scipy.sparse as sp
import xarray as xr
from distributed import Client
from numpy.typing import NDArray

from annbatch_dask import DatasetCollection, concat_lazy
from annbatch_dask.errors import AnnbatchDaskError, CollectionError, MissingPackageError
from annbatch_dask.mixing import check_picture

if TYPE_CHECKING:
    import anndata as ad

N_SHOWN = 10  # genes in the table, categories in the picture
N_LABELLED = 5  # genes in the picture


class Look(NamedTuple):
    """What was found."""

    cells: pd.DataFrame  # by category: cells, and the median number of values of those whose X was read
    genes: pd.DataFrame  # mean and variance, those that vary most first
    n_values: NDArray[np.int64]  # of each cell whose X was read


def open_view(paths: list[str]) -> ad.AnnData:
    """Open a collection, or the outer join of files; nothing of X and no obs names are read."""
    if len(paths) == 1 and paths[0].rstrip("/").endswith(".zarr"):
        try:
            return DatasetCollection(paths[0], mode="r").to_lazy(load_annotation_index=False)
        except CollectionError:  # an AnnData file, or nothing
            pass
    return concat_lazy(paths, label="file", load_annotation_index=False)


def connect(address: str) -> Client:
    """Find a cluster, or end."""
    try:
        return Client(address)
    except OSError as error:
        sys.exit(f"inspect_atlas: no scheduler answers at {address} ({error}); check the address")


def category(view: ad.AnnData, by: str | None) -> xr.DataArray:
    """Read a column of obs: the one asked for, or cell_type, or the first categorical one."""
    obs = view.obs.ds
    names = [str(name) for name in obs if name != "_index"]
    found = [c for c in names if isinstance(obs[c].dtype, pd.CategoricalDtype)]
    name = by or next((c for c in ("cell_type", *found) if c in found), None)
    if name not in names:
        what = "categorical column" if name is None else f"column {name!r}"
        sys.exit(f"inspect_atlas: obs has no {what}; give --by one of: {', '.join(names)}")
    return obs[name].load()


def moments(block: Any) -> NDArray[np.float64]:
    """Return (1, 2, n_genes): the sum of each gene's values, and that of their squares."""
    block = sp.csr_matrix(block, dtype=np.float64)
    return np.stack([block.sum(0).A1, block.multiply(block).sum(0).A1])[None]


def count_values(block: Any) -> NDArray[np.int64]:
    """Return (n_cells,): how many genes of each cell have a value."""
    return np.asarray(sp.csr_matrix(block).getnnz(1), np.int64)


def look(view: ad.AnnData, column: xr.DataArray, n_blocks: int | None) -> Look:
    """Read row blocks of X in one pass, and group what they hold by a column of obs."""
    starts = np.cumsum([0, *view.X.chunks[0]])
    n_all = view.X.numblocks[0]
    chosen = np.unique(np.linspace(0, n_all - 1, n_blocks or n_all).astype(int))
    X = view.X.blocks[chosen]
    rows = np.concatenate([np.arange(starts[k], starts[k + 1]) for k in chosen])
    sums = X.map_blocks(moments, new_axis=1, chunks=((1,) * len(chosen), (2,), X.chunks[1]), meta=np.empty((0, 0, 0)))
    counts = X.map_blocks(count_values, drop_axis=1, meta=np.empty(0, np.int64))
    (mean, mean_square), n_values = dask.compute(sums.sum(0) / len(rows), counts)
    genes = pd.DataFrame({"mean": mean, "variance": mean_square - mean**2}, index=view.var_names)
    read = column.isel({column.dims[0]: rows})
    values = xr.DataArray(n_values, dims=column.dims, name="values")
    cells = pd.DataFrame(
        {
            "cells": column.groupby(column).count().to_series(),
            "values a cell": values.groupby(read.drop_vars(read.coords)).median().to_series(),
        }
    )
    return Look(cells.sort_values("cells", ascending=False), genes.sort_values("variance", ascending=False), n_values)


def report(found: Look, name: str, plot: Path) -> None:
    """Print what was found, and draw it."""
    print(f"\n{found.cells.to_string(float_format='{:,.0f}'.format)}")
    print(f"\ngenes that vary most, in {len(found.n_values):,} cells")
    print(found.genes.head(N_SHOWN).to_string(float_format="{:,.3g}".format))
    try:
        draw(found, name, plot)
        print(f"\npicture: {plot}")
    except ImportError as error:
        print(f"\nno picture: {error}; pip install matplotlib")


def draw(found: Look, name: str, path: Path) -> None:
    """Draw cells per category, values per cell, and genes by mean and variance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    categories, values, genes = figure.subplots(1, 3)
    largest = found.cells["cells"].head(N_SHOWN)[::-1]
    categories.barh(largest.index.astype(str), largest)
    categories.set(xlabel="cells", title=f"{name}: {len(largest)} largest of {len(found.cells)}")
    values.hist(found.n_values, bins="auto")
    values.set(xlabel="values a cell", ylabel="cells", title=f"{len(found.n_values):,} cells")
    seen = found.genes[found.genes["mean"] > 0]
    genes.loglog(seen["mean"], seen["variance"], ".", markersize=3)
    for gene, at in seen.head(N_LABELLED).iterrows():
        genes.annotate(f"{gene} ", (at["mean"], at["variance"]), fontsize=7, ha="right")
    genes.set(xlabel="mean", ylabel="variance", title=f"{len(seen):,} genes that have values")
    figure.savefig(path, dpi=120)


def main() -> int:
    """Read the command line and look."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="AnnData files, or one collection; local or URLs")
    parser.add_argument("--by", metavar="COLUMN", help="of obs (default: cell_type, or the first categorical one)")
    parser.add_argument("--blocks", type=int, metavar="N", help="row blocks of X to read, evenly spread (default: all)")
    parser.add_argument("--plot", type=Path, default=Path("atlas.png"), metavar="FILE", help="(default: atlas.png)")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="Dask cluster to read X on (default: this process)")
    args = parser.parse_args()
    if args.blocks is not None and args.blocks < 1:
        parser.error(f"--blocks is {args.blocks}; it must be 1 or more")
    try:
        with suppress(MissingPackageError):  # the tables are printed all the same
            check_picture(args.plot)  # before X is read
        view = open_view(args.paths)
        print(f"{view.n_obs:,} cells x {view.n_vars:,} genes; X: {view.X.dtype}, {view.X.numblocks[0]:,} row blocks")
        column = category(view, args.by)
        with connect(args.scheduler) if args.scheduler else nullcontext():
            found = look(view, column, args.blocks)
    except AnnbatchDaskError as error:
        sys.exit(f"inspect_atlas: {error}")
    report(found, str(column.name), args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
