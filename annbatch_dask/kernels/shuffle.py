"""numpy's random permutation, made in one call that holds no lock of Python's."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic
from numpy.typing import NDArray

from annbatch_dask.kernels.compiled import compiled

__all__ = ["MAX_PERMUTED", "permute"]

MAX_PERMUTED = 1 << 31
"""More rows than this it does not take."""
_U = np.uint64
_N_ROUNDS = 10
_N_DRAWN = 1024
_MULTIPLIERS = _U(0xD2E7470EE14C6C93), _U(0xCA5A826395121157)
_STEPS = _U(0x9E3779B97F4A7C15), _U(0xBB67AE8584CAA73B)


def _product(_typing: Any, a: Any, b: Any) -> Any:
    """The high and the low 64 bits of a product."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide, word = ir.IntType(128), ir.IntType(64)
        whole = builder.mul(builder.zext(args[0], wide), builder.zext(args[1], wide))
        high = builder.trunc(builder.lshr(whole, wide(64)), word)
        return context.make_tuple(builder, signature.return_type, [high, builder.trunc(whole, word)])

    return numba.types.UniTuple(numba.uint64, 2)(numba.uint64, numba.uint64), generate


_multiply: Any = intrinsic(_product)


@compiled
def _philox(counter: Any, first: Any, second: Any) -> Any:
    """Block ``counter`` of Philox4x64-10 (Salmon, Moraes, Dror, Shaw 2011) with a key of two words."""
    a, b, c, d = counter, _U(0), _U(0), _U(0)
    for _ in range(_N_ROUNDS):
        high_a, low_a = _multiply(_MULTIPLIERS[0], a)
        high_c, low_c = _multiply(_MULTIPLIERS[1], c)
        a, b, c, d = high_c ^ b ^ first, low_c, high_a ^ d ^ second, low_a
        first, second = first + _STEPS[0], second + _STEPS[1]
    return a, b, c, d


@compiled
def permute(key: NDArray[np.uint64], n: int) -> Any:
    """What ``numpy.random.Generator(numpy.random.Philox(key=key)).permutation(n)`` returns.

    Parameters
    ----------
    key
        (2,)
    n
        At most ``MAX_PERMUTED``.
    """
    order, found, drawn = np.arange(n).astype(np.uint32), np.empty(max(n, 1), np.uint32), np.empty(_N_DRAWN, np.uint32)
    left, counter, mask, at = _U(max(n - 1, 0)), _U(1), _U(1), _U(_N_DRAWN)
    while mask < left:
        mask += mask + _U(1)
    while left > _U(0):
        if at == _U(_N_DRAWN):
            for k in range(0, _N_DRAWN, 8):
                a, b, c, d = _philox(counter, key[0], key[1])
                drawn[k], drawn[k + 1], drawn[k + 2], drawn[k + 3] = a, a >> _U(32), b, b >> _U(32)
                drawn[k + 4], drawn[k + 5], drawn[k + 6], drawn[k + 7] = c, c >> _U(32), d, d >> _U(32)
                counter += _U(1)
            at = _U(0)
        while at < _U(_N_DRAWN) and left > mask >> _U(1):
            place = _U(drawn[at]) & mask
            found[left] = place
            left -= _U(place <= left)  # else another one is drawn
            at += _U(1)
        while mask >> _U(1) >= left and mask > _U(0):
            mask >>= _U(1)
    for k in range(1, n):
        i = _U(n - k)
        place = found[i]
        order[i], order[place] = order[place], order[i]
    return order.astype(np.int64)
