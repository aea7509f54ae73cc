"""Memory asked for before it is written: a core that waits for each line in turn leaves bandwidth unused."""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir
from numba.extending import intrinsic

from annbatch_dask.kernels.compiled import compiled

__all__ = ["prefetch_row"]

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


_ask: Any = intrinsic(_prefetch)


@compiled
def prefetch_row(row: Any) -> None:
    """Ask for all cache lines of a contiguous row, to be written; a hint that changes no value."""
    for at in range(0, row.shape[0], _LINE_NBYTES // row.itemsize):
        _ask(row, at)
