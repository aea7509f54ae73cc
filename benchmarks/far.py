#!/usr/bin/env python3
"""What latency costs: a collection on an S3 server that answers late, beside the same one on this disk.

far.py                    all parts, as tables
far.py load | slow | build | clients
  [--cells 160000] [--latencies-ms 0 50] [--connections 128] [--epochs 5] [--files-built 4] [--work FOLDER]

The server (far_server.py) is a process of its own on loopback: what is measured is waiting, not a network's width.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import anndata as ad
import numpy as np
import scipy.sparse as sp
from far_server import Far, Settings, served

from annbatch_dask import DatasetCollection, Loader

N_GENES, N_VALUES, N_FILES = 20_000, 500, 4
SLOW_S = 5.0


@dataclass(frozen=True)
class Setup:
    """What is measured, and where."""

    work: Path
    far: Far
    n_cells: int
    latencies_ms: tuple[float, ...]
    n_connections: int
    n_epochs: int
    n_built: int

    @property
    def files(self) -> list[Path]:
        """The inputs, which the server has too."""
        return sorted((self.work / "bucket/in").glob("*.h5ad"))

    @property
    def options(self) -> dict[str, Any]:
        """storage_options to reach the server."""
        return self.far.options(self.n_connections)


def report(what: str, **facts: float | str) -> None:
    """Print one measurement."""
    print(json.dumps({"what": what} | facts), flush=True)


def make_inputs(folder: Path, n_cells: int) -> None:
    """Write some files of made-up counts."""
    folder.mkdir(parents=True, exist_ok=True)
    n = n_cells // N_FILES
    for number in range(N_FILES):
        path = folder / f"{number}-{n}.h5ad"
        if path.exists():
            continue
        rng = np.random.default_rng(number)
        columns = np.sort(rng.integers(0, N_GENES, (n, N_VALUES)), axis=1).astype(np.int32)
        values = rng.geometric(0.4, columns.size).astype(np.float32)
        x = sp.csr_matrix((values, columns.reshape(-1), np.arange(n + 1) * N_VALUES), shape=(n, N_GENES))
        x.sum_duplicates()
        obs = {"cell_type": rng.choice(["B", "T", "NK"], n), "batch": np.full(n, number)}
        adata = ad.AnnData(x, obs=obs)
        adata.obs["cell_type"] = adata.obs["cell_type"].astype("category")
        adata.obs_names = [f"{number}-{i}" for i in range(n)]
        adata.var_names = [f"g{i}" for i in range(N_GENES)]
        adata.write_h5ad(path)


def build(out: str | Path, files: list[Any], options: dict[str, Any] | None = None) -> DatasetCollection:
    """Build a collection of some datasets."""
    collection = DatasetCollection(out, storage_options=options)
    return collection.add_adatas(files, seed=0, dataset_size="20MB", storage_options=options, progress=False)


def epochs(collection: DatasetCollection, n: int, **sizes: Any) -> Iterator[tuple[float, float]]:
    """Seconds and processor seconds of some epochs of one loader."""
    given = {"batch_size": 2048, "chunk_size": 256, "preload_nchunks": 32} | sizes
    loader: Loader[Any, Any] = Loader(**given, shuffle=True, seed=0, preload_to_gpu=False)
    loader.use_collection(collection)
    for _ in range(n):
        start, cpu = time.perf_counter(), time.process_time()
        n_obs = sum(batch["X"].shape[0] for batch in loader)
        assert n_obs == collection.n_obs
        yield time.perf_counter() - start, time.process_time() - cpu


def opened(setup: Setup, latency_ms: float | None) -> DatasetCollection:
    """The collection on the disk, or on the server where a latency is given."""
    if latency_ms is None:
        return DatasetCollection(setup.work / "bucket/o.zarr", mode="r")
    setup.far.set(Settings())
    collection = DatasetCollection("s3://bucket/o.zarr", mode="r", storage_options=setup.options)
    setup.far.set(Settings(latency_s=latency_ms / 1000))
    return collection


def load(setup: Setup) -> None:
    """Epochs from the disk and from the server, by turns; the first of each, which is cold, does not count."""
    sizes = {"max_requests": setup.n_connections}
    places = (None, *setup.latencies_ms)
    runs = {ms: epochs(opened(setup, ms), setup.n_epochs + 1, **sizes) for ms in places}
    taken: dict[float | None, list[float]] = {ms: [] for ms in places}
    used: dict[float | None, list[tuple[float, float]]] = {ms: [] for ms in places}
    for epoch in range(setup.n_epochs + 1):
        for latency_ms, run in runs.items():
            settings = Settings(latency_s=(latency_ms or 0) / 1000)
            setup.far.set(settings)
            seconds, cpu = next(run)
            facts = {"ms": "disk" if latency_ms is None else latency_ms, "epoch": epoch}
            rate = {"cells_per_s": round(setup.n_cells / seconds), "s": round(seconds, 2), "cpu_s": round(cpu, 2)}
            counted = setup.far.set(settings)
            report("load", **facts, **rate, **counted)
            if epoch:
                taken[latency_ms].append(seconds)
                used[latency_ms].append((cpu, counted["server_cpu_s"]))
    for latency_ms, times in taken.items():
        shares = [a / b for a, b in zip(taken[None], times, strict=True)]
        name, rate = "disk" if latency_ms is None else latency_ms, round(setup.n_cells / median(times))
        cpu, server_cpu = (median(found) / setup.n_cells * 1e6 for found in zip(*used[latency_ms], strict=True))
        facts = {"of_disk": round(median(shares), 2), "shares": str(np.round(shares, 2))}
        report("rate", ms=name, cells_per_s=rate, **facts, us_a_cell=round(cpu, 2), server_us=round(server_cpu, 2))


def slow(setup: Setup) -> None:
    """An epoch in which one request takes seconds: how long no batch came."""
    collection = opened(setup, max(setup.latencies_ms))
    latency_s = max(setup.latencies_ms) / 1000
    sizes = {"batch_size": 512, "chunk_size": 128, "preload_nchunks": 16, "max_requests": setup.n_connections}
    loader: Loader[Any, Any] = Loader(**sizes, shuffle=True, seed=0, preload_to_gpu=False)
    loader.use_collection(collection)
    sum(1 for _ in loader)
    for n_slow in (0, 1):
        setup.far.set(Settings(latency_s, n_slow, SLOW_S))
        start, longest = time.perf_counter(), 0.0
        last = start
        for _ in loader:
            longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
        report("slow", n_slow=n_slow, s=round(time.perf_counter() - start, 2), longest_s=round(longest, 2))


def build_all(setup: Setup) -> None:
    """A build of files on the server, onto the server, and its verification."""
    for latency_ms in (None, max(setup.latencies_ms)):
        setup.far.set(Settings(latency_s=(latency_ms or 0) / 1000))
        out: str | Path = setup.work / "local.zarr" if latency_ms is None else f"s3://bucket/b{latency_ms:g}.zarr"
        options = None if latency_ms is None else setup.options
        for left in (setup.work / "local.zarr", *(setup.work / "bucket").glob("b*.zarr*")):
            shutil.rmtree(left, ignore_errors=True)
        files: list[Any] = [
            p if latency_ms is None else f"s3://bucket/in/{p.name}" for p in setup.files[: setup.n_built]
        ]
        start = time.perf_counter()
        collection = build(out, files, options)
        seconds = time.perf_counter() - start
        counted = setup.far.set(Settings(latency_s=(latency_ms or 0) / 1000))
        name = "disk" if latency_ms is None else latency_ms
        report("build", ms=name, s=round(seconds, 1), cells_per_s=round(collection.n_obs / seconds), **counted)
        start = time.perf_counter()
        assert collection.verify().ok
        report("verify", ms=name, s=round(time.perf_counter() - start, 1), **setup.far.set(Settings()))


def clients(setup: Setup) -> None:
    """Ranges of one object by s3fs and by obstore, as many at a time as there are connections."""
    key = "blob"
    (setup.work / "bucket" / key).write_bytes(np.random.default_rng(0).bytes(2**26))
    for latency_ms in setup.latencies_ms:
        setup.far.set(Settings(latency_s=latency_ms / 1000))
        for nbytes, n in ((2**16, 2000), (2**20, 200)):
            for name, make in (("s3fs", s3fs_get), ("obstore", obstore_get)):
                seconds, cpu = timed(make(setup, key), nbytes, n, setup.n_connections)
                facts = {"requests_per_s": round(n / seconds), "cpu_ms": round(cpu / n * 1000, 2)}
                report(f"client {name}", ms=latency_ms, kib=nbytes // 1024, **facts)


def timed(get: Callable[..., object], nbytes: int, n: int, n_threads: int) -> tuple[float, float]:
    """Return seconds and processor seconds of some reads, after the connections have been made."""
    starts = np.random.default_rng(1).integers(0, 2**26 - nbytes, n).tolist()
    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(partial(get, nbytes=nbytes), starts[:n_threads]))
        begun, cpu = time.perf_counter(), time.process_time()
        list(pool.map(partial(get, nbytes=nbytes), starts))
        return time.perf_counter() - begun, time.process_time() - cpu


def s3fs_get(setup: Setup, key: str) -> Callable[..., object]:
    """Read by fsspec's client."""
    import fsspec

    fs = fsspec.filesystem("s3", **setup.options)
    return lambda start, nbytes: fs.cat_file(f"bucket/{key}", start=start, end=start + nbytes)


