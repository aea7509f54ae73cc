"""The swap-or-not shuffle: a keyed bijection on [0, n) for any n, computed row by row."""

import numba as nb
import numpy as np

__all__ = ["swap_or_not"]


@nb.njit(nogil=True, cache=True)
def swap_or_not(x: np.ndarray, n: np.uint64, offsets: np.ndarray, keys: np.ndarray, order: np.ndarray) -> None:
    """Apply rounds of swap-or-not to ``x`` in place.

    Each round pairs x with ``offset - x mod n`` and swaps the pair when a keyed bit of its larger
    member says so. A round is its own inverse, so the rounds in reverse order undo the whole.

    Parameters
    ----------
    x
        (n_rows,) uint64, each < n.
    n
        Size of the domain.
    offsets
        (n_rounds,) uint64, each < n.
    keys
        (n_rounds,) uint64, any value.
    order
        (n_rounds,) int64, the order in which to apply the rounds.

    References
    ----------
    Hoang, Morris, Rogaway (2012), "An Enciphering Scheme Based on a Card Shuffle", CRYPTO 2012.
    The keyed bit is the top bit of the finaliser of SplitMix64 (Steele, Lea, Flood 2014).
    """
    block = 4096  # rows at a time: stays in the first-level cache over all rounds
    for start in range(0, x.shape[0], block):
        part = x[start : start + block]
        for r in order:
            offset, key = offsets[r], keys[r]
            for i in range(part.shape[0]):
                a = part[i]
                b = offset - a if offset >= a else offset + (n - a)
                z = max(a, b) + key
                z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
                z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
                part[i] = b if z >> np.uint64(63) else a
