"""The kernel that makes dense rows, on rows as an atlas has them: its time beside that of zeroing as many bytes."""

from __future__ import annotations

import json
import sys
from functools import partial

import numpy as np
import torch

from annbatch_dask.kernels import gpu

N_ROWS, N_COLUMNS, N_ENTRIES, N_CHOSEN = 4096, 37_900, 2150, 2000


def say(**facts):
    print(json.dumps(facts), flush=True)


def timed(work, n=30):
    """Median milliseconds."""
    for _ in range(3):
        work()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize()
    return float(np.median([a.elapsed_time(b) for a, b in zip(marks[:-1], marks[1:], strict=True)]))


def rows_of_an_atlas():
    """A slab of uint16 values and columns of a window of four batches, and its tables; on the device."""
    rng = np.random.default_rng(0)
    n = 4 * N_ROWS
    lengths = rng.poisson(N_ENTRIES, n).astype(np.int32)
    columns = np.concatenate([np.sort(rng.choice(N_COLUMNS, k, replace=False)) for k in lengths[:256]])
    starts = np.concatenate([[0], np.cumsum(lengths[:256])[:-1]])
    n_flat = len(columns)
    slab = np.concatenate([rng.poisson(3, n_flat).astype(np.uint16), columns.astype(np.uint16)]).view(np.uint8)
    slab = np.tile(slab, 64)  # 16,384 rows that lie apart
    at = (np.arange(64)[:, None] * (n_flat * 4) + starts * 2).reshape(-1).astype(np.int64)
    lengths = np.tile(lengths[:256], 64)
    rows, dest = rng.permutation(n).astype(np.int32), np.tile(np.arange(N_ROWS, dtype=np.int32), 4)
    return [torch.from_numpy(a).cuda() for a in (slab, at, at + n_flat * 2, lengths, rows, dest)]


def launch_with(name, n_threads):
    """The kernel in blocks of another size."""
    import cupy

    source = gpu.SOURCE.replace(f"partial[{gpu.N_THREADS}]", f"partial[{n_threads}]")
    source = source.replace(f"int half = {gpu.N_THREADS} / 2", f"int half = {n_threads} / 2")
    kernel = cupy.RawModule(code=source, options=("-std=c++17",), name_expressions=[name]).get_function(name)

    def launch(grid, shared, arguments, stream):
        with cupy.cuda.ExternalStream(stream.cuda_stream):
            kernel(grid, (n_threads,), tuple(map(gpu._raw_argument, arguments)), shared_mem=shared)

    return launch


class Densify:
    """Batches of one kind, one after the other, of rows that lie on the device."""

    def __init__(self, dtype, width, target_sum):
        self.tables = rows_of_an_atlas()
        self.width, self.target_sum = width, target_sum
        self.out = torch.empty((N_ROWS, width), dtype=getattr(torch, dtype), device="cuda")
        self.n_outside = torch.zeros(8, dtype=torch.int64, device="cuda")
        chosen = np.full(N_COLUMNS, -1, np.int32)
        chosen[np.random.default_rng(1).choice(N_COLUMNS, N_CHOSEN, replace=False)] = np.arange(N_CHOSEN)
        self.places = torch.from_numpy(chosen).cuda()
        delivered = None if dtype == "bfloat16" else dtype
        self.name = gpu.kernel_name("densify", ["uint16", "uint16"], "float32", delivered)
        self.n_made = 0

    def make(self, kernel, tile_nbytes):
        """Queue one batch."""
        n_tiles = -(-self.width * 4 // tile_nbytes)
        tile = (self.width + 32 * n_tiles - 1) // (32 * n_tiles) * 32
        first, self.n_made = self.n_made % 4 * N_ROWS, self.n_made + 1
        arguments = [*self.tables, first, self.places, int(self.width == N_CHOSEN), N_COLUMNS, self.width, tile]
        arguments += [self.target_sum, self.out, self.n_outside, 0]
        kernel((N_ROWS, n_tiles), tile * 4, arguments, torch.cuda.current_stream())


def main(*, only_first):
    """Print what each takes."""
    for dtype, width, target_sum in (
        ("float32", N_COLUMNS, 0.0),
        ("bfloat16", N_COLUMNS, 0.0),
        ("float16", N_COLUMNS, 0.0),
        ("float32", N_COLUMNS, 1e4),
        ("float32", N_CHOSEN, 0.0),
        ("float32", N_CHOSEN, 1e4),
    ):
        work = Densify(dtype, width, target_sum)
        kernels = {"cupy": gpu.compiled(work.name, "cupy", 0)}
        if only_first:
            for _ in range(30):
                work.make(kernels["cupy"], 40 * 1024)
            torch.cuda.synchronize()
            return
        if (dtype, width, target_sum) == ("float32", N_COLUMNS, 0.0):
            kernels |= {"torch": gpu.compiled(work.name, "torch", 0)}
            kernels |= {f"{n} threads": launch_with(work.name, n) for n in (128, 512, 1024)}
        floor = timed(work.out.zero_)
        for kind, kernel in kernels.items():
            for kib in (20, 40) if width == N_COLUMNS else (40,):
                took = timed(partial(work.make, kernel, kib * 1024))
                what = f"{dtype}, {width} wide{', log1p' * bool(target_sum)}; {kind}, tiles of {kib} KiB"
                say(densify=what, ms=round(took, 3), zeroing_ms=round(floor, 3), Mcells_per_s=round(4.096 / took, 1))


if __name__ == "__main__":
    main(only_first="--first" in sys.argv)
