"""Entries of a batch come as numpy copies them, past a processor's cache or not, whatever the threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from annbatch_dask.kernels import assemble
from annbatch_dask.kernels.entries import Entries, entry_copier


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("least", [0, 1 << 40], ids=["past", "through"])
@pytest.mark.parametrize(
    ("stored", "delivered", "columns_in", "columns_out"),
    [
        ("uint16", "float32", "uint16", "int32"),
        ("float32", "float32", "int32", "int32"),
        ("uint8", "uint8", "uint16", "int64"),
        ("int64", "float64", "int64", "int32"),
        ("uint8", "float32", "uint32", "int64"),
    ],
)
def test_entries_are_copied_as_numpy_does(monkeypatch, stored, delivered, columns_in, columns_out, least, n_threads):
    monkeypatch.setattr(assemble, "_MIN_STREAM_NBYTES", least)
    rng = np.random.default_rng(0)
    values = rng.integers(0, 200, 5000).astype(stored)
    columns = rng.integers(0, 200, 5000).astype(columns_in)
    lengths = rng.integers(0, 90, 60)
    starts = rng.integers(0, 4900, 60)
    pointers = np.concatenate([[0], np.cumsum(lengths)])
    addresses = [source.ctypes.data + starts * source.itemsize for source in (values, columns)]
    rows = Entries(*addresses, pointers, pointers.astype(np.int32))
    dest = np.zeros(pointers[-1] + 3, delivered)[3:], np.zeros(pointers[-1], columns_out)
    copier = entry_copier(rows, (values, columns), dest, 7)
    with ThreadPoolExecutor(n_threads) as threads:
        for job in [threads.submit(copier) for _ in range(n_threads)]:
            job.result()
    taken = np.concatenate([np.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)])
    np.testing.assert_array_equal(dest[0], values[taken].astype(delivered))
    np.testing.assert_array_equal(dest[1], columns[taken].astype(columns_out))
