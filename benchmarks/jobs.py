#!/usr/bin/env python3
"""One measurement of annbatch_dask in a process of its own; prints a JSON line per measurement.

jobs.py shuffle ATLAS_DIR OUT.zarr [--dataset-size 100000] [--layout open|packed] [--stats]
jobs.py load OUT.zarr [--output csr|dense|genes] [--epochs 3] [--package annbatch_dask|annbatch] [--busy-s 2.0]
jobs.py tokens OUT.zarr [--output ranks|bins] [--epochs 3]
jobs.py bounds OUT.zarr
jobs.py disks ATLAS_DIR OUT.zarr
jobs.py gather ATLAS_DIR OUT.zarr [--dataset-size 100000] [--layout open|packed]
jobs.py ranks OUT.zarr --ranks 8 --threads 2 [--output csr]
jobs.py python OUT.zarr [--threads 2]
jobs.py order random|blocks|"full shuffle"|weighted [--rows 100000000]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import resource
import shutil
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

N_THREADS = len(os.sched_getaffinity(0))
N_GENES = 2000
N_SHARED_EPOCHS = 4
N_PYTHON_EPOCHS = 12
BATCH = 4096
WINDOW = 16_000_000
MAX_LENGTH = 2048


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
    options = {"dataset_size": args.dataset_size, "layout": args.layout, "stats": args.stats}
    collection.add_adatas(sources(args.atlas), seed=0, progress=False, **options)
    seconds = time.perf_counter() - start
    report("shuffle", seconds, cells=collection.n_obs, cells_per_s=round(collection.n_obs / seconds))


def load(args: argparse.Namespace) -> None:
    """Time whole epochs: batch 4096, chunk 512, 32 chunks preloaded, values as in the sources (float32).

    Both packages run the settings of annbatch's own single-cell tutorial. `genes` is dense over N_GENES of them.
    """
    import zarr

    package = importlib.import_module(args.package)
    if args.package != "annbatch_dask":
        warnings.filterwarnings("ignore")
        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    collection = package.DatasetCollection(zarr.open(args.store, mode="r"))
    names = np.random.default_rng(0).choice(var_names(args.store), N_GENES, replace=False)
    for epoch in range(args.epochs):
        loader, finish = make_loader(package, collection, args.output, names, epoch)
        n_batches = len(loader)
        start, n_obs = time.perf_counter(), 0
        for batch in loader:
            n_obs += finish(batch["X"]).shape[0]
            time.sleep(args.busy_s / n_batches)  # a consumer that leaves the processors alone, as a GPU does
        seconds = time.perf_counter() - start
        report(f"load {args.output}", seconds, cells=n_obs, cells_per_s=round(n_obs / seconds))


def tokens(args: argparse.Namespace) -> None:
    """Time whole epochs of tokens, 2,048 of a cell at most; those that fill rows up are not counted."""
    from annbatch_dask import DatasetCollection, Loader
    from annbatch_dask.transforms import BinnedExpression, RankTokens

    collection = DatasetCollection(args.store, mode="r")
    genes = collection.var.index
    order = np.random.default_rng(0).permutation(len(genes)) + 2
    vocabulary = {"<pad>": 0, "<cls>": 1} | dict(zip(genes, order.tolist(), strict=True))
    medians = dict(zip(genes, np.random.default_rng(1).lognormal(size=len(genes)).tolist(), strict=True))
    transform = {
        "ranks": lambda: RankTokens(vocabulary, medians, max_length=MAX_LENGTH, cls="<cls>"),
        "bins": lambda: BinnedExpression(vocabulary, max_length=MAX_LENGTH),
    }[args.output]()
    sizes = {"batch_size": 1024, "chunk_size": 512, "preload_nchunks": 32, "shuffle": True, "preload_to_gpu": False}
    for epoch in range(args.epochs):
        loader: Loader[Any, Any] = Loader(**sizes, transform=transform, obs_columns=[], layers=(), obsm=(), seed=epoch)
        loader.use_collection(collection)
        start, n_tokens, n_obs = time.perf_counter(), 0, 0
        for batch in loader:
            mask = list(batch["X"].values())[-1]
            n_tokens += int(np.count_nonzero(mask))
            n_obs += len(mask)
        seconds = time.perf_counter() - start
        facts = {"tokens": n_tokens, "tokens_per_s": round(n_tokens / seconds), "cells_per_s": round(n_obs / seconds)}
        report(f"tokens {args.output}", seconds, **facts)


def make_loader(
    package: Any, collection: Any, output: str, names: np.ndarray, seed: int
) -> tuple[Any, Callable[[Any], Any]]:
    """Return a loader, and what turns its X into the output where the loader itself cannot."""
    sizes = {"batch_size": BATCH, "chunk_size": 512, "preload_nchunks": 32, "shuffle": True, "preload_to_gpu": False}
    rng = np.random.default_rng(seed)
    if package.__name__ == "annbatch_dask":
        form = {"csr": {}, "dense": {"dense": True}, "genes": {"dense": True, "var_names": names.tolist()}}[output]
        loader = package.Loader(**sizes, **form, obs_columns=["cell_type"], layers=(), obsm=(), rng=rng)
        return loader.use_collection(collection), lambda x: x
    loader = package.Loader(**sizes, rng=rng).use_collection(collection, load_adata=backed)
    where = loader.var.index.get_indexer(names)
    return loader, {"csr": lambda x: x, "dense": lambda x: x.toarray(), "genes": lambda x: x[:, where].toarray()}[
        output
    ]


def backed(group: Any) -> Any:
    """Open a dataset with X on disk and one column of obs."""
    import anndata as ad

    obs = ad.experimental.read_lazy(group).obs[["cell_type"]].to_memory()
    return ad.AnnData(ad.io.sparse_dataset(group["X"]), obs=obs, var=ad.io.read_elem(group["var"])[[]])


def ranks(args: argparse.Namespace) -> None:
    """Time epochs that several processes share, each with threads of its own, on the cores this one may use.

    More threads than cores stand for a larger machine of which each core is slower: what they cost beside their work
    shows in processor time, and in how often one had to leave a core to another.
    """
    import annbatch_dask.loader  # noqa: F401 - once for all

    context = multiprocessing.get_context("fork")
    ready, begin = context.Barrier(args.ranks + 1), context.Barrier(args.ranks + 1)
    found = context.Queue()
    started = [context.Process(target=rank, args=(args, number, ready, begin, found)) for number in range(args.ranks)]
    for process in started:
        process.start()
    ready.wait()
    start = time.perf_counter()
    begin.wait()
    facts = np.array([found.get() for _ in started])
    seconds = time.perf_counter() - start
    for process in started:
        process.join()
    cells, cpu_s, n_threads, n_evicted = facts.sum(0).tolist()
    rates = {"cells_per_s": round(cells / seconds), "cpu_us_per_cell": round(cpu_s / cells * 1e6, 2)}
    report("ranks", seconds, cells=cells, **rates, threads=n_threads, evictions_per_s=round(n_evicted / seconds))


def rank(args: argparse.Namespace, number: int, ready: Any, begin: Any, found: Any) -> None:
    """Load one rank's share, once what is compiled is there."""
    import annbatch_dask
    from annbatch_dask.loader import loader as module
    from annbatch_dask.samplers import RandomSampler

    module.count_threads = lambda: args.threads
    collection = annbatch_dask.DatasetCollection(args.store, mode="r")
    names = np.random.default_rng(0).choice(var_names(args.store), N_GENES, replace=False)
    form = {"csr": {}, "dense": {"dense": True}, "genes": {"dense": True, "var_names": names.tolist()}}[args.output]
    window = {"chunk_size": 512, "preload_nchunks": 4, "batch_size": 1024}
    n_rows = N_SHARED_EPOCHS * collection.n_obs // args.ranks
    sampler = RandomSampler(**window, replacement=True, num_samples=n_rows, seed=number)
    loader = annbatch_dask.Loader(batch_sampler=sampler, **form, obs_columns=["cell_type"], layers=(), obsm=())
    loader.use_collection(collection)
    next(iter(loader))
    ready.wait()
    begin.wait()
    before, n_obs, n_threads = resource.getrusage(resource.RUSAGE_SELF), 0, 0
    for batch in loader:
        n_obs += batch["X"].shape[0]
        n_threads = max(n_threads, threading.active_count())
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found.put((n_obs, cpu_s, n_threads, after.ru_nivcsw - before.ru_nivcsw))


