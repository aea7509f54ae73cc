"""The finaliser of SplitMix64 (Steele, Lea, Flood 2014): 64 bits in, 64 bits out, each of which depends on all."""

from __future__ import annotations

import numba as nb
import numpy as np

__all__ = ["finalise"]


@nb.njit(inline="always")
def finalise(z):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Finalise a uint64 in kernels; its ``py_func`` takes arrays."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
