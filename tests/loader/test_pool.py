from __future__ import annotations

import copy
import gc
import os
import pickle
import weakref

import numpy as np
import pytest
import scipy.sparse as sp

from annbatch_dask.loader import pool as pool_module
from annbatch_dask.loader.pool import BufferPool, SparePool, spare_pool

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


def rested(*nbytes, limit=100 * N):
    """A spare pool whose pass has ended, and where its buffers were."""
    spare = SparePool()
    pool = spare.take()
    held = [pool.empty(n, "uint8") for n in nbytes]
    where = [address(array) for array in held]
    for array in held:
        array[:] = 7
    held.clear()
    del array
    spare.keep(pool, limit)
    return spare, where


def test_memory_of_a_pass_serves_the_next():
    spare, (where,) = rested(5 * N)
    pool = spare.take()
    assert address(pool.empty(5 * N, "uint8")) == where
    assert spare.take() is not pool  # another pass at the same time has its own


def test_rested_memory_holds_what_is_written():
    spare, _ = rested(5 * N)
    array = spare.take().empty(5 * N, "uint8")
    array[:] = 9
    assert (array == 9).all()


def test_no_more_memory_rests_than_allowed():
    spare, where = rested(5 * N, 6 * N, limit=8 * N)  # the last one to come back is the largest
    pool = spare.take()
    assert 6 * N <= pool.idle_nbytes <= 8 * N
    assert address(pool.empty(6 * N, "uint8")) == where[1]


def test_what_comes_back_between_passes_is_let_go():
    spare = SparePool()
    pool = spare.take()
    held = pool.empty(N, "uint8")
    spare.keep(pool, 100 * N)
    held[:] = 3
    del held
    assert spare.take().idle_nbytes == 0


@pytest.mark.parametrize("copied", [copy.copy, lambda spare: pickle.loads(pickle.dumps(spare))])  # noqa: S301
def test_all_loaders_of_a_process_share_one(copied):
    spare = spare_pool()
    assert copied(spare) is spare is spare_pool()


def test_memory_goes_with_the_last_loader(monkeypatch):
    monkeypatch.setattr(pool_module, "_shared", [])
    spare = spare_pool()
    pool = spare.take()
    pool.empty(N, "uint8")
    spare.keep(pool, 100 * N)
    gone = weakref.ref(pool)
    del pool, spare
    assert gone() is None
    assert spare_pool().take().idle_nbytes == 0


def test_a_forked_process_takes_none_of_its_parents(monkeypatch):
    spare, _ = rested(5 * N)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert spare.take().idle_nbytes == 0


def test_a_forked_process_does_not_wait_for_a_thread_of_its_parent(monkeypatch):
    spare = SparePool()
    pool = spare.take()
    pool._lock.acquire()  # as by a thread that was taking memory when the process was forked
    monkeypatch.setattr(os, "getpid", lambda: -1)
    spare.keep(pool, 100 * N)
    assert spare.take() is not pool


def test_memory_that_the_kernel_cannot_borrow_is_let_go(monkeypatch):
    monkeypatch.setattr(pool_module, "_advise", lambda *_: False)
    spare, _ = rested(5 * N)
    assert spare.take().idle_nbytes == 0


def test_memory_that_is_not_there():
    with pytest.raises(MemoryError, match="no memory for a buffer of"):
        BufferPool().empty(1 << 60, "uint8")
