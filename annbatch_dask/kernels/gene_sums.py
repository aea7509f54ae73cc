"""Sums over cells of each gene, by group of cells: what means, variances and dispersions are worked out of."""

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic
from numpy.typing import NDArray

from annbatch_dask.kernels.compiled import compiled
from annbatch_dask.kernels.packed import U64, pointer_to
from annbatch_dask.kernels.rows import offsets_of

__all__ = ["N_SUMS", "SUMS", "add_clipped", "add_csr", "add_dense", "new_sums"]

SUMS = (
    "n_nonzero",
    "sum",
    "sum_of_squares",
    "normalized_sum",
    "normalized_sum_of_squares",
    "log_sum",
    "log_sum_of_squares",
)
"""Of a gene: cells that have it; sums of its counts, of those scaled to one sum a cell, and of log(1 + x) of these."""
N_SUMS = 8
"""Their places, the last of which is empty: a gene's sums are one line of a processor's cache."""
_COUNT_NBYTES = 4
"""Counts of so many bytes add up to a row's sum in 64 bits."""
_TABLE = 64
"""Counts below this are worked out once a row, most of whose values are the same few."""
_RUN = 64
"""Counts that are looked at together for one that is not in the table."""


def new_sums(n_groups: int, n_vars: int) -> NDArray[np.float64]:
    """(n_groups, n_vars, :data:`N_SUMS`) float64 zeros."""
    flat = np.zeros(n_groups * n_vars * N_SUMS + N_SUMS)
    shift = (-flat.ctypes.data // 8) % N_SUMS  # to where a line of the cache begins
    return flat[shift : shift + n_groups * n_vars * N_SUMS].reshape(n_groups, n_vars, N_SUMS)


@compiled
def _fill(line, value, scale):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    scaled = value * scale
    logged = np.log1p(scaled)
    line[0], line[1], line[2] = 1.0, value, value * value
    line[3], line[4] = scaled, scaled * scaled
    line[5], line[6] = logged, logged * logged


def _add_line(_typing: Any, lines: Any, at: Any, out: Any, to: Any) -> Any:
    """Add the line of sums at ``lines[at]`` to that at ``out[to]``, as one vector."""
    vector = ir.VectorType(ir.DoubleType(), N_SUMS)

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> None:
        line = builder.load(pointer_to(builder, context, lines, args[0], args[1], vector), align=8)
        place = pointer_to(builder, context, out, args[2], args[3], vector)
        builder.store(builder.fadd(line, builder.load(place, align=8)), place, align=8)

    return numba.void(lines, at, out, to), generate


add_line: Any = intrinsic(_add_line)


@compiled
def _scan(values, large):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """The sum of a row's counts, the bits that any has, and how many are not in the table: ``large`` says where."""
    total, seen, n_large = U64(0), U64(0), 0
    for start in range(0, values.shape[0], _RUN):
        some, bits = values[start : start + _RUN], U64(0)
        for k in range(some.shape[0]):
            total += U64(some[k])
            bits |= U64(some[k])
        seen |= bits
        if bits >= _TABLE:
            for k in range(some.shape[0]):
                large[n_large] = start + k
                n_large += some[k] >= _TABLE
    return total, seen, n_large


@compiled
def _add_counts(sums, n_vars, order, groups, offsets, indices, values, target_sum):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, PLR0913, PLR0917
    """Whole numbers of 0 and more. Those not in the table are added last, so that the loop has no branch."""
    longest = 0
    for row in order:
        longest = max(longest, offsets[row + 1] - offsets[row])
    large, lines = np.empty(longest + 1, np.int64), np.zeros((_TABLE + 2, N_SUMS))
    flat = lines.reshape(lines.size)
    for row in order:
        start, stop = offsets[row], offsets[row + 1]
        row_indices, row_values, first = indices[start:stop], values[start:stop], U64(groups[row] * n_vars)
        total, seen, n_large = _scan(row_values, large)
        scale = target_sum / max(float(total), 1.0)
        for small in range(1, min(int(seen) + 1, _TABLE)):
            _fill(lines[small], float(small), scale)
        for k in range(row_values.shape[0]):
            line = min(U64(row_values[k]), U64(_TABLE))  # whose line is empty
            add_line(flat, line * U64(N_SUMS), sums, (first + U64(row_indices[k])) * U64(N_SUMS))
        for j in range(n_large):
            k = large[j]
            _fill(lines[_TABLE + 1], float(row_values[k]), scale)
            add_line(flat, U64(_TABLE + 1) * U64(N_SUMS), sums, (first + U64(row_indices[k])) * U64(N_SUMS))


@compiled
def _add_values(sums, n_vars, order, groups, offsets, indices, values, target_sum):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, PLR0913, PLR0917
    """Any numbers."""
    line = np.zeros(N_SUMS)
    for row in order:
        first, total = groups[row] * n_vars, 0.0
        for k in range(offsets[row], offsets[row + 1]):
            total += values[k]
        scale = target_sum / (total if total != 0 else 1.0)
        for k in range(offsets[row], offsets[row + 1]):
            if values[k] != 0:
                _fill(line, float(values[k]), scale)
                add_line(line, U64(0), sums, U64(first + indices[k]) * U64(N_SUMS))


def add_csr(
    sums: NDArray[np.float64],
    groups: NDArray[np.int64],
    offsets: NDArray[np.int64],
    indices: NDArray,
    values: NDArray,
    target_sum: float,
) -> None:
    """Add rows of a CSR matrix to the sums of their groups.

    Each group's rows are added one by one in their order, so the sums do not depend on how rows are cut into calls.
    Sums of whole numbers are exact below 2**53.

    Parameters
    ----------
    sums
        Of :func:`new_sums`; changed in place.
    groups
        (n_rows,) group of each row.
    offsets, indices, values
        (n_rows + 1,), from 0, (nnz,) and (nnz,).
    target_sum
        What a row is scaled to before the logarithm.
    """
    is_one = sums.shape[0] == 1
    order = np.arange(len(groups)) if is_one else np.argsort(groups, kind="stable")  # a group's sums stay in the cache
    is_count = values.dtype.kind == "u" and values.dtype.itemsize <= _COUNT_NBYTES
    add = _add_counts if is_count else _add_values
    add(sums.reshape(-1), sums.shape[1], order, groups, offsets, indices, values, float(target_sum))


def add_dense(sums: NDArray[np.float64], groups: NDArray[np.int64], rows: NDArray, target_sum: float) -> None:
    """Add (n_rows, n_vars) rows likewise."""
    there = rows != 0
    offsets = offsets_of(there.sum(1, dtype=np.int64))
    add_csr(sums, groups, offsets, there.nonzero()[1], rows[there], target_sum)


@compiled
def _add_clipped(out, order, groups, offsets, indices, values, clip):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, PLR0913, PLR0917
    for row in order:
        sums, limits = out[groups[row]], clip[groups[row]]
        for k in range(offsets[row], offsets[row + 1]):
            v = min(float(values[k]), limits[indices[k]])
            sums[indices[k], 0] += v
            sums[indices[k], 1] += v * v


def add_clipped(
    out: NDArray[np.float64],
    groups: NDArray[np.int64],
    offsets: NDArray[np.int64],
    indices: NDArray,
    values: NDArray,
    clip: NDArray[np.float64],
) -> None:
    """Add rows of a CSR matrix, cut at a highest value, and the squares of these, to the sums of their groups.

    Parameters
    ----------
    out
        (n_groups, n_vars, 2) float64; changed in place.
    clip
        (n_groups, n_vars) float64.
    """
    order = np.argsort(groups, kind="stable")
    _add_clipped(out, order, np.asarray(groups, np.int64), offsets, indices, values, clip)
