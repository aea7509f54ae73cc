#!/usr/bin/env python3
"""Train a small variational autoencoder of counts on a collection, and draw its latent space. Needs torch.

train_vae.py OUT.zarr COLUMN --plot latent.png
train_vae.py OUT.zarr COLUMN --epochs 50 --state vae.pt      interrupted? the same command goes on at the last save

Counts are negative binomial around depth x softmax(decoder(z)), with one dispersion for each gene. A tenth of the
cells, at most 5,000, is held out, with all values of COLUMN in equal shares; COLUMN colours the picture and is not
learnt from. Each epoch prints the evidence lower bound (ELBO) of the log likelihood, in nats a cell.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch.distributions import NegativeBinomial, Normal, kl_divergence
from torch.nn.functional import log_softmax

from annbatch_dask import DatasetCollection, Loader
from annbatch_dask.errors import AnnbatchDaskError
from annbatch_dask.mixing import check_picture
from annbatch_dask.storage.filesystems import check_parent
from annbatch_dask.transforms import NormalizeLog1p

BATCH_SIZE = 256
LEARNING_RATE = 2e-3
N_HIDDEN, N_LATENT = 128, 10
N_GENES = 2_000
N_HELD_OUT = 5_000  # at most
N_SAMPLED = 4_096  # cells that genes are chosen by
SAVE_EVERY = 100  # batches
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class VAE(torch.nn.Module):
    """Counts of a cell from a few normal variables."""

    def __init__(self, n_genes: int) -> None:
        super().__init__()
        self.encoder = torch.nn.Sequential(
            torch.nn.Linear(n_genes, N_HIDDEN), torch.nn.ReLU(), torch.nn.Linear(N_HIDDEN, 2 * N_LATENT)
        )
        self.decoder = torch.nn.Sequential(
            torch.nn.Linear(N_LATENT, N_HIDDEN), torch.nn.ReLU(), torch.nn.Linear(N_HIDDEN, n_genes)
        )
        self.log_dispersion = torch.nn.Parameter(torch.zeros(n_genes))

    def encode(self, X: torch.Tensor) -> Normal:
        """Return what is believed of z of each cell: normals of (n_cells, N_LATENT)."""
        mean, log_variance = self.encoder(torch.log1p(X)).chunk(2, dim=1)
        return Normal(mean, torch.exp(log_variance / 2))

    def elbo(self, X: torch.Tensor) -> torch.Tensor:
        """Return the ELBO of each cell, (n_cells,), by one draw of z; X holds counts."""
        posterior = self.encode(X)
        z = posterior.rsample()
        log_mean = X.sum(1, keepdim=True).clamp(min=1).log() + log_softmax(self.decoder(z), dim=1)
        counts = NegativeBinomial(self.log_dispersion.exp(), logits=log_mean - self.log_dispersion, validate_args=False)
        return counts.log_prob(X).sum(1) - kl_divergence(posterior, Normal(0.0, 1.0)).sum(1)


@dataclass
class Training:
    """A model, and what feeds it; stops after any batch, and goes on there."""

    genes: list[str]
    model: VAE
    optimiser: torch.optim.Adam
    loader: Loader[Any, Any]
    history: list[tuple[float, float]] = field(default_factory=list)  # ELBO a cell by epoch: learnt from, held out
    total: float = 0.0  # of this epoch's cells so far
    n_cells: int = 0
    n_batches: int = 0  # of all epochs

    @classmethod
    def of(cls, collection: DatasetCollection, genes: list[str], learnt_from: NDArray[np.bool_]) -> Training:
        """Return one that has not begun."""
        torch.manual_seed(0)
        model = VAE(len(genes)).to(DEVICE)
        loader = open_loader(
            collection,
            genes,
            batch_size=BATCH_SIZE,
            chunk_size=32,
            preload_nchunks=256,
            shuffle=True,
            seed=0,
            where=learnt_from,
            obs_columns=[],
        )
        return cls(genes, model, torch.optim.Adam(model.parameters(), lr=LEARNING_RATE), loader)

    def learn(self, X: torch.Tensor) -> None:
        """Take one step."""
        elbo = self.model.elbo(X.to(DEVICE))
        self.optimiser.zero_grad()
        (-elbo.mean()).backward()
        self.optimiser.step()
        self.total += float(elbo.detach().sum())
        self.n_cells += len(elbo)
        self.n_batches += 1

    def end_epoch(self, held_out: torch.Tensor) -> None:
        """Note how good the model is."""
        with torch.no_grad(), torch.random.fork_rng():  # looking at it changes nothing
            torch.manual_seed(0)
            self.history.append((self.total / self.n_cells, float(self.model.elbo(held_out).mean())))
        self.total, self.n_cells = 0.0, 0
        print("epoch {:3d}: ELBO a cell {:,.2f}, held out {:,.2f}".format(len(self.history), *self.history[-1]))

    def save(self, path: Path) -> None:
        """Write everything, and replace what was there at once."""
        state = {
            "genes": self.genes,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "loader": self.loader.state_dict(),
            "random": (torch.get_rng_state(), torch.cuda.get_rng_state_all()),
            "progress": (self.history, self.total, self.n_cells, self.n_batches),
        }
        partial = path.with_name(path.name + ".partial")
        torch.save(state, partial)
        partial.replace(path)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where a state was saved."""
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.loader.load_state_dict(state["loader"])
        torch.set_rng_state(state["random"][0])
        torch.cuda.set_rng_state_all(state["random"][1])
        self.history, self.total, self.n_cells, self.n_batches = state["progress"]


