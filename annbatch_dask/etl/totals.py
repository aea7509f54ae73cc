"""Sums of the scatter receipts per dataset, updated as each arrives: blocks times datasets are too many to keep."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.etl.receipts import ScatterReceipt

__all__ = ["Totals", "decode", "encode", "packed"]

_FINGERPRINT = "fingerprint"


def packed(fingerprint: NDArray[np.uint64], nnz: Mapping[str, NDArray[np.int64]]) -> dict[str, Any]:
    """The part of a receipt that says something of each dataset, and what it says of all.

    Parameters
    ----------
    fingerprint
        (n_datasets,) of the block's rows in each.
    nnz
        Stored values of each sparse matrix in each dataset: (n_datasets,).
    """
    return {
        "datasets": {_FINGERPRINT: encode(fingerprint)} | {f"nnz/{name}": encode(n) for name, n in nnz.items()},
        "nnz": {name: int(n.sum()) for name, n in nnz.items()},
        _FINGERPRINT: f"{int(fingerprint.sum()):016x}",
    }


def encode(values: NDArray) -> str:
    """An array as text, for a receipt."""
    if values.dtype == np.int64 and values.max(initial=0) < 2**32:
        values = values.astype(np.uint32)
    return f"{values.dtype.str} {base64.b64encode(values).decode()}"


def decode(text: str) -> NDArray:
    """The array again."""
    dtype, _, values = text.partition(" ")
    return np.frombuffer(base64.b64decode(values), dtype)


class Totals:
    """Sums over all blocks, of each dataset.

    Attributes
    ----------
    fingerprint
        (n_datasets,) uint64, modulo 2**64.
    nnz
        Stored values of each sparse matrix: (n_datasets,) int64.
    """

    def __init__(self, n_datasets: int) -> None:
        self.fingerprint = np.zeros(n_datasets, np.uint64)
        self.nnz: dict[str, NDArray[np.int64]] = {}

    def take(self, receipt: ScatterReceipt) -> None:
        """Add what a receipt says of each dataset, and let go of it there."""
        found = {name: decode(text) for name, text in receipt.datasets.items()}
        receipt.datasets.clear()
        self.fingerprint += found.pop(_FINGERPRINT)
        for name, values in found.items():
            matrix = name.removeprefix("nnz/")
            self.nnz[matrix] = self.nnz.get(matrix, 0) + values.astype(np.int64)
