"""Rows on a CUDA device: one kernel makes the batch, each of its elements written once, in the delivered dtype.

A block of threads makes a stretch of columns of one row: in shared memory, where entries are added up, and from there
in order. Rows are in a slab, the bytes of a window as they were loaded; tables say where each begins.

The twins on the CPU are :func:`annbatch_dask.kernels.assemble.scatter_rows` and ``take_columns``; the source below is
also C++, and the tests run it as such.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike

__all__ = ["N_THREADS", "SOURCE", "Kernel", "compiled", "find_compiler", "kernel_name", "knows", "tiles"]

Kernel = Callable[[tuple[int, int], int, list[Any], Any], None]
"""Launches: grid, bytes of shared memory, arguments, stream. Arguments are arrays, ints (32 bits) and floats (64)."""

N_THREADS = 256
_TILE_NBYTES = 40 * 1024
"""Of shared memory for a block: five blocks fit on a multiprocessor of the last generations, one on any."""

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
    "f2": "Half",
    "f4": "float",
    "f8": "double",
}

SOURCE = r"""
struct Half { unsigned short bits; };
struct BFloat { unsigned short bits; };
union Bits { float number; unsigned int bits; };

template <typename Value> struct Read {
    static __device__ Value of(Value value) { return value; }
};
template <> struct Read<Half> {
    static __device__ float of(Half half)
    {
        const unsigned int exponent = half.bits >> 10 & 31, digits = half.bits & 1023;
        Bits out;
        if (exponent == 0) out.number = digits * 5.9604644775390625e-8f;
        else out.bits = (exponent == 31 ? 0x7f800000u : exponent + 112u << 23) | digits << 13;
        out.bits |= (half.bits & 0x8000u) << 16;
        return out.number;
    }
};

// What is added up: integers of 64 bits as unsigned ones, since CUDA adds up no others.
template <typename Sum> struct Cast {
    template <typename Value> static __device__ Sum of(Value value) { return (Sum)value; }
};
template <> struct Cast<unsigned long long> {
    template <typename Value> static __device__ unsigned long long of(Value value) { return (long long)value; }
    static __device__ unsigned long long of(unsigned long long value) { return value; }
};

// What is delivered. Half precision is rounded to the nearest, to the even one of two.
template <typename Out> struct Write {
    template <typename Sum> static __device__ Out of(Sum sum) { return (Out)sum; }
};
template <> struct Write<BFloat> {
    static __device__ BFloat of(float sum)
    {
        Bits in;
        in.number = sum;
        BFloat out;
        out.bits = sum != sum ? 0x7fc0 : (in.bits + 0x7fffu + (in.bits >> 16 & 1)) >> 16;
        return out;
    }
};
template <> struct Write<Half> {
    static __device__ Half of(float sum)
    {
        Bits in;
        in.number = sum;
        const unsigned int sign = in.bits >> 16 & 0x8000u;
        unsigned int rest = in.bits & 0x7fffffffu;
        if (rest > 0x7f800000u) rest = 0x7e00;
        else if (rest >= 0x47800000u) rest = 0x7c00;
        else if (rest >= 0x38800000u) rest = rest - 0x38000000u + 0xfffu + (rest >> 13 & 1) >> 13;
        else rest = (unsigned int)rintf((sum < 0 ? -sum : sum) * 16777216.0f);
        Half out;
        out.bits = sign | rest;
        return out;
    }
};

// Four values that are written at once.
template <typename Out> struct alignas(4 * sizeof(Out)) Four { Out of[4]; };

// The sum of a row, the same whatever block asks for it.
template <typename Value> __device__ double sum_of(const Value* values, int length)
{
    __shared__ double partial[N_THREADS];
    double part = 0;
    for (int j = threadIdx.x; j < length; j += blockDim.x) part += (double)Read<Value>::of(values[j]);
    partial[threadIdx.x] = part;
    __syncthreads();
    for (int half = N_THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half && threadIdx.x + half < blockDim.x) partial[threadIdx.x] += partial[threadIdx.x + half];
        __syncthreads();
    }
    return partial[0];
}

