"""A hash of each row's content, the same whatever the order of rows, the dtype of values or the file format.

A row's hash is a sum over its elements, so it does not depend on the order in which they are met; a
collection's fingerprint is the sum of its rows' hashes modulo 2**64. Not cryptographic: it detects loss,
repetition and corruption, not forgery. Whole numbers below 2**32 enter as themselves, other values as float64, and
integers that no float64 equals by bits of their own.
"""

import zlib

import numba as nb
import numpy as np
from numpy.typing import NDArray

from annbatch_dask.kernels.compiled import compiled
from annbatch_dask.kernels.rows import slabs

__all__ = ["add_dense", "add_sparse", "add_strings", "field_salt", "finish_rows"]

_SLAB = 2**15  # entries turned to float64 at a time: stays in the second-level cache


def field_salt(name: str) -> np.uint64:
    """A number that tells one element's values from another's."""
    return np.uint64((zlib.crc32(name.encode()) * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)


@nb.njit(inline="always")
def _mix(z):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@compiled
def _add_counts(hashes, bounds, keys, values, salt):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Unsigned values: what :func:`_add_floats` adds for them, as whole numbers below 2**32 stand for themselves."""
    for row in range(bounds.shape[0] - 1):
        # views first, so that the loop is compiled to vector instructions
        row_keys, row_values = keys[bounds[row] : bounds[row + 1]], values[bounds[row] : bounds[row + 1]]
        total = np.uint64(0)
        for k in range(row_keys.shape[0]):
            z = (np.uint64(row_keys[k]) << np.uint64(32)) + np.uint64(row_values[k])
            z = (z + salt) * np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
            total += z ^ (z >> np.uint64(29))
        hashes[row] += total


@compiled
def _add_floats(hashes, bounds, keys, values, bits, salt):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    for row in range(bounds.shape[0] - 1):
        total = np.uint64(0)
        for k in range(bounds[row], bounds[row + 1]):
            v = values[k]
            if 0 <= v < 2.0**32 and v == np.floor(v) and bits[k] != np.uint64(0x8000000000000000):
                b = np.uint64(v)
            elif v == v:  # noqa: PLR0124
                b = _mix(bits[k])
            else:
                b = np.uint64(0x7FF8000000000000)  # one NaN for all: a cast may change its payload
            z = (np.uint64(keys[k]) << np.uint64(32)) + b
            z = (z + salt) * np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
            total += z ^ (z >> np.uint64(29))
        hashes[row] += total


def add_sparse(
    hashes: NDArray[np.uint64], bounds: NDArray[np.int64], indices: NDArray, values: NDArray, salt: np.uint64
) -> None:
    """Add the stored values of a CSR matrix to the rows' hashes.

    hashes : (n,) uint64, changed in place. bounds : (n + 1,) int64 from 0. indices, values : (nnz,).
    """
    if values.dtype in (np.uint8, np.uint16) and indices.dtype == np.uint16:
        _add_counts(hashes, bounds, indices, values, salt)
        return
    for a, b in slabs(bounds, _SLAB):
        part = slice(bounds[a], bounds[b])
        wide = values[part].astype(np.float64)
        keys = indices[part].astype(np.uint32)
        bits = _own_bits(values[part], wide.view(np.uint64))
        _add_floats(hashes[a:b], bounds[a : b + 1] - bounds[a], keys, wide, bits, salt)


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
            total += _mix((bits[i, k] ^ (np.uint64(k + 1) * np.uint64(0x9E3779B97F4A7C15))) + salt)
        hashes[i] += total


def add_dense(hashes: NDArray[np.uint64], values: NDArray, salt: np.uint64) -> None:
    """Add a dense (n, k) matrix to the rows' hashes. NaN adds nothing: an outer join fills absent genes with it."""
    step = max(1, _SLAB // max(1, values.shape[1]))
    for a in range(0, len(values), step):
        bits = values[a : a + step].astype(np.float64)
        bits[np.isnan(bits)] = np.nan  # one NaN for all: a cast may change its payload
        _add_grid(hashes[a : a + step], _own_bits(values[a : a + step], bits.view(np.uint64)), salt)


@compiled
def add_strings(hashes, bounds, data, salt):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Add UTF-8 strings to the rows' hashes: FNV-1a (Fowler, Noll, Vo) of the bytes, mixed.

    hashes : (n,) uint64, changed in place. bounds : (n + 1,) int64. data : uint8.
    """
    for i in range(hashes.shape[0]):
        h = np.uint64(0xCBF29CE484222325)
        for k in range(bounds[i], bounds[i + 1]):
            h = (h ^ np.uint64(data[k])) * np.uint64(0x100000001B3)
        hashes[i] += _mix(h + salt)


@compiled
def finish_rows(hashes):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Mix each row's sum once more, so that values cannot trade places between rows unseen; returns the total."""
    total = np.uint64(0)
    for i in range(hashes.shape[0]):
        total += _mix(hashes[i])
    return total