def var_names(store: Path) -> np.ndarray:
    """Return the genes of a collection."""
    import anndata as ad
    import zarr

    _, first = next(zarr.open_group(store, mode="r").groups())
    names: np.ndarray = ad.io.read_elem(first["var"]).index.to_numpy()
    return names


def python(args: argparse.Namespace) -> None:
    """Time what is left of epochs of CSR where compiled code that reads, decodes and copies does nothing.

    Its calls stay, as all of Python around them. What plans the reads and the batches in compiled code is counted as
    processor time, but holds no lock of Python's: of every other epoch it is timed, and left out of ``lock_ms``.
    """
    import numba

    from annbatch_dask import DatasetCollection, Loader
    from annbatch_dask.chunks import native
    from annbatch_dask.kernels import entries
    from annbatch_dask.loader import loader as module

    module.count_threads = lambda: args.threads
    sizes = {"batch_size": BATCH, "chunk_size": 512, "preload_nchunks": 32, "shuffle": True, "preload_to_gpu": False}
    loader: Loader[Any, Any] = Loader(**sizes, obs_columns=["cell_type"], layers=(), obsm=(), seed=0)
    loader.use_collection(DatasetCollection(args.store, mode="r"))
    n_windows = sum(batch["X"].shape[0] for batch in loader) / (512 * 32)
    native.fill_next = numba.njit(nogil=True)(lambda _1, _2, _3, _4, _5, _6, _7, _8, _9: 0)
    entries._copy_entries = numba.njit(nogil=True)(lambda _1, _2, _3, _4, _5, _6, _7, _8, _9, _10, _11: None)
    for epoch in range(N_PYTHON_EPOCHS + 1):
        start, cpu_s = time.perf_counter(), cpu_of_pass(loader)
        seconds = time.perf_counter() - start
        with unlocked_time() as unlocked_s:
            lock_s = cpu_of_pass(loader) - sum(unlocked_s)
        if epoch:  # the first one compiles
            facts = {"cpu_ms_per_window": cpu_s, "lock_ms_per_window": lock_s}
            report("python", seconds, **{name: round(s / n_windows * 1e3, 2) for name, s in facts.items()})