template <typename Value, typename Column, typename Sum, typename Out>
__global__ void densify(const unsigned char* slab, const long long* value_at, const long long* column_at,
                        const int* lengths, const int* rows, const int* dest, int first, const int* places,
                        int is_chosen, int n_columns, int width, int tile, double target_sum, Out* out,
                        unsigned long long* n_outside, int batch)
{
    extern __shared__ double shared[];
    Sum* sums = (Sum*)shared;
    const int row = rows[first + blockIdx.x], length = lengths[row];
    const int begin = blockIdx.y * tile, size = width - begin < tile ? width - begin : tile;
    const Value* values = (const Value*)(slab + value_at[row]);
    const Column* columns = (const Column*)(slab + column_at[row]);

    for (int j = 2 * threadIdx.x; j < tile; j += 2 * blockDim.x) sums[j] = sums[j + 1] = 0;  // tiles are even
    double scale = 1;
    if (target_sum > 0) {
        const double total = sum_of(values, length);
        if (total != 0) scale = target_sum / total;
    }
    __syncthreads();
    for (int j = threadIdx.x; j < length; j += blockDim.x) {
        const unsigned long long column = columns[j];  // a negative one becomes huge
        if (column >= (unsigned long long)n_columns) {
            if (blockIdx.y == 0) atomicAdd(n_outside + batch, 1ULL);
            continue;
        }
        const int place = (is_chosen ? places[column] : (int)column) - begin;
        if (place < 0 || place >= size) continue;
        // Atomic, since a row may name a column twice.
        if (target_sum > 0) atomicAdd(sums + place, Cast<Sum>::of(log1p((double)Read<Value>::of(values[j]) * scale)));
        else atomicAdd(sums + place, Cast<Sum>::of(Read<Value>::of(values[j])));
    }
    __syncthreads();
    Out* to = out + (long long)dest[first + blockIdx.x] * width + begin;
    if (width % 4 == 0 && sizeof(Out) <= 4) {  // so are begin and size
        for (int j = 4 * threadIdx.x; j < size; j += 4 * blockDim.x) {
            Four<Out> four;
            for (int k = 0; k < 4; k++) four.of[k] = Write<Out>::of(sums[j + k]);
            *(Four<Out>*)(to + j) = four;
        }
    } else {
        for (int j = threadIdx.x; j < size; j += blockDim.x) to[j] = Write<Out>::of(sums[j]);
    }
}

template <typename Value, typename Column, typename Sum, typename Out, typename Index>
__global__ void gather(const unsigned char* slab, const long long* value_at, const long long* column_at,
                       const int* lengths, const int* rows, const int* dest, int first, const long long* starts,
                       double target_sum, Out* out, Index* out_columns)
{
    const int row = rows[first + blockIdx.x], length = lengths[row];
    const long long start = starts[dest[first + blockIdx.x]];
    const Value* values = (const Value*)(slab + value_at[row]);
    const Column* columns = (const Column*)(slab + column_at[row]);
    double scale = 1;
    if (target_sum > 0) {
        const double total = sum_of(values, length);
        if (total != 0) scale = target_sum / total;
    }
    for (int j = threadIdx.x; j < length; j += blockDim.x) {
        if (target_sum > 0) {
            out[start + j] = Write<Out>::of(Cast<Sum>::of(log1p((double)Read<Value>::of(values[j]) * scale)));
        } else {
            out[start + j] = Write<Out>::of(Cast<Sum>::of(Read<Value>::of(values[j])));
        }
        out_columns[start + j] = columns[j];
    }
}

