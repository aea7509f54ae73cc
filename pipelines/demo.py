#!/usr/bin/env python3
"""The whole path in one run: two AnnData files, a true shuffle, mixed mini-batches, a classifier.

demo.py [FILES...]      without FILES two are made: 20,000 and 15,000 cells, ordered by type

Everything is written to ./demo_data, which may be deleted at any time.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from sklearn.linear_model import SGDClassifier

from annbatch_dask import DatasetCollection, Loader
from annbatch_dask.mixing import Mixing, measure_mixing
from annbatch_dask.transforms import NormalizeLog1p

FOLDER = Path("demo_data")
BATCH_SIZE = 512
N_SPACE, N_TYPES = 4_000, 8
PARTS = {"part_1.h5ad": (20_000, 3_200), "part_2.h5ad": (15_000, 2_800)}


def main() -> int:
    """Run the demo on the files of the command line, or on files made for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="AnnData files; made up if none are given")
    files = parser.parse_args().files or make_files(FOLDER)
    FOLDER.mkdir(exist_ok=True)

    title("shuffle")
    collection = shuffle(files, FOLDER / "collection.zarr")
    column = class_column(collection)

    title(f"stream one epoch in batches of {BATCH_SIZE}")
    before = sequential_batches(files, column)
    after = stream(collection, column)
    show_mixing(column, before, after)

    title(f"train a linear classifier of {column} for one epoch")
    train(collection, column)
    return 0


def make_files(folder: Path) -> list[Path]:
    """Write two gzip files of different genes: counts around a profile per cell type, cells in type order."""
    title("make two AnnData files")
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    space = np.array([f"GENE{i:05d}" for i in range(N_SPACE)])
    profiles = rng.lognormal(0, 1.8, N_SPACE) * rng.lognormal(0, 0.2, (N_TYPES, N_SPACE))
    paths = []
    for name, (n_obs, n_genes) in PARTS.items():
        genes = np.sort(rng.choice(N_SPACE, n_genes, replace=False))
        adata = make_adata(n_obs, profiles[:, genes], seed=len(paths))
        adata.var_names = space[genes]
        paths.append(folder / name)
        adata.write_h5ad(paths[-1], compression="gzip")
        print(f"{paths[-1]}: {n_obs:,} cells x {n_genes:,} genes, {adata.X.nnz / n_obs:,.0f} values a cell")
    return paths


def make_adata(n_obs: int, profiles: np.ndarray, *, seed: int) -> ad.AnnData:
    """Draw counts around the profiles: (n_types, n_genes) weights."""
    rng = np.random.default_rng([1, seed])
    types = np.sort(rng.choice(len(profiles), n_obs, p=rng.dirichlet(np.full(len(profiles), 5.0))))
    depth = rng.lognormal(np.log(2_000), 0.4, (n_obs, 1))
    shares = profiles / profiles.sum(1, keepdims=True)
    blocks = np.array_split(np.arange(n_obs), max(n_obs // 1_000, 1))
    counts = sp.vstack([sp.csr_matrix(rng.poisson(depth[b] * shares[types[b]]), dtype="f4") for b in blocks])
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical.from_codes(types, [f"type_{t}" for t in range(len(profiles))]),
            "donor": pd.Categorical([f"donor_{d}" for d in rng.integers(0, 6, n_obs)]),
            "n_counts": np.asarray(counts.sum(1)).ravel(),
        },
        index=[f"file{seed}_cell{i}" for i in range(n_obs)],
    )
    return ad.AnnData(X=counts.tocsr(), obs=obs)


