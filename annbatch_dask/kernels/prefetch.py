"""Memory asked for before it is written, or written past the cache: a core that waits leaves bandwidth unused."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from annbatch_dask.kernels.compiled import compiled

__all__ = ["copy_past", "end_stream", "put_past", "prefetch_at", "prefetch_row", "put_row", "shift_to"]

_LINE_NBYTES = 64


def _prefetch(_typing: Any, array: Any, index: Any) -> Any:
    """LLVM's ``prefetch`` of ``array[index]``, 1-D and contiguous, for a write that comes soon."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> None:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        place = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place.type, number, number, number])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [place.type], kind)
        for_write, keep, data_cache = number(1), number(3), number(1)
        builder.call(prefetch, [place, for_write, keep, data_cache])

    return numba.void(array, index), generate


prefetch_at: Any = intrinsic(_prefetch)


@compiled
def prefetch_row(row: Any) -> None:
    """Ask for all cache lines of a contiguous row, to be written; a hint that changes no value."""
    for at in range(0, row.shape[0], _LINE_NBYTES // row.itemsize):
        prefetch_at(row, at)


STREAM_VALUES = 16
"""Values that :func:`stream` writes: a cache line of them."""
STREAM_NBYTES = STREAM_VALUES * 4


def _stream(_typing: Any, source: Any, at: Any, dest: Any, to: Any) -> Any:
    """Write ``dest[to:to + 16] = source[at:at + 16]`` past the cache, which need not read what it then overwrites.

    ``source`` has integers of at most 32 bits, ``dest`` integers of 32 bits or float32, and ``to`` is at the beginning
    of a cache line. Before another thread reads, :func:`end_stream`.
    """
    item, wide = ir.IntType(source.dtype.bitwidth), ir.IntType(32)
    is_float = isinstance(dest.dtype, numba.types.Float)
    there = ir.VectorType(ir.FloatType() if is_float else wide, STREAM_VALUES)

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> None:
        def pointer(kind: Any, k: int, vector: Any) -> Any:
            data = context.make_array(kind)(context, builder, args[k]).data
            return builder.bitcast(builder.gep(data, [args[k + 1]]), vector.as_pointer())

        here = ir.VectorType(item, STREAM_VALUES)
        values = builder.load(pointer(source, 0, here), align=item.width // 8)
        if is_float:
            values = (builder.sitofp if source.dtype.signed else builder.uitofp)(values, there)
        elif item.width < wide.width:
            values = (builder.sext if source.dtype.signed else builder.zext)(values, there)
        written = builder.store(values, pointer(dest, 2, there), align=STREAM_NBYTES)
        written.set_metadata("nontemporal", builder.module.add_metadata([wide(1)]))

    return numba.void(source, at, dest, to), generate


def _end_stream(_typing: Any) -> Any:
    """Let other threads see what was written by :func:`stream`."""

    def generate(_context: Any, builder: Any, _signature: Any, _args: Any) -> None:
        builder.fence("seq_cst")

    return numba.void(), generate


def _stream_line(_typing: Any, source: Any, at: Any, dest: Any, to: Any) -> Any:
    """Copy the cache line from ``source[at]`` on to that from ``dest[to]`` on, past the cache; see :func:`_stream`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> None:
        line = ir.VectorType(ir.IntType(64), STREAM_NBYTES // 8).as_pointer()
        here, there = (
            builder.bitcast(
                builder.gep(context.make_array(signature.args[k])(context, builder, args[k]).data, [args[k + 1]]), line
            )
            for k in (0, 2)
        )
        written = builder.store(builder.load(here, align=1), there, align=STREAM_NBYTES)
        written.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))

    return numba.void(source, at, dest, to), generate


stream: Any = intrinsic(_stream)
_put_line: Any = intrinsic(_stream_line)
end_stream: Any = intrinsic(_end_stream)


@compiled
def put_past(source: Any, start: Any, n: Any, dest: Any, to: Any) -> None:
    """Copy ``dest[to:to + n] = source[start:start + n]``, cache lines as a whole, and past the cache.

    Before another thread reads, :func:`end_stream`.
    """
    step, one = np.uint64(STREAM_VALUES), np.uint64(1)
    before = np.uint64(dest.ctypes.data) // np.uint64(4)
    first = min((step - (before + to) % step) % step, n)
    j = np.uint64(0)
    while j < first:
        dest[to + j] = source[start + j]
        j += one
    while j + step <= n:
        stream(source, start + j, dest, to + j)
        j += step
    while j < n:
        dest[to + j] = source[start + j]
        j += one


@compiled
def copy_past(source: Any, starts: Any, lengths: Any, dest: Any, dest_starts: Any) -> None:
    """Copy stretches as ``copy_rows`` of the assembly does, but cache lines as a whole, and past the cache."""
    for i in range(starts.shape[0]):
        put_past(source, np.uint64(starts[i]), np.uint64(lengths[i]), dest, np.uint64(dest_starts[i]))
    end_stream()


@compiled
def shift_to(source: Any, row: Any) -> Any:
    """The item of ``source``, among its first ones, that is as far from a cache line's beginning as ``row`` is."""
    apart = np.uint64(row.ctypes.data) - np.uint64(source.ctypes.data)
    return apart % np.uint64(_LINE_NBYTES) // np.uint64(source.itemsize)


@compiled
def put_row(source: Any, at: Any, row: Any) -> None:
    """Copy ``source[at:]`` to a row of the same dtype, contiguous and aligned: whole cache lines go past the cache.

    Before another thread reads, :func:`end_stream`.
    """
    step, n, one = np.uint64(_LINE_NBYTES // source.itemsize), np.uint64(row.shape[0]), np.uint64(1)
    before = np.uint64(row.ctypes.data) // np.uint64(source.itemsize)
    first = min((step - before % step) % step, n)
    j = np.uint64(0)
    while j < first:
        row[j] = source[at + j]
        j += one
    while j + step <= n:
        _put_line(source, at + j, row, j)
        j += step
    while j < n:
        row[j] = source[at + j]
        j += one
