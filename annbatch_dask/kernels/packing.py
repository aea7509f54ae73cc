"""Integers packed into blocks: the other side of :mod:`annbatch_dask.kernels.packed`, which unpacks them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.kernels.compiled import compiled
from annbatch_dask.kernels.packed import (
    BLOCK_VALUES,
    HEADER_NBYTES,
    TAIL_NBYTES,
    U64,
    VERSION,
    bits_of,
    bound_nbytes,
    length_of,
    magic_number,
    shift_left,
    shift_right,
    table_entry_nbytes,
    write_number,
)

__all__ = ["pack"]

_PATCH_COST = 4
"""Bits that a patch is taken to cost beside its own: at less than 1 % more bytes a third fewer of them."""


@compiled
def _choose_width(values, lengths):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """(width, high) of fewest bits: what all values are packed in, and what is stored of each that needs more."""
    n_bits = bits_of(values)
    for quarter in range(4):
        for k in range(65):
            lengths[quarter, k] = 0
    for k in range(U64(256)):  # the quarters in turn: a count that was just raised is not there yet to be raised again
        lengths[U64(0), length_of(values[k])] += 1
        lengths[U64(1), length_of(values[U64(256) + k])] += 1
        lengths[U64(2), length_of(values[U64(512) + k])] += 1
        lengths[U64(3), length_of(values[U64(768) + k])] += 1
    longest = n_bits
    while longest > U64(0) and not (
        lengths[0, longest] or lengths[1, longest] or lengths[2, longest] or lengths[3, longest]
    ):
        longest -= U64(1)
    width, fewest = longest, U64(BLOCK_VALUES) * longest
    best = width
    longer = np.zeros(4, np.int64)
    while width > U64(0):
        n, most = 0, 0
        for quarter in range(4):
            longer[quarter] += lengths[quarter, width]
            n += longer[quarter]
            most = max(most, longer[quarter])
        width -= U64(1)
        high = longest - width
        if most > 255:
            break
        if high > U64(56) and (width > U64(0) or n_bits < U64(64)):
            continue
        high = U64(64) if high > U64(56) else high
        cost = U64(BLOCK_VALUES) * width + U64(n) * (U64(8 + _PATCH_COST) + high)
        if cost < fewest:
            best, fewest = width, cost
    high = longest - best
    return best, U64(64) if high > U64(56) else high


@compiled
def _pack_words(values, width, words):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """The low bits of a block's values; ``words`` has room for all bits, and is zero."""
    ty = values.dtype.type
    n_bits = bits_of(values)
    n_lanes = U64(BLOCK_VALUES) // n_bits
    mask = ty(shift_right(ty(-1), n_bits - width))
    bit = U64(0)
    for row in range(n_bits):
        word, shift, first = bit // n_bits * n_lanes, bit % n_bits, U64(row) * n_lanes
        for k in range(n_lanes):
            words[word + U64(k)] |= shift_left(values[first + U64(k)] & mask, shift)
        if shift + width > n_bits:
            for k in range(n_lanes):
                words[word + n_lanes + U64(k)] |= shift_right(values[first + U64(k)] & mask, n_bits - shift)
        bit += width


@compiled
def _pack_patches(values, width, high, raw, at, counts):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, PLR0913, PLR0917
    """Places and high bits of the values that need more than ``width`` bits; returns where they end."""
    ty = values.dtype.type
    highs, limit = at, ty(shift_left(ty(1), width) - ty(1))
    for quarter in range(4):
        first = highs
        for k in range(U64(256)):
            raw[highs] = np.uint8(k)
            highs += U64(values[U64(256) * U64(quarter) + k] > limit)
        counts[quarter] = highs - first
    waiting, n_waiting = U64(0), U64(0)
    end, k = highs, at
    for quarter in range(4):
        for _ in range(counts[quarter]):
            value = values[U64(256) * U64(quarter) + U64(raw[k])]
            k += U64(1)
            waiting |= U64(shift_right(value, width)) << n_waiting
            n_waiting += high
            while n_waiting >= U64(8):
                raw[end] = np.uint8(waiting & U64(255))
                waiting, n_waiting = waiting >> U64(8), n_waiting - U64(8)
                end += U64(1)
    if n_waiting > U64(0):
        raw[end] = np.uint8(waiting)
        end += U64(1)
    return end


