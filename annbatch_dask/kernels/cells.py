"""Sparse rows as they are compared: each gene named once, in ascending order, and no zero."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.kernels.compiled import compiled
from annbatch_dask.kernels.rows import offsets_of, sort_entries

__all__ = ["compare_rows", "is_plain", "plain_rows", "widest"]


@compiled
def is_plain(offsets, indices, values):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """True if in each row [a, b) of ``offsets`` the indices ascend, none of them is there twice, and no value is 0."""
    for row in range(offsets.shape[0] - 1):
        # views first, so that the loops are compiled to vector instructions
        row_indices, row_values = indices[offsets[row] : offsets[row + 1]], values[offsets[row] : offsets[row + 1]]
        is_odd = False
        for k in range(row_values.shape[0]):
            is_odd |= row_values[k] == 0
        for k in range(1, row_indices.shape[0]):
            is_odd |= row_indices[k - 1] >= row_indices[k]
        if is_odd:
            return False
    return True


@compiled
def compare_rows(raw, offsets, rows, others, equal):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """``equal[i]`` becomes False where the bytes of row ``rows[i]`` are not those of row ``others[i]``."""
    for i in range(rows.shape[0]):
        a, b = offsets[rows[i]], offsets[others[i]]
        n = offsets[rows[i] + 1] - a
        if n != offsets[others[i] + 1] - b:
            equal[i] = False
            continue
        one, other = raw[a : a + n], raw[b : b + n]
        differ = np.uint8(0)
        for k in range(n):
            differ |= one[k] ^ other[k]
        equal[i] &= differ == 0


def widest(dtype: np.dtype) -> np.dtype:
    """The dtype of 8 bytes in which values of a dtype are added up."""
    return np.dtype({"f": np.float64, "i": np.int64}.get(dtype.kind, np.uint64))


def plain_rows(
    offsets: NDArray[np.int64], indices: NDArray, values: NDArray
) -> tuple[NDArray[np.int64], NDArray, NDArray, bool]:
    """Rows with the same content: genes in ascending order, those named twice added up, zeros left out.

    Parameters
    ----------
    offsets, indices, values
        (n + 1,), (nnz,), (nnz,); not changed.

    Returns
    -------
    The same three, and whether any values were added up: they are of the :func:`widest` dtype then.
    """
    indices, values = indices.copy(), values.copy()
    sort_entries(offsets, indices, values)
    again = np.zeros(len(indices), bool)
    again[1:] = indices[1:] == indices[:-1]
    again[offsets[:-1][np.diff(offsets) > 0]] = False
    repeats = bool(again.any())
    if repeats:
        first = np.flatnonzero(~again)
        values = np.add.reduceat(values.astype(widest(values.dtype)), first)
        indices, offsets = indices[first], np.searchsorted(first, offsets)
    keep = values != 0
    if not keep.all():
        indices, values, offsets = indices[keep], values[keep], offsets_of(keep)[offsets]
    return offsets, indices, values, repeats
