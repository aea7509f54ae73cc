"""Runs of rows of a zarr array, straight from the shard files into a given buffer.

zarr reads chunk by chunk through its codec pipeline. For the arrays that matter here (zarr v3 arrays,
sharded or not, whose chunks are plain little-endian bytes under at most one common compressor) it is enough
to know where the chunks lie: the shard's index is read once, the bytes of neighbouring chunks come in one
``pread``, and every chunk that is wanted whole is decompressed to where it belongs, with no copy in between.
numcodecs and ``pread`` release the GIL, so the tasks run in as many threads as the caller has.

Everything else goes through zarr itself (:attr:`RangeReader.is_fast` tells). Both ways give the same values.

What guarantees each read:

- The files are those that were there when the reader was made, in the version they had: every read compares it
  (:mod:`annbatch_dask.storage.versions`). A file that was replaced, overwritten or removed is a CollectionChangedError.
- Where chunks and shard indexes have a crc32c, as in all matrices that this package writes, it is compared at every
  read, before anything is decoded: bytes that rot on a disk, in its cache, in memory or on the way are an
  IntegrityError. A chunk of other arrays (annbatch's have a checksum for the index alone) has to decode to its size.
- A copy in a :class:`~annbatch_dask.storage.range_cache.RangeCache` whose checksum is wrong is forgotten, and the store
  asked once more.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import google_crc32c
import numcodecs
import numcodecs.blosc
import numcodecs.zstd
import numpy as np
from numpy.typing import NDArray

from annbatch_dask.errors import IntegrityError
from annbatch_dask.storage.chunk_files import ChunkFiles, chunk_files, scratch
from annbatch_dask.storage.range_cache import RangeCache
from annbatch_dask.storage.versions import Listing

if TYPE_CHECKING:
    import zarr

__all__ = ["ALL_WRITTEN", "MAX_GAP_NBYTES", "MAX_READ_NBYTES", "RangeReader", "Task"]

ALL_WRITTEN = "all-chunks-written"
"""Attribute of an array of which every chunk was written: a file that is not there was lost, and is no fill value."""

Task = Callable[[], object]
Array = NDArray[Any]
Ints = NDArray[np.int64]

MAX_GAP_NBYTES = 64 * 1024
"""Chunks at most this far apart in a file are fetched by one read."""

MAX_READ_NBYTES = 2 * 1024 * 1024
"""A read grows no further than this (a single chunk may be larger)."""

_MISSING = -1
_CRC_NBYTES = 4
_EMPTY_ENTRY = np.iinfo(np.uint64).max


class RangeReader:
    """Reads runs of rows (the first axis) of one array, as it was when the reader was made.

    Reading only; safe to use from several threads; pickles without its cache.

    Parameters
    ----------
    array
        The zarr array.
    fast
        False to read through zarr in any case. True does not force: see :attr:`is_fast`.
    cache
        Where to keep what comes from an object store.
    listing
        Of a folder above the array, from the moment since which nothing may have changed; None lists its files now.
    """

    def __init__(
        self,
        array: zarr.Array[Any],
        *,
        fast: bool = True,
        cache: RangeCache | None = None,
        listing: Listing | None = None,
    ) -> None:
        self.array = array
        self._files = chunk_files(array, cache, listing)
        self._layout = None if self._files is None or not fast else _find_layout(array, self._files)
        self._indexes: dict[tuple[int, ...], _ShardIndex] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_indexes": {}}

    @property
    def is_fast(self) -> bool:
        """Whether chunks are read directly rather than through zarr."""
        return self._layout is not None

    @property
    def is_remote(self) -> bool:
        """Whether each task waits for a request to a store."""
        return self._layout is not None and self._layout.files.is_remote

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the values, native byte order."""
        return np.dtype(self.array.dtype).newbyteorder("=")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return tuple(self.array.shape)

    def read(self, spans: Ints, out: Array) -> None:
        """Read in this thread; see :meth:`tasks`."""
        for task in self.tasks(spans, out):
            task()

    def tasks(self, spans: Ints, out: Array) -> list[Task]:
        """The work that fills ``out``, as independent calls for any threads.

        Parameters
        ----------
        spans
            (n, 2) half-open runs of rows, ascending, not overlapping, within the array.
        out
            C-contiguous, of the array's dtype; its first axis holds the runs one after the other.
            Complete once every task has run.
        """
        lengths = spans[:, 1] - spans[:, 0]
        if out.shape != (int(lengths.sum()), *self.shape[1:]) or out.dtype != self.dtype:
            msg = f"out has shape {out.shape} and dtype {out.dtype}; needed: {lengths.sum()} rows of {self.dtype}"
            raise ValueError(msg)
        spans = spans[lengths > 0]
        if self._layout is None:
            return list(self._plain_tasks(spans, out))
        return list(self._fast_tasks(self._layout, spans, out))

    def close(self) -> None:
        """Keep no file open until the next read. Takes no lock."""
        if self._files is not None:
            self._files.close()

    def index_tasks(self, spans: Ints) -> list[Task]:
        """What :meth:`tasks` would do first, one after the other: read the indexes of shards not met before."""
        if self._layout is None:
            return []
        pieces = _Pieces.of(spans[spans[:, 1] > spans[:, 0]], self._layout.chunk_shape[0])
        rows = [row for row, _, _ in pieces.by_shard(self._layout.chunks_per_shard[0])]
        shards = {(row, *column.shard) for row in rows for column in self._layout.columns()}
        return [partial(self._index, self._layout, shard) for shard in sorted(shards - self._indexes.keys())]

    def _plain_tasks(self, spans: Ints, out: Array) -> Iterator[Task]:
        row = 0
        for start, stop in spans.tolist():
            yield partial(_read_plain, self.array, self._files, start, stop, out[row : row + stop - start])
            row += stop - start

    def _fast_tasks(self, layout: _Layout, spans: Ints, out: Array) -> Iterator[Task]:
        pieces = _Pieces.of(spans, layout.chunk_shape[0])
        for column in layout.columns():
            for shard_row, first, last in pieces.by_shard(layout.chunks_per_shard[0]):
                index = self._index(layout, (shard_row, *column.shard))
                yield from _shard_tasks(layout, column, index, pieces, (first, last), out)

    def _index(self, layout: _Layout, shard: tuple[int, ...]) -> _ShardIndex:
        known = self._indexes.get(shard)
        if known is None:
            known = self._indexes[shard] = _read_index(layout, layout.key(shard))
        return known