@compiled
def _subtract(values, first, n, differences, sign, out):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, PLR0913, PLR0917
    """Subtract the base of ``values[first:][:n]``; pads with zeros."""
    ty = values.dtype.type
    if differences:
        base = ty(values[first] - ty(1))
        out[0] = 0
        for k in range(U64(1), n):
            out[k] = ty(values[first + k] - values[first + k - U64(1)] - ty(1))
    else:
        least = ty(-1)
        for k in range(n):
            least = min(least, ty(values[first + U64(k)] ^ sign))
        base = ty(least ^ sign)
        for k in range(n):
            out[U64(k)] = ty(values[first + U64(k)] - base)
    for k in range(n, U64(BLOCK_VALUES)):
        out[k] = 0
    return base


@compiled
def _pack(values, differences, sign, raw):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    n_bits, n_values = bits_of(values), U64(values.shape[0])
    n_blocks, entry_nbytes = (n_values + U64(BLOCK_VALUES - 1)) // U64(BLOCK_VALUES), table_entry_nbytes(n_bits)
    write_number(raw, U64(0), 4, magic_number)
    write_number(raw, U64(4), 4, U64(VERSION) | n_bits << U64(8) | U64(differences) << U64(16))
    write_number(raw, U64(8), 8, n_values)
    rest, words = np.empty(BLOCK_VALUES, values.dtype), np.empty(BLOCK_VALUES, values.dtype)
    lengths, counts = np.empty((4, 65), np.int64), np.empty(4, np.int64)
    at = U64(HEADER_NBYTES) + n_blocks * entry_nbytes
    for block in range(n_blocks):
        first = U64(block) * U64(BLOCK_VALUES)
        base = _subtract(values, first, min(U64(BLOCK_VALUES), n_values - first), differences, sign, rest)
        width, high = _choose_width(rest, lengths)
        entry = U64(HEADER_NBYTES) + U64(block) * entry_nbytes
        for k in range(entry_nbytes):
            raw[entry + U64(k)] = 0
        write_number(raw, entry, 4, at // U64(4))
        if width > U64(0):
            words[:] = 0
            _pack_words(rest, width, words)
            packed = words.view(np.uint8)
            for k in range(U64(128) * width):
                raw[at + U64(k)] = packed[U64(k)]
            at += U64(128) * width
        counts[:] = 0
        if high > U64(0):
            at = _pack_patches(rest, width, high, raw, at, counts)
        for quarter in range(4):
            raw[entry + U64(4 + quarter)] = np.uint8(counts[quarter])
        raw[entry + U64(8)], raw[entry + U64(9)] = np.uint8(width), np.uint8(high)
        write_number(raw, entry + entry_nbytes - n_bits // U64(8), n_bits // U64(8), base)
        while at & U64(3):
            raw[at] = 0
            at += U64(1)
    for k in range(TAIL_NBYTES):
        raw[at + U64(k)] = 0
    return at + U64(TAIL_NBYTES)


def pack(values: NDArray, *, differences: bool) -> NDArray[np.uint8]:
    """Pack integers; the same ones become the same bytes on every machine.

    Parameters
    ----------
    values
        1-D contiguous, of any integer dtype, in this machine's byte order.
    differences
        Store each value less the one before it, which makes small numbers of ascending ones; any order may follow.

    Returns
    -------
    The chunk, for :func:`unpack`.
    """
    raw = np.empty(bound_nbytes(len(values), values.dtype), np.uint8)
    unsigned = values.view(f"u{values.dtype.itemsize}")
    sign = unsigned.dtype.type(2 ** (8 * values.dtype.itemsize - 1) if values.dtype.kind == "i" else 0)
    return raw[: _pack(unsigned, differences, sign, raw)]
