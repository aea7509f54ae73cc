"""The kernel that makes dense rows, on rows as an atlas has them: its time beside that of zeroing as many bytes."""

from __future__ import annotations

import json

import numpy as np
import torch

from annbatch_dask.kernels import gpu

N_ROWS, N_COLUMNS, N_ENTRIES = 4096, 37_900, 2150


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


def main():
    """Print what each takes."""
    slab, value_at, column_at, lengths, rows, dest = rows_of_an_atlas()
    n_outside = torch.zeros(8, dtype=torch.int64, device="cuda")
    stream = torch.cuda.current_stream()
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    chosen = np.full(N_COLUMNS, -1, np.int32)
    chosen[np.random.default_rng(1).choice(N_COLUMNS, 2000, replace=False)] = np.arange(2000)
    places = torch.from_numpy(chosen).cuda()
    for dtype, width, target_sum in (
        ("float32", N_COLUMNS, 0.0), ("bfloat16", N_COLUMNS, 0.0), ("float16", N_COLUMNS, 0.0),
        ("float32", N_COLUMNS, 1e4), ("bfloat16", N_COLUMNS, 1e4), ("float32", 2000, 0.0), ("float32", 2000, 1e4),
    ):  # fmt: skip
        out = torch.empty((N_ROWS, width), dtype=names[dtype], device="cuda")
        floor = timed(out.zero_)
        delivered = None if dtype == "bfloat16" else dtype
        name = gpu.kernel_name("densify", ["uint16", "uint16"], "float32", delivered)
        for compiler in ("cupy", "torch"):
            kernel = gpu.compiled(name, compiler, 0)
            for kib in (16, 24, 40) if compiler == "cupy" and width > 2000 else (40,):
                n_tiles = -(-width * 4 // (kib * 1024))
                tile = (width + 32 * n_tiles - 1) // (32 * n_tiles) * 32
                batch = iter(range(10**6))

                def work(
                    kernel=kernel, n_tiles=n_tiles, tile=tile, batch=batch, out=out, width=width, target=target_sum
                ):
                    first = next(batch) % 4 * N_ROWS
                    where = [slab, value_at, column_at, lengths, rows, dest, first, places, int(width == 2000)]
                    kernel(
                        (N_ROWS, n_tiles), tile * 4, [*where, N_COLUMNS, width, tile, target, out, n_outside, 0], stream
                    )

                took = timed(work)
                what = (
                    f"densify to {dtype}, {width} wide{', log1p' * bool(target_sum)}, by {compiler}, tiles of {kib} KiB"
                )
                say(
                    what=what, ms=round(took, 3), zeroing_ms=round(floor, 3), million_cells_per_s=round(4.096 / took, 1)
                )


if __name__ == "__main__":
    main()
