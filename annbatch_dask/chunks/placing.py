"""Reads that were planned for a column of chunks, and how one of them is made and its chunks placed, one by one.

This is the way of object stores and of every codec; it defines what is wrong with a chunk that is not sound, where
:mod:`annbatch_dask.chunks.native` only says that one is.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numcodecs
import numcodecs.blosc
import numcodecs.zstd
import numpy as np

from annbatch_dask.chunks import native
from annbatch_dask.chunks.files import OpenFiles, scratch
from annbatch_dask.chunks.layout import Array, ChunkLayout, GridColumn, Ints, ReadPlan, ShardIndex, checked
from annbatch_dask.errors import IntegrityError
from annbatch_dask.kernels.chunk_plan import describe_reads, files_of
from annbatch_dask.kernels.packed import unpacker
from annbatch_dask.kernels.shared import address_of
from annbatch_dask.storage.packed import PACKED, unpack_chunk

__all__ = ["ColumnPlan", "Opened", "Way", "fill_missing", "place_read"]

_BLOSC_HEADER_NBYTES = 16


@dataclass(frozen=True)
class ColumnPlan:
    """Reads planned for one column, and where what is read goes."""

    index: ShardIndex
    column: GridColumn
    planned: ReadPlan
    out: Array

    @property
    def reads(self) -> Ints:
        """See :func:`annbatch_dask.kernels.chunk_plan.plan_chunks`."""
        return self.planned.reads

    @property
    def chunks(self) -> Ints:
        """See :func:`annbatch_dask.kernels.chunk_plan.plan_chunks`."""
        return self.planned.chunks

    @property
    def pieces(self) -> Ints:
        """See :func:`annbatch_dask.kernels.chunk_plan.plan_chunks`."""
        return self.planned.pieces

    @property
    def layout(self) -> ChunkLayout:
        """Where the chunks are, and how they are encoded."""
        return self.index.layout


class Way(NamedTuple):
    """How :func:`annbatch_dask.chunks.native.fill` decodes the chunks of a column.

    Attributes
    ----------
    how
        The first of its numbers, those that are the same for every destination.
    start
        Where the column begins in a row of the destination, in bytes.
    stride
        Bytes from one row of the destination to the next; None where it says itself.
    """

    how: tuple[int, ...]
    start: int
    stride: int | None

    @classmethod
    def of(cls, layout: ChunkLayout, column: GridColumn) -> Way | None:
        """None where it does not know how."""
        name, has_crc, n_axes = layout.codec.name, layout.codec.has_crc, len(layout.shape)
        if name not in (None, "blosc", PACKED) or (name == PACKED and n_axes != 1):
            return None
        if not native.can_fill(is_blosc=name == "blosc", has_crc=has_crc, from_files=not layout.files.is_remote):
            return None
        start, width, stride = 0, layout.row_nbytes, layout.row_nbytes if column.is_full_width else None
        if not column.is_full_width:
            if n_axes != 2:  # noqa: PLR2004 - rows of more are in more than one piece
                return None
            itemsize, (wanted,) = layout.dtype.itemsize, column.rows_out
            start, width = wanted.start * itemsize, (wanted.stop - wanted.start) * itemsize
        kind = native.PLAIN if name is None else native.BLOSC
        if name == PACKED:
            kind = unpacker(layout.dtype.itemsize).address
        how = (kind, int(has_crc), layout.chunk_shape[0], layout.row_nbytes, width)
        return cls(how, start, stride)

    def into(self, out: Array) -> list[int] | None:
        """A row of ``hows`` without bases for this destination; None if its rows are not one behind the other."""
        if not out.flags.c_contiguous:
            return None
        stride = out.strides[0] if self.stride is None else self.stride
        return [*self.how, address_of(out) + self.start, stride]


class Opened(NamedTuple):
    """Reads of files that are open as long as this is referred to.

    Attributes
    ----------
    reads
        As :func:`annbatch_dask.chunks.native.fill` has them.
    n_bytes, largest
        Bytes of all, and of the largest.
    files
        Keeps the files open.
    """

    reads: Ints
    n_bytes: int
    largest: int
    files: OpenFiles

    @classmethod
    def of(cls, index: ShardIndex, planned: ReadPlan) -> Opened | None:
        """Open the files of a plan, those that are not open yet; None where too many are open already."""
        if planned.n_bytes >= 0:
            return cls(planned.described, planned.n_bytes, planned.largest, planned.files)
        shards = files_of(planned.reads).tolist()
        missing = [shard for shard in shards if planned.files.table[shard, 0] < 0]
        files = planned.files.having(index.layout.files, {shard: index.keys[shard] for shard in missing})
        if files is None:
            return None
        reads, n_bytes, largest = describe_reads(planned.reads, files.table)
        return cls(reads, n_bytes, largest, files)


def fill_missing(plan: ColumnPlan, missing: Ints) -> None:
    """Put the fill value where nothing was written."""
    for first, end in missing.tolist():
        for start, stop, dest in plan.pieces[first:end].tolist():
            plan.out[(slice(dest, dest + stop - start), *plan.column.rows_out)] = plan.layout.fill


def place_read(plan: ColumnPlan, how: list[int] | None, number: int, chunks: Sequence[int] | None = None) -> None:
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


def _unplaced(plan: ColumnPlan, how: list[int] | None, number: int, raw: memoryview) -> Sequence[int]:
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


def _place(plan: ColumnPlan, raw: memoryview, chunk: int) -> None:
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
