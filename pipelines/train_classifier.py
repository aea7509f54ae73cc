#!/usr/bin/env python3
"""Train a linear classifier of an obs column on a collection, for one epoch. Needs torch.

train_classifier.py COLLECTION.zarr COLUMN

The first dataset is held out. It is a random sample of all cells, because the shuffle is a true one.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import zarr

from annbatch_dask import DatasetCollection, Loader

BATCH_SIZE = 256


def load(group: zarr.Group, column: str) -> ad.AnnData:
    """Open a dataset: X stays on disk, one column of obs is read."""
    labels = ad.io.read_elem(group["obs"])[[column]]
    X = group["X"] if isinstance(group["X"], zarr.Array) else ad.io.sparse_dataset(group["X"])
    return ad.AnnData(X=X, obs=labels, var=ad.io.read_elem(group["var"])[[]])


def make_loader(groups: list[zarr.Group], column: str, *, shuffle: bool) -> Any:
    """Stream the datasets as torch tensors."""
    loader = Loader(
        batch_size=BATCH_SIZE,
        chunk_size=32,
        preload_nchunks=256,
        shuffle=shuffle,
        rng=np.random.default_rng(0) if shuffle else None,
        to="torch",
        preload_to_gpu=False,
        dense=True,
        dtype=np.float32,
    )
    return loader.add_adatas([load(g, column) for g in groups])


def features(X: Any) -> Any:
    """Scale each cell to 10,000 counts and take log(1 + x)."""
    return (X * (1e4 / X.sum(1, keepdim=True).clamp(min=1))).log1p()


def labels(obs: pd.DataFrame, column: str, classes: list[str]) -> Any:
    """Number the classes of a batch."""
    import torch

    codes = pd.Categorical(obs[column].astype(str), categories=classes).codes
    return torch.from_numpy(codes.astype(np.int64))


def accuracy(model: Any, loader: Any, column: str, classes: list[str]) -> float:
    """Return the share of cells whose class the model names."""
    import torch

    right = total = 0
    with torch.no_grad():
        for batch in loader:
            target = labels(batch["obs"], column, classes)
            right += int((model(features(batch["X"])).argmax(1) == target).sum())
            total += len(target)
    return right / total


def train(collection: DatasetCollection, column: str) -> None:
    """Train for one epoch on all datasets but the first, and print the accuracies."""
    try:
        import torch
    except ImportError:
        print("torch is not installed: skipped")
        return
    held_out, *rest = collection
    rest = rest or [held_out]  # a single dataset: nothing to hold out
    classes = sorted(collection.obs(columns=[column])[column].astype(str).unique())
    torch.manual_seed(0)
    model = torch.nn.Linear(collection.n_var, len(classes))
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for batch in make_loader(rest, column, shuffle=True):
        target = labels(batch["obs"], column, classes)
        loss = torch.nn.functional.cross_entropy(model(features(batch["X"])), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    seen, unseen = (
        accuracy(model, make_loader([group], column, shuffle=False), column, classes) for group in (rest[0], held_out)
    )
    print(f"accuracy after one epoch: {seen:.3f} on a dataset trained on, {unseen:.3f} on the one held out")


def main() -> int:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("collection")
    parser.add_argument("column", help="obs column to predict, e.g. cell_type")
    args = parser.parse_args()
    train(DatasetCollection(args.collection, mode="r"), args.column)
    return 0


if __name__ == "__main__":
    sys.exit(main())
