"""Sums over cells of each gene, by group of cells: what means, variances and dispersions are worked out of."""

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic
from numpy.typing import NDArray

from annbatch_dask.kernels.compiled import compiled
from annbatch_dask.kernels.packed import U64, pointer_to, spread
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
"""Counts below this are worked out once a row, most of whose values are the same few. It has to fit into 8 bits."""
_RUN = 64
"""Counts that are looked at together for those that are not in the table: one bit of a word for each."""


def new_sums(n_groups: int, n_vars: int) -> NDArray[np.float64]:
    """(n_groups, n_vars, :data:`N_SUMS`) float64 zeros."""
    flat = np.zeros(n_groups * n_vars * N_SUMS + N_SUMS)
    shift = (-flat.ctypes.data // 8) % N_SUMS  # to where a line of the cache begins
    return flat[shift : shift + n_groups * n_vars * N_SUMS].reshape(n_groups, n_vars, N_SUMS)


@compiled
def _fill(line, scaled, logged):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    line[3], line[4] = scaled, scaled * scaled
    line[5], line[6] = logged, logged * logged


@compiled
def _count(line, value):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    line[0], line[1], line[2] = 1.0, value, value * value


def _add_line(_typing: Any, lines: Any, at: Any, out: Any, to: Any) -> Any:
    """Add the line of sums at ``lines[at]`` to that at ``out[to]``, as one vector."""
    vector = ir.VectorType(ir.DoubleType(), N_SUMS)

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> None:
        line = builder.load(pointer_to(builder, context, lines, args[0], args[1], vector), align=8)
        place = pointer_to(builder, context, out, args[2], args[3], vector)
        builder.store(builder.fadd(line, builder.load(place, align=8)), place, align=8)

    return numba.void(lines, at, out, to), generate


add_line: Any = intrinsic(_add_line)


def _look_at_run(_typing: Any, values: Any, at: Any, limit: Any) -> Any:
    """Of ``values[at:at + 64]``, unsigned: their sum, and which are at least ``limit``, a bit for each."""
    item, word = ir.IntType(values.dtype.bitwidth), ir.IntType(64)
    wide = ir.IntType(max(32, 2 * item.width))  # holds the sum of a run
    here, there = ir.VectorType(item, _RUN), ir.VectorType(wide, _RUN)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        run = builder.load(pointer_to(builder, context, values, args[0], args[1], here), align=item.width // 8)
        kind = ir.FunctionType(wide, [there])
        add = get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.add.v{_RUN}i{wide.width}")
        total = builder.call(add, [builder.zext(run, there)])
        limits = spread(builder, builder.trunc(args[2], item), here)
        is_large = builder.bitcast(builder.icmp_unsigned(">=", run, limits), word)
        total = builder.zext(total, word) if wide.width < word.width else total
        return context.make_tuple(builder, signature.return_type, [total, is_large])

    return numba.types.UniTuple(numba.uint64, 2)(values, at, numba.uint64), generate


def _lowest_bit(_typing: Any, bits: Any) -> Any:
    """Place of the lowest bit that is set, of a number other than 0."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.IntType(1)(1))

    return numba.uint64(bits), generate


look_at_run: Any = intrinsic(_look_at_run)
lowest_bit: Any = intrinsic(_lowest_bit)


@compiled
def _scan(values, large):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """The sum of a row's counts, and how many are not in the table: ``large`` says where."""
    total, n_large, whole = U64(0), 0, values.shape[0] // _RUN * _RUN
    for start in range(0, whole, _RUN):
        some, is_large = look_at_run(values, start, U64(_TABLE))
        total += some
        while is_large != U64(0):
            large[n_large] = start + lowest_bit(is_large)
            n_large += 1
            is_large &= is_large - U64(1)
    for k in range(whole, values.shape[0]):
        total += U64(values[k])
        large[n_large] = k
        n_large += values[k] >= _TABLE
    return total, n_large


@compiled
def _add_counts(sums, lines, n_vars, order, groups, offsets, indices, values, target_sum):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, PLR0913, PLR0917
    """Whole numbers of 0 and more. Those not in the table are added last, so that the loop has no branch.

    ``lines``: zeros: of each count in the table, an empty one, and one for a count that is not there.
    """
    longest = 0
    for row in order:
        longest = max(longest, offsets[row + 1] - offsets[row])
    large, flat, other = np.empty(longest + 1, np.int64), lines.reshape(lines.size), _TABLE + 1
    for small in range(1, _TABLE):
        _count(lines[small], float(small))
    for row in order:
        start, stop = offsets[row], offsets[row + 1]
        row_indices, row_values, first = indices[start:stop], values[start:stop], U64(groups[row] * n_vars)
        total, n_large = _scan(row_values, large)
        scale = target_sum / max(float(total), 1.0)
        for small in range(1, min(int(total) + 1, _TABLE)):
            scaled = float(small) * scale
            _fill(lines[small], scaled, np.log(1.0 + scaled))  # log1p is slower; this is off by 1e-16 at most
        for k in range(row_values.shape[0]):
            line = min(U64(row_values[k]), U64(_TABLE))  # whose line is empty
            add_line(flat, line * U64(N_SUMS), sums, (first + U64(row_indices[k])) * U64(N_SUMS))
        for j in range(n_large):
            k = large[j]
            value = float(row_values[k])
            _count(lines[other], value)
            _fill(lines[other], value * scale, np.log(1.0 + value * scale))
            add_line(flat, U64(other) * U64(N_SUMS), sums, (first + U64(row_indices[k])) * U64(N_SUMS))


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
                value = np.float64(values[k])  # float() of float32 stays it, and its square would be rounded
                _count(line, value)
                _fill(line, value * scale, np.log1p(value * scale))
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
    flat, n_vars = sums.reshape(-1), sums.shape[1]
    rows = (order, groups, offsets, indices, values, float(target_sum))
    if is_count:
        _add_counts(flat, new_sums(1, _TABLE + 2)[0], n_vars, *rows)
    else:
        _add_values(flat, n_vars, *rows)


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
            v = min(np.float64(values[k]), limits[indices[k]])
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
