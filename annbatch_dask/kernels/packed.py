"""Integers in few bits: blocks of 1,024 values, each packed in as many bits as most of them need.

Within a block, value ``i`` is in lane ``i % L`` of ``L`` lanes, so that one step of a loop moves 1,024 bits of
neighbours, which compilers make vector instructions of (the vertical layout of D. Lemire and L. Boytsov, "Decoding
billions of integers per second through vectorization", 2015, and of A. Afroozeh and P. Boncz, "The FastLanes
Compression Layout", 2023). The few values that need more bits are patched (M. Zukowski et al., "Super-Scalar RAM-CPU
Cache Compression", 2006). :class:`annbatch_dask.storage.packed.PackedCodec` describes every byte.

Vectors are written out in LLVM's own terms, since numba widens integers of 8 and 16 bits to 64, and whether loops
become vectors then varies with its release.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from annbatch_dask.kernels.compiled import compiled, compiled_for_c

__all__ = [
    "BLOCK_VALUES",
    "DAMAGED",
    "HEADER_NBYTES",
    "MAGIC",
    "TAIL_NBYTES",
    "U64",
    "VERSION",
    "bits_of",
    "bound_nbytes",
    "length_of",
    "magic_number",
    "pointer_to",
    "shift_left",
    "shift_right",
    "spread",
    "table_entry_nbytes",
    "unpack",
    "unpack_runs",
    "unpacker",
    "write_number",
]

MAGIC = b"ABPK"
VERSION = 1
BLOCK_VALUES = 1024
HEADER_NBYTES = 16
TAIL_NBYTES = 8
"""Zeros behind the last block: a reader of eight bytes at a time reads no further."""
DAMAGED = {
    1: "it is shorter than its header and block table",
    2: "it does not begin as a packed chunk does, or a later release wrote it",
    3: "its integers have another size",
    4: "it holds another number of values",
    5: "a block lies beyond its end",
    6: "a block has a width that its integers have not",
}
"""What each status of :func:`unpack` but 0 says of a chunk."""
_U64, _I32 = ir.IntType(64), ir.IntType(32)
_ROW_NBITS, _SUM_NBITS, _SHUFFLE_NBITS = 1024, 512, 128
magic_number = int.from_bytes(MAGIC, "little")


def _bits(_typing: Any, array: Any) -> Any:
    """Bits of an item of the array, which is known when the function is compiled."""

    def generate(_context: Any, _builder: Any, signature: Any, _args: Any) -> Any:
        return _U64(signature.args[0].dtype.bitwidth)

    return numba.uint64(array), generate


def _narrow(operation: str) -> Callable[..., Any]:
    """A shift of an integer that keeps its size; by fewer bits than it has."""

    def shift(_typing: Any, value: Any, by: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return getattr(builder, operation)(args[0], context.cast(builder, args[1], by, signature.args[0]))

        return value(value, by), generate

    return shift


def _length(_typing: Any, value: Any) -> Any:
    """Bits of an integer up to its highest set one; 0 of 0."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        zeros = builder.ctlz(args[0], ir.IntType(1)(0))
        n_bits = args[0].type.width
        length = builder.sub(zeros.type(n_bits), zeros)
        return builder.zext(length, _U64) if n_bits < _U64.width else length

    return numba.uint64(value), generate