def cpu_of_pass(loader: Any) -> float:
    """Iterate once; returns the processor time of all threads."""
    start = time.process_time()
    for _ in loader:
        pass
    return time.process_time() - start


@contextlib.contextmanager
def unlocked_time() -> Iterator[list[float]]:
    """Give the processor time of each call of compiled code that holds no lock.

    To look at what is handed over and to hand back takes the lock: what a call takes that does nothing is left out.
    """
    from numba.core.dispatcher import Dispatcher

    from annbatch_dask.kernels import entries

    spent: list[float] = []
    start, some, n = time.thread_time(), np.zeros(1, np.int64), 1000
    for _ in range(n):
        entries._copy_entries(some, some, some, 0, some, some, some, 0, some, 0, some)
    call_s = (time.thread_time() - start) / n

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*given: Any) -> Any:
            start = time.thread_time()
            found = call(*given)
            spent.append(max(time.thread_time() - start - call_s, 0))
            return found

        return wrapper

    kept = [
        (module, name, value)
        for module_name, module in list(sys.modules.items())
        if module_name.startswith("annbatch_dask")
        for name, value in list(vars(module).items())
        if isinstance(value, Dispatcher)
    ]
    for module, name, value in kept:
        setattr(module, name, timed(value))
    try:
        yield spent
    finally:
        for module, name, value in kept:
            setattr(module, name, value)


def order(args: argparse.Namespace) -> None:
    """Time the start of epochs over many rows: no data, only which rows come first."""
    from annbatch_dask.samplers import RandomSampler
    from annbatch_dask.scdataset import BlockShuffling, BlockWeightedSampling, SamplingStrategy, StrategySampler

    def of(strategy: SamplingStrategy) -> StrategySampler:
        return StrategySampler(strategy, 4096, rng=np.random.default_rng(0))

    samplers = {
        "random": lambda _: RandomSampler(512, 32, 4096, rng=np.random.default_rng(0)),
        "blocks": lambda _: of(BlockShuffling(16)),
        "full shuffle": lambda _: of(BlockShuffling(1)),
        "weighted": lambda weights: of(BlockWeightedSampling(16, weights=weights)),
    }
    next(samplers["full shuffle"](None).sample(1000))  # what is compiled on first use
    before = peak_rss()
    weights = np.random.default_rng(0).random(args.rows) if args.name == "weighted" else None
    start = time.perf_counter()
    sampler = samplers[args.name](weights)
    for epoch in range(2):
        requests = sampler.sample(args.rows)
        next(requests)
        seconds = time.perf_counter() - start
        report(f"{args.name}, epoch {epoch}", seconds, n_bytes=peak_rss() - before)
        requests.close()
        start = time.perf_counter()


