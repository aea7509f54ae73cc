"""One pass over values: what dtype could hold them."""

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.kernels.compiled import compiled

__all__ = ["add_floats", "add_whole", "float_range", "narrow_counts", "range_of"]


@compiled
def float_range(values):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201, ANN202
    """(integral, low, high, single, n_nan, n_inf) of a 1-D float array; see ``plan.dtypes.ValueRange``.

    The range is that of the finite values.
    """
    low, high = 0.0, 0.0
    not_whole, not_single, n_nan, n_inf = 0, 0, 0, 0
    for k in range(values.shape[0]):
        v = np.float64(values[k])
        finite = v if v - v == 0.0 else 0.0
        low = min(low, finite)
        high = max(high, finite)
        # a negative zero is whole, but an integer would lose its sign
        not_whole += (v != np.floor(v)) | ((v == 0.0) & np.signbit(v))
        not_single += (np.float64(np.float32(v)) != v) & (v == v)  # noqa: PLR0124
        n_nan += v != v  # noqa: PLR0124
        n_inf += (v == np.inf) | (v == -np.inf)
    return not_whole + n_nan + n_inf == 0, low, high, not_single == 0, n_nan, n_inf


@compiled
def all_whole(values, bits):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201, ANN202
    """True if every float is a whole number and none a negative zero, whose sign an integer would lose."""
    fractions, negative_zeros = 0, 0
    sign = bits.dtype.type(1) << bits.dtype.type(8 * bits.itemsize - 1)
    for k in range(values.shape[0]):
        fractions += np.floor(values[k]) != values[k]
    for k in range(bits.shape[0]):
        negative_zeros += bits[k] == sign
    return fractions + negative_zeros == 0


@compiled
def narrow_counts(values, bits, out):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Write floats to a uint16 array; returns whether every one is a count that fits exactly, and the greatest."""
    misfits, greatest = 0, np.uint16(0)
    top = bits.dtype.type(8 * bits.itemsize - 1)
    for k in range(values.shape[0]):
        v = values[k]
        # the clamp keeps the cast defined; a negative zero has its sign bit
        u = np.uint16(min(max(v, values.dtype.type(0)), values.dtype.type(65535)))
        out[k] = u
        greatest = max(greatest, u)
        misfits += (values.dtype.type(u) != v) | (bits[k] >> top)
    return misfits == 0, greatest


def range_of(values: NDArray) -> tuple[bool, float, float, bool, int, int, bool]:
    """Like `float_range`, for any real dtype, with exact integer bounds, and whether float64 holds them; includes 0.

    Whole numbers from 2**63 on are not called integral, as they fit no signed integer.
    """
    if values.size == 0:
        return True, 0, 0, True, 0, 0, True
    flat = values.reshape(-1)
    if flat.dtype.kind in "bui":
        low, high = min(0, int(flat.min())), max(0, int(flat.max()))
        double = -(2**53) <= low and high <= 2**53
        return True, low, high, -(2**24) <= low and high <= 2**24, 0, 0, double
    if flat.dtype.itemsize < 4:  # noqa: PLR2004
        flat = flat.astype(np.float32)
    low_f, high_f = float(flat.min()), float(flat.max())
    limit = 2**24 if flat.dtype.itemsize == 4 else 2**53  # noqa: PLR2004
    if -limit < low_f and high_f < limit and all_whole(flat, flat.view(f"u{flat.dtype.itemsize}")):  # counts, by far
        low, high = min(0, int(low_f)), max(0, int(high_f))
        return True, low, high, -(2**24) <= low and high <= 2**24, 0, 0, True
    whole, low_f, high_f, single, n_nan, n_inf = float_range(flat)
    whole = whole and -(2.0**63) < low_f and high_f < 2.0**63
    return whole, int(low_f) if whole else low_f, int(high_f) if whole else high_f, single, n_nan, n_inf, True


@compiled
def add_whole(offsets, keys, values, ends, at, limits):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201, PLR0913, PLR0917
    """Add up the integers of equal neighbouring keys of each row, in place; stops where a sum does not fit.

    ``offsets``: (n + 1,) of rows whose keys ascend. ``ends``: (n + 1,) offsets after it, written. ``at``: row, entry
    and free place to begin with, moved on; the row is n at the end. ``limits``: least and greatest sum, and 0, as int64
    or uint64, which sums are made in.
    """
    low, high, zero = limits[0], limits[1], limits[2]
    row, k, place = at[0], at[1], at[2]
    n = offsets.shape[0] - 1
    while row < n:
        stop = offsets[row + 1]
        while k < stop:
            key, total, m = keys[k], zero + values[k], k + 1
            while m < stop and keys[m] == key:
                v = zero + values[m]
                if (v > zero and total > high - v) or (v < zero and total < low - v):
                    at[0], at[1], at[2] = row, k, place
                    return
                total += v
                m += 1
            keys[place], values[place] = key, total
            place, k = place + 1, m
        row += 1
        ends[row] = place
    at[0], at[1], at[2] = row, k, place


@compiled
def add_floats(offsets, keys, values, ends):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Like :func:`add_whole`, of floats: each sum is made in float64, and rounded once.

    Returns the first sum of whole numbers that was not exact; 0 if there is none.
    """
    place, bad = 0, 0.0
    for row in range(offsets.shape[0] - 1):
        k, stop = offsets[row], offsets[row + 1]
        while k < stop:
            key, value, total, m = keys[k], values[k], np.float64(values[k]), k + 1
            whole, peak = total == np.floor(total), np.abs(total)
            while m < stop and keys[m] == key:
                v = np.float64(values[m])
                whole = whole and v == np.floor(v)
                total += v
                peak = max(peak, np.abs(total))
                m += 1
            keys[place], values[place] = key, value
            if m > k + 1:
                values[place] = total
                is_exact = np.float64(values[place]) == total and peak < 2.0**53
                if whole and not is_exact and total - total == 0.0 and bad == 0.0:  # infinity is none
                    bad = total
            place, k = place + 1, m
        ends[row + 1] = place
    return bad
