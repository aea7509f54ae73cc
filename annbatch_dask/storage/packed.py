"""A codec of zarr v3 for arrays of integers that are mostly small, or differ little from one to the next.

Reading and writing one chunk: :mod:`annbatch_dask.kernels.packed`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import zarr.registry
from numpy.typing import NDArray
from zarr.abc.codec import ArrayBytesCodec

from annbatch_dask.errors import IntegrityError, LayoutError
from annbatch_dask.kernels.packed import DAMAGED, unpack, unpack_runs
from annbatch_dask.kernels.packing import pack

if TYPE_CHECKING:
    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import Buffer, NDBuffer

__all__ = ["PACKED", "PackedCodec", "packs", "unpack_chunk", "unpack_chunk_runs"]

PACKED = "annbatch_dask.packed"
"""The codec's name in the metadata of an array. zarr's message names it where this package is not installed."""


def packs(dtype: np.dtype[Any]) -> bool:
    """True if the codec takes values of a dtype."""
    return dtype.kind in "iu"


@dataclass(frozen=True)
class PackedCodec(ArrayBytesCodec):
    """Integers of any size, packed in as many bits as most of a block's 1,024 values need.

    zarr finds it under the name ``annbatch_dask.packed`` where this package is installed. It stands in the place of the
    codec ``bytes``; a checksum may follow, such as ``crc32c``. Its configuration is ``{"differences": true}``, or
    false, which says how chunks are written; each says itself how it is to be read.

    Parameters
    ----------
    differences
        Store each value less the one before it: for columns of sparse rows, which ascend.

    Notes
    -----
    **A chunk** holds ``n`` integers of ``T`` = 8, 16, 32 or 64 bits, signed ones as the unsigned ones of the same bits;
    all that follows is modulo 2^T. All numbers are little-endian. Block ``b`` holds the values from 1024 b on; the last
    one is filled up to 1,024 with values that mean nothing.

    ========  ==============  =================================================================
    byte      size            what
    ========  ==============  =================================================================
    0         4               ``ABPK``
    4         1               version of this format: 1
    5         1               T
    6         1               1 if differences are stored, else 0
    7         1               0
    8         8               n
    16        E each          the table: an entry for each of the ceil(n / 1024) blocks
    then      varies          the blocks, each of which begins at a multiple of 4 bytes
    at last   8               zeros, so that reading 8 bytes from any byte of a block is reading the chunk
    ========  ==============  =================================================================

    **An entry** has E = 12, 12, 16, 20 bytes for T = 8, 16, 32, 64:

    ========  ==============  =================================================================
    byte      size            what
    ========  ==============  =================================================================
    0         4               where the block begins in the chunk, in units of 4 bytes
    4         4 times 1       c0 .. c3: patches in each quarter (256 values) of the block
    8         1               w: bits in which each value is packed, 0 to T
    9         1               h: bits in each patch, with w + h <= T; 0 to 56, or 64
    E - T/8   T/8             the base
    ========  ==============  =================================================================

    Bytes between are 0. A block can be decoded without any other.

    **A block** consists of 128 w bytes of words, c0 + c1 + c2 + c3 bytes of places, and the patches, h bits each, from
    the lowest bit of their first byte up.

    The words are w rows of L = 1024 / T words of T bits. Value ``i`` of the block, with r = i div L and l = i mod L,
    is in lane l: its w bits are the bits from r w on of the number of w T bits whose k-th T bits (from the lowest) are
    word l of row k. So they begin at bit (r w) mod T of word l in row (r w) div T, and continue at bit 0 of the word
    below it.

    The p-th place of quarter q, a byte x, says that the p-th patch of this quarter is to be shifted by w bits and
    added to value 256 q + x. Patches of all quarters follow each other.

    With values ``u[i]`` so obtained, those of the array are ``v[i] = base + u[i]``; where differences are stored,
    ``v[i] = v[i - 1] + 1 + u[i]`` with ``v[-1] = base``.

    Examples
    --------
    >>> import zarr
    >>> array = zarr.create_array({}, shape=5, dtype="uint16", serializer=PackedCodec(differences=True))
    >>> array[:] = [3, 17, 4_000, 1, 2]
    >>> array[1:4].tolist()
    [17, 4000, 1]
    """

    is_fixed_size: ClassVar[bool] = False  # type: ignore[misc]

    differences: bool = False

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Read from an array's metadata.

        Raises
        ------
        LayoutError
            For a configuration that a later release wrote.
        """
        configuration = dict(data.get("configuration", {}))
        differences = configuration.pop("differences", False)
        if configuration or not isinstance(differences, bool):
            msg = (
                f"codec {PACKED} has the configuration {data.get('configuration')}, and this release knows "
                "'differences', true or false; upgrade annbatch-dask"
            )
            raise LayoutError(msg)
        return cls(differences)

    def to_dict(self) -> dict[str, Any]:
        """Configuration of the codec for an array's metadata."""
        return {"name": PACKED, "configuration": {"differences": self.differences}}

    def validate(self, *, shape: tuple[int, ...], dtype: Any, chunk_grid: Any) -> None:  # noqa: ARG002 - zarr's
        """Refuse arrays that are not of integers."""
        native = dtype.to_native_dtype()
        if not packs(native):
            msg = f"codec {PACKED} packs integers, and the array is of {native}; use zarr's codec 'bytes' for it"
            raise LayoutError(msg)

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """Not known before.

        Raises
        ------
        NotImplementedError
            Always, as zarr asks.
        """
        raise NotImplementedError

    def encode_values(self, values: NDArray) -> NDArray[np.uint8]:
        """Bytes of a chunk of these values."""
        flat = np.ascontiguousarray(values).reshape(-1)
        return pack(flat.astype(flat.dtype.newbyteorder("="), copy=False), differences=self.differences)

    def _decode_sync(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        dtype = chunk_spec.dtype.to_native_dtype()
        values = np.empty(chunk_spec.shape, dtype.newbyteorder("="))
        unpack_chunk(chunk_data.as_numpy_array(), values.reshape(-1))
        values = values.astype(dtype, copy=False)
        return chunk_spec.prototype.nd_buffer.from_numpy_array(values)

    def _encode_sync(self, chunk_data: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        return chunk_spec.prototype.buffer.from_array_like(self.encode_values(chunk_data.as_numpy_array()))

    async def _decode_single(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        return await asyncio.to_thread(self._decode_sync, chunk_data, chunk_spec)

    async def _encode_single(self, chunk_data: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        return await asyncio.to_thread(self._encode_sync, chunk_data, chunk_spec)


def unpack_chunk(raw: Any, out: NDArray, *, n_values: int | None = None, start: int = 0) -> None:
    """Decode values of a packed chunk.

    Parameters
    ----------
    raw
        Bytes of the chunk.
    out
        1-D contiguous, of the array's dtype in this machine's byte order: takes the values from ``start`` on.
    n_values
        Number of values of the whole chunk; None if equal to that of ``out``.
    start
        The first value wanted.

    Raises
    ------
    IntegrityError
        If it is no such chunk.
    """
    n = len(out) if n_values is None else n_values
    status = unpack(np.frombuffer(raw, np.uint8), n, start, out.view(f"u{out.itemsize}"))
    if status:
        msg = f"a packed chunk of {len(raw):,} bytes and {n:,} values of {out.dtype} is damaged: {DAMAGED[status]}"
        raise IntegrityError(msg)


def unpack_chunk_runs(  # noqa: PLR0913, PLR0917 - runs
    raw: NDArray[np.uint8],
    chunks: NDArray[np.int64],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    out: NDArray,
    out_starts: NDArray[np.int64],
) -> None:
    """Decode runs of values of packed chunks; the arguments are those of :func:`annbatch_dask.kernels.packed.unpack_runs`.

    Raises
    ------
    IntegrityError
        If there are no such chunks.
    """  # noqa: E501
    status = unpack_runs(raw, chunks, starts, lengths, out.view(f"u{out.itemsize}"), out_starts)
    if status:
        msg = f"one of {len(chunks):,} packed chunks of {out.dtype} is damaged: {DAMAGED[status]}"
        raise IntegrityError(msg)


zarr.registry.register_codec(PACKED, PackedCodec)  # also where no metadata of an installed package say so
