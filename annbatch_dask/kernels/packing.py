"""Integers packed into blocks: the other side of :mod:`annbatch_dask.kernels.packed`, which unpacks them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic
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
    pointer_to,
    shift_left,
    shift_right,
    spread,
    table_entry_nbytes,
    write_number,
)

__all__ = ["pack"]

_PATCH_COST = 4
"""Bits that a patch is taken to cost beside its own: at less than 1 % more bytes a third fewer of them."""


_QUARTER = BLOCK_VALUES // 4
_ROW_NBITS, _COUNT_NBITS = 1024, 512
_NUMBER = ir.IntType(64)


def _masks_longer(context: Any, builder: Any, values: Any, args: Any, n: int) -> Iterator[tuple[int, Any]]:
    """First place and mask, a bit a lane, of each vector of ``n`` values: which are greater than the limit.

    ``args``: the values, the first one, and the limit.
    """
    lane = ir.IntType(values.dtype.bitwidth)
    vector = ir.VectorType(lane, _COUNT_NBITS // lane.width)
    most = spread(builder, args[2], vector)
    for k in range(0, n, vector.count):
        at = builder.add(args[1], _NUMBER(k))
        found = builder.load(pointer_to(builder, context, values, args[0], at, vector), align=lane.width // 8)
        yield k, builder.bitcast(builder.icmp_unsigned(">", found, most), ir.IntType(vector.count))


def _as_number(builder: Any, value: Any) -> Any:
    return value if value.type.width == _NUMBER.width else builder.zext(value, _NUMBER)


def _count_longer(_typing: Any, values: Any, first: Any, limit: Any) -> Any:
    """How many values of a quarter, from ``first`` on, are greater than ``limit``."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        total = _NUMBER(0)
        for _, mask in _masks_longer(context, builder, values, args, _QUARTER):
            total = builder.add(total, _as_number(builder, builder.ctpop(mask)))
        return total

    return numba.uint64(values, first, limit), generate


def _longer_bits(_typing: Any, values: Any, first: Any, limit: Any) -> Any:
    """A bit for each of 64 values, from ``first`` on and the lowest first: whether it is greater than ``limit``."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        bits = _NUMBER(0)
        for k, mask in _masks_longer(context, builder, values, args, _NUMBER.width):
            bits = builder.or_(bits, builder.shl(_as_number(builder, mask), _NUMBER(k)))
        return bits

    return numba.uint64(values, first, limit), generate


def _any_of(_typing: Any, values: Any) -> Any:
    """The bits that any value of a block has."""
    lane = ir.IntType(values.dtype.bitwidth)
    vector = ir.VectorType(lane, _COUNT_NBITS // lane.width)

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        bits = ir.Constant(vector, None)
        for k in range(0, BLOCK_VALUES, vector.count):
            at = ir.IntType(64)(k)
            found = builder.load(pointer_to(builder, context, values, args[0], at, vector), align=lane.width // 8)
            bits = builder.or_(bits, found)
        lanes = [builder.extract_element(bits, ir.IntType(32)(k)) for k in range(vector.count)]
        found = lanes.pop()
        for each in lanes:
            found = builder.or_(found, each)
        return found

    return values.dtype(values), generate


def _put_row(_typing: Any, values: Any, first: Any, left: Any, right: Any, mask: Any, raw: Any, at: Any) -> Any:
    """Write one value of every lane, shifted by fewer bits than it has, to the words at byte ``at``.

    What is shifted to the left is added to the bits that are there.
    """
    lane = ir.IntType(values.dtype.bitwidth)
    vector = ir.VectorType(lane, _ROW_NBITS // lane.width)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> None:
        row = builder.load(pointer_to(builder, context, values, args[0], args[1], vector), align=lane.width // 8)
        row = builder.and_(row, spread(builder, args[4], vector))
        for k, shift in ((2, builder.shl), (3, builder.lshr)):
            row = shift(row, spread(builder, context.cast(builder, args[k], signature.args[k], values.dtype), vector))
        place = pointer_to(builder, context, raw, args[5], args[6], vector)
        is_behind = builder.icmp_unsigned("!=", args[2], args[2].type(0))
        before = builder.select(is_behind, builder.load(place, align=1), ir.Constant(vector, None))
        builder.store(builder.or_(row, before), place, align=1)

    return numba.void(values, first, left, right, mask, raw, at), generate


count_longer: Any = intrinsic(_count_longer)
longer_bits: Any = intrinsic(_longer_bits)
any_of: Any = intrinsic(_any_of)
put_row: Any = intrinsic(_put_row)


@compiled
def _choose_width(values):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """(width, high) of fewest bits: what all values are packed in, and what is stored of each that needs more."""
    ty, n_bits = values.dtype.type, bits_of(values)
    longest = length_of(any_of(values))
    width, fewest = longest, U64(BLOCK_VALUES) * longest
    best = width
    while width > U64(0):
        width -= U64(1)
        limit = ty(shift_left(ty(1), width) - ty(1))
        n, most = U64(0), U64(0)
        for quarter in range(4):
            longer = count_longer(values, U64(_QUARTER) * U64(quarter), limit)
            n += longer
            most = max(most, longer)
        high = longest - width
        if most > U64(255):
            break
        if high > U64(56) and (width > U64(0) or n_bits < U64(64)):
            continue
        high = U64(64) if high > U64(56) else high
        cost = U64(BLOCK_VALUES) * width + n * (U64(8 + _PATCH_COST) + high)
        if cost < fewest:
            best, fewest = width, cost
    high = longest - best
    return best, U64(64) if high > U64(56) else high


@compiled
def _pack_words(values, width, raw, at):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """The low bits of a block's values, from byte ``at`` on."""
    ty = values.dtype.type
    n_bits = bits_of(values)
    n_lanes = U64(BLOCK_VALUES) // n_bits
    mask = ty(shift_right(ty(-1), n_bits - width))
    bit = U64(0)
    for row in range(n_bits):
        word, shift, first = at + bit // n_bits * U64(128), bit % n_bits, U64(row) * n_lanes
        put_row(values, first, shift, U64(0), mask, raw, word)
        if shift + width > n_bits:
            put_row(values, first, U64(0), n_bits - shift, mask, raw, word + U64(128))
        bit += width