def peak_rss() -> int:
    """Return the most memory this process has had, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def disks(args: argparse.Namespace) -> None:
    """Time what a build cannot avoid: inflating the sources, and writing the collection's bytes."""
    inflate(sources(args.atlas))
    write(args.store)


def bounds(args: argparse.Namespace) -> None:
    """Time what an epoch cannot avoid: decoding the collection, and writing the bytes of its batches."""
    from annbatch_dask import DatasetCollection

    collection = DatasetCollection(args.store, mode="r")
    n_values = decode(args.store)
    fill("csr", collection.n_obs, [(n_values * BATCH // collection.n_obs, dtype) for dtype in ("float32", "int32")])
    fill("dense", collection.n_obs, [(BATCH * collection.n_var, "float32")])
    fill("genes", collection.n_obs, [(BATCH * N_GENES, "float32")])


def gather(args: argparse.Namespace) -> None:
    """Measure processor time of gather tasks, and of encoding and writing the same shards of X alone, in this process.

    A build of all files runs twice, one task after the other: the first loads what is compiled, and does not count.
    Decoding what is encoded again is not counted.
    """
    import dask

    from annbatch_dask import DatasetCollection
    from annbatch_dask.etl import build

    task, cpu_s = build.gather, [0.0]

    def timed(*task_args: Any) -> Any:
        start = time.process_time()
        receipt = task(*task_args)
        cpu_s[0] += time.process_time() - start
        return receipt

    build.gather = timed
    for is_warm in (False, True):
        shutil.rmtree(args.out, ignore_errors=True)
        cpu_s[0] = 0.0
        with dask.config.set(scheduler="synchronous"):
            collection = DatasetCollection(args.out)
            collection.add_adatas(
                sources(args.atlas), dataset_size=args.dataset_size, seed=0, progress=False, layout=args.layout
            )
        seconds, n_values = encode(args.out, args.layout)
        if is_warm:
            report("encode and write", seconds, values=n_values)
            report("gather", cpu_s[0], values=n_values)


def encode(store: Path, layout: str) -> tuple[float, int]:
    """Write the sparse X of a collection once more, beside it; returns seconds of processor time, and values."""
    import zarr

    from annbatch_dask.chunks.reader import RangeReader
    from annbatch_dask.etl.write import packing_of
    from annbatch_dask.storage.folder import Folder
    from annbatch_dask.storage.shards import ShardWriter, compressor_json

    again = store.with_suffix(".encode-test")
    seconds, n_values = 0.0, 0
    for dataset, group in zarr.open_group(store, mode="r").groups():
        for name in ("data", "indices"):
            array = group["X"][name]
            n_values += array.shape[0] if name == "data" else 0
            (again / dataset / name).mkdir(parents=True)
            writer = ShardWriter(
                Folder(str(again)),
                zarr.storage.MemoryStore(),
                f"{dataset}/{name}",
                shape=array.shape,
                dtype=array.dtype,
                chunk_rows=array.chunks[0],
                shard_rows=array.shards[0],
                compressor=compressor_json([c for c in array.compressors if c.to_dict()["name"] != "crc32c"]),
                attributes={},
                packing=packing_of(name, array.dtype) if layout == "packed" else None,
            )
            reader = RangeReader(array)
            with contextlib.ExitStack() as opened:
                for begin in range(0, array.shape[0], WINDOW):
                    stop = min(begin + WINDOW, array.shape[0])
                    values = np.empty(stop - begin, array.dtype)
                    for decode_some in reader.tasks(np.array([[begin, stop]]), values):
                        decode_some()
                    start = time.process_time()
                    if not begin:
                        opened.enter_context(writer)
                    writer.append(values)
                    seconds += time.process_time() - start
                start = time.process_time()
                opened.close()
                seconds += time.process_time() - start
    shutil.rmtree(again)
    return seconds, n_values


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


def decode(store: Path) -> int:
    """Decode every chunk of X of the collection on all cores, into one buffer; returns the number of values."""
    import zarr

    from annbatch_dask.chunks.dealing import deal
    from annbatch_dask.chunks.reader import RangeReader

    groups = [group["X"] for _, group in zarr.open_group(store, mode="r").groups()]
    readers = [RangeReader(x[name]) for x in groups for name in ("data", "indices")]
    buffers = {reader.dtype: np.empty(WINDOW, reader.dtype) for reader in readers}
    with ThreadPoolExecutor(N_THREADS) as pool:
        for is_warm in (False, True):
            start, n_bytes = time.perf_counter(), 0
            for reader in readers:
                for begin in range(0, reader.shape[0], WINDOW):
                    stop = min(begin + WINDOW, reader.shape[0])
                    out = buffers[reader.dtype][: stop - begin]
                    tasks = deal(reader.tasks(np.array([[begin, stop]]), out), 3 * N_THREADS)
                    list(pool.map(lambda task: task(), tasks))
                    n_bytes += out.nbytes
            if is_warm:
                report("decode", time.perf_counter() - start, n_bytes=n_bytes)
    return sum(int(x["data"].shape[0]) for x in groups)


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


def fill(output: str, n_obs: int, arrays: list[tuple[int, str]]) -> None:
    """Fill the arrays of one batch on all cores, as often as an epoch needs; two of each take turns, as in a loader."""
    batches = [[np.ones(size, dtype) for size, dtype in arrays] for _ in range(2)]
    parts = [[part for array in batch for part in np.array_split(array, N_THREADS)] for batch in batches]
    n_batches = -(-n_obs // BATCH)
    start = time.perf_counter()
    with ThreadPoolExecutor(N_THREADS) as pool:
        for number in range(n_batches):
            list(pool.map(lambda part: part.fill(0), parts[number % 2]))
    n_bytes = n_batches * sum(array.nbytes for array in batches[0])
    report(f"write {output}", time.perf_counter() - start, n_bytes=n_bytes, cells=n_obs)


def _add_build(job: argparse.ArgumentParser) -> None:
    """Add the options of a job that builds."""
    job.add_argument("atlas", type=Path)
    job.add_argument("out", type=Path)
    job.add_argument("--dataset-size", type=int, default=100_000)
    job.add_argument("--layout", choices=("open", "packed"), default="open")


def main() -> int:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True)
    job = jobs.add_parser("shuffle")
    _add_build(job)
    job.add_argument("--stats", action="store_true", help="with statistics of genes")
    job.set_defaults(run=shuffle)
    job = jobs.add_parser("load")
    job.add_argument("store", type=Path)
    job.add_argument("--output", choices=("csr", "dense", "genes"), default="csr")
    job.add_argument("--epochs", type=int, default=3)
    job.add_argument("--package", choices=("annbatch_dask", "annbatch"), default="annbatch_dask")
    job.add_argument("--busy-s", type=float, default=0.0, help="seconds the consumer takes for an epoch")
    job.set_defaults(run=load)
    job = jobs.add_parser("tokens")
    job.add_argument("store", type=Path)
    job.add_argument("--output", choices=("ranks", "bins"), default="ranks")
    job.add_argument("--epochs", type=int, default=3)
    job.set_defaults(run=tokens)
    job = jobs.add_parser("bounds")
    job.add_argument("store", type=Path)
    job.set_defaults(run=bounds)
    job = jobs.add_parser("disks")
    job.add_argument("atlas", type=Path)
    job.add_argument("store", type=Path)
    job.set_defaults(run=disks)
    job = jobs.add_parser("gather")
    _add_build(job)
    job.set_defaults(run=gather)
    job = jobs.add_parser("ranks")
    job.add_argument("store", type=Path)
    job.add_argument("--ranks", type=int, default=8)
    job.add_argument("--threads", type=int, default=2)
    job.add_argument("--output", choices=("csr", "dense", "genes"), default="csr")
    job.set_defaults(run=ranks)
    job = jobs.add_parser("python")
    job.add_argument("store", type=Path)
    job.add_argument("--threads", type=int, default=2)
    job.set_defaults(run=python)
    job = jobs.add_parser("order")
    job.add_argument("name")
    job.add_argument("--rows", type=int, default=100_000_000)
    job.set_defaults(run=order)
    args = parser.parse_args()
    args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
