#!/usr/bin/env python3
"""Train a linear classifier of an obs column on a collection, for one epoch. Needs torch.

train_classifier.py OUT.zarr COLUMN
train_classifier.py OUT.zarr COLUMN --against IN_ORDER.zarr --plot accuracy.png
torchrun --nproc-per-node 3 train_classifier.py OUT.zarr COLUMN --distributed

A tenth of the cells is held out. --against names a collection of the same cells in the order of their files, from
`annbatch-dask shuffle FILES -o IN_ORDER.zarr --no-shuffle`. Two more models learn from that one: from random batches of
it in memory, which is as good as it gets, and from a stream of it from front to back.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from annbatch_dask import DatasetCollection, Loader
from annbatch_dask.errors import AnnbatchDaskError
from annbatch_dask.mixing import check_picture
from annbatch_dask.transforms import NormalizeLog1p

BATCH_SIZE = 240  # of all ranks together: 2, 3, 4, 5, 6 and 8 of them share it evenly
LEARNING_RATE = 3e-3
N_HELD_OUT = 5_000  # at most
TARGET_SUM = 1e4
Curve = list[tuple[int, float]]  # cells seen, accuracy on cells held out


class HeldOut(NamedTuple):
    """Cells that no model learns from."""

    names: pd.Index[Any]
    X: torch.Tensor
    target: torch.Tensor
    classes: pd.Index[Any]

    def accuracy(self, model: torch.nn.Module) -> float:
        """Return the share of these cells whose class the model names."""
        with torch.no_grad():
            right = model(self.X).argmax(1) == self.target
            return float(right[self.target >= 0].float().mean())


def open_loader(collection: DatasetCollection, column: str, **options: Any) -> Loader[Any, Any]:
    """Stream normalised expression and the column's codes as torch tensors."""
    loader: Loader[Any, Any] = Loader(
        to="torch",
        preload_to_gpu=False,
        dense=True,
        dtype=np.float32,
        transform=NormalizeLog1p(TARGET_SUM),
        layers=[],
        obsm=[],
        obs_columns=[column],
        obs_codes=[column],
        **options,
    )
    return loader.use_collection(collection)


def hold_out(collection: DatasetCollection, column: str) -> HeldOut:
    """Load a tenth of the cells, which has all classes in equal shares."""
    values = collection.obs([column], names=False)[column]
    if pd.api.types.is_float_dtype(values) and (values.dropna() % 1 != 0).any():
        sys.exit(f"train_classifier: {column} of obs holds fractions, which are no classes; name a column of labels")
    rows = np.flatnonzero(collection.split({"train": 0.9, "test": 0.1}, stratify=column, seed=0)["test"])
    rows = np.random.default_rng(0).permutation(rows)[:N_HELD_OUT]
    loader = open_loader(collection, column, batch_size=len(rows), chunk_size=len(rows), preload_nchunks=1, where=rows)
    (batch,) = loader
    return HeldOut(batch["obs"].index, batch["X"], batch["obs_codes"][column], loader.obs_categories[column])


def shuffled(collection: DatasetCollection, column: str, held_out: HeldOut, *, distributed: bool) -> Loader[Any, Any]:
    """Return the loader this is about."""
    return open_loader(
        collection,
        column,
        global_batch_size=BATCH_SIZE,
        chunk_size=24,
        preload_nchunks=320,
        shuffle=True,
        seed=0,
        dist_info="torch" if distributed else None,
        where=learnt_from(collection, column, held_out),
    )


def in_order(collection: DatasetCollection, column: str, held_out: HeldOut) -> Loader[Any, Any]:
    """Return a loader from front to back."""
    where = learnt_from(collection, column, held_out)
    loader = open_loader(collection, column, batch_size=BATCH_SIZE, where=where)
    if loader.n_vars != held_out.X.shape[1] or not loader.obs_categories[column].equals(held_out.classes):
        sys.exit(f"train_classifier: {collection.path} is of other cells: its genes or values of {column} differ")
    return loader


