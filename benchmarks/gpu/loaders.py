"""Dense batches on a GPU, ours beside annbatch's, in turn: batch 4096, chunk 512, 32 chunks, as in annbatch's tutorial.

    loaders.py ATLAS_DIR [--device cuda|cpu] [--epochs 4] [--rows N] [--of annbatch,open,packed] [--build-only]
               [--seconds N]

``open`` and ``packed`` are the layouts of ours.

Every epoch adds up each batch on the device, so the batch was really there; the sums of both must agree.

An epoch of the atlas is over in tenths of a second, of which a part is the start: passes of ``--rows`` cells, drawn
with replacement by each package's own sampler, show the rate of a long one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import pathlib
import sys
import time
import warnings
from functools import partial

warnings.filterwarnings("ignore")
import anndata as ad  # noqa: E402
import numpy as np  # noqa: E402

SIZES = {"batch_size": 4096, "chunk_size": 512, "preload_nchunks": 32, "shuffle": True}
N_GENES = 2000
N_LONG = 3


def say(**facts):
    print(json.dumps(facts), flush=True)


def lazy(path):
    a = ad.experimental.read_lazy(path)
    return ad.AnnData(X=a.X, obs=a.obs[["cell_type"]].to_memory(), var=a.var.to_memory())


def backed(group):
    a = ad.experimental.read_lazy(group)
    return ad.AnnData(X=ad.io.sparse_dataset(group["X"]), obs=a.obs[["cell_type"]].to_memory(), var=a.var.to_memory())


def build(folder, names):
    """The collections, each written by its own package."""
    import annbatch_dask

    inputs = sorted(str(p) for p in pathlib.Path(folder).glob("*.h5ad"))
    for name in names:
        out = f"{folder}/{name}.zarr"
        if pathlib.Path(out, "zarr.json").exists():
            continue
        package, more = annbatch_dask, {"seed": 0, "progress": False, "layout": name}
        if name == "annbatch":
            import annbatch as package

            more = {"load_adata": lazy}
        start = time.perf_counter()
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars
            package.DatasetCollection(out).add_adatas(inputs, shuffle=True, dataset_size=50_000, **more)
        say(what="build", of=name, seconds=round(time.perf_counter() - start, 1))


def ours(folder, device, genes=None, rows=None, layout="open", **more):
    import annbatch_dask as m

    more = {"dense": "gpu" if device == "cuda" else "cpu", "obs_columns": ["cell_type"]} | more
    if genes is not None:
        more["var_names"] = genes
    loader = m.Loader(**rows_of(m, rows), to="torch", preload_to_gpu=device == "cuda", **more)
    return loader.use_collection(m.DatasetCollection(f"{folder}/{layout}.zarr", mode="r")), lambda x: x


def rows_of(package, n):
    """Arguments of a loader of either package, for epochs or for passes of ``n`` rows."""
    if n is None:
        return SIZES
    sizes = [SIZES[name] for name in ("chunk_size", "preload_nchunks", "batch_size")]
    rng = np.random.default_rng(0)
    return {"batch_sampler": package.samplers.RandomSampler(*sizes, replacement=True, num_samples=n, rng=rng)}


def theirs(folder, device, genes=None, rows=None):
    import annbatch as m
    import torch

    loader = m.Loader(**rows_of(m, rows), preload_to_gpu=device == "cuda", to="torch")
    loader = loader.use_collection(m.DatasetCollection(f"{folder}/annbatch.zarr", mode="r"), load_adata=backed)
    where = None if genes is None else torch.as_tensor(backed_var(folder).get_indexer(genes), device=device)

    def dense(x):
        x = x.to(device).to_dense()
        return x if where is None else x.index_select(1, where)

    return loader, dense


def backed_var(folder):
    import annbatch as m

    return backed(next(iter(m.DatasetCollection(f"{folder}/annbatch.zarr", mode="r")))).var.index


def epoch(loader, dense, device):
    """Cells, seconds and the sum of all values of one pass."""
    import torch

    total = torch.zeros((), dtype=torch.float64, device=device)
    start, n = time.perf_counter(), 0
    for batch in loader:
        x = dense(batch["X"])
        total += x.sum(dtype=torch.float64)
        n += x.shape[0]
    total = float(total)  # waits for the device
    return n, time.perf_counter() - start, total


def main():
    p = argparse.ArgumentParser()
    p.add_argument("atlas")
    p.add_argument("--device", default="cuda")
    p.add_argument("--epochs", type=int, default=4)
    p.add_argument("--rows", type=int, default=2_000_000)
    p.add_argument("--of", default="annbatch,open,packed")
    p.add_argument("--build-only", action="store_true")
    p.add_argument("--seconds", type=float)
    a = p.parse_args()
    if "annbatch" in a.of:
        import zarr

        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})  # as annbatch recommends; ours needs none
    makers = {name: theirs if name == "annbatch" else partial(ours, layout=name) for name in a.of.split(",")}
    build(a.atlas, makers)
    if a.build_only:
        return 0
    if a.seconds:
        return keep_on(a, next(name for name in makers if name != "annbatch"))
    import annbatch_dask as m

    names = m.DatasetCollection(f"{a.atlas}/{next(n for n in makers if n != 'annbatch')}.zarr", mode="r").var.index
    chosen = list(np.random.default_rng(0).choice(names, N_GENES, replace=False))
    ok = True
    for label, genes in (("all genes", None), (f"{N_GENES:,} genes", chosen)):
        made = {}
        for name, make in makers.items():
            start = time.perf_counter()
            made[name] = make(a.atlas, a.device, genes)
            say(what=label, of=name, opened_s=round(time.perf_counter() - start, 3))
        rates, sums = {}, {}
        for k in range(a.epochs):
            for name in made if k % 2 else reversed(made):
                n, seconds, total = epoch(*made[name], a.device)
                say(what=label, of=name, epoch=k, cells_per_s=round(n / seconds), sum=total)
                if k:
                    rates.setdefault(name, []).append(n / seconds)
                sums[name] = total
        mid = {k: float(np.median(v)) for k, v in rates.items()}
        agree = max(sums.values()) - min(sums.values()) <= 1e-6 * abs(max(sums.values()))
        ok &= agree
        times = {k: round(v / mid["annbatch"], 2) for k, v in mid.items()} if "annbatch" in mid else None
        say(what=label, median={k: round(v) for k, v in mid.items()}, times=times, sums_agree=agree)
    long = {name: make(a.atlas, a.device, None, a.rows) for name, make in makers.items()}
    found = {name: [] for name in long}
    for _ in range(N_LONG):
        for name, made in long.items():
            n, seconds, _ = epoch(*made, a.device)
            found[name].append(n / seconds)
            say(what=f"passes of {a.rows:,} cells", of=name, cells_per_s=round(n / seconds))
    mid = {name: round(float(np.median(rates))) for name, rates in found.items()}
    say(what=f"passes of {a.rows:,} cells", median=mid)
    for name in makers if a.device == "cuda" else ():
        for form in ({"dtype": "bfloat16"}, {"dense": False}) if name != "annbatch" else ():
            made = ours(a.atlas, a.device, layout=name, **form)
            rates = [n / s for n, s, _ in (epoch(made[0], as_values, a.device) for _ in range(a.epochs))][1:]
            say(what=str(form), of=name, cells_per_s=round(float(np.median(rates))))
    return 0 if ok else 1


def as_values(x):
    """Something that can be added up, and has a row for each cell."""
    return x if not x.is_sparse_csr else Rows(x)


class Rows:
    """A sparse batch, its values alone."""

    def __init__(self, x):
        self.shape, self._values = x.shape, x.values()

    def sum(self, dtype):
        """Of all values."""
        return self._values.sum(dtype=dtype)


def keep_on(a, layout):
    """Epochs of one layout for some seconds, to be looked at from outside."""
    n = 0
    loader, dense = ours(a.atlas, a.device, layout=layout)
    epoch(loader, dense, a.device)
    until = time.perf_counter() + a.seconds
    say(what="now", of=layout)
    begun = time.perf_counter()
    while time.perf_counter() < until:
        n += epoch(loader, dense, a.device)[0]
    say(what="watched", of=layout, cells_per_s=round(n / (time.perf_counter() - begun)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
