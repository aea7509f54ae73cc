"""What compiled loops of several threads share: counters of work that was taken, and memory by its address."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.extending import intrinsic
from numpy.typing import NDArray

from annbatch_dask.kernels.compiled import compiled

__all__ = ["add_to", "address_of", "pointer_at", "take_part"]


def address_of(array: NDArray[Any]) -> int:
    """Where an array begins in memory."""
    address: int = array.__array_interface__["data"][0]
    return address


def _add_to(_typing: Any, array: Any, at: Any, n: Any) -> Any:
    """Add to an integer of 64 bits in a contiguous array, at once for all threads; returns what it was before."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", builder.gep(data, [args[1]]), args[2], "seq_cst")

    return numba.int64(array, numba.intp, numba.int64), generate


def _pointer_at(_typing: Any, address: Any, like: Any) -> Any:
    """A pointer to values of an array's dtype, from the address of the first, for ``numba.carray``."""
    pointer = numba.types.CPointer(like.dtype)

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(pointer))

    return pointer(numba.int64, like), generate


add_to: Any = intrinsic(_add_to)
pointer_at: Any = intrinsic(_pointer_at)


@compiled
def take_part(n: int, n_parts: int, taken: Any, which: int) -> Any:
    """The next of ``n_parts`` of ``n`` items that no thread has taken: whether there is one, and its run."""
    part = add_to(taken, which, 1)
    return part < n_parts, np.uint64(n * part // n_parts), np.uint64(n * (part + 1) // n_parts)