def obstore_get(setup: Setup, key: str) -> Callable[..., object]:
    """Read with the same condition by obstore."""
    import obstore
    from obstore.store import S3Store

    store = S3Store(
        "bucket",
        endpoint=setup.far.url,
        access_key_id="a",
        secret_access_key="b",
        region="us-east-1",
        client_options={"allow_http": True, "pool_max_idle_per_host": str(setup.n_connections)},
    )
    tag = obstore.head(store, key)["e_tag"]

    def get(start: int, nbytes: int) -> int:
        out = memoryview(bytearray(nbytes))
        out[:] = memoryview(
            obstore.get(store, key, options={"range": (start, start + nbytes), "if_match": tag}).bytes()
        )
        return nbytes

    return get


PARTS: dict[str, Callable[[Setup], None]] = {"load": load, "slow": slow, "build": build_all, "clients": clients}


def main() -> int:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=list(PARTS))
    parser.add_argument("--cells", type=int, default=160_000)
    parser.add_argument("--latencies-ms", type=float, nargs="*", default=[0, 50])
    parser.add_argument("--connections", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--files-built", type=int, default=N_FILES, help="a fourth of the cells each")
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        work = args.work or Path(made)
        make_inputs(work / "bucket/in", args.cells)
        with served(work) as far:
            setup = Setup(
                work, far, args.cells, tuple(args.latencies_ms), args.connections, args.epochs, args.files_built
            )
            if not (work / "bucket/o.zarr/zarr.json").exists():
                build(work / "bucket/o.zarr", setup.files)
            for part in args.parts:
                PARTS[part](setup)
    report("peak", mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
