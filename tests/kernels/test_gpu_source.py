"""The CUDA kernels' source, compiled as C++ and run by threads as on a GPU: the results of their twins on the CPU.

This checks arithmetic and index maps where no GPU is; tests/gpu runs the kernels themselves.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess

import numpy as np
import pytest
import scipy.sparse as sp

from annbatch_dask.kernels.assemble import SparseRows, half_bits, normalize_rows, scatter_rows, take_columns
from annbatch_dask.kernels.gpu import N_THREADS, SOURCE, kernel_name, tiles

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")

CUDA = r"""
#include <atomic>
#include <barrier>
#include <cmath>
#include <thread>
#include <vector>
#define __global__
#define __device__
#define __shared__ static
struct Place { unsigned x, y; };
static Place blockIdx, blockDim;
static thread_local Place threadIdx;
static std::barrier<>* barrier;
double shared[5 * 1024];
template <typename Sum> void atomicAdd(Sum* sum, Sum value) { std::atomic_ref<Sum>(*sum).fetch_add(value); }
void __syncthreads() { barrier->arrive_and_wait(); }
"""
LAUNCH = r"""
template <typename Block> void launch(int n_threads, int n_rows, int n_tiles, Block block)
{
    std::barrier<> all(n_threads);
    barrier = &all;
    blockDim = {(unsigned)n_threads, 1};
    std::vector<std::thread> threads;
    for (int t = 0; t < n_threads; t++) threads.emplace_back([=, &all] {
        threadIdx = {(unsigned)t, 0};
        for (int b = 0; b < n_rows * n_tiles; b++) {
            if (t == 0) blockIdx = {(unsigned)(b / n_tiles), (unsigned)(b % n_tiles)};
            all.arrive_and_wait();
            block();
            all.arrive_and_wait();
        }
    });
    for (auto& thread : threads) thread.join();
}
typedef const unsigned char* Slab; typedef const long long* At; typedef const int* Ints;
"""
RUN = {
    "densify": r"""
extern "C" void run_NUMBER(int n_threads, int n_rows, int n_tiles, Slab slab, At value_at, At column_at, Ints lengths,
                           Ints rows, Ints dest, int first, Ints places, int is_chosen, int n_columns, int width,
                           int tile, double target_sum, void* out, unsigned long long* n_outside, int batch)
{
    launch(n_threads, n_rows, n_tiles, [=] {
        KERNEL(slab, value_at, column_at, lengths, rows, dest, first, places, is_chosen, n_columns, width, tile,
               target_sum, (OUT*)out, n_outside, batch);
    });
}
""",
    "pick": r"""
extern "C" void run_NUMBER(int n_threads, int n_rows, int n_tiles, Slab slab, At value_at, Ints rows, Ints dest,
                           int first, Ints columns, int is_chosen, int n_columns, int width, int tile,
                           double target_sum, void* out)
{
    launch(n_threads, n_rows, n_tiles, [=] {
        KERNEL(slab, value_at, rows, dest, first, columns, is_chosen, n_columns, width, tile, target_sum, (OUT*)out);
    });
}
""",
    "gather": r"""