def _read_plain(array: zarr.Array[Any], files: ChunkFiles | None, start: int, stop: int, out: Array) -> None:
    """By zarr; afterwards the files it has read must be as they were."""
    out[...] = array[start:stop]
    if files is not None:
        outer = array.shards or array.chunks
        grid = [range(start // outer[0], -(-stop // outer[0]))]
        grid += [range(-(-n // c)) for n, c in zip(array.shape[1:], outer[1:], strict=True)]
        for shard in itertools.product(*grid):
            files.check(array.metadata.encode_chunk_key(shard))


# ---------------------------------------------------------------------------------------------- layout


@dataclass(frozen=True)
class _Codec:
    """What was done to the bytes of a chunk: one compressor or none, then a checksum or none."""

    name: str | None
    has_crc: bool


@dataclass(frozen=True)
class _Column:
    """One cell of the chunk grid over all axes but the first.

    ``shard`` and ``inner`` are the coordinates of the file and of the chunk in it; ``rows_out`` and
    ``rows_in`` index one run of rows of the destination and of the decoded chunk.
    """

    shard: tuple[int, ...]
    inner: tuple[int, ...]
    rows_out: tuple[slice, ...]
    rows_in: tuple[slice, ...]
    is_full_width: bool


@dataclass(frozen=True)
class _Layout:
    """Where the chunks of an array lie and how they are packed. An array without shards has one chunk a file."""

    files: ChunkFiles
    key: Callable[[tuple[int, ...]], str]
    shape: tuple[int, ...]
    shard_shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fill: Any
    codec: _Codec
    is_sharded: bool
    index_at_end: bool
    index_has_crc: bool
    all_written: bool

    @property
    def chunks_per_shard(self) -> tuple[int, ...]:
        return tuple(s // c for s, c in zip(self.shard_shape, self.chunk_shape, strict=True))

    @property
    def index_nbytes(self) -> int:
        return 16 * math.prod(self.chunks_per_shard) + (_CRC_NBYTES if self.index_has_crc else 0)

    @property
    def chunk_nbytes(self) -> int:
        return math.prod(self.chunk_shape) * self.dtype.itemsize

    def columns(self) -> Iterator[_Column]:
        """The cells of the chunk grid over the trailing axes; exactly one where chunks span whole rows."""
        shape, chunk, per_shard = self.shape[1:], self.chunk_shape[1:], self.chunks_per_shard[1:]
        grid = [range(-(-n // c)) for n, c in zip(shape, chunk, strict=True)]
        for cell in itertools.product(*grid):
            starts = [i * c for i, c in zip(cell, chunk, strict=True)]
            widths = [min(c, n - s) for n, c, s in zip(shape, chunk, starts, strict=True)]
            yield _Column(
                shard=tuple(i // k for i, k in zip(cell, per_shard, strict=True)),
                inner=tuple(i % k for i, k in zip(cell, per_shard, strict=True)),
                rows_out=tuple(slice(s, s + w) for s, w in zip(starts, widths, strict=True)),
                rows_in=tuple(slice(0, w) for w in widths),
                is_full_width=chunk == shape,
            )


_COMPRESSORS = ("blosc", "zstd", "gzip")


def _find_layout(array: zarr.Array[Any], files: ChunkFiles) -> _Layout | None:
    """How to read the array directly, or None where only zarr knows."""
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
    return _Layout(
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
    codec: _Codec
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


def _find_codec(codecs: Sequence[Mapping[str, Any]], dtype: np.dtype[Any]) -> _Codec | None:
    """The codec where the chain is bytes, at most one compressor, at most one checksum; else None."""
    names = [codec["name"] for codec in codecs]
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
    return _Codec(rest[0] if rest else None, has_crc)


# ------------------------------------------------------------------------------------------ shard index


@dataclass(frozen=True)
class _ShardIndex:
    """Offset and size of every chunk of one file; size -1 where the chunk was not written."""

    key: str
    offsets: Ints
    sizes: Ints


def _read_index(layout: _Layout, key: str) -> _ShardIndex:
    version, path = layout.files.version(key), layout.files.name(key)
    n_chunks = math.prod(layout.chunks_per_shard)
    if version is None:  # a file of nothing but fill values is not written
        if layout.all_written:
            msg = f"{path} is missing, and it was written; restore it, or build the collection again"
            raise IntegrityError(msg)
        return _ShardIndex(key, np.zeros(n_chunks, np.int64), np.full(n_chunks, _MISSING))
    file_nbytes = version[-1]
    if not layout.is_sharded:
        return _ShardIndex(key, np.zeros(1, np.int64), np.array([file_nbytes], np.int64))
    nbytes = layout.index_nbytes
    if file_nbytes < nbytes:
        msg = f"{path} has {file_nbytes} bytes, its shard index alone needs {nbytes}: the file is truncated"
        raise IntegrityError(msg)
    start = file_nbytes - nbytes if layout.index_at_end else 0
    raw = layout.files.read(key, start, start + nbytes)
    if layout.index_has_crc:
        try:
            raw = _checked(raw, path)
        except IntegrityError:
            if not layout.files.is_cached:
                raise
            raw = _checked(layout.files.read(key, start, start + nbytes, anew=True), path)
    entries = np.frombuffer(raw, dtype="<u8").reshape(n_chunks, 2)
    is_missing = entries[:, 0] == _EMPTY_ENTRY
    entries = np.where(is_missing[:, None], 0, entries).astype(np.int64)
    if (entries < 0).any() or (entries.sum(axis=1) > file_nbytes).any():
        msg = f"the shard index of {path} points beyond the file's {file_nbytes} bytes"
        raise IntegrityError(msg)
    return _ShardIndex(key, entries[:, 0], np.where(is_missing, _MISSING, entries[:, 1]))


def _checked(raw: memoryview, path: str, offset: int | None = None) -> memoryview:
    """The bytes of a chunk, or of a file's shard index, without their trailing crc32c, once it matches."""
    body, stored = raw[:-_CRC_NBYTES], int.from_bytes(raw[-_CRC_NBYTES:], "little")
    computed = google_crc32c.value(np.asarray(body))  # takes an array as it lies, but no memoryview
    if computed != stored:
        what = "the shard index" if offset is None else f"the chunk at byte {offset}"
        msg = f"{what} of {path} is damaged: checksum {computed:#010x}, stored {stored:#010x}; restore the file"
        raise IntegrityError(msg)
    return body


# ------------------------------------------------------------------------------------------------ tasks


@dataclass(frozen=True)
class _Pieces:
    """What each run of rows takes from each row of chunks, ascending.

    Piece ``p`` takes rows ``start[p]:stop[p]`` of chunk row ``chunk[p]`` to rows ``dest[p]:`` of the output;
    pieces ``bounds[c]:bounds[c + 1]`` share the chunk row ``chunks[c]``.
    """

    start: list[int]
    stop: list[int]
    dest: list[int]
    chunks: Ints
    bounds: list[int]

    @classmethod
    def of(cls, spans: Ints, chunk_len: int) -> _Pieces:
        """The pieces of ascending, disjoint, non-empty runs."""
        first, last = spans[:, 0] // chunk_len, (spans[:, 1] - 1) // chunk_len
        counts = last - first + 1
        span = np.repeat(np.arange(len(spans)), counts)
        chunk = np.arange(len(span)) - np.repeat(np.cumsum(counts) - counts, counts) + first[span]
        low = np.maximum(spans[span, 0], chunk * chunk_len)
        high = np.minimum(spans[span, 1], (chunk + 1) * chunk_len)
        dest = np.cumsum(high - low) - (high - low)
        chunks, bounds = np.unique(chunk, return_index=True)
        base = chunk * chunk_len
        return cls((low - base).tolist(), (high - base).tolist(), dest.tolist(), chunks, [*bounds.tolist(), len(span)])

    def by_shard(self, chunks_per_shard: int) -> Iterator[tuple[int, int, int]]:
        """Shard row, and the stretch of ``chunks`` that lies in it."""
        shards, firsts = np.unique(self.chunks // chunks_per_shard, return_index=True)
        bounds = [*firsts.tolist(), len(self.chunks)]
        return zip(shards.tolist(), bounds[:-1], bounds[1:], strict=True)


@dataclass
class _Read:
    """Neighbouring chunks of one file: positions in ``_Pieces.chunks``, offsets and sizes."""

    offset: int
    end: int
    chunks: list[tuple[int, int, int]]


def _shard_tasks(
    layout: _Layout, column: _Column, index: _ShardIndex, pieces: _Pieces, stretch: tuple[int, int], out: Array
) -> Iterator[Task]:
    first, last = stretch
    per_shard = layout.chunks_per_shard
    in_shard = pieces.chunks[first:last] % per_shard[0]
    flat = np.ravel_multi_index((in_shard, *column.inner), per_shard)
    offsets, sizes = index.offsets[flat], index.sizes[flat]
    missing = np.flatnonzero(sizes == _MISSING)
    if len(missing):
        yield partial(_fill, layout, column, pieces, (first + missing).tolist(), out)
    present = np.flatnonzero(sizes != _MISSING)
    present = present[np.argsort(offsets[present], kind="stable")]
    places = (first + present, offsets[present], sizes[present])
    located = zip(*(x.tolist() for x in places), strict=True)
    for read in _coalesce(located):
        yield partial(_run, layout, column, index, pieces, read, out)


def _coalesce(located: Iterator[tuple[int, int, int]]) -> Iterator[_Read]:
    read: _Read | None = None
    for chunk in located:
        _, offset, size = chunk
        if read is not None and offset - read.end <= MAX_GAP_NBYTES and offset + size - read.offset <= MAX_READ_NBYTES:
            read.end = max(read.end, offset + size)
            read.chunks.append(chunk)
            continue
        if read is not None:
            yield read
        read = _Read(offset, offset + size, [chunk])
    if read is not None:
        yield read


def _fill(layout: _Layout, column: _Column, pieces: _Pieces, chunks: list[int], out: Array) -> None:
    for chunk in chunks:
        for p in range(pieces.bounds[chunk], pieces.bounds[chunk + 1]):
            stop = pieces.dest[p] + pieces.stop[p] - pieces.start[p]
            out[(slice(pieces.dest[p], stop), *column.rows_out)] = layout.fill


def _run(layout: _Layout, column: _Column, index: _ShardIndex, pieces: _Pieces, read: _Read, out: Array) -> None:
    raw, path = layout.files.read(index.key, read.offset, read.end), layout.files.name(index.key)
    is_copy = layout.files.is_cached
    for chunk, offset, size in read.chunks:
        part = slice(offset - read.offset, offset - read.offset + size)
        while True:
            try:
                encoded = _checked(raw[part], path, offset) if layout.codec.has_crc else raw[part]
                _place(layout, column, encoded, pieces, chunk, out)
                break
            except Exception as error:
                if not is_copy:
                    error.add_note(f"while decoding {size} bytes at offset {offset} of {path}")
                    raise
            raw, is_copy = layout.files.read(index.key, read.offset, read.end, anew=True), False


def _place(layout: _Layout, column: _Column, raw: memoryview, pieces: _Pieces, chunk: int, out: Array) -> None:
    """Decode one chunk: to where it belongs if all of it is wanted, else by way of a scratch chunk."""
    first, last = pieces.bounds[chunk], pieces.bounds[chunk + 1]
    n_rows = layout.chunk_shape[0]
    if column.is_full_width and last - first == 1 and pieces.stop[first] - pieces.start[first] == n_rows:
        dest = pieces.dest[first]
        _decode(layout, raw, out[dest : dest + n_rows])
        return
    decoded = scratch("chunk", layout.chunk_nbytes).view(layout.dtype).reshape(layout.chunk_shape)
    _decode(layout, raw, decoded)
    for p in range(first, last):
        start, stop, dest = pieces.start[p], pieces.stop[p], pieces.dest[p]
        out[(slice(dest, dest + stop - start), *column.rows_out)] = decoded[(slice(start, stop), *column.rows_in)]


# ----------------------------------------------------------------------------------------------- decode


def _decode(layout: _Layout, raw: memoryview, dest: Array) -> None:
    """Unpack one chunk into ``dest``, C-contiguous and exactly as large."""
    if layout.codec.name == "blosc":
        _check_size(int.from_bytes(raw[4:8], "little"), dest)  # numcodecs accepts a short chunk
        numcodecs.blosc.decompress(raw, dest)
        return
    plain: Any = raw
    if layout.codec.name == "zstd":
        plain = numcodecs.zstd.decompress(raw)  # given a destination, it would accept a short chunk as well
    elif layout.codec.name == "gzip":
        plain = zlib.decompress(raw, wbits=31, bufsize=dest.nbytes)
    _check_size(len(plain), dest)
    dest.reshape(-1)[:] = np.frombuffer(plain, dtype=dest.dtype)


def _check_size(nbytes: int, dest: Array) -> None:
    if nbytes != dest.nbytes:
        msg = f"a chunk holds {nbytes} bytes, expected {dest.nbytes}"
        raise IntegrityError(msg)
