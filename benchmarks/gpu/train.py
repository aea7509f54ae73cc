"""A training step beside the loader: how much of each hides behind the other."""

from __future__ import annotations

import itertools
import sys
import time

import torch
from loaders import ours, say

WIDTH, N_TYPES, N_EPOCHS = 1024, 20, 4


def main(folder):
    """Rates of the loader alone, of the step alone, and of both."""
    loader, _ = ours(folder, "cuda", dtype="bfloat16", obs_codes=["cell_type"])
    first = next(iter(loader))
    n_genes = first["X"].shape[1]
    widths = [n_genes, WIDTH, WIDTH, N_TYPES]
    layers = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    model = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2]).to(
        "cuda", torch.bfloat16
    )
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step(batch):
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(model(torch.log1p(batch["X"])), batch["obs_codes"]["cell_type"])
        loss.backward()
        optimizer.step()
        return loss

    def run(batches, work):
        start, n = time.perf_counter(), 0
        for batch in batches:
            loss = work(batch)
            n += len(batch["X"])
        torch.cuda.synchronize()
        return n / (time.perf_counter() - start), float(loss)

    for what, batches, work in (
        ("loader alone", lambda: loader, lambda batch: batch["X"].sum()),
        ("step alone", lambda: [first] * 40, step),
        ("both", lambda: loader, step),
    ):
        found = [run(batches(), work) for _ in range(N_EPOCHS)][1:]
        say(what=what, cells_per_s=round(sorted(rate for rate, _ in found)[1]), loss=round(found[-1][1], 4))


if __name__ == "__main__":
    main(sys.argv[1])
