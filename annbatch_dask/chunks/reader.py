"""Runs of rows of a zarr array, straight from the shard files into a given buffer.

zarr reads chunk by chunk through its codec pipeline. For the arrays that matter here (zarr v3 arrays,
sharded or not, whose chunks are plain little-endian bytes under at most one common compressor, or integers packed by
this package's codec) it is enough to know where the chunks are: the shard's index is read once, the bytes of
neighbouring chunks come in one ``pread``, and every chunk that is wanted whole is decompressed to where it belongs,
with no copy in between.
What is in local files is read and decoded by :mod:`annbatch_dask.chunks.native`, many chunks in a call without the
GIL; :func:`deal` makes the calls about equal. What it does not place is read again one by one, by numcodecs, which
also handles other codecs; that way says what is wrong.

Everything else goes through zarr itself (:attr:`RangeReader.is_fast` tells). All ways give the same values.

What guarantees each read:

- The files are those that were there when the reader was made, in the version they had: every read compares it
  (:mod:`annbatch_dask.storage.versions`). A file that was replaced, overwritten or removed is a CollectionChangedError.
- Where chunks and shard indexes have a crc32c, as in all matrices that this package writes, it is compared at every
  read, before anything is decoded: bytes that rot on a disk, in its cache, in memory or on the way are an
  IntegrityError. A chunk of other arrays (annbatch's have a checksum for the index alone) has to decode to its size.
- A copy in a :class:`~annbatch_dask.chunks.cache.RangeCache` whose checksum is wrong is forgotten, and the store
  asked once more.
"""

from __future__ import annotations

import itertools
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numcodecs
import numcodecs.blosc
import numcodecs.zstd
import numpy as np
from numpy.typing import NDArray

from annbatch_dask.chunks import native
from annbatch_dask.chunks.cache import RangeCache
from annbatch_dask.chunks.files import ChunkFiles, Held, chunk_files, scratch
from annbatch_dask.chunks.layout import Array, ChunkLayout, GridColumn, Ints, ShardIndex, checked, find_layout
from annbatch_dask.errors import IntegrityError
from annbatch_dask.kernels.chunk_plan import count_rows, describe_reads, files_of
from annbatch_dask.kernels.packed import unpacker
from annbatch_dask.storage.packed import PACKED, unpack_chunk
from annbatch_dask.storage.versions import Listing

if TYPE_CHECKING:
    import zarr

__all__ = ["MAX_READ_NBYTES", "MIN_PART_NBYTES", "Divisible", "LocalChunks", "RangeReader", "Task", "deal"]

Task = Callable[[], object]
MAX_READ_NBYTES = 2 * 1024 * 1024
"""A read grows no further than this (a single chunk may be larger)."""
_MAX_FILL_NBYTES = 256 * 1024
"""The same where one call makes many reads: what was read is still in a core's cache when it is decoded."""
MIN_PART_NBYTES = 512 * 1024
"""Less is not worth a thread's waking up."""
_BLOSC_HEADER_NBYTES = 16


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
        Files of a folder above the array, listed when it was opened; None lists them now.
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
        self._layout = None if self._files is None or not fast else find_layout(array, self._files)
        self._index = None if self._layout is None else ShardIndex(self._layout)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_index": None if self._layout is None else ShardIndex(self._layout)}

    @property
    def is_fast(self) -> bool:
        """True if chunks are read directly rather than through zarr."""
        return self._layout is not None

    @property
    def is_remote(self) -> bool:
        """True if each task waits for a request to a store."""
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
        spans = np.ascontiguousarray(spans, np.int64)
        n_rows, n_empty = count_rows(spans, self.shape[0])
        if n_rows < 0:  # what is compiled would not notice
            msg = f"runs must ascend from 0 to {self.shape[0]} and not overlap, got {spans.tolist()}"
            raise ValueError(msg)
        if out.shape != (n_rows, *self.shape[1:]) or out.dtype != self.dtype:
            msg = f"out has shape {out.shape} and dtype {out.dtype}; needed: {n_rows} rows of {self.dtype}"
            raise ValueError(msg)
        if n_empty:
            spans = spans[spans[:, 1] > spans[:, 0]]
        if self._index is None:
            return list(self._plain_tasks(spans, out))
        for shard in self._index.unknown(spans):
            self._index.load(shard)
        return [task for column in self._index.columns for task in _tasks_of(self._index, column, spans, out)]

    def local_chunks(self, spans: Ints) -> LocalChunks | None:
        """Locations of the values of some runs, in the order of the array; None if one call cannot read them.

        It can where the array has one dimension and is in local files, and all chunks were written, in order.
        """
        if self._index is None or len(self.shape) != 1 or self._index.layout.files.is_remote or not len(spans):
            return None
        (column,), nothing = self._index.columns, np.empty(0, self.dtype)
        how = _how(self._index.layout, column, nothing)
        if how is None:
            return None
        for shard in self._index.unknown(spans):
            self._index.load(shard)
        reads, chunks, pieces, missing = self._index.plan(column, spans, 0)
        if len(missing) or (chunks[1:, 2] < chunks[:-1, 2]).any():
            return None
        held: list[Held] = []
        reads = _opened(_ColumnPlan(self._index, column, reads, chunks, pieces, nothing), 0, held)
        return LocalChunks(reads, chunks[:, 2:4], pieces, tuple(how[:4]), held)

    def close(self) -> None:
        """Keep no file open until the next read. Takes no lock."""
        if self._files is not None:
            self._files.close()

    def index_tasks(self, spans: Ints) -> list[Task]:
        """Return tasks that read the shard indexes :meth:`tasks` would otherwise read one after the other."""
        if self._index is None:
            return []
        spans = np.ascontiguousarray(spans[spans[:, 1] > spans[:, 0]], np.int64)
        return [partial(self._index.load, shard) for shard in self._index.unknown(spans)]

    def _plain_tasks(self, spans: Ints, out: Array) -> Iterator[Task]:
        row = 0
        for start, stop in spans.tolist():
            yield partial(_read_plain, self.array, self._files, start, stop, out[row : row + stop - start])
            row += stop - start


