from __future__ import annotations

import gc

import numpy as np
import pytest
import scipy.sparse as sp

from annbatch_dask.loader.pool import BufferPool

N = 1_000_000


def address(array):
    return array.__array_interface__["data"][0]


def test_memory_is_used_again():
    pool = BufferPool()
    first = pool.empty(N, "float32")
    where = address(first)
    del first
    assert address(pool.empty((1000, 990), "float32")) == where


def test_slightly_larger_requests_fit_too():
    pool = BufferPool()
    first = pool.empty(N, "uint8")
    where = address(first)
    del first
    assert address(pool.empty(int(N * 1.03), "uint8")) == where


@pytest.mark.parametrize(
    "keep",
    [
        lambda a: a,
        lambda a: a[10:20],
        lambda a: a.reshape(1000, -1)[5, :3],
        lambda a: a.view("uint8")[::7],
        memoryview,
        lambda a: sp.csr_matrix((a, np.zeros(N, np.int32), [0, N]), shape=(1, 1)),
    ],
    ids=["array", "slice", "row", "view", "memoryview", "csr"],
)
def test_memory_in_use_is_never_used_again(keep):
    pool = BufferPool()
    array = pool.empty(N, "float32")
    array[:] = 1
    where = address(array)
    kept = keep(array)
    del array
    other = pool.empty(N, "float32")
    assert address(other) != where
    del kept
    gc.collect()
    assert address(pool.empty(N, "float32")) == where


def test_torch_tensors_keep_memory():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pool = BufferPool()
    array = pool.empty(N, "float32")
    where = address(array)
    tensor = torch.from_numpy(array)[3:5]
    del array
    other = pool.empty(N, "float32")
    assert address(other) != where
    del tensor
    assert address(pool.empty(N, "float32")) == where


def test_aligned_and_contiguous():
    array = BufferPool().empty((1000, 77), "float64")
    assert address(array) % 64 == 0
    assert array.flags.c_contiguous
    assert array.flags.writeable


def test_useless_memory_is_let_go():
    pool = BufferPool()
    del (array := [pool.empty(10 * N, "uint8")])[0]
    assert pool.idle_nbytes >= 10 * N
    for _ in range(40):
        array = pool.empty(N, "uint8")
    del array
    assert pool.idle_nbytes < 5 * N


def test_close_frees_everything():
    pool = BufferPool()
    held = pool.empty(N, "uint8")
    pool.empty(N, "uint8")
    pool.close()
    assert pool.idle_nbytes == 0
    held[:] = 3
    del held
    assert pool.idle_nbytes == 0
