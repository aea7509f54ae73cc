"""Randomness as a function of integers: nothing here is advanced, so nothing depends on who asks first."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.kernels.permute import count_rounds, round_keys, swap_or_not
from annbatch_dask.kernels.shuffle import MAX_PERMUTED, permute
from annbatch_dask.kernels.splitmix import finalise

__all__ = ["Key", "Shuffled", "generator", "permutation", "uniforms"]

Ints = NDArray[np.int64]
Key = tuple[int, int]
"""Seed and epoch."""


def generator(key: Key, *position: int) -> np.random.Generator:
    """The generator that belongs to one position of one epoch."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key, spawn_key=position)))


def permutation(n: int, key: Key, *position: int) -> Ints:
    """``generator(key, *position).permutation(n)``, in half the time, and the same whatever numpy's version."""
    if n > MAX_PERMUTED:
        return generator(key, *position).permutation(n)
    words = np.random.SeedSequence(key, spawn_key=position).generate_state(2, np.uint64)
    order: Ints = permute(words, n)
    return order


def uniforms(key: Key, role: int, counters: NDArray[np.integer]) -> NDArray[np.float64]:
    """(k,) numbers in [0, 1), each a function of the key, the role and its own one of the (k,) counters.

    The finaliser of SplitMix64 (Steele, Lea, Flood 2014) on an arithmetic sequence, as it is meant to be used.
    """
    start = generator(key, role).integers(2**64, dtype=np.uint64)
    z = counters.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start
    top_53_bits: NDArray[np.uint64] = finalise.py_func(z) >> np.uint64(11)
    return top_53_bits.astype(np.float64) * 2.0**-53


class Shuffled:
    """A random order of [0, n), looked up at any position without the rest of it being made.

    Parameters
    ----------
    n
        How many.
    key
        Seed and epoch.
    """

    def __init__(self, n: int, key: Key) -> None:
        self._n = n
        n_rounds = count_rounds(n)
        self._rounds = np.arange(n_rounds)
        self._keys = round_keys(max(n, 1), n_rounds, "order", n, *key)

    def __len__(self) -> int:
        return self._n

    def at(self, positions: NDArray[np.integer]) -> Ints:
        """(k,) int64, what is at each of the (k,) positions."""
        return self._apply(positions, self._rounds)

    def find(self, values: NDArray[np.integer]) -> Ints:
        """(k,) int64, the position of each of the (k,) values."""
        return self._apply(values, self._rounds[::-1].copy())

    def _apply(self, values: NDArray[np.integer], rounds: Ints) -> Ints:
        out = np.array(values, np.uint64)
        if self._n > 1:
            swap_or_not(out, np.uint64(self._n), *self._keys, rounds)
        return out.astype(np.int64)