def shuffle(files: list[Path], target: Path) -> DatasetCollection:
    """Write the files' cells in random order to a fresh collection of about six datasets."""
    shutil.rmtree(target, ignore_errors=True)
    collection = DatasetCollection(target)
    n_obs = sum(ad.read_h5ad(file, backed="r").n_obs for file in files)
    size = int(np.clip(-(-n_obs // 6), 1, 50_000))
    plan = collection.plan_adatas(files, dataset_size=size, seed=0)
    print(plan.summary())
    start = time.perf_counter()
    plan.run(progress=True)
    seconds = time.perf_counter() - start
    print(f"{target}: {n_obs:,} cells x {collection.n_vars:,} genes in {seconds:.1f} s")
    return collection


def class_column(collection: DatasetCollection) -> str:
    """Pick the column that shows mixing: the first categorical one that has several values."""
    obs = collection.obs()
    found = [c for c in obs.columns if isinstance(obs[c].dtype, pd.CategoricalDtype) and obs[c].nunique() > 1]
    return next((c for c in ("cell_type", *found) if c in found and c != "src_path"), "src_path")


def sequential_batches(files: list[Path], column: str) -> list[np.ndarray]:
    """Return the classes in each batch of someone who reads the files from front to back."""
    parts = [ad.read_h5ad(f, backed="r").obs for f in files]
    names = [
        p[column].astype(str) if column in p else pd.Series(str(f), p.index) for f, p in zip(files, parts, strict=True)
    ]
    classes = pd.concat(names).to_numpy()
    return np.split(classes, np.arange(BATCH_SIZE, len(classes), BATCH_SIZE))


def stream(collection: DatasetCollection, column: str) -> list[np.ndarray]:
    """Stream an epoch; return the classes in each batch."""
    loader = Loader(
        batch_size=BATCH_SIZE,
        chunk_size=32,
        preload_nchunks=256,
        shuffle=True,
        rng=np.random.default_rng(0),
        layers=[],
        obsm=[],
        obs_columns=[column],
    )
    loader.use_collection(collection)
    next(iter(loader))  # compiles, once on a machine
    start = time.perf_counter()
    batches = [batch["obs"][column].astype(str).to_numpy() for batch in loader]
    seconds = time.perf_counter() - start
    print(f"{loader.n_obs:,} cells in {seconds:.1f} s: {loader.n_obs / seconds:,.0f} cells/s")
    return batches


def show_mixing(column: str, before: list[np.ndarray], after: list[np.ndarray]) -> None:
    """Print how well batches are mixed before and after the shuffle, and draw it."""
    for name, batches in (("files read in order", before), ("shuffled", after)):
        print(f"{name + ':':<20} {mixing_line(measure_mixing(codes(batches)), column)}")
    try:
        path = draw_picture(column, {"files read in order": before, "shuffled": after})
        print(f"picture: {path}")
    except ImportError:
        draw_text({"files read in order": before, "shuffled": after})


def mixing_line(mixing: Mixing, column: str) -> str:
    """Say it in words."""
    return (
        f"{mixing.mean_classes:5.1f} distinct {column} a batch, entropy {mixing.mean_entropy:.2f} bits, "
        f"{mixing.share:.3f} of a random batch's"
    )


def codes(batches: list[np.ndarray]) -> list[np.ndarray]:
    """Number the classes."""
    numbers = pd.factorize(np.concatenate(batches))[0]
    return np.split(numbers, np.cumsum([len(b) for b in batches])[:-1])


def class_shares(batches: list[np.ndarray], classes: np.ndarray) -> np.ndarray:
    """Return the share of each class in each batch, (n_batches, n_classes)."""
    return np.array([[np.mean(batch == c) for c in classes] for batch in batches])


def draw_picture(column: str, rows: dict[str, list[np.ndarray]]) -> Path:
    """Draw each batch as a column of class shares, and return the picture's path."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(rows), 1, figsize=(9, 5), layout="constrained", sharey=True)
    classes = np.unique(np.concatenate(next(iter(rows.values()))))
    for axis, (name, batches) in zip(axes, rows.items(), strict=True):
        shares = class_shares(batches, classes)
        axis.stackplot(np.arange(len(batches)), shares.T, step="mid", labels=classes)
        axis.set(title=name, xlabel="batch", ylabel="share", xlim=(0, len(batches) - 1), ylim=(0, 1))
    if len(classes) <= 20:
        figure.legend(*axes[0].get_legend_handles_labels(), title=column, loc="outside right center")
    path = FOLDER / "mixing.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def draw_text(rows: dict[str, list[np.ndarray]], *, n_shown: int = 8, width: int = 60) -> None:
    """Draw some batches as bars of letters, one letter per class."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    classes = np.unique(np.concatenate(next(iter(rows.values()))))
    for name, batches in rows.items():
        print(name)
        for batch in batches[:: max(len(batches) // n_shown, 1)]:
            counts = np.searchsorted(classes, np.sort(batch)[np.linspace(0, len(batch) - 1, width).astype(int)])
            print("  " + "".join(letters[c % len(letters)] for c in counts))


def train(collection: DatasetCollection, column: str) -> None:
    """Learn the classes from one epoch of the shuffled loader, a batch at a time; a tenth of the cells is held out."""
    splits = collection.split({"train": 0.9, "test": 0.1}, stratify=column, seed=0)
    classifier = SGDClassifier(loss="log_loss", random_state=0)
    training = normalised_batches(collection, column, splits["train"])
    n_classes = len(training.obs_categories[column])
    start = time.perf_counter()
    n_cells = 0
    for batch in training:
        classes = batch["obs_codes"][column]
        known = classes >= 0  # -1 stands for a missing value
        classifier.partial_fit(batch["X"][known], classes[known], classes=np.arange(n_classes))
        n_cells += len(classes)
    seconds = time.perf_counter() - start
    print(f"{n_cells:,} cells in {seconds:.1f} s, loaded, normalised and learnt from")

    right = [
        classifier.predict(batch["X"]) == batch["obs_codes"][column]
        for batch in normalised_batches(collection, column, splits["test"])
    ]
    print(f"accuracy {np.concatenate(right).mean():.3f} on {sum(map(len, right)):,} cells held out")


def normalised_batches(collection: DatasetCollection, column: str, cells: np.ndarray) -> Loader:
    """Stream dense, normalised expression of some cells and the column's codes."""
    loader = Loader(
        batch_size=BATCH_SIZE,
        chunk_size=32,
        preload_nchunks=256,
        shuffle=True,
        rng=np.random.default_rng(0),
        dense=True,
        transform=NormalizeLog1p(1e4),
        layers=[],
        obsm=[],
        obs_columns=[],
        obs_codes=[column],
        where=cells,
    )
    return loader.use_collection(collection)


def title(text: str) -> None:
    """Print a heading."""
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
