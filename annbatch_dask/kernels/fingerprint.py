"""A hash of each row's content, the same whatever the order of rows, the dtype of values or the file format.

A row's hash is a sum over its elements, so it does not depend on the order in which they are met; a
collection's fingerprint is the sum of its rows' hashes modulo 2**64. Not cryptographic: it detects loss,
repetition and corruption, not forgery. Whole numbers below 2**32 enter as themselves, other values as float64, and
integers that no float64 equals by bits of their own.
"""

import zlib

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.kernels.compiled import compiled
from annbatch_dask.kernels.rows import slabs
from annbatch_dask.kernels.splitmix import finalise

__all__ = ["add_dense", "add_sparse", "add_strings", "field_salt", "finish_rows"]

_SLAB = 2**15  # entries turned to float64 at a time: stays in the second-level cache


def field_salt(name: str) -> np.uint64:
    """A number that tells one element's values from another's."""
    return np.uint64((zlib.crc32(name.encode()) * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)


@compiled
def _add_counts(hashes, offsets, keys, values, salt):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Unsigned values: what :func:`_add_floats` adds for them, as whole numbers below 2**32 stand for themselves."""
    for row in range(offsets.shape[0] - 1):
        # views first, so that the loop is compiled to vector instructions
        row_keys, row_values = keys[offsets[row] : offsets[row + 1]], values[offsets[row] : offsets[row + 1]]
        total = np.uint64(0)
        for k in range(row_keys.shape[0]):
            z = (np.uint64(row_keys[k]) << np.uint64(32)) + np.uint64(row_values[k])
            z = (z + salt) * np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
            total += z ^ (z >> np.uint64(29))
        hashes[row] += total


@compiled
def _add_floats(hashes, offsets, keys, values, bits, salt):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    for row in range(offsets.shape[0] - 1):
        total = np.uint64(0)
        for k in range(offsets[row], offsets[row + 1]):
            v = values[k]
            if 0 <= v < 2.0**32 and v == np.floor(v) and bits[k] != np.uint64(0x8000000000000000):
                b = np.uint64(v)
            elif v == v:  # noqa: PLR0124
                b = finalise(bits[k])
            else:
                b = np.uint64(0x7FF8000000000000)  # one NaN for all: a cast may change its payload
            z = (np.uint64(keys[k]) << np.uint64(32)) + b
            z = (z + salt) * np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
            total += z ^ (z >> np.uint64(29))
        hashes[row] += total


def add_sparse(
    hashes: NDArray[np.uint64], offsets: NDArray[np.int64], indices: NDArray, values: NDArray, salt: np.uint64
) -> None:
    """Add the stored values of a CSR matrix to the rows' hashes.

    hashes : (n,) uint64, changed in place. bounds : (n + 1,) int64 from 0. indices, values : (nnz,).
    """
    if values.dtype in (np.uint8, np.uint16) and indices.dtype == np.uint16:
        _add_counts(hashes, offsets, indices, values, salt)
        return
    for a, b in slabs(offsets, _SLAB):
        part = slice(offsets[a], offsets[b])
        wide = values[part].astype(np.float64)
        keys = indices[part].astype(np.uint32)
        bits = _own_bits(values[part], wide.view(np.uint64))
        _add_floats(hashes[a:b], offsets[a : b + 1] - offsets[a], keys, wide, bits, salt)


_NO_FLOAT = np.uint64(0xA5A5_5A5A_C3C3_3C3C)


def _own_bits(values: NDArray, bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The bits of values as float64, but for integers that float64 rounds: 2**60 + 1 is not 2**60."""
    if values.dtype.kind not in "iu" or values.dtype.itemsize < 8 or not values.size:  # noqa: PLR2004
        return bits
    if -(2**53) <= int(values.min()) and int(values.max()) <= 2**53:
        return bits
    size = np.where(values < 0, -values.astype(np.uint64), values.astype(np.uint64))  # also of -2**63
    lowest = size & -size
    rounded = size // np.maximum(lowest, np.uint64(1)) >= np.uint64(2**53)
    return np.where(rounded, values.astype(np.uint64) ^ _NO_FLOAT, bits)


@compiled
def _add_grid(hashes, bits, salt):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    for i in range(bits.shape[0]):
        total = np.uint64(0)
        for k in range(bits.shape[1]):
            if bits[i, k] == np.uint64(0x7FF8000000000000):
                continue
            total += finalise((bits[i, k] ^ (np.uint64(k + 1) * np.uint64(0x9E3779B97F4A7C15))) + salt)
        hashes[i] += total


def add_dense(hashes: NDArray[np.uint64], values: NDArray, salt: np.uint64) -> None:
    """Add a dense (n, k) matrix to the rows' hashes. NaN adds nothing: an outer join fills absent genes with it."""
    step = max(1, _SLAB // max(1, values.shape[1]))
    for a in range(0, len(values), step):
        bits = values[a : a + step].astype(np.float64)
        bits[np.isnan(bits)] = np.nan  # one NaN for all: a cast may change its payload
        _add_grid(hashes[a : a + step], _own_bits(values[a : a + step], bits.view(np.uint64)), salt)


@compiled
def add_strings(hashes, offsets, data, salt):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Add UTF-8 strings to the rows' hashes: FNV-1a (Fowler, Noll, Vo) of the bytes, mixed.

    hashes : (n,) uint64, changed in place. bounds : (n + 1,) int64. data : uint8.
    """
    for i in range(hashes.shape[0]):
        h = np.uint64(0xCBF29CE484222325)
        for k in range(offsets[i], offsets[i + 1]):
            h = (h ^ np.uint64(data[k])) * np.uint64(0x100000001B3)
        hashes[i] += finalise(h + salt)


@compiled
def finish_rows(hashes):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Mix each row's sum once more, so that values cannot trade places between rows unseen; returns the total."""
    total = np.uint64(0)
    for i in range(hashes.shape[0]):
        total += finalise(hashes[i])
    return total
