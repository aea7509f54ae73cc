#!/usr/bin/env python3
"""One measurement of annbatch_dask in a process of its own; prints a JSON line per measurement.

jobs.py shuffle ATLAS_DIR OUT.zarr [--dataset-size 100000]
jobs.py load OUT.zarr [--output csr|dense] [--epochs 3]
jobs.py bounds ATLAS_DIR OUT.zarr
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

N_THREADS = len(os.sched_getaffinity(0))


def report(what: str, seconds: float, **facts: float) -> None:
    """Print one measurement."""
    print(json.dumps({"what": what, "seconds": round(seconds, 3), **facts}), flush=True)


def sources(folder: Path) -> list[Path]:
    """Return the atlas's files."""
    return sorted(folder.glob("*.h5ad"))


def shuffle(args: argparse.Namespace) -> None:
    """Time a whole shuffle, from nothing running to the collection committed."""
    from annbatch_dask import DatasetCollection

    start = time.perf_counter()
    collection = DatasetCollection(args.out)
    collection.add_adatas(sources(args.atlas), dataset_size=args.dataset_size, seed=0, progress=False)
    seconds = time.perf_counter() - start
    report("shuffle", seconds, cells=collection.n_obs, cells_per_s=round(collection.n_obs / seconds))


def load(args: argparse.Namespace) -> None:
    """Time whole epochs: batch 4096, chunk 512, 32 chunks preloaded, values as in the sources (float32)."""
    from annbatch_dask import DatasetCollection, Loader

    collection = DatasetCollection(args.store, mode="r")
    for epoch in range(args.epochs):
        loader: Any = Loader(
            batch_size=4096,
            chunk_size=512,
            preload_nchunks=32,
            shuffle=True,
            preload_to_gpu=False,
            rng=np.random.default_rng(epoch),
            dense=args.output == "dense",
            obs_columns=["cell_type"],  # as annbatch's side does
        )
        loader.use_collection(collection)
        start, n_obs = time.perf_counter(), 0
        for batch in loader:
            n_obs += batch["X"].shape[0]
        seconds = time.perf_counter() - start
        report(f"load {args.output}", seconds, cells=n_obs, cells_per_s=round(n_obs / seconds))


def bounds(args: argparse.Namespace) -> None:
    """Time what cannot be avoided: inflating the sources, decoding and writing the collection's bytes."""
    inflate(sources(args.atlas))
    decode(args.store)
    write(args.store)
    fill_dense(args.store)


def inflate(paths: list[Path]) -> None:
    """Inflate every gzip chunk of X with libdeflate, on all cores; the result is thrown away."""
    import deflate
    import h5py

    start, n_bytes = time.perf_counter(), 0
    with ThreadPoolExecutor(N_THREADS) as pool:
        for path in paths:
            with h5py.File(path) as file:
                for name in ("data", "indices"):
                    array = file["X"][name]
                    size = array.chunks[0] * array.dtype.itemsize
                    # The raw chunks of one array are held; they are small beside the inflated ones.
                    for raw in pool.map(lambda raw, size=size: len(deflate.zlib_decompress(raw, size)), raws(array)):
                        n_bytes += raw
    report("inflate", time.perf_counter() - start, n_bytes=n_bytes)


def raws(array: Any) -> Iterator[bytes]:
    """Yield the compressed chunks."""
    for start in range(0, array.shape[0], array.chunks[0]):
        yield array.id.read_direct_chunk((start,))[1]


def decode(store: Path) -> None:
    """Read every X array of the collection, window by window."""
    import zarr

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    start, n_bytes, window = time.perf_counter(), 0, 16_000_000
    for group in (g for _, g in zarr.open_group(store, mode="r").groups()):
        for name in ("data", "indices"):
            array = group["X"][name]
            for begin in range(0, array.shape[0], window):
                n_bytes += array[begin : begin + window].nbytes
    report("decode", time.perf_counter() - start, n_bytes=n_bytes)


def write(store: Path) -> None:
    """Write as many bytes as the collection has beside it, and force them to disk."""
    n_bytes = sum(p.stat().st_size for p in store.rglob("*") if p.is_file())
    block = os.urandom(1 << 24)
    path = store.with_suffix(".write-test")
    start = time.perf_counter()
    with path.open("wb") as file:
        for done in range(0, n_bytes, len(block)):
            file.write(block[: n_bytes - done])
        file.flush()
        os.fsync(file.fileno())
    report("write", time.perf_counter() - start, n_bytes=n_bytes)
    path.unlink()


def fill_dense(store: Path) -> None:
    """Zero a dense float32 batch as often as an epoch needs: the floor under any dense output."""
    from annbatch_dask import DatasetCollection

    collection = DatasetCollection(store, mode="r")
    batch = np.empty((4096, collection.n_var), dtype=np.float32)
    start = time.perf_counter()
    for _ in range(-(-collection.n_obs // len(batch))):
        batch.fill(0)
    report("zero dense", time.perf_counter() - start, n_bytes=4 * collection.n_obs * collection.n_var)


def main() -> int:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True)
    job = jobs.add_parser("shuffle")
    job.add_argument("atlas", type=Path)
    job.add_argument("out", type=Path)
    job.add_argument("--dataset-size", type=int, default=100_000)
    job.set_defaults(run=shuffle)
    job = jobs.add_parser("load")
    job.add_argument("store", type=Path)
    job.add_argument("--output", choices=("csr", "dense"), default="csr")
    job.add_argument("--epochs", type=int, default=3)
    job.set_defaults(run=load)
    job = jobs.add_parser("bounds")
    job.add_argument("atlas", type=Path)
    job.add_argument("store", type=Path)
    job.set_defaults(run=bounds)
    args = parser.parse_args()
    args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