@compiled
def _pack_patches(values, width, high, raw, at, counts):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, PLR0913, PLR0917
    """Places and high bits of the values that need more than ``width`` bits; returns where they end."""
    ty = values.dtype.type
    highs, limit = at, ty(shift_left(ty(1), width) - ty(1))
    for quarter in range(4):
        before = highs
        for k in range(U64(0), U64(_QUARTER), U64(64)):
            longer = longer_bits(values, U64(_QUARTER) * U64(quarter) + k, limit)
            while longer:
                raw[highs] = np.uint8(k + length_of(longer & (~longer + U64(1))) - U64(1))
                highs += U64(1)
                longer &= longer - U64(1)
        counts[quarter] = highs - before
    waiting, n_waiting = U64(0), U64(0)
    end, k = highs, at
    for quarter in range(4):
        for _ in range(counts[quarter]):
            value = values[U64(256) * U64(quarter) + U64(raw[k])]
            k += U64(1)
            waiting |= U64(shift_right(value, width)) << n_waiting
            n_waiting += high
            write_number(raw, end, 8, waiting)  # bytes that are not whole yet are written again
            end += n_waiting >> U64(3)
            waiting = U64(0) if n_waiting == U64(64) else waiting >> (n_waiting & ~U64(7))
            n_waiting &= U64(7)
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
    rest, counts = np.empty(BLOCK_VALUES, values.dtype), np.empty(4, np.int64)
    at = U64(HEADER_NBYTES) + n_blocks * entry_nbytes
    for block in range(n_blocks):
        first = U64(block) * U64(BLOCK_VALUES)
        base = _subtract(values, first, min(U64(BLOCK_VALUES), n_values - first), differences, sign, rest)
        width, high = _choose_width(rest)
        entry = U64(HEADER_NBYTES) + U64(block) * entry_nbytes
        for k in range(entry_nbytes):
            raw[entry + U64(k)] = 0
        write_number(raw, entry, 4, at // U64(4))
        if width > U64(0):
            _pack_words(rest, width, raw, at)
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