def _read_plain(array: zarr.Array[Any], files: ChunkFiles | None, start: int, stop: int, out: Array) -> None:
    """Read with zarr, and check that the files did not change meanwhile."""
    out[...] = array[start:stop]
    if files is not None:
        outer = array.shards or array.chunks
        grid = [range(start // outer[0], -(-stop // outer[0]))]
        grid += [range(-(-n // c)) for n, c in zip(array.shape[1:], outer[1:], strict=True)]
        for shard in itertools.product(*grid):
            files.check(array.metadata.encode_chunk_key(shard))


@dataclass(frozen=True)
class _ColumnPlan:
    """Reads planned for one column, see :func:`annbatch_dask.kernels.chunk_plan.plan_chunks`."""

    index: ShardIndex
    column: GridColumn
    reads: Ints
    chunks: Ints
    pieces: Ints
    out: Array

    @property
    def layout(self) -> ChunkLayout:
        return self.index.layout


def _how(layout: ChunkLayout, column: GridColumn, out: Array) -> list[int] | None:
    """A row of :func:`annbatch_dask.chunks.native.fill`'s ``hows``, without bases; None where it does not know how."""
    name, has_crc = layout.codec.name, layout.codec.has_crc
    if name not in (None, "blosc", PACKED) or not out.flags.c_contiguous or (name == PACKED and out.ndim != 1):
        return None
    if not native.can_fill(is_blosc=name == "blosc", has_crc=has_crc, from_files=not layout.files.is_remote):
        return None
    start, width, stride = 0, layout.row_nbytes, layout.row_nbytes
    if not column.is_full_width:
        if out.ndim != 2:  # noqa: PLR2004 - rows of more are in more than one piece
            return None
        itemsize, (wanted,) = layout.dtype.itemsize, column.rows_out
        start, width, stride = wanted.start * itemsize, (wanted.stop - wanted.start) * itemsize, out.strides[0]
    kind = unpacker(layout.dtype.itemsize).address if name == PACKED else native.PLAIN if name is None else native.BLOSC
    return [kind, has_crc, layout.chunk_shape[0], layout.row_nbytes, width, out.ctypes.data + start, stride]


def _tasks_of(index: ShardIndex, column: GridColumn, spans: Ints, out: Array) -> Iterator[Task]:
    layout, how = index.layout, _how(index.layout, column, out)
    is_each = how is None or layout.files.is_remote
    reads, chunks, pieces, missing = index.plan(column, spans, MAX_READ_NBYTES if is_each else _MAX_FILL_NBYTES)
    plan = _ColumnPlan(index, column, reads, chunks, pieces, out)
    if len(missing):
        yield partial(_fill, plan, missing)
    if is_each:
        yield from (partial(_run, plan, how, number) for number in range(len(reads)))
    elif how is not None and len(reads):
        yield _Fill(plan, how)


@dataclass(frozen=True)
class LocalChunks:
    """Chunks of an array of one dimension in local files, which ``held`` keeps open.

    Attributes
    ----------
    reads
        A row of :func:`native.fill`'s ``reads`` for each chunk.
    runs
        (n, 2) the half-open run of pieces of each.
    pieces
        (n, 3) values ``[start, stop)`` of a chunk, and where they go.
    how
        How a chunk is encoded, whether a crc32c follows, its values, and the bytes of each.
    """

    reads: Ints
    runs: Ints
    pieces: Ints
    how: tuple[int, ...]
    held: Sequence[Held]


class Divisible(ABC):
    """Work that is done as a whole, or in parts by several threads."""

    def __call__(self) -> None:
        """Do all of it."""
        for task in self.cut(1):
            task()

    @abstractmethod
    def cut(self, n_parts: int) -> list[Task]:
        """Split the work into at most a number of calls of about equal size; fewer if splitting does not pay."""


@dataclass(frozen=True)
class _Fill:
    """Reads of local files that one call can make, or several about equal ones."""

    plan: _ColumnPlan
    how: list[int]

    def __call__(self) -> None:
        _Fills.of([self]).run(0, len(self.plan.reads))


def deal(tasks: Sequence[Task], n_parts: int) -> list[Task]:
    """Split the work into at most ``n_parts`` calls of about equal size, and tasks that cannot be split."""
    fills = [task for task in tasks if isinstance(task, _Fill)]
    others = [task for task in tasks if not isinstance(task, _Fill)]
    dealt = [part for task in others for part in (task.cut(n_parts) if isinstance(task, Divisible) else [task])]
    if not fills:
        return dealt
    whole = _Fills.of(fills)
    return [*dealt, *(partial(whole.run, first, stop) for first, stop in whole.cut(n_parts))]


@dataclass(frozen=True)
class _Fills:
    """The arguments of :func:`native.fill` for several plans; ``held`` keeps the files open."""

    fills: Sequence[_Fill]
    held: Sequence[Held]
    reads: Ints
    chunks: Ints
    pieces: Ints
    hows: Ints
    is_done: NDArray[np.bool_]
    chunk_nbytes: int

    @classmethod
    def of(cls, fills: Sequence[_Fill]) -> _Fills:
        held: list[Held] = []
        reads, hows, n_chunks, n_pieces = [], [], 0, 0
        for number, fill in enumerate(fills):
            plan = fill.plan
            reads.append(_opened(plan, number, held))
            hows.append([*fill.how, n_chunks, n_pieces])
            n_chunks, n_pieces = n_chunks + len(plan.chunks), n_pieces + len(plan.pieces)
        chunks = np.concatenate([fill.plan.chunks for fill in fills])
        pieces = np.concatenate([fill.plan.pieces for fill in fills])
        largest = max(fill.plan.layout.chunk_nbytes for fill in fills)
        is_done = np.zeros(n_chunks, np.bool_)
        return cls(fills, held, np.concatenate(reads), chunks, pieces, np.array(hows), is_done, largest)

    def cut(self, n_parts: int) -> Iterator[tuple[int, int]]:
        """Runs of reads of about as many bytes."""
        so_far = np.cumsum(self.reads[:, 4])
        n_parts = max(1, min(n_parts, int(so_far[-1]) // MIN_PART_NBYTES))
        bounds = np.searchsorted(so_far, so_far[-1] * np.arange(1, n_parts) / n_parts).tolist()
        bounds = [0, *bounds, len(self.reads)]
        return ((first, stop) for first, stop in itertools.pairwise(bounds) if first < stop)

    def run(self, first: int, stop: int) -> None:
        """Make some of the reads; what could not be placed is read again, to go well or to say what is wrong."""
        raw = scratch("raw", int(self.reads[first:stop, 4].max()))
        spare = scratch("chunk", self.chunk_nbytes)
        given = (self.reads, self.chunks, self.pieces, self.hows, first, stop)
        if not native.fill(*given, native.functions(), raw, spare, self.is_done):
            return
        firsts = np.cumsum([0, *(len(fill.plan.reads) for fill in self.fills)])
        for number in range(first, stop):
            begin, end, which = self.reads[number, 5:].tolist()
            base = int(self.hows[which, 7])
            left = [k for k in range(begin, end) if not self.is_done[base + k]]
            if left:
                _run(self.fills[which].plan, None, number - int(firsts[which]), left)


def _opened(plan: _ColumnPlan, number: int, held: list[Held]) -> Ints:
    """The reads of a plan as :func:`native.fill` has them, of files that are open from now on."""
    files, keys, found = plan.layout.files, plan.index.keys, []
    for shard in files_of(plan.reads).tolist():
        file, version = files.hold(keys[shard]), files.version(keys[shard])
        assert version is not None  # nothing is read of a file that was not there
        held.append(file)
        found.append((file.fd, *version))
    reads: Ints = describe_reads(plan.reads, np.array(found, np.int64).reshape(-1, 3), number)
    return reads


def _fill(plan: _ColumnPlan, missing: Ints) -> None:
    for first, end in missing.tolist():
        for start, stop, dest in plan.pieces[first:end].tolist():
            plan.out[(slice(dest, dest + stop - start), *plan.column.rows_out)] = plan.layout.fill


def _run(plan: _ColumnPlan, how: list[int] | None, number: int, chunks: Sequence[int] | None = None) -> None:
    """Make one read and place its chunks, or some of them."""
    layout, (shard, begin, nbytes) = plan.layout, plan.reads[number, :3].tolist()
    key = plan.index.keys[shard]
    raw, path = layout.files.read(key, begin, begin + nbytes), layout.files.name(key)
    is_copy = layout.files.is_cached
    for chunk in chunks if chunks is not None else _unplaced(plan, how, number, raw):
        offset, size = plan.chunks[chunk, :2].tolist()
        part = slice(offset - begin, offset - begin + size)
        while True:
            try:
                encoded = checked(raw[part], path, offset) if layout.codec.has_crc else raw[part]
                _place(plan, encoded, chunk)
                break
            except Exception as error:
                if not is_copy:
                    error.add_note(f"while decoding {size} bytes at offset {offset} of {path}")
                    raise
            raw, is_copy = layout.files.read(key, begin, begin + nbytes, anew=True), False


def _unplaced(plan: _ColumnPlan, how: list[int] | None, number: int, raw: memoryview) -> Sequence[int]:
    """The chunks of a read that are still to be placed, after one call has placed those it can."""
    offset, nbytes, first, stop = plan.reads[number, 1:].tolist()
    if how is None:
        return range(first, stop)
    reads = np.array([[native.IN_MEMORY, 0, 0, offset, nbytes, 0, stop - first, 0]])
    given = (reads, plan.chunks[first:stop], plan.pieces, np.array([[*how, 0, 0]]), 0, 1)
    spare, is_done = scratch("chunk", plan.layout.chunk_nbytes), np.zeros(stop - first, np.bool_)
    if not native.fill(*given, native.functions(), np.frombuffer(raw, np.uint8), spare, is_done):
        return ()
    return [first + k for k in range(stop - first) if not is_done[k]]


def _place(plan: _ColumnPlan, raw: memoryview, chunk: int) -> None:
    """Decode one chunk: to where it belongs if all of it is wanted, else by way of a scratch chunk."""
    layout, column, out = plan.layout, plan.column, plan.out
    first, last = plan.chunks[chunk, 2:4].tolist()
    pieces, n_rows = plan.pieces[first:last].tolist(), layout.chunk_shape[0]
    if column.is_full_width and len(pieces) == 1 and pieces[0][1] - pieces[0][0] == n_rows:
        dest = pieces[0][2]
        _decode(layout, raw, out[dest : dest + n_rows])
        return
    decoded = scratch("chunk", layout.chunk_nbytes).view(layout.dtype).reshape(layout.chunk_shape)
    _decode(layout, raw, decoded)
    for start, stop, dest in pieces:
        out[(slice(dest, dest + stop - start), *column.rows_out)] = decoded[(slice(start, stop), *column.rows_in)]


def _decode(layout: ChunkLayout, raw: memoryview, dest: Array) -> None:
    """Unpack one chunk into ``dest``, C-contiguous and exactly as large."""
    if layout.codec.name == "blosc":
        _check_size(int.from_bytes(raw[4:8], "little"), dest)  # numcodecs accepts a short chunk
        said = int.from_bytes(raw[12:16], "little")
        if len(raw) < _BLOSC_HEADER_NBYTES or said != len(raw):  # numcodecs reads on behind the chunk's end
            msg = f"a chunk has {len(raw)} bytes, its header says {said}"
            raise IntegrityError(msg)
        numcodecs.blosc.decompress(raw, dest)
        return
    if layout.codec.name == PACKED:
        unpack_chunk(raw, dest.reshape(-1))
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
