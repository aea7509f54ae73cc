"""Peak memory of a process that loads, over three epochs."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import zarr

pytestmark = pytest.mark.timeout(600)  # an interpreter and three epochs
N_OBS, N_PER_ROW, N_VAR = 40_000, 500, 2000
WINDOW_ROWS, BATCH_NBYTES, PREFETCH_NBYTES = 8192, 8_192_000, 24_000_000
# Beside prefetch_bytes: the batch in the user's hands and the one before, buffers that wait to be used again, a chunk a
# thread. Batches are the most of it, so all forms have batches of as many bytes.
CONSTANT_NBYTES = 64_000_000

SCRIPT = """
import sys
from pathlib import Path
import anndata as ad
import zarr
from annbatch_dask import Loader

def high_water():
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))

path, window, batch, prefetch, form = sys.argv[1], *map(int, sys.argv[2:5]), eval(sys.argv[5])
matrix = ad.io.sparse_dataset(zarr.open_group(path, mode="r"))
def loader(n_chunks, batch_size):
    made = Loader(batch_size=batch_size, chunk_size=512, preload_nchunks=n_chunks, shuffle=True,
                  preload_to_gpu=False, prefetch_bytes=prefetch, **form)
    return made.add_dataset(matrix)
for _ in zip(loader(1, 8), range(20)):  # imports, kernels, row pointers
    pass
before = high_water()
n_rows = sum(b["X"].shape[0] for epoch in range(3) for b in loader(window // 512, batch))
print(n_rows, high_water() - before)
"""


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    """80 MB of values and columns once they are decoded, 160 MB as float32 CSR."""
    path = tmp_path_factory.mktemp("memory") / "x.zarr"
    group = zarr.create_group(path)
    rng = np.random.default_rng(0)
    step = N_VAR // N_PER_ROW
    columns = np.arange(0, N_VAR, step) + rng.integers(0, step, (N_OBS, N_PER_ROW))
    parts = {
        "data": rng.integers(1, 9, N_OBS * N_PER_ROW).astype(np.uint16),
        "indices": columns.astype(np.uint16).reshape(-1),
        "indptr": np.arange(N_OBS + 1, dtype=np.int64) * N_PER_ROW,
    }
    for name, values in parts.items():
        group.create_array(name, data=values, chunks=(64 * N_PER_ROW,), shards=(64 * N_PER_ROW * 100,))
    group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [N_OBS, N_VAR]})
    group.attrs["source-dtype"] = "float32"
    return path


@pytest.mark.parametrize(
    ("form", "row_nbytes"),
    [
        pytest.param("{}", 8 * N_PER_ROW, id="csr"),
        pytest.param("{'dense': True}", 4 * N_VAR, id="dense"),
        pytest.param(
            "{'dense': True, 'dtype': 'float16', 'casting': 'unsafe'}", 2 * N_VAR, id="half", marks=pytest.mark.chaos
        ),
    ],
)
def test_peak_memory_is_the_read_ahead_and_a_constant(matrix, form, row_nbytes):
    numbers = [WINDOW_ROWS, BATCH_NBYTES // row_nbytes, PREFETCH_NBYTES]
    command = [sys.executable, "-c", SCRIPT, str(matrix), *map(str, numbers), form]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    n_rows, grown = map(int, done.stdout.split())
    assert n_rows == 3 * N_OBS
    assert grown < PREFETCH_NBYTES + CONSTANT_NBYTES
