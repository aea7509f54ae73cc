"""Locations of an array's chunks: from its metadata and the indexes of its shards."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from annbatch_dask.chunks.files import ChunkFiles, OpenFiles
from annbatch_dask.errors import IntegrityError
from annbatch_dask.kernels.chunk_plan import find_shards, plan_chunks
from annbatch_dask.manifest import ALL_WRITTEN
from annbatch_dask.storage.packed import PACKED, packs

if TYPE_CHECKING:
    import zarr

__all__ = [
    "MAX_GAP_NBYTES",
    "Array",
    "ChunkLayout",
    "GridColumn",
    "Ints",
    "ReadPlan",
    "ShardIndex",
    "checked",
    "find_layout",
]

Array = NDArray[Any]
Ints = NDArray[np.int64]
MAX_GAP_NBYTES = 64 * 1024
"""Chunks at most this far apart in a file are fetched by one read."""
_MISSING = -1
_CRC_NBYTES = 4
_EMPTY_ENTRY = np.iinfo(np.uint64).max


@dataclass(frozen=True)
class ChunkCodec:
    """Encoding of a chunk: bytes with at most one compressor, or packed values; then a checksum or none."""

    name: str | None
    has_crc: bool


@dataclass(frozen=True)
class GridColumn:
    """One cell of the chunk grid over all axes but the first.

    ``shard`` and ``inner`` number the file and the chunk in it, among those of the same rows; ``rows_out`` and
    ``rows_in`` index one run of rows of the destination and of the decoded chunk.
    """

    shard: int
    inner: int
    rows_out: tuple[slice, ...]
    rows_in: tuple[slice, ...]
    is_full_width: bool


@dataclass(frozen=True)
class ChunkLayout:
    """Locations and encoding of an array's chunks. An array without shards has one chunk per file."""

    files: ChunkFiles
    key: Callable[[tuple[int, ...]], str]
    shape: tuple[int, ...]
    shard_shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fill: Any
    codec: ChunkCodec
    is_sharded: bool
    index_at_end: bool
    index_has_crc: bool
    all_written: bool

    @property
    def chunks_per_shard(self) -> tuple[int, ...]:
        """Chunks along each axis of a shard."""
        return tuple(s // c for s, c in zip(self.shard_shape, self.chunk_shape, strict=True))

    @property
    def n_shards(self) -> tuple[int, ...]:
        """Shards along each axis of the array."""
        return tuple(-(-n // s) for n, s in zip(self.shape, self.shard_shape, strict=True))

    @property
    def index_nbytes(self) -> int:
        """Bytes of a shard's index."""
        return 16 * math.prod(self.chunks_per_shard) + (_CRC_NBYTES if self.index_has_crc else 0)

    @property
    def row_nbytes(self) -> int:
        """Bytes of a row of a chunk."""
        return math.prod(self.chunk_shape[1:]) * self.dtype.itemsize

    @property
    def chunk_nbytes(self) -> int:
        """Bytes of a decoded chunk."""
        return self.chunk_shape[0] * self.row_nbytes

    def columns(self) -> Iterator[GridColumn]:
        """The cells of the chunk grid over the trailing axes; exactly one where chunks span whole rows."""
        shape, chunk, per_shard = self.shape[1:], self.chunk_shape[1:], self.chunks_per_shard[1:]
        grid = [range(-(-n // c)) for n, c in zip(shape, chunk, strict=True)]
        for cell in itertools.product(*grid):
            starts = [i * c for i, c in zip(cell, chunk, strict=True)]
            widths = [min(c, n - s) for n, c, s in zip(shape, chunk, starts, strict=True)]
            yield GridColumn(
                shard=_ravel([i // k for i, k in zip(cell, per_shard, strict=True)], self.n_shards[1:]),
                inner=_ravel([i % k for i, k in zip(cell, per_shard, strict=True)], per_shard),
                rows_out=tuple(slice(s, s + w) for s, w in zip(starts, widths, strict=True)),
                rows_in=tuple(slice(0, w) for w in widths),
                is_full_width=chunk == shape,
            )


def _ravel(place: Sequence[int], shape: Sequence[int]) -> int:
    number = 0
    for i, n in zip(place, shape, strict=True):
        number = number * n + i
    return number


_COMPRESSORS = ("blosc", "zstd", "gzip")


def find_layout(array: zarr.Array[Any], files: ChunkFiles) -> ChunkLayout | None:
    """Return the layout to read an array directly, or None if only zarr can read it."""
    metadata: Any = array.metadata
    if metadata.zarr_format != 3:
        return None
    dtype = np.dtype(array.dtype)
    if dtype.kind not in "biufc" or array.ndim == 0:
        return None
    described = metadata.to_dict()
    grid = described["chunk_grid"]
    if grid["name"] != "regular" or described.get("storage_transformers"):
        return None
    outer_shape = tuple(int(n) for n in grid["configuration"]["chunk_shape"])
    packing = _find_packing(described["codecs"], outer_shape, dtype)
    if packing is None or not all(packing.chunk_shape):
        return None
    return ChunkLayout(
        files=files,
        key=metadata.chunk_key_encoding.encode_chunk_key,
        shape=tuple(array.shape),
        shard_shape=outer_shape,
        chunk_shape=packing.chunk_shape,
        dtype=dtype.newbyteorder("="),
        fill=np.asarray(metadata.fill_value, dtype=dtype),
        codec=packing.codec,
        is_sharded=packing.is_sharded,
        index_at_end=packing.index_at_end,
        index_has_crc=packing.index_has_crc,
        all_written=bool(array.attrs.get(ALL_WRITTEN)),
    )


@dataclass(frozen=True)
class _Packing:
    chunk_shape: tuple[int, ...]
    codec: ChunkCodec
    is_sharded: bool = False
    index_at_end: bool = True
    index_has_crc: bool = False


def _find_packing(
    codecs: Sequence[Mapping[str, Any]], outer_shape: tuple[int, ...], dtype: np.dtype[Any]
) -> _Packing | None:
    if len(codecs) != 1 or codecs[0]["name"] != "sharding_indexed":
        codec = _find_codec(codecs, dtype)
        return None if codec is None else _Packing(outer_shape, codec)
    configuration = codecs[0]["configuration"]
    codec = _find_codec(configuration["codecs"], dtype)
    index_codec = _find_codec(configuration["index_codecs"], np.dtype(np.uint64))
    if codec is None or index_codec is None or index_codec.name is not None:
        return None
    return _Packing(
        chunk_shape=tuple(int(n) for n in configuration["chunk_shape"]),
        codec=codec,
        is_sharded=True,
        index_at_end=configuration.get("index_location", "end") == "end",
        index_has_crc=index_codec.has_crc,
    )


def _find_codec(codecs: Sequence[Mapping[str, Any]], dtype: np.dtype[Any]) -> ChunkCodec | None:
    """The codec where the chain is bytes, at most one compressor, at most one checksum, or is packed; else None."""
    names = [codec["name"] for codec in codecs]
    if names in ([PACKED], [PACKED, "crc32c"]) and packs(dtype):
        return ChunkCodec(PACKED, len(names) > 1)
    if not names or names[0] != "bytes":
        return None
    endian = (codecs[0].get("configuration") or {}).get("endian")
    if dtype.itemsize > 1 and getattr(endian, "value", endian) != "little":
        return None
    rest = names[1:]
    has_crc = bool(rest) and rest[-1] == "crc32c"
    if has_crc:
        rest = rest[:-1]
    if len(rest) > 1 or not set(rest) <= set(_COMPRESSORS):
        return None
    return ChunkCodec(rest[0] if rest else None, has_crc)


class ShardIndex:
    """Chunk locations of the shards whose indexes were read so far.

    A shard has the number of its cell in the grid of shards; memory of those not asked for is never touched.

    Attributes
    ----------
    offsets, sizes
        (n_shards, n_chunks) of each chunk in its file; size -1 where it was not written.
    keys
        Names of the files, by shard.
    open_files
        Those of local files that were read since :meth:`close`.
    """

    def __init__(self, layout: ChunkLayout) -> None:
        self.layout = layout
        self.columns = tuple(layout.columns())
        n_shards, n_chunks = math.prod(layout.n_shards), math.prod(layout.chunks_per_shard)
        self.offsets, self.sizes = np.empty((n_shards, n_chunks), np.int64), np.empty((n_shards, n_chunks), np.int64)
        self.keys: dict[int, str] = {}
        per_shard = layout.chunks_per_shard
        self._grid = per_shard[0], math.prod(layout.n_shards[1:]), math.prod(per_shard[1:])
        self.close()

    def close(self) -> None:
        """Keep no file open. Who reads has a reference of its own."""
        self.open_files = OpenFiles(0 if self.layout.files.is_remote else len(self.offsets))

    @property
    def is_complete(self) -> bool:
        """True if all shards were loaded."""
        return len(self.keys) == len(self.offsets)

    def unknown(self, spans: Ints) -> list[int]:
        """The shards of some rows that were not loaded yet."""
        if self.is_complete:
            return []
        n_each = math.prod(self.layout.n_shards[1:])
        rows = find_shards(spans, self.layout.shard_shape[0]).tolist()
        shards = [row * n_each + shard for row in rows for shard in dict.fromkeys(c.shard for c in self.columns)]
        return [shard for shard in shards if shard not in self.keys]

    def load(self, shard: int) -> None:
        """Read the index of a shard, in any thread."""
        place = np.unravel_index(shard, self.layout.n_shards)
        key = self.layout.key(tuple(int(i) for i in place))
        self.offsets[shard], self.sizes[shard] = _read_index(self.layout, key)
        self.keys[shard] = key

    def plan(self, column: GridColumn, spans: Ints, max_read: int) -> ReadPlan:
        """Plan the reads of some rows of a column whose shards were loaded."""
        per_row, n_shards, per_shard = self._grid
        grid = (per_row, n_shards, column.shard, per_shard, column.inner)
        layout, files = self.layout, self.open_files
        given = (spans, layout.shape[0], layout.chunk_shape[0], grid, self.offsets, self.sizes)
        found = plan_chunks(*given, MAX_GAP_NBYTES, max_read, files.table)
        n_rows, reads, chunks, pieces, missing, described, n_bytes, largest = found
        return ReadPlan(n_rows, reads, chunks, pieces, missing, described, n_bytes, largest, files)


class ReadPlan(NamedTuple):
    """Reads of some rows, see :func:`annbatch_dask.kernels.chunk_plan.plan_chunks`, and files that were open."""

    n_rows: int
    reads: Ints
    chunks: Ints
    pieces: Ints
    missing: Ints
    described: Ints
    n_bytes: int
    largest: int
    files: OpenFiles


def _read_index(layout: ChunkLayout, key: str) -> tuple[Ints, Ints]:
    """Offset and size of every chunk of one file; size -1 where the chunk was not written."""
    version, path = layout.files.version(key), layout.files.name(key)
    n_chunks = math.prod(layout.chunks_per_shard)
    if version is None:  # a file of nothing but fill values is not written
        if layout.all_written:
            msg = f"{path} is missing, and it was written; restore it, or build the collection again"
            raise IntegrityError(msg)
        return np.zeros(n_chunks, np.int64), np.full(n_chunks, _MISSING)
    file_nbytes = version[-1]
    if not layout.is_sharded:
        return np.zeros(1, np.int64), np.array([file_nbytes], np.int64)
    nbytes = layout.index_nbytes
    if file_nbytes < nbytes:
        msg = f"{path} has {file_nbytes} bytes, its shard index alone needs {nbytes}: the file is truncated"
        raise IntegrityError(msg)
    start = file_nbytes - nbytes if layout.index_at_end else 0
    raw = layout.files.read(key, start, start + nbytes)
    if layout.index_has_crc:
        try:
            raw = checked(raw, path)
        except IntegrityError:
            if not layout.files.is_cached:
                raise
            raw = checked(layout.files.read(key, start, start + nbytes, anew=True), path)
    entries = np.frombuffer(raw, dtype="<u8").reshape(n_chunks, 2)
    is_missing = entries[:, 0] == _EMPTY_ENTRY
    entries = np.where(is_missing[:, None], 0, entries)
    if (entries > file_nbytes).any() or (entries.sum(axis=1) > file_nbytes).any():  # each by itself: sums overflow
        msg = f"the shard index of {path} points beyond the file's {file_nbytes} bytes"
        raise IntegrityError(msg)
    entries = entries.astype(np.int64)
    return entries[:, 0], np.where(is_missing, _MISSING, entries[:, 1])


def checked(raw: memoryview, path: str, offset: int | None = None) -> memoryview:
    """The bytes of a chunk, or of a file's shard index, without their trailing crc32c, once it matches."""
    body, stored = raw[:-_CRC_NBYTES], int.from_bytes(raw[-_CRC_NBYTES:], "little")
    computed = google_crc32c.value(np.asarray(body))  # takes an array as it is, but no memoryview
    if computed != stored:
        what = "the shard index" if offset is None else f"the chunk at byte {offset}"
        msg = f"{what} of {path} is damaged: checksum {computed:#010x}, stored {stored:#010x}; restore the file"
        raise IntegrityError(msg)
    return body