def in_memory(collection: DatasetCollection, column: str, held_out: HeldOut) -> Iterator[dict[str, Any]]:
    """Read everything with anndata, and yield batches of cells in random order."""
    adata = ad.concat([ad.io.read_zarr(group) for group in collection], merge="same")
    adata = adata[learnt_from(collection, column, held_out)]
    codes = pd.Categorical(adata.obs[column], categories=held_out.classes).codes.astype(np.int64)
    order = np.random.default_rng(0).permutation(adata.n_obs)
    for rows in np.split(order, np.arange(BATCH_SIZE, len(order), BATCH_SIZE)):
        X = np.asarray(adata.X[rows].todense(), np.float32)
        X = np.log1p(X * (TARGET_SUM / X.sum(1, keepdims=True).clip(min=1)))
        yield {"X": torch.from_numpy(X), "obs_codes": {column: torch.from_numpy(codes[rows])}}


def learnt_from(collection: DatasetCollection, column: str, held_out: HeldOut) -> NDArray[np.bool_]:
    """Return a mask of the cells that are not held out."""
    return ~collection.obs(columns=[column]).index.isin(held_out.names)


def learn(batches: Iterable[Any], column: str, held_out: HeldOut, *, distributed: bool = False) -> Curve:
    """Train a new model on the batches; return how its accuracy grew."""
    torch.manual_seed(0)
    model: torch.nn.Module = torch.nn.Linear(held_out.X.shape[1], len(held_out.classes))
    model = DistributedDataParallel(model) if distributed else model
    optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    curve, n_seen = [(0, held_out.accuracy(model))], 0
    for number, batch in enumerate(batches, 1):
        loss = cross_entropy(model(batch["X"]), batch["obs_codes"][column], ignore_index=-1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        n_seen += len(batch["X"]) * (dist.get_world_size() if distributed else 1)
        if number % 5 == 0:
            curve.append((n_seen, held_out.accuracy(model)))
    return [*curve, (n_seen, held_out.accuracy(model))]


def compare(collection: DatasetCollection, ordered: DatasetCollection, column: str) -> dict[str, Curve]:
    """Train one model on each kind of batches."""
    held_out = hold_out(collection, column)
    streamed = in_order(ordered, column, held_out)
    return {
        "in-memory random batches": learn(in_memory(ordered, column, held_out), column, held_out),
        "shuffled loader": learn(shuffled(collection, column, held_out, distributed=False), column, held_out),
        "streamed in source order": learn(streamed, column, held_out),
    }


def train(collection: DatasetCollection, column: str, *, distributed: bool = False) -> dict[str, Curve]:
    """Train one model from the shuffled loader, on all ranks together if there are any."""
    held_out = hold_out(collection, column)
    loader = shuffled(collection, column, held_out, distributed=distributed)
    return {"shuffled loader": learn(loader, column, held_out, distributed=distributed)}


def report(curves: dict[str, Curve], plot: Path | None = None) -> None:
    """Print where each curve ended, and draw all of them."""
    for name, curve in curves.items():
        print(f"{name + ':':<26} accuracy {curve[-1][1]:.3f} on cells held out, after {curve[-1][0]:,} cells")
    if plot is None:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, curve), style in zip(curves.items(), ("-", "--", "-."), strict=False):
        axes.plot(*zip(*curve, strict=True), style, label=name)
    axes.set(xlabel="cells seen", ylabel="accuracy on cells held out", ylim=(0, 1.02))
    axes.legend(loc="center right")
    figure.savefig(plot, dpi=120)
    print(f"picture: {plot}")


def main() -> int:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("collection", metavar="OUT.zarr")
    parser.add_argument("column", metavar="COLUMN", help="obs column to predict, e.g. cell_type")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw accuracy by cells seen; needs matplotlib")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--against", metavar="IN_ORDER.zarr", help="train on in-memory and on unshuffled batches too")
    what.add_argument("--distributed", action="store_true", help="share the batches among the processes of torchrun")
    args = parser.parse_args()
    try:
        if args.plot is not None:
            check_picture(args.plot)  # before hours of work
        run(args)
    except AnnbatchDaskError as error:
        sys.exit(f"train_classifier: {error}")
    return 0


def run(args: argparse.Namespace) -> None:
    """Train what was asked for, and say how it went."""
    collection = DatasetCollection(args.collection, mode="r")
    if args.against is not None:
        report(compare(collection, DatasetCollection(args.against, mode="r"), args.column), args.plot)
        return
    if args.distributed:
        dist.init_process_group("gloo")
    curves = train(collection, args.column, distributed=args.distributed)
    if not args.distributed or dist.get_rank() == 0:
        report(curves, args.plot)
    if args.distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
