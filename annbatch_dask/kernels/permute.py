"""The swap-or-not shuffle: a keyed bijection on [0, n) for any n, computed row by row."""

from hashlib import blake2b

import numpy as np

from annbatch_dask.kernels.compiled import compiled
from annbatch_dask.kernels.splitmix import finalise

__all__ = ["count_rounds", "round_keys", "swap_or_not"]


def count_rounds(n: int) -> int:
    """Number of rounds after which pairs of rows are indistinguishable from uniform; see :func:`swap_or_not`."""
    return 96 + 6 * max(1, n).bit_length()


def round_keys(n: int, n_rounds: int, *label: object) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and keys of the rounds: integers of our own, the same on every machine.

    Parameters
    ----------
    n
        Size of the domain.
    n_rounds
        Number of rounds.
    label
        What the permutation belongs to; its parts enter by their text.

    Returns
    -------
    (n_rounds,) uint64 offsets below ``n``; (n_rounds,) uint64 keys.
    """
    drawn = [_derive(*label, r) for r in range(n_rounds)]
    return np.array([a % n for a, _ in drawn], np.uint64), np.array([k for _, k in drawn], np.uint64)


def _derive(*parts: object) -> tuple[int, int]:
    """128 and 64 bits that depend on all parts."""
    digest = blake2b("/".join(map(str, parts)).encode(), digest_size=24).digest()
    return int.from_bytes(digest[:16], "little"), int.from_bytes(digest[16:], "little")


@compiled
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
                part[i] = b if finalise(max(a, b) + key) >> np.uint64(63) else a