def open_loader(collection: DatasetCollection, genes: list[str], **options: Any) -> Loader[Any, Any]:
    """Stream counts of some genes as dense float32 tensors."""
    loader: Loader[Any, Any] = Loader(
        to="torch",
        preload_to_gpu=False,
        dense=True,
        dtype=np.float32,
        var_names=genes,
        layers=[],
        obsm=[],
        **options,
    )
    return loader.use_collection(collection)


def most_variable(collection: DatasetCollection, rows: NDArray[np.bool_], n_genes: int) -> list[str]:
    """Return the genes whose normalised values vary most in some of the cells, in the collection's order."""
    found = np.random.default_rng(0).permutation(np.flatnonzero(rows))[:N_SAMPLED]
    options = {"batch_size": len(found), "chunk_size": len(found), "preload_nchunks": 1, "where": found}
    loader: Loader[Any, Any] = Loader(
        **options, transform=NormalizeLog1p(), layers=[], obsm=[], obs_columns=[], preload_to_gpu=False
    )
    (batch,) = loader.use_collection(collection)
    X = sp.csr_matrix(batch["X"])
    variance = np.asarray(X.power(2).mean(0)).ravel() - np.asarray(X.mean(0)).ravel() ** 2
    return batch["var"].index[np.sort(np.argsort(-variance, kind="stable")[:n_genes])].tolist()


def hold_out(
    collection: DatasetCollection, column: str, rows: NDArray[np.bool_], genes: list[str]
) -> tuple[torch.Tensor, pd.Series]:
    """Load cells that are not learnt from, and their values of the column."""
    chosen = np.random.default_rng(0).permutation(np.flatnonzero(rows))[:N_HELD_OUT]
    n = len(chosen)
    loader = open_loader(
        collection, genes, batch_size=n, chunk_size=n, preload_nchunks=1, where=chosen, obs_columns=[column]
    )
    (batch,) = loader
    X = batch["X"]
    if (X != X.round()).any():
        sys.exit(
            f"train_vae: X of {collection.path} holds fractions, and the likelihood is one of counts; build it with "
            "counts='raw/X' or 'layers/<key>', whichever has them"
        )
    return X.to(DEVICE), batch["obs"][column]


def load(path: Path) -> Any:
    """Read a state that this script saved, or end."""
    try:
        saved = torch.load(path, map_location="cpu")
    except (EOFError, RuntimeError, UnpicklingError):
        saved = None
    if not isinstance(saved, dict) or "genes" not in saved:
        sys.exit(f"train_vae: {path} is no state that this script saved; give another --state, or remove it")
    return saved


def train(collection: DatasetCollection, column: str, n_epochs: int, n_genes: int | None, state: Path | None) -> Any:
    """Train a model, or go on with one; return it, cells held out, and their values of the column."""
    splits = collection.split({"train": 0.9, "held out": 0.1}, stratify=column, seed=0)
    saved = load(state) if state and state.exists() else None
    genes = saved["genes"] if saved else most_variable(collection, splits["train"], n_genes or N_GENES)
    if saved and n_genes and min(n_genes, collection.n_vars) != len(genes):
        sys.exit(f"train_vae: --genes is {n_genes}, and {state} has a model of {len(genes)}; leave out one of them")
    held_out, values = hold_out(collection, column, splits["held out"], genes)
    training = Training.of(collection, genes, splits["train"])
    if saved:
        training.restore(saved)
        if len(training.history) >= n_epochs:
            print(f"{state} has {len(training.history)} epochs already; to go on, give --epochs a number above that")
        else:
            print(f"going on in epoch {len(training.history) + 1}, after {training.n_batches:,} batches")
    while len(training.history) < n_epochs:
        for batch in training.loader:
            training.learn(batch["X"])
            if state and training.n_batches % SAVE_EVERY == 0:
                training.save(state)
        training.end_epoch(held_out)
        if state:
            training.save(state)
    return training.model, held_out, values


def draw(model: VAE, held_out: torch.Tensor, values: pd.Series, path: Path) -> None:
    """Draw the first two principal components of the latent space, a colour for each value."""
    from matplotlib.figure import Figure

    with torch.no_grad():
        latent = model.encode(held_out).mean.cpu()
    centred = latent - latent.mean(0)
    points = (centred @ torch.linalg.svd(centred, full_matrices=False)[2][:2].T).numpy()
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for value in pd.unique(values.dropna()):
        axes.plot(*points[(values == value).to_numpy()].T, ".", markersize=3, label=str(value))
    axes.set(title=f"{len(points):,} cells held out", xlabel="1st component of z", ylabel="2nd")
    figure.legend(loc="outside right upper", markerscale=3, title=values.name)
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")


def main() -> int:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("collection", metavar="OUT.zarr")
    parser.add_argument("column", metavar="COLUMN", help="obs column to colour the picture by, e.g. cell_type")
    parser.add_argument("--epochs", type=int, default=20, metavar="N", help="in all (default: 20)")
    parser.add_argument("--genes", type=int, metavar="N", help=f"the most variable ones (default: {N_GENES:,})")
    parser.add_argument("--state", type=Path, metavar="FILE", help="save to, and go on from, this file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the latent space; needs matplotlib")
    args = parser.parse_args()
    for name in ("epochs", "genes"):
        if vars(args)[name] is not None and vars(args)[name] < 1:
            parser.error(f"--{name} is {vars(args)[name]}; it must be 1 or more")
    try:
        if args.state is not None:  # before hours of work
            check_parent(str(args.state))
        if args.plot is not None:
            check_picture(args.plot)
        collection = DatasetCollection(args.collection, mode="r")
        found = train(collection, args.column, args.epochs, args.genes, args.state)
    except AnnbatchDaskError as error:
        sys.exit(f"train_vae: {error}")
    if args.plot is not None:
        draw(*found, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