extern "C" void run_NUMBER(int n_threads, int n_rows, int n_tiles, Slab slab, At value_at, At column_at, Ints lengths,
                           Ints rows, Ints dest, int first, At starts, double target_sum, void* out, int* out_columns)
{
    launch(n_threads, n_rows, n_tiles, [=] {
        KERNEL(slab, value_at, column_at, lengths, rows, dest, first, starts, target_sum, (OUT*)out, out_columns);
    });
}
""",
}
# Values, columns, sums, and what is delivered; the last word may be bfloat16.
SPARSE = [
    ("uint16", "uint16", "float32", "float32"),
    ("uint16", "uint16", "float32", "bfloat16"),
    ("float32", "int32", "float32", "float16"),
    ("float32", "int32", "float64", "float64"),
    ("float16", "uint16", "float32", "float32"),
    ("int8", "uint16", "int32", "int8"),
    ("uint64", "int64", "int64", "uint64"),
    ("bool", "int64", "int32", "bool"),
]
DENSE = [(value, total, out) for value, _, total, out in SPARSE]
KERNELS = [(kernel, t) for kernel, types in (("densify", SPARSE), ("pick", DENSE), ("gather", SPARSE)) for t in types]


def name_of(kernel, types):
    *stored, total, out = types
    return kernel_name(
        kernel, stored, total, None if out == "bfloat16" else out, "int32" if kernel == "gather" else None
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernel")
    runs = []
    for number, (kernel, types) in enumerate(KERNELS):
        name = name_of(kernel, types)
        out = name[:-1].split(", ")[-2 if kernel == "gather" else -1]
        runs.append(RUN[kernel].replace("NUMBER", str(number)).replace("KERNEL", name).replace("OUT", out))
    (folder / "kernel.cpp").write_text(
        CUDA + SOURCE.replace("extern __shared__ double shared[];", "") + LAUNCH + "".join(runs)
    )
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-w", "-o", "kernel.so", "kernel.cpp"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "kernel.so"))


def call(library, number, n_threads, n_rows, n_tiles, *arguments):
    """Arrays as pointers, ints and floats as they are."""
    kept = [np.ascontiguousarray(a) if isinstance(a, np.ndarray) else a for a in arguments]
    passed = [ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else a for a in kept]
    passed = [
        ctypes.c_double(a) if isinstance(a, float) else ctypes.c_int(a) if isinstance(a, int) else a for a in passed
    ]
    library[f"run_{number}"](ctypes.c_int(n_threads), ctypes.c_int(n_rows), ctypes.c_int(n_tiles), *passed)


def stored(rng, shape, value):
    """Small numbers of a dtype, some of them 0."""
    x = rng.integers(0 if value[0] in "ub" else -100, 100, shape) * (rng.random(shape) < 0.4)
    return (x / 8 if value.startswith("float") else x).astype(value)


def half_as_stored(rows, out):
    """Rows as they are delivered: half precision as its bits."""
    if out in ("float16", "bfloat16"):
        return half_bits(rows, bfloat16=out == "bfloat16")
    return rows.astype(out)


def bits_of(out, shape):
    return np.full(shape, 77, "uint16" if out in ("float16", "bfloat16") else out)


def equal(found, expected, out, *, is_computed):
    if not is_computed:
        np.testing.assert_array_equal(found, expected)
        return
    if out == "float16":
        found, expected = found.view(np.float16), expected.view(np.float16)
    if out == "bfloat16":
        found, expected = ((bits.astype(np.uint32) << 16).view(np.float32) for bits in (found, expected))
    rtol = {"float16": 1e-3, "bfloat16": 1e-2, "float32": 1e-6, "float64": 1e-12}[out]
    np.testing.assert_allclose(found.astype(float), expected.astype(float), rtol=rtol)


SHAPES = [(7, 29, 32), (3, 100, 32), (5, 1, 32), (4, 64, 32)]
"""Rows, columns, and the columns of a tile."""


@pytest.mark.parametrize("number", range(len(SPARSE)))
@pytest.mark.parametrize("is_chosen", [False, True])
@pytest.mark.parametrize("target_sum", [None, 1e4])
def test_densify_makes_what_its_twin_makes(library, number, is_chosen, target_sum):
    value, column, total, out = SPARSE[number]
    if target_sum is not None and total.startswith("int"):
        pytest.skip("normalised values are floats")
    rng = np.random.default_rng(number)
    for (n_rows, n_columns, tile), n_threads in zip(SHAPES, (8, 3, 1, 32), strict=True):
        x = stored(rng, (n_rows, n_columns), value)
        x = np.abs(x) if target_sum else x
        x[n_rows // 2] = 0
        csr = sp.csr_matrix(x.astype(np.float64))
        # Rows lie one behind the other, but begin anywhere, in an order of their own; other rows' bytes between them.
        order = rng.permutation(n_rows)
        slab, value_at, column_at = np.zeros(n_rows * n_columns * 32 + 4096, np.uint8), np.zeros(n_rows, np.int64), None
        column_at, at = np.zeros(n_rows, np.int64), 64
        lengths = np.diff(csr.indptr)
        for row in order:
            part = slice(csr.indptr[row], csr.indptr[row + 1])
            for places, flat in (
                (value_at, csr.data[part].astype(value)),
                (column_at, csr.indices[part].astype(column)),
            ):
                at += -at % flat.itemsize
                places[row] = at
                slab[at : at + flat.nbytes] = flat.view(np.uint8)
                at += flat.nbytes + 3
        rows, dest = rng.permutation(n_rows), rng.permutation(n_rows)
        chosen = rng.permutation(n_columns)[: max(1, n_columns // 3)]
        places = np.full(n_columns, -1, np.int32)
        places[chosen] = np.arange(len(chosen))
        width = len(chosen) if is_chosen else n_columns
        # The batch is the second one: what comes before it in the tables is another's.
        table = [np.concatenate([[0, 0], a]).astype(np.int32) for a in (rows, dest)]
        found, counted = bits_of(out, (n_rows, width)), np.zeros(3, np.uint64)
        n_tiles = max(1, -(-width // tile))
        where = slab, value_at, column_at, lengths.astype(np.int32), *table, 2
        sizes = int(is_chosen), n_columns, width, tile, float(target_sum or 0)
        call(library, number, n_threads, n_rows, n_tiles, *where, places, *sizes, found, counted, 1)

        starts, sparse = csr.indptr[:-1].astype(np.int64), csr.data.astype(value)
        if value == "float16":
            sparse = sparse.astype(np.float32)
        if target_sum is not None:
            normalized = np.empty(len(sparse), np.float64)
            normalize_rows(sparse, starts, lengths.astype(np.int64), normalized, starts, target_sum=target_sum)
            sparse = normalized
        made = np.empty((n_rows, width), total)
        at = SparseRows(sparse, csr.indices.astype(column))
        scatter_rows(at, starts[rows], lengths[rows].astype(np.int64), made, dest, places if is_chosen else None)
        equal(found, half_as_stored(made, out), out, is_computed=target_sum is not None)
        assert counted.tolist() == [0, 0, 0]
        if is_chosen:
            continue

        n_each = np.zeros(n_rows, np.int64)
        n_each[dest] = lengths[rows]
        ends = np.cumsum(n_each)
        kept, kept_columns = bits_of(out, csr.nnz), np.full(csr.nnz, -1, np.int32)
        starts_of = np.concatenate([[0], ends])
        gathered = len(SPARSE) + len(DENSE) + number
        call(library, gathered, n_threads, n_rows, 1, *where, starts_of, float(target_sum or 0), kept, kept_columns)
        order = np.empty(n_rows, np.int64)
        order[dest] = rows
        expected = sp.csr_matrix((sparse, csr.indices, csr.indptr), csr.shape)[order]
        np.testing.assert_array_equal(kept_columns, expected.indices)
        equal(kept, half_as_stored(expected.data.astype(total), out), out, is_computed=target_sum is not None)


@pytest.mark.parametrize("number", range(len(DENSE)))
@pytest.mark.parametrize("is_chosen", [False, True])
@pytest.mark.parametrize("target_sum", [None, 1e4])
def test_pick_makes_what_its_twin_makes(library, number, is_chosen, target_sum):
    value, total, out = DENSE[number]
    if target_sum is not None and total.startswith("int"):
        pytest.skip("normalised values are floats")
    rng = np.random.default_rng(number)
    for (n_rows, n_columns, tile), n_threads in zip(SHAPES, (8, 3, 1, 32), strict=True):
        x = stored(rng, (n_rows, n_columns), value)
        x = np.abs(x) if target_sum else x
        x[n_rows // 2] = 0
        value_at = np.arange(n_rows) * n_columns * x.itemsize
        rows, dest = rng.permutation(n_rows), rng.permutation(n_rows)
        chosen = rng.permutation(n_columns)[: max(1, n_columns // 3)] if is_chosen else np.arange(n_columns)
        found = bits_of(out, (n_rows, len(chosen)))
        table = [np.concatenate([[0], a]).astype(np.int32) for a in (rows, dest)]
        sizes = int(is_chosen), n_columns, len(chosen), tile, float(target_sum or 0)
        n_tiles = max(1, -(-len(chosen) // tile))
        columns = chosen.astype(np.int32)
        call(library, len(SPARSE) + number, n_threads, n_rows, n_tiles, x, value_at, *table, 1, columns, *sizes, found)

        made = (x.astype(np.float32) if value == "float16" else x).reshape(-1)
        starts = np.arange(n_rows) * n_columns
        if target_sum is not None:
            normalized = np.empty(made.size, np.float64)
            normalize_rows(made, starts, np.full(n_rows, n_columns), normalized, starts, target_sum=target_sum)
            made = normalized
        expected = np.empty((n_rows, len(chosen)), total)
        take_columns(made, starts[rows], chosen, expected, dest)
        equal(found, half_as_stored(expected, out), out, is_computed=target_sum is not None)


def test_densify_adds_up_and_counts_what_lies_outside(library):
    values, columns = np.array([1, 2, 4, 8], np.float32), np.array([1, 1, -1, 3], np.int32)
    slab = np.concatenate([values.view(np.uint8), columns.view(np.uint8)])
    found, counted = np.full((3, 40), 7.0), np.zeros(2, np.uint64)
    where = slab, np.array([0, 8, 8]), np.array([16, 24, 24]), *np.array([[2, 0, 2], [0, 1, 2], [0, 1, 2]], np.int32), 0
    call(library, 3, 4, 3, 2, *where, np.zeros(1, np.int32), 0, 3, 40, 32, 0.0, found, counted, 1)
    assert found[0, :3].tolist() == [0, 3, 0]
    assert not found[1:].any()
    assert not found[0, 3:].any()
    assert counted.tolist() == [0, 2], "once, though two tiles look at each entry"


def test_half_precision_is_rounded_as_numpy_does(library):
    every = np.arange(2**16, dtype=np.uint16)
    near = every.astype(np.uint32) << 16  # float32 with any sign, exponent and first digits
    floats = np.concatenate(
        [every.view(np.float16).astype(np.float32), near.view(np.float32), (near | 0x8000).view(np.float32)]
    )
    bits = floats.view(np.uint32)
    floats = np.concatenate([bits, bits + 1, bits - 1]).view(np.float32)  # and their neighbours
    rows, width = len(floats) // 256, 256
    picked = {}
    for number, (value, _, out) in enumerate(DENSE):
        if (value, out) == ("float32", "float16"):
            picked[out] = len(SPARSE) + number
    found = np.zeros((rows, width), np.uint16)
    where = floats, np.arange(rows) * width * 4, *np.tile(np.arange(rows, dtype=np.int32), (2, 1)), 0
    call(library, picked["float16"], 4, rows, 1, *where, np.zeros(1, np.int32), 0, width, width, width, 0.0, found)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = floats.astype(np.float16)
    is_nan = np.isnan(expected)
    np.testing.assert_array_equal(found.reshape(-1)[~is_nan], expected.view(np.uint16)[~is_nan])
    assert np.isnan(found.view(np.float16).reshape(-1)[is_nan]).all()


@pytest.mark.parametrize("width", [0, 1, 31, 32, 2000, 10_240, 10_241, 37_900])
@pytest.mark.parametrize("itemsize", [4, 8])
def test_tiles_cover_a_row_and_fit_in_shared_memory(width, itemsize):
    n_tiles, tile = tiles(width, itemsize)
    assert (n_tiles - 1) * tile < max(width, 1) <= n_tiles * tile
    assert tile * itemsize + 8 * N_THREADS <= 48 * 1024