def pointer_to(builder: Any, context: Any, kind: Any, array: Any, at: Any, vector: Any) -> Any:
    """Pointer to ``array[at]``, to read or write a vector there."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), vector.as_pointer())


def spread(builder: Any, value: Any, vector: Any) -> Any:
    """The value in every lane."""
    nothing = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(nothing, value, _I32(0))
    return builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(_I32, vector.count), None))


def _take_row(_typing: Any, raw: Any, at: Any, next_at: Any, shift: Any, mask: Any, out: Any, to: Any) -> Any:
    """One value of every lane: bits from ``shift`` on of the words at byte ``at``, and from 0 on of those at ``next_at``.

    The values have no bits of the second words where these are the first.
    """  # noqa: E501
    lane = ir.IntType(out.dtype.bitwidth)
    vector = ir.VectorType(lane, _ROW_NBITS // lane.width)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> None:
        def words(k: int) -> Any:
            return builder.load(pointer_to(builder, context, raw, args[0], args[k], vector), align=1)

        by = context.cast(builder, args[3], shift, out.dtype)
        low = builder.lshr(words(1), spread(builder, by, vector))
        # shifted twice, as one shift by all bits of a lane means nothing
        left = spread(builder, builder.sub(lane(lane.width - 1), by), vector)
        high = builder.shl(builder.shl(words(2), left), spread(builder, lane(1), vector))
        is_split = builder.icmp_unsigned("!=", args[1], args[2])
        row = builder.select(is_split, builder.or_(low, high), low)
        row = builder.and_(row, spread(builder, args[4], vector))
        builder.store(row, pointer_to(builder, context, out, args[5], args[6], vector), align=lane.width // 8)

    return numba.void(raw, at, next_at, shift, mask, out, to), generate


def _sum_steps(n: int, n_near: int) -> Iterator[list[int]]:
    """Lane indices of each step of a running sum over n lanes; lane ``n`` is zero.

    At first within ``n_near`` lanes, which processors move with less effort, then the last of them to those behind.
    """
    step = 1
    while step < n_near:
        yield [i - step if i % n_near >= step else n for i in range(n)]
        step *= 2
    while step < n:
        yield [i // step * step - 1 if i // step % 2 else n for i in range(n)]
        step *= 2


def _add_up(_typing: Any, src: Any, src_at: Any, before: Any, out: Any, out_at: Any) -> Any:
    """``out[k]`` = the running sum of ``src[k] + 1`` after ``before``, for the lanes of a vector; returns the last."""
    lane = ir.IntType(src.dtype.bitwidth)
    n = _SUM_NBITS // lane.width
    vector, places = ir.VectorType(lane, n), ir.VectorType(_I32, n)

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        sums = builder.load(pointer_to(builder, context, src, args[0], args[1], vector), align=lane.width // 8)
        for moved in _sum_steps(n, _SHUFFLE_NBITS // lane.width):
            others = builder.shuffle_vector(sums, ir.Constant(vector, None), ir.Constant(places, moved))
            sums = builder.add(sums, others)
        sums = builder.add(sums, ir.Constant(vector, list(range(1, n + 1))))
        last = builder.extract_element(sums, _I32(n - 1))  # before the sum is added: the next vector waits for less
        sums = builder.add(sums, spread(builder, args[2], vector))
        builder.store(sums, pointer_to(builder, context, out, args[3], args[4], vector), align=lane.width // 8)
        return builder.add(args[2], last)

    return src.dtype(src, src_at, before, out, out_at), generate


bits_of: Any = intrinsic(_bits)
shift_left: Any = intrinsic(_narrow("shl"))
shift_right: Any = intrinsic(_narrow("lshr"))
length_of: Any = intrinsic(_length)
take_row: Any = intrinsic(_take_row)
add_up: Any = intrinsic(_add_up)
U64 = np.uint64  # an index of this type is not looked at for a sign


@compiled
def table_entry_nbytes(n_bits):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Size of a block's entry in the table: 12, 16 or 20 bytes, of which the last are the base."""
    return (U64(10) + n_bits // U64(8) + U64(3)) & ~U64(3)


@compiled
def _read(raw, at, n):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """A little-endian number of n bytes."""
    value = U64(0)
    for k in range(n):
        value |= U64(raw[at + U64(k)]) << U64(8 * k)
    return value


@compiled
def write_number(raw, at, n, value):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Like `_read`, but writes the number."""
    for k in range(n):
        raw[at + U64(k)] = np.uint8((U64(value) >> U64(8 * k)) & U64(255))


def bound_nbytes(n_values: int, dtype: np.dtype) -> int:
    """Bytes that :func:`pack` may need."""
    n_blocks = -(-n_values // BLOCK_VALUES)
    return HEADER_NBYTES + TAIL_NBYTES + n_blocks * (24 + BLOCK_VALUES * dtype.itemsize)


@compiled
def _unpack_words(raw, at, width, out):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """The packed part of a block, whose words begin at byte ``at``."""
    ty = out.dtype.type
    n_bits = bits_of(out)
    n_lanes = U64(BLOCK_VALUES) // n_bits
    if width == U64(0):
        for k in range(U64(BLOCK_VALUES)):
            out[k] = ty(0)
        return
    mask = ty(shift_right(ty(-1), n_bits - width))
    bit = U64(0)
    for row in range(n_bits):
        word = at + bit // n_bits * U64(128)
        shift = bit % n_bits
        next_word = word if shift + width <= n_bits else word + U64(128)
        take_row(raw, word, next_word, shift, mask, out, U64(row) * n_lanes)
        bit += width


@compiled
def _patch(raw, at, counts, width, high, out):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, PLR0913, PLR0917
    """Put the bits above ``width`` into the values that have some; ``at`` is the first of their places."""
    ty = out.dtype.type
    n = U64(0)
    for quarter in range(4):
        n += (counts >> U64(8 * quarter)) & U64(255)
    highs, bit, k = at + n, U64(0), at
    mask = ~U64(0) >> (U64(64) - high)
    for quarter in range(4):
        first, end = U64(256 * quarter), k + ((counts >> U64(8 * quarter)) & U64(255))
        while k < end:
            place = first + U64(raw[k])
            found = (_read(raw, highs + (bit >> U64(3)), 8) >> (bit & U64(7))) & mask
            out[place] = out[place] | ty(shift_left(ty(found), width))
            bit += high
            k += U64(1)


@compiled
def _finish(values, base, differences, out, to):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """The values of a block from what was packed of them."""
    ty = values.dtype.type
    if differences:
        last = base
        for k in range(U64(0), U64(BLOCK_VALUES), U64(_SUM_NBITS) // bits_of(values)):
            last = add_up(values, k, last, out, to + k)
    else:
        for k in range(U64(BLOCK_VALUES)):
            out[to + k] = ty(values[k] + base)


@compiled
def _check_chunk(raw, n_values, n_bits):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """0 if this may be a packed chunk of so many integers of so many bits, or a key of ``DAMAGED``."""
    nbytes = U64(raw.shape[0])
    n_blocks = (U64(n_values) + U64(BLOCK_VALUES - 1)) // U64(BLOCK_VALUES)
    if nbytes < U64(HEADER_NBYTES + TAIL_NBYTES):
        return 1
    if _read(raw, U64(0), 4) != U64(magic_number) or raw[U64(4)] != VERSION or raw[U64(6)] > 1 or raw[U64(7)] != 0:
        return 2
    if U64(raw[U64(5)]) != n_bits:
        return 3
    if _read(raw, U64(8), 8) != U64(n_values):
        return 4
    return 1 if (nbytes - U64(HEADER_NBYTES)) // table_entry_nbytes(n_bits) < n_blocks else 0


@compiled
def _look_up(raw, block, n_bits):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """What the table of a chunk says of a block: 0 or a key of ``DAMAGED``, and where and how it is packed."""
    nbytes, entry_nbytes = U64(raw.shape[0]), table_entry_nbytes(n_bits)
    entry = U64(HEADER_NBYTES) + block * entry_nbytes
    place = _read(raw, entry, 4) * U64(4)
    counts = _read(raw, entry + U64(4), 4)
    width, high = U64(raw[entry + U64(8)]), U64(raw[entry + U64(9)])
    base = _read(raw, entry + entry_nbytes - n_bits // U64(8), n_bits // U64(8))
    n_patches = (
        (counts & U64(255)) + (counts >> U64(8) & U64(255)) + (counts >> U64(16) & U64(255)) + (counts >> U64(24))
    )
    used = U64(128) * width + n_patches + (n_patches * high + U64(7)) // U64(8)
    status = 0
    if width + high > n_bits or U64(56) < high < U64(64) or (n_patches > U64(0) and high == U64(0)):
        status = 6
    elif place + (used + U64(3) & ~U64(3)) + U64(TAIL_NBYTES) > nbytes:
        status = 5
    return status, place, counts, width, high, base


@compiled
def unpack(raw, n_values, start, out):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Decode values [start, start + len(out)) of a packed chunk into ``out``; returns 0, or a key of ``DAMAGED``.

    Whatever the bytes are, nothing is read or written outside the two arrays. Where it is not 0, ``out`` holds
    anything. Blocks that hold none of the values are not looked at.

    Parameters
    ----------
    raw
        1-D contiguous uint8: the chunk, and nothing behind it.
    n_values
        How many values it has to hold.
    start
        The first one wanted.
    out
        1-D contiguous, of the unsigned dtype that is as large as that of the values.
    """
    status = _check_chunk(raw, n_values, bits_of(out))
    if status != 0:
        return status
    if start < 0 or start > n_values or out.shape[0] > n_values - start:
        return 4
    differences = raw[U64(6)] == 1
    first, stop = U64(start), U64(start + out.shape[0])
    values, spare = np.empty(BLOCK_VALUES, out.dtype), np.empty(BLOCK_VALUES, out.dtype)
    at = first
    while at < stop:
        block = at // U64(BLOCK_VALUES)
        status, place, counts, width, high, low = _look_up(raw, block, bits_of(out))
        if status != 0:
            return status
        _unpack_words(raw, place, width, values)
        if counts > U64(0):
            _patch(raw, place + U64(128) * width, counts, width, high, values)
        base, block_start = out.dtype.type(low), block * U64(BLOCK_VALUES)
        end = min(block_start + U64(BLOCK_VALUES), stop)
        if end - at == U64(BLOCK_VALUES):
            _finish(values, base, differences, out, at - first)
        else:
            _finish(values, base, differences, spare, U64(0))
            for k in range(end - at):
                out[at - first + U64(k)] = spare[at - block_start + U64(k)]
        at = end
    return 0


@compiled
def unpack_runs(raw, chunks, starts, lengths, out, out_starts):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201, PLR0913, PLR0917
    """Decode runs of values of packed chunks, each to its place; returns 0, or a key of ``DAMAGED``.

    A block is decoded once for all runs of it that follow each other. Nothing is read or written outside the arrays;
    where the status is not 0, ``out`` holds anything.

    Parameters
    ----------
    raw
        1-D contiguous uint8: all chunks, with anything between them.
    chunks
        (n_chunks, 4) int64, ascending: number of values before each, its values, its first byte and its bytes.
    starts, lengths
        (n_runs,) int64: values of all chunks, each run within one.
    out
        1-D contiguous, of the unsigned dtype that is as large as that of the values.
    out_starts
        (n_runs,) int64.
    """
    values, found = np.empty(BLOCK_VALUES, out.dtype), np.empty(BLOCK_VALUES, out.dtype)
    chunk, before, n_values, last = raw[:0], 0, 0, -1
    for i in range(starts.shape[0]):
        start, n = starts[i], lengths[i]
        if n <= 0:
            continue
        if not before <= start < before + n_values:
            k = np.searchsorted(chunks[:, 0], start, side="right") - 1
            if k < 0 or chunks[k, 2] < 0 or chunks[k, 3] < 0 or chunks[k, 2] + chunks[k, 3] > raw.shape[0]:
                return 5
            before, n_values, last = chunks[k, 0], chunks[k, 1], -1
            chunk = raw[chunks[k, 2] : chunks[k, 2] + chunks[k, 3]]
            status = _check_chunk(chunk, n_values, bits_of(out))
            if status != 0:
                return status
        if start + n > before + n_values or out_starts[i] < 0 or out_starts[i] + n > out.shape[0]:
            return 4
        at, stop, shift = U64(start - before), U64(start - before + n), U64(out_starts[i]) - U64(start - before)
        while at < stop:
            block = at // U64(BLOCK_VALUES)
            if int(block) != last:
                status, place, counts, width, high, low = _look_up(chunk, block, bits_of(out))
                if status != 0:
                    return status
                _unpack_words(chunk, place, width, values)
                if counts > U64(0):
                    _patch(chunk, place + U64(128) * width, counts, width, high, values)
                _finish(values, out.dtype.type(low), chunk[U64(6)] == 1, found, U64(0))
                last = int(block)
            end = min((block + U64(1)) * U64(BLOCK_VALUES), stop)
            for k in range(at, end):
                out[k + shift] = found[k % U64(BLOCK_VALUES)]
            at = end
    return 0


def _unpack_at(raw, nbytes, n_values, start, out, n):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, PLR0913, PLR0917
    return unpack(numba.carray(raw, (nbytes,)), n_values, start, numba.carray(out, (n,)))


@cache
def unpacker(itemsize: int) -> Any:
    """:func:`unpack` for integers of so many bytes, to be called as C does at its ``address``.

    It takes the address of the chunk, its bytes, the number of its values, the first one wanted, the address of where
    they go and how many are wanted, all as integers of 64 bits, and returns one.
    """
    number, out = numba.int64, numba.types.CPointer(getattr(numba, f"uint{8 * itemsize}"))
    raw = numba.types.CPointer(numba.uint8)
    return compiled_for_c(number(raw, number, number, number, out, number), _unpack_at)
