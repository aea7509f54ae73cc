"""Rows on a CUDA device. Sparse ones become dense in one cupy kernel, a block of threads a row.

Its twin on the CPU is :func:`annbatch_dask.kernels.assemble.scatter_rows`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

__all__ = ["SOURCE", "densify", "normalized"]

_THREADS = 256
_NAMES = {
    "b1": "bool",
    "i1": "signed char",
    "u1": "unsigned char",
    "i2": "short",
    "u2": "unsigned short",
    "i4": "int",
    "u4": "unsigned int",
    "i8": "long long",
    "u8": "unsigned long long",
    "f4": "float",
    "f8": "double",
}

SOURCE = r"""
template <typename Sum>
struct Cast {
    template <typename Value> static __device__ Sum of(Value value) { return (Sum)value; }
};
template <>
struct Cast<unsigned long long> {  // which stands for signed ones: CUDA adds up no others of 64 bits
    template <typename Value> static __device__ unsigned long long of(Value value) { return (long long)value; }
};

template <typename Value, typename Column, typename Sum>
__global__ void densify(const Value* values, const Column* columns, const long long* indptr, const int* places,
                        long long n_columns, double target_sum, Sum* out, long long width,
                        unsigned long long* n_outside)
{
    const long long first = indptr[blockIdx.x] + threadIdx.x, last = indptr[blockIdx.x + 1];
    Sum* row = out + blockIdx.x * width;
    __shared__ double total;
    if (threadIdx.x == 0) total = 0;
    for (long long column = threadIdx.x; column < width; column += blockDim.x) row[column] = 0;
    __syncthreads();
    if (target_sum > 0) {
        double part = 0;
        for (long long j = first; j < last; j += blockDim.x) part += (double)values[j];
        atomicAdd(&total, part);
        __syncthreads();
    }
    const double scale = total != 0 ? target_sum / total : 1;
    for (long long j = first; j < last; j += blockDim.x) {
        const unsigned long long column = columns[j];  // a negative one becomes huge
        if (column >= (unsigned long long)n_columns) {
            atomicAdd(n_outside, 1ULL);
            continue;
        }
        const long long place = places ? places[column] : (long long)column;
        if (place < 0) continue;
        // Atomic, since a row may name a column twice.
        if (target_sum > 0) atomicAdd(row + place, Cast<Sum>::of(log1p((double)values[j] * scale)));
        else atomicAdd(row + place, Cast<Sum>::of(values[j]));
    }
}
"""


def densify(
    sparse: tuple[Any, Any, Any], n_columns: int, out: Any, *, places: Any | None, target_sum: float | None
) -> Any:
    """Fill dense rows from sparse ones, on the current device and stream; returns before it is done.

    Parameters
    ----------
    sparse
        Values, columns and row pointers (int64): cupy arrays, row ``i`` is ``indptr[i]:indptr[i + 1]``.
    n_columns
        Columns of the data.
    out
        (n_rows, width) of float32, float64, int32 or int64; what it held is overwritten.
    places
        (n_columns,) int32: where each column goes, -1 for one that is left out; None puts each where it was.
    target_sum
        Scale each row to this sum, over all its columns, and take log(1 + x); None takes the values as they are.

    Returns
    -------
    Array of one uint64: entries left out because their column does not exist, 0 on sound data.
    """
    import cupy

    values, columns, indptr = sparse
    n_outside = cupy.zeros(1, np.uint64)
    sums = out.view(np.uint64) if out.dtype == np.int64 else out
    if len(out):
        arguments = (values, columns, indptr, 0 if places is None else places)  # 0: the null pointer
        numbers = (np.int64(n_columns), np.float64(target_sum or 0), sums, np.int64(out.shape[1]), n_outside)
        kernel = _compiled(*(_NAMES[array.dtype.str[1:]] for array in (values, columns, sums)))
        kernel((len(out),), (_THREADS,), (*arguments, *numbers))
    return n_outside


def normalized(rows: Any, target_sum: float) -> Any:
    """Dense rows scaled to a sum, log(1 + x) of them; float64."""
    import cupy

    totals = rows.sum(axis=1, dtype=np.float64, keepdims=True)
    return cupy.log1p(rows * (target_sum / cupy.where(totals != 0, totals, target_sum)))


@cache
def _compiled(value: str, column: str, total: str) -> Any:
    import cupy

    name = f"densify<{value}, {column}, {total}>"
    module = cupy.RawModule(code=SOURCE, options=("-std=c++17",), name_expressions=[name])
    return module.get_function(name)