template <typename Value, typename Sum, typename Out>
__global__ void pick(const unsigned char* slab, const long long* value_at, const int* rows, const int* dest, int first,
                     const int* columns, int is_chosen, int n_columns, int width, int tile, double target_sum, Out* out)
{
    const Value* values = (const Value*)(slab + value_at[rows[first + blockIdx.x]]);
    const int begin = blockIdx.y * tile, end = width - begin < tile ? width : begin + tile;
    double scale = 1;
    if (target_sum > 0) {
        const double total = sum_of(values, n_columns);
        if (total != 0) scale = target_sum / total;
    }
    Out* to = out + (long long)dest[first + blockIdx.x] * width;
    for (int j = begin + threadIdx.x; j < end; j += blockDim.x) {
        const Value value = values[is_chosen ? columns[j] : j];
        if (target_sum > 0) to[j] = Write<Out>::of(Cast<Sum>::of(log1p((double)Read<Value>::of(value) * scale)));
        else to[j] = Write<Out>::of(Cast<Sum>::of(Read<Value>::of(value)));
    }
}
""".replace("N_THREADS", str(N_THREADS))


def tiles(width: int, itemsize: int) -> tuple[int, int]:
    """Into how many stretches rows are cut, and how many columns each has; a multiple of 32 of them."""
    most = _TILE_NBYTES // itemsize
    n_tiles = max(1, -(-width // most))
    tile = -(-width // n_tiles)
    return n_tiles, max(32, -(-tile // 32) * 32)


def kernel_name(
    kernel: Literal["densify", "gather", "pick"],
    stored: Sequence[DTypeLike],
    total: DTypeLike,
    delivered: DTypeLike | None,
    index: DTypeLike | None = None,
) -> str:
    """A kernel for some dtypes.

    Parameters
    ----------
    kernel
        Makes dense rows of sparse ones, sparse ones of sparse ones, or dense ones of dense ones.
    stored
        Dtypes of values, and of columns for sparse rows.
    total
        Dtype of sums: float32, float64, int32 or int64.
    delivered
        Dtype of the output; None for bfloat16.
    index
        Dtype of output columns, for ``"gather"``.

    Raises
    ------
    KeyError
        If CUDA does not know a dtype.
    """
    added = {"long long": "unsigned long long"}.get(_name(total), _name(total))
    names = [*map(_name, stored), added, "BFloat" if delivered is None else _name(delivered)]
    return f"{kernel}<{', '.join(names if index is None else [*names, _name(index)])}>"


def knows(dtype: DTypeLike) -> bool:
    """True if kernels read and write a dtype."""
    return np.dtype(dtype).isnative and np.dtype(dtype).str[1:] in _NAMES


def _name(dtype: DTypeLike) -> str:
    return _NAMES[np.dtype(dtype).str[1:]]


def find_compiler(library: Literal["cupy", "torch"]) -> Literal["cupy", "torch"] | None:
    """Return the kernel compiler for arrays of a library, or None.

    torch's arrays take cupy's compiler where cupy is installed, else torch's own, which has it since 2.8.
    """
    if find_spec("cupy") is not None:
        return "cupy"
    if library == "cupy":
        return None
    import torch

    return "torch" if hasattr(torch.cuda, "_compile_kernel") and torch.version.hip is None else None


@cache
def compiled(name: str, compiler: Literal["cupy", "torch"], device: int) -> Kernel:
    """A kernel on a device, which must be the current one of the calling thread."""
    return (_compiled_by_cupy if compiler == "cupy" else _compiled_by_torch)(name)


def _compiled_by_cupy(name: str) -> Kernel:
    import cupy

    stream_class = cupy.cuda.Stream
    from_torch = stream_class.from_external if hasattr(stream_class, "from_external") else _external_stream

    kernel = cupy.RawModule(code=SOURCE, options=("-std=c++17",), name_expressions=[name]).get_function(name)

    def launch(grid: tuple[int, int], shared_nbytes: int, arguments: list[Any], stream: Any) -> None:
        raw = tuple(_raw_argument(argument) for argument in arguments)
        with stream if isinstance(stream, cupy.cuda.Stream) else from_torch(stream):
            kernel(grid, (N_THREADS,), raw, shared_mem=shared_nbytes)

    return launch


def _external_stream(stream: Any) -> Any:
    """Wrap an external stream as cupy before 14 does."""
    import cupy

    return cupy.cuda.ExternalStream(stream.cuda_stream)


def _raw_argument(argument: Any) -> Any:
    if isinstance(argument, int):
        return np.int32(argument)
    if isinstance(argument, float):
        return np.float64(argument)
    return np.uint64(argument.data_ptr() if hasattr(argument, "data_ptr") else argument.data.ptr)


def _compiled_by_torch(name: str) -> Kernel:
    import torch

    kernel = torch.cuda._compile_kernel(SOURCE, name)

    def launch(grid: tuple[int, int], shared_nbytes: int, arguments: list[Any], stream: Any) -> None:
        kernel(grid=(*grid, 1), block=(N_THREADS, 1, 1), args=arguments, shared_mem=shared_nbytes, stream=stream)

    return launch
