#!/usr/bin/env python3
"""Train a small transformer on a collection to say which genes were masked, in cells as ranked genes. Needs torch.

pretrain_tokens.py OUT.zarr
pretrain_tokens.py OUT.zarr --epochs 10 --state tokens.pt      interrupted? the same command goes on at the last save
pretrain_tokens.py OUT.zarr --vocabulary tokens.json --medians medians.json      others' tables, such as Geneformer's

Each cell is its genes in order of their counts over the gene's median (transforms.RankTokens), the first ones only;
15 % of them are masked. A tenth of the cells, at most 2,000, is held out. Each epoch prints the cross entropy of masked
genes in nats, learnt from and held out, beside that of guessing each gene as often as it is among the tokens of the
cells that are learnt from: what a model knows that sees no cell, only how frequent genes are (unigrams). By default
tokens are those of the collection's genes, and medians those of a sample of its cells.

On the demo's atlas (demo_data/collection.zarr of demo.py, 35,000 cells) unigrams have 7.07 nats a masked gene; the
model has, on cells held out, 7.04 after the first epoch, 6.38 after the second and 5.69 after the third.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from annbatch_dask import DatasetCollection, Loader
from annbatch_dask.errors import AnnbatchDaskError
from annbatch_dask.storage.filesystems import check_parent
from annbatch_dask.transforms import RankTokens

BATCH_SIZE = 256
MAX_LENGTH = 64
LEARNING_RATE = 2e-3
N_DIMS, N_HEADS, N_LAYERS = 64, 4, 2
MASKED = 0.15
N_HELD_OUT = 2_000  # at most
N_SAMPLED = 4_096  # cells that medians are taken of
SAVE_EVERY = 50  # batches
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class MaskedGenes(torch.nn.Module):
    """Which gene is where one was masked, from the others of the cell."""

    def __init__(self, n_tokens: int, max_length: int) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(n_tokens, N_DIMS)
        self.places = torch.nn.Embedding(max_length, N_DIMS)
        options = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        layer = torch.nn.TransformerEncoderLayer(N_DIMS, N_HEADS, 4 * N_DIMS, **options)
        self.encoder = torch.nn.TransformerEncoder(layer, N_LAYERS, enable_nested_tensor=False)
        self.norm = torch.nn.LayerNorm(N_DIMS)
        self.decoder = torch.nn.Linear(N_DIMS, n_tokens)
        torch.nn.init.normal_(self.tokens.weight, std=0.1)
        torch.nn.init.normal_(self.decoder.weight, std=0.01)

    def loss(self, ids: torch.Tensor, mask: torch.Tensor, is_masked: torch.Tensor, mask_token: int) -> torch.Tensor:
        """Return the cross entropy of the masked genes; ids and masks are (n_cells, max_length)."""
        hidden = self.tokens(ids.masked_fill(is_masked, mask_token)) + self.places.weight
        is_padding = ~mask
        is_padding[:, 0] = False  # of a cell without tokens something must be looked at
        hidden = self.encoder(hidden, src_key_padding_mask=is_padding)
        return cross_entropy(self.decoder(self.norm(hidden[is_masked])), ids[is_masked])


@dataclass
class Training:
    """A model, and what feeds it; stops after any batch, and goes on there."""

    transform: RankTokens
    model: MaskedGenes
    optimiser: torch.optim.AdamW
    loader: Loader[Any, Any]
    history: list[tuple[float, float]] = field(default_factory=list)  # loss by epoch: learnt from, held out
    total: float = 0.0  # of this epoch's batches so far
    n_batches: int = 0  # of this epoch

    @classmethod
    def of(cls, collection: DatasetCollection, transform: RankTokens, rows: NDArray[np.bool_]) -> Training:
        """Return one that has not begun."""
        torch.manual_seed(0)
        model = MaskedGenes(max(transform.vocabulary.values()) + 1, transform.max_length).to(DEVICE)
        loader = open_loader(
            collection, transform, batch_size=BATCH_SIZE, chunk_size=32, preload_nchunks=256, shuffle=True, where=rows
        )
        return cls(transform, model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE), loader)

    def learn(self, X: dict[str, torch.Tensor]) -> None:
        """Take one step."""
        loss = self.loss(X)
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.total += float(loss.detach())
        self.n_batches += 1

    def loss(self, X: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the cross entropy of genes that are masked at random."""
        ids, mask = X["input_ids"].to(DEVICE), X["attention_mask"].to(DEVICE)
        return self.model.loss(ids, mask, choose_masked(mask), self.transform.token("<mask>"))

    def end_epoch(self, held_out: list[dict[str, torch.Tensor]], unigram: float) -> None:
        """Note how good the model is."""
        with torch.no_grad(), torch.random.fork_rng():  # looking at it changes nothing
            torch.manual_seed(0)
            losses = [float(self.loss(X)) for X in held_out]
        self.history.append((self.total / self.n_batches, float(np.mean(losses))))
        self.total, self.n_batches = 0.0, 0
        line = "epoch {:3d}: {:.4f} nats a masked gene, held out {:.4f}, unigrams {:.4f}"
        print(line.format(len(self.history), *self.history[-1], unigram), flush=True)

    def save(self, path: Path) -> None:
        """Write everything, and replace what was there at once."""
        state = {
            "vocabulary": self.transform.vocabulary,
            "medians": self.transform.medians,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "loader": self.loader.state_dict(),
            "random": (torch.get_rng_state(), torch.cuda.get_rng_state_all()),
            "progress": (self.history, self.total, self.n_batches),
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
        self.history, self.total, self.n_batches = state["progress"]


def choose_masked(mask: torch.Tensor) -> torch.Tensor:
    """Draw the genes that are masked: (n_cells, max_length), at least one in all."""
    is_masked = (torch.rand(mask.shape) < MASKED).to(mask.device) & mask
    return is_masked if is_masked.any() else mask


def open_loader(collection: DatasetCollection, transform: RankTokens, **options: Any) -> Loader[Any, Any]:
    """Stream cells as tensors of tokens."""
    loader: Loader[Any, Any] = Loader(
        to="torch", preload_to_gpu=False, transform=transform, layers=[], obsm=[], obs_columns=[], seed=0, **options
    )
    return loader.use_collection(collection)


def find_medians(collection: DatasetCollection, rows: NDArray[np.bool_]) -> dict[str, float]:
    """Return the median of each gene's counts other than zero, in some of the cells; 1 where none has any."""
    found = np.random.default_rng(0).permutation(np.flatnonzero(rows))[:N_SAMPLED]
    options = {"batch_size": len(found), "chunk_size": len(found), "preload_nchunks": 1, "where": found}
    loader: Loader[Any, Any] = Loader(**options, layers=[], obsm=[], obs_columns=[], preload_to_gpu=False)
    (batch,) = loader.use_collection(collection)
    columns = sp.csc_matrix(batch["X"])
    parts = np.split(columns.data, columns.indptr[1:-1])
    return {
        gene: float(np.median(part)) if part.any() else 1.0
        for gene, part in zip(batch["var"].index, parts, strict=True)
    }


def frequencies(collection: DatasetCollection, transform: RankTokens, rows: NDArray[np.bool_]) -> torch.Tensor:
    """Return the log of how often each token is among those of some cells, one added to each: (n_tokens,)."""
    counts = torch.ones(max(transform.vocabulary.values()) + 1)
    for batch in open_loader(collection, transform, batch_size=BATCH_SIZE, where=rows):
        ids = batch["X"]["input_ids"][batch["X"]["attention_mask"]]
        counts += torch.bincount(ids, minlength=len(counts))
    return torch.log(counts / counts.sum())


def unigram_loss(log_frequencies: torch.Tensor, held_out: list[dict[str, torch.Tensor]]) -> float:
    """Return the cross entropy of the same masked genes by their frequencies alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = [-log_frequencies[X["input_ids"][choose_masked(X["attention_mask"])]].mean() for X in held_out]
    return float(np.mean(found))


def make_transform(
    collection: DatasetCollection, rows: NDArray[np.bool_], vocabulary: Path | None, medians: Path | None
) -> RankTokens:
    """Return how cells become tokens: by tables that are given, or of the collection's genes."""
    known: Any = vocabulary
    if vocabulary is None:
        known = {"<pad>": 0, "<mask>": 1} | {gene: n + 2 for n, gene in enumerate(collection.var.index)}
    scales = find_medians(collection, rows) if medians is None else medians
    missing = "error" if vocabulary is None else "drop"
    return RankTokens(known, scales, max_length=MAX_LENGTH, missing=missing)


def load(path: Path) -> Any:
    """Read a state that this script saved, or end."""
    try:
        saved = torch.load(path, map_location="cpu")
    except (EOFError, RuntimeError, UnpicklingError):
        saved = None
    if not isinstance(saved, dict) or "vocabulary" not in saved:
        sys.exit(f"pretrain_tokens: {path} is no state that this script saved; give another --state, or remove it")
    return saved


def train(
    collection: DatasetCollection, n_epochs: int, state: Path | None, vocabulary: Path | None, medians: Path | None
) -> Training:
    """Train a model, or go on with one."""
    splits = collection.split({"train": 0.9, "held out": 0.1}, seed=0)
    saved = load(state) if state and state.exists() else None
    if saved:
        transform = RankTokens(saved["vocabulary"], saved["medians"], max_length=MAX_LENGTH, missing="drop")
        given = RankTokens(vocabulary or saved["vocabulary"], medians or saved["medians"], max_length=MAX_LENGTH)
        if (given.vocabulary, given.medians) != (transform.vocabulary, transform.medians):
            sys.exit(f"pretrain_tokens: {state} is of another vocabulary or other medians; give these, or none")
    else:
        transform = make_transform(collection, splits["train"], vocabulary, medians)
    if "<mask>" not in transform.vocabulary:
        sys.exit("pretrain_tokens: the vocabulary has no token <mask>; add it with a number of its own")
    cells = np.random.default_rng(0).permutation(np.flatnonzero(splits["held out"]))[:N_HELD_OUT]
    held_out = [batch["X"] for batch in open_loader(collection, transform, batch_size=BATCH_SIZE, where=cells)]
    training = Training.of(collection, transform, splits["train"])
    log_frequencies = frequencies(collection, transform, splits["train"])
    unigram = unigram_loss(log_frequencies, held_out)
    if saved:
        training.restore(saved)
        if len(training.history) >= n_epochs:
            print(f"{state} has {len(training.history)} epochs already; to go on, give --epochs a number above that")
        else:
            print(f"going on in epoch {len(training.history) + 1}, after {training.n_batches:,} of its batches")
    else:
        with torch.no_grad():  # what is known without a cell needs not be learnt
            training.model.decoder.bias.copy_(log_frequencies)
    while len(training.history) < n_epochs:
        for batch in training.loader:
            training.learn(batch["X"])
            if state and training.n_batches % SAVE_EVERY == 0:
                training.save(state)
        training.end_epoch(held_out, unigram)
        if state:
            training.save(state)
    return training


def main() -> int:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("collection", metavar="OUT.zarr")
    parser.add_argument("--epochs", type=int, default=5, metavar="N", help="in all (default: 5)")
    parser.add_argument("--vocabulary", type=Path, metavar="FILE", help="token of each gene: JSON, CSV, TSV or Parquet")
    parser.add_argument("--medians", type=Path, metavar="FILE", help="median of each gene, alike")
    parser.add_argument("--state", type=Path, metavar="FILE", help="save to, and go on from, this file")
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error(f"--epochs is {args.epochs}; it must be 1 or more")
    try:
        if args.state is not None:
            check_parent(str(args.state))  # before hours of work
        collection = DatasetCollection(args.collection, mode="r")
        train(collection, args.epochs, args.state, args.vocabulary, args.medians)
    except AnnbatchDaskError as error:
        sys.exit(f"pretrain_tokens: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
