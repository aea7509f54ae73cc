"""Dtypes of stored and asked-for values, and datasets of them, for batches that are made on a device."""

from __future__ import annotations

import scipy.sparse as sp

from tests.loader.data import matrix

STORED = [("uint8", "uint16", "uint8"), ("float32", "uint16", "int32"), ("float64",) * 3]
ASKED = [None, "float32", "float16", "bfloat16", "stored"]


def datasets(kind, dtypes):
    """About a hundred rows in several datasets, some of them empty."""
    parts = []
    for k, dtype in enumerate(dtypes):
        x = matrix(31 + k, first=40 * k, seed=k)
        x[4] = 0
        parts.append((x / 7 if dtype.startswith("float") else x).astype(dtype))
    return [sp.csr_matrix(x) if kind == "csr" else x for x in parts]
