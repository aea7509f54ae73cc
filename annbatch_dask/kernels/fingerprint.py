"""A hash of each row's content, the same whatever the order of rows, the dtype of values or the file format.

A row's hash is a sum over its elements, so it does not depend on the order in which they are met; a
collection's fingerprint is the sum of its rows' hashes modulo 2**64. Not cryptographic: it detects loss,
repetition and corruption, not forgery. Values enter as float64 (integers beyond 2**53 by their low bits' rounding).
"""

import zlib

import numba as nb
import numpy as np
from numpy.typing import NDArray

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


@nb.njit(nogil=True, cache=True)
def _add_entries(  # type: ignore[no-untyped-def]  # noqa: ANN202, PLR0913, PLR0917 - compiled for what it is given
    hashes,  # noqa: ANN001
    bounds,  # noqa: ANN001
    row,  # noqa: ANN001
    first,  # noqa: ANN001
    keys,  # noqa: ANN001
    values,  # noqa: ANN001
    bits,  # noqa: ANN001
    salt,  # noqa: ANN001
):
    """Add entries [first, first + n) of the flat arrays to their rows; returns the row to go on with."""
    last = first + keys.shape[0]
    while row < bounds.shape[0] - 1 and bounds[row] < last:
        start, stop = max(bounds[row], first), min(bounds[row + 1], last)
        total = np.uint64(0)
        # views first, so that the loop is compiled to vector instructions
        row_keys = keys[start - first : stop - first]
        row_values, row_bits = values[start - first : stop - first], bits[start - first : stop - first]
        for k in range(stop - start):
            z = (np.uint64(row_keys[k]) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
            # one NaN for all: a cast may change its payload
            b = row_bits[k] if row_values[k] == row_values[k] else np.uint64(0x7FF8000000000000)  # noqa: PLR0124
            z = (b ^ z) + salt
            z = (z ^ (z >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
            total += z ^ (z >> np.uint64(29))
        hashes[row] += total
        if bounds[row + 1] > last:
            break
        row += 1
    return row


def add_sparse(
    hashes: NDArray[np.uint64], bounds: NDArray[np.int64], indices: NDArray, values: NDArray, salt: np.uint64
) -> None:
    """Add the stored values of a CSR matrix to the rows' hashes.

    hashes : (n,) uint64, changed in place. bounds : (n + 1,) int64 from 0. indices, values : (nnz,).
    """
    row = 0
    for a in range(0, len(indices), _SLAB):
        keys = indices[a : a + _SLAB].astype(np.uint32)
        wide = values[a : a + _SLAB].astype(np.float64)
        row = _add_entries(hashes, bounds, row, a, keys, wide, wide.view(np.uint64), salt)


@nb.njit(nogil=True, cache=True)
def _add_grid(hashes, bits, salt):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    for i in range(bits.shape[0]):
        total = np.uint64(0)
        for k in range(bits.shape[1]):
            total += _mix((bits[i, k] ^ (np.uint64(k + 1) * np.uint64(0x9E3779B97F4A7C15))) + salt)
        hashes[i] += total


def add_dense(hashes: NDArray[np.uint64], values: NDArray, salt: np.uint64) -> None:
    """Add a dense (n, k) matrix to the rows' hashes."""
    step = max(1, _SLAB // max(1, values.shape[1]))
    for a in range(0, len(values), step):
        bits = values[a : a + step].astype(np.float64)
        bits[np.isnan(bits)] = np.nan  # one NaN for all: a cast may change its payload
        _add_grid(hashes[a : a + step], bits.view(np.uint64), salt)


@nb.njit(nogil=True, cache=True)
def add_strings(hashes, bounds, data, salt):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Add UTF-8 strings to the rows' hashes: FNV-1a (Fowler, Noll, Vo) of the bytes, mixed.

    hashes : (n,) uint64, changed in place. bounds : (n + 1,) int64. data : uint8.
    """
    for i in range(hashes.shape[0]):
        h = np.uint64(0xCBF29CE484222325)
        for k in range(bounds[i], bounds[i + 1]):
            h = (h ^ np.uint64(data[k])) * np.uint64(0x100000001B3)
        hashes[i] += _mix(h + salt)


@nb.njit(nogil=True, cache=True)
def finish_rows(hashes):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Mix each row's sum once more, so that values cannot trade places between rows unseen; returns the total."""
    total = np.uint64(0)
    for i in range(hashes.shape[0]):
        total += _mix(hashes[i])
    return total
