"""The CUDA kernel's source, compiled as C++ and run by one thread: the result of its twin on the CPU.

This checks its arithmetic where no GPU is; tests/gpu runs the kernel itself.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess

import numpy as np
import pytest
import scipy.sparse as sp

from annbatch_dask.kernels.assemble import SparseRows, normalize_rows, scatter_rows
from annbatch_dask.kernels.gpu import SOURCE

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")

CUDA = r"""
#include <cmath>
#define __global__
#define __device__
#define __shared__ static
struct Place { unsigned x; };
static Place blockIdx{0}, threadIdx{0}, blockDim{1};
template <typename Sum> void atomicAdd(Sum* sum, Sum value) { *sum += value; }
void __syncthreads() {}
"""
RUN = r"""
extern "C" void run_NUMBER(long long n_rows, const VALUE* values, const COLUMN* columns, const long long* indptr,
                           const int* places, long long n_columns, double target_sum, SUM* out, long long width,
                           unsigned long long* n_outside)
{
    for (blockIdx.x = 0; blockIdx.x < n_rows; blockIdx.x++)
        densify<VALUE, COLUMN, SUM>(values, columns, indptr, places, n_columns, target_sum, out, width, n_outside);
}
"""
# Dtypes of values, columns and sums; and the C types of all three.
TYPES = [
    ("uint16", "uint16", "float32", "unsigned short", "unsigned short", "float"),
    ("float32", "int32", "float64", "float", "int", "double"),
    ("int8", "uint16", "int64", "signed char", "unsigned short", "unsigned long long"),
    ("float32", "int64", "int32", "float", "long long", "int"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernel")
    runs = []
    for number, types in enumerate(TYPES):
        run = RUN.replace("NUMBER", str(number))
        for word, name in zip(("VALUE", "COLUMN", "SUM"), types[3:], strict=True):
            run = run.replace(word, name)
        runs.append(run)
    (folder / "kernel.cpp").write_text(CUDA + SOURCE + "".join(runs))
    command = ["g++", "-std=c++17", "-shared", "-fPIC", "-w", "-o", "kernel.so", "kernel.cpp"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "kernel.so"))


def run(library, number, sparse, n_columns, width, *, places=None, target_sum=0.0):
    values, columns, indptr = sparse
    out, n_outside = np.full((len(indptr) - 1, width), 77, TYPES[number][2]), np.zeros(1, np.uint64)
    values, columns, indptr, out_at, n_at = (ctypes.c_void_p(a.ctypes.data) for a in (*sparse, out, n_outside))
    chosen = ctypes.c_void_p(None if places is None else places.ctypes.data)
    numbers = ctypes.c_longlong(n_columns), ctypes.c_double(target_sum)
    n_rows = ctypes.c_longlong(len(out))
    library[f"run_{number}"](n_rows, values, columns, indptr, chosen, *numbers, out_at, ctypes.c_longlong(width), n_at)
    return out, int(n_outside[0])


@pytest.mark.parametrize("number", range(len(TYPES)))
@pytest.mark.parametrize("is_chosen", [False, True])
@pytest.mark.parametrize("target_sum", [None, 1e4])
def test_the_kernel_makes_what_its_twin_makes(library, number, is_chosen, target_sum):
    value, column, total, *_ = TYPES[number]
    if target_sum is not None and total.startswith("int"):
        pytest.skip("normalised values are floats")
    rng = np.random.default_rng(number)
    x = rng.integers(-100 if value != "uint16" else 0, 100, (17, 29)) * (rng.random((17, 29)) < 0.4)
    x[3] = 0
    csr = sp.csr_matrix(np.abs(x) if target_sum else x)
    sparse = csr.data.astype(value), csr.indices.astype(column), csr.indptr.astype(np.int64)
    places = None
    if is_chosen:
        places = np.full(29, -1, np.int32)
        places[[7, 0, 28, 11]] = range(4)
    width = 29 if places is None else 4
    found, n_outside = run(library, number, sparse, 29, width, places=places, target_sum=target_sum or 0)

    values, columns, indptr = sparse
    starts, lengths = indptr[:-1], np.diff(indptr)
    if target_sum is not None:
        values = np.empty(len(values), total)
        normalize_rows(sparse[0], starts, lengths, values, starts, target_sum=target_sum)
    expected = np.empty((17, width), total)
    scatter_rows(SparseRows(values, columns), starts, lengths, expected, np.arange(17), places)
    np.testing.assert_allclose(found, expected, rtol=0 if target_sum is None else 1e-6)
    assert n_outside == 0


def test_the_kernel_adds_up_and_counts_what_lies_outside(library):
    sparse = np.array([1, 2, 4, 8], np.float32), np.array([1, 1, -1, 3], np.int32), np.array([0, 2, 2, 4])
    found, n_outside = run(library, 1, sparse, 3, 3)
    assert found.tolist() == [[0, 3, 0], [0, 0, 0], [0, 0, 0]]
    assert n_outside == 2
