"""Runs of rows of a zarr array, straight from the shard files into a given buffer.

zarr reads chunk by chunk through its codec pipeline. For the arrays that matter here (zarr v3 arrays,
sharded or not, whose chunks are plain little-endian bytes under at most one common compressor, or integers packed by
this package's codec) it is enough to know where the chunks are: the shard's index is read once, the bytes of
neighbouring chunks come in one ``pread``, and every chunk that is wanted whole is decompressed to where it belongs,
with no copy in between.
What is in local files is read and decoded by :mod:`annbatch_dask.chunks.native`, many chunks in a call without the
GIL; :func:`annbatch_dask.chunks.dealing.deal` makes the calls about equal. What it does not place is read again one by
one (:mod:`annbatch_dask.chunks.placing`), by numcodecs, which also handles other codecs; that way says what is wrong.

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
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from annbatch_dask.chunks.cache import RangeCache
from annbatch_dask.chunks.dealing import Fill, Task
from annbatch_dask.chunks.files import ChunkFiles, OpenFiles, chunk_files
from annbatch_dask.chunks.layout import Array, Ints, ShardIndex, find_layout
from annbatch_dask.chunks.placing import ColumnPlan, Opened, Way, fill_missing, place_read
from annbatch_dask.kernels.chunk_plan import count_rows
from annbatch_dask.storage.threads import unlocked_property
from annbatch_dask.storage.versions import Listing

if TYPE_CHECKING:
    import zarr

__all__ = ["MAX_READ_NBYTES", "LocalChunks", "RangeReader"]

MAX_READ_NBYTES = 2 * 1024 * 1024
"""A read grows no further than this (a single chunk may be larger)."""
_MAX_FILL_NBYTES = 256 * 1024
"""The same where one call makes many reads: what was read is still in a core's cache when it is decoded."""


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
        self._dtype = np.dtype(array.dtype).newbyteorder("=")  # zarr takes its time to say
        self._shape = tuple(array.shape)

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name != "_ways"}  # they have addresses
        return kept | {"_index": None if self._layout is None else ShardIndex(self._layout)}

    @unlocked_property
    def _ways(self) -> tuple[Way | None, ...]:
        """Of each column, how many of its chunks are decoded in one call."""
        return () if self._index is None else tuple(Way.of(self._index.layout, c) for c in self._index.columns)

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
        return self._dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self._shape

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
        spans, index = np.ascontiguousarray(spans, np.int64), self._index
        if index is None or not index.is_complete:
            self._check(spans, count_rows(spans, self.shape[0]), out)
        if index is None:
            return list(self._plain_tasks(spans, out))
        for shard in index.unknown(spans):
            index.load(shard)
        return [task for number in range(len(index.columns)) for task in self._tasks_of(number, spans, out)]

    def _check(self, spans: Ints, n_rows: int, out: Array) -> None:
        """ValueError unless the runs, of so many rows, are sound, and fill ``out``; nothing compiled would notice."""
        if n_rows < 0:
            msg = f"runs must ascend from 0 to {self.shape[0]} and not overlap, got {spans.tolist()}"
            raise ValueError(msg)
        if out.shape != (n_rows, *self.shape[1:]) or out.dtype != self.dtype:
            msg = f"out has shape {out.shape} and dtype {out.dtype}; needed: {n_rows} rows of {self.dtype}"
            raise ValueError(msg)

    def _tasks_of(self, number: int, spans: Ints, out: Array) -> Iterator[Task]:
        """The work of one column of chunks."""
        index = self._index
        assert index is not None
        column, way = index.columns[number], self._ways[number]
        how = None if way is None else way.into(out)
        is_each = how is None or index.layout.files.is_remote
        planned = index.plan(column, spans, MAX_READ_NBYTES if is_each else _MAX_FILL_NBYTES)
        self._check(spans, planned.n_rows, out)
        plan = ColumnPlan(index, column, planned, out)
        if len(planned.missing):
            yield partial(fill_missing, plan, planned.missing)
        if is_each:
            yield from (partial(place_read, plan, how, read) for read in range(len(planned.reads)))
        elif how is not None and len(planned.reads):
            yield Fill(plan, how)

    def local_chunks(self, spans: Ints) -> LocalChunks | None:
        """Locations of the values of some runs, in the order of the array; None if one call cannot read them.

        It can where the array has one dimension and is in local files, of which not too many are open, and all chunks
        were written, in order.
        """
        if self._index is None or len(self.shape) != 1 or self._index.layout.files.is_remote or not len(spans):
            return None
        (column,), (way,) = self._index.columns, self._ways
        if way is None:
            return None
        for shard in self._index.unknown(spans):
            self._index.load(shard)
        planned = self._index.plan(column, spans, 0)
        chunks = planned.chunks
        if len(planned.missing) or (chunks[1:, 2] < chunks[:-1, 2]).any():
            return None
        if (found := Opened.of(self._index, planned)) is None:
            return None
        return LocalChunks(found.reads, chunks[:, 2:4], planned.pieces, way.how[:4], found.files)

    def close(self) -> None:
        """Keep no file open until the next read. Takes no lock."""
        if self._files is not None:
            self._files.close()
        if self._index is not None:
            self._index.close()

    def index_tasks(self, spans: Ints) -> list[Task]:
        """Return tasks that read the shard indexes :meth:`tasks` would otherwise read one after the other."""
        if self._index is None or self._index.is_complete:
            return []
        spans = np.ascontiguousarray(spans, np.int64)
        return [partial(self._index.load, shard) for shard in self._index.unknown(spans)]

    def _plain_tasks(self, spans: Ints, out: Array) -> Iterator[Task]:
        row = 0
        for start, stop in spans.tolist():
            if start == stop:
                continue
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
class LocalChunks:
    """Chunks of an array of one dimension in local files, which ``files`` keeps open.

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
    files: OpenFiles
