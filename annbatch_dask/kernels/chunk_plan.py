"""Plans the byte ranges that hold some rows of a chunked array, and the destination of each chunk."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.kernels.compiled import compiled
from annbatch_dask.kernels.rows import order_row

__all__ = ["count_rows", "describe_reads", "files_of", "find_shards", "plan_chunks"]

Ints = NDArray[np.int64]


@compiled
def count_rows(spans: Any, n_rows: int) -> Any:
    """Rows of some half-open runs; -1 unless they ascend from 0 to ``n_rows``."""
    n, before = 0, 0
    for i in range(len(spans)):
        start, stop = spans[i, 0], spans[i, 1]
        if start < before or stop < start or stop > n_rows:
            return -1
        n += stop - start
        before = stop
    return n


@compiled
def files_of(reads: Any) -> Any:
    """The shard of each run of reads, see :func:`plan_chunks`, that are of one file."""
    found, n = np.empty(len(reads), np.int64), 0
    for i in range(len(reads)):
        if n == 0 or found[n - 1] != reads[i, 0]:
            found[n] = reads[i, 0]
            n += 1
    return found[:n]


@compiled
def describe_reads(reads: Any, files: Any) -> Any:
    """Reads as the native way has them: (3,) numbers of their file in the place of the shard, and a 0 behind.

    ``files`` has a row for each shard. Beside the reads, returns the bytes of all and of the largest; -1 bytes if a
    file has a negative number, as one that is not open.
    """
    found, n_bytes, largest, are_open = np.empty((len(reads), 8), np.int64), 0, 0, True
    for i in range(len(reads)):
        for column in range(3):
            found[i, column] = files[reads[i, 0], column]
        for column in range(4):
            found[i, 3 + column] = reads[i, 1 + column]
        found[i, 7] = 0
        are_open = are_open and found[i, 0] >= 0
        n_bytes += reads[i, 2]
        largest = max(largest, reads[i, 2])
    return found, n_bytes if are_open else -1, largest


@compiled
def find_shards(spans: Any, n_rows: int) -> Any:
    """The rows of shards that hold some rows of an array, ascending.

    Parameters
    ----------
    spans
        (n, 2) half-open runs of rows, ascending, disjoint.
    n_rows
        Rows of a shard.
    """
    found = np.empty(spans[-1, 1] // n_rows - spans[0, 0] // n_rows + 1 if len(spans) else 0, np.int64)
    n_found = 0
    for i in range(len(spans)):
        for shard in range(spans[i, 0] // n_rows, -(-spans[i, 1] // n_rows) if spans[i, 1] > spans[i, 0] else 0):
            if not n_found or found[n_found - 1] != shard:
                found[n_found] = shard
                n_found += 1
    return found[:n_found]


@compiled
def _cut(spans: Any, chunk_len: int) -> Any:
    """Cut runs of rows at chunk boundaries: the pieces, their rows of chunks, and the offsets of the pieces."""
    n_pieces = 0
    for i in range(len(spans)):
        if spans[i, 1] > spans[i, 0]:
            n_pieces += (spans[i, 1] - 1) // chunk_len - spans[i, 0] // chunk_len + 1
    pieces, rows = np.empty((n_pieces, 3), np.int64), np.empty(n_pieces, np.int64)
    firsts = np.empty(n_pieces + 1, np.int64)
    p = n_rows = dest = 0
    for i in range(len(spans)):
        start, stop = spans[i, 0], spans[i, 1]
        while start < stop:
            row = start // chunk_len
            end = min(stop, (row + 1) * chunk_len)
            pieces[p, 0], pieces[p, 1], pieces[p, 2] = start - row * chunk_len, end - row * chunk_len, dest
            if n_rows == 0 or rows[n_rows - 1] != row:
                rows[n_rows], firsts[n_rows] = row, p
                n_rows += 1
            dest += end - start
            start = end
            p += 1
    firsts[n_rows] = n_pieces
    return pieces, rows[:n_rows], firsts[: n_rows + 1]


@compiled
def _look_up(rows: Any, firsts: Any, grid: Any, offsets: Any, sizes: Any) -> Any:
    """Chunks that were written, by shard and offset, and the pieces of those that were not."""
    chunks, missing = np.empty((len(rows), 5), np.int64), np.empty((len(rows), 2), np.int64)
    n_chunks = n_missing = 0
    for k in range(len(rows)):
        shard = rows[k] // grid[0] * grid[1] + grid[2]
        inner = rows[k] % grid[0] * grid[3] + grid[4]
        if sizes[shard, inner] < 0:
            missing[n_missing, 0], missing[n_missing, 1] = firsts[k], firsts[k + 1]
            n_missing += 1
            continue
        chunks[n_chunks, 0], chunks[n_chunks, 1] = offsets[shard, inner], sizes[shard, inner]
        chunks[n_chunks, 2], chunks[n_chunks, 3], chunks[n_chunks, 4] = firsts[k], firsts[k + 1], shard
        n_chunks += 1
    _order_by_offset(chunks[:n_chunks])
    return chunks[:n_chunks], missing[:n_missing]


@compiled
def _order_by_offset(chunks: Any) -> None:
    """Put the chunks of each shard, which stand together, into the order of the file.

    By loops: numba takes seconds to compile numpy's own sorting and assigning of rows.
    """
    n, first = len(chunks), 0
    order, spare, keys = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
    moved = np.empty((n, 5), np.int64)
    for k in range(1, n + 1):
        if k < n and chunks[k, 4] == chunks[first, 4]:
            continue
        for i in range(first, k):
            keys[i] = chunks[i, 0]
        order_row(keys[first:k], order[first:k], spare)
        for i in range(first, k):
            for column in range(5):
                moved[i, column] = chunks[first + order[i], column]
        first = k
    for i in range(n):
        for column in range(5):
            chunks[i, column] = moved[i, column]


@compiled
def plan_chunks(  # noqa: PLR0913, PLR0917
    spans: Any,
    n_rows: int,
    chunk_len: int,
    grid: Any,
    offsets: Any,
    sizes: Any,
    max_gap: int,
    max_read: int,
    files: Any,
) -> Any:
    """Plan the reads of some rows of an array.

    Parameters
    ----------
    spans
        (n, 2) half-open runs of rows, ascending, disjoint.
    n_rows
        Rows of the array.
    chunk_len
        Rows of a chunk.
    grid
        (5,) rows of chunks in a shard; then what the number of a shard is to be multiplied by and what is to be added
        to find its row in ``offsets`` and ``sizes``; then the same for the row of a chunk in its shard, and its column.
    offsets, sizes
        (n_shards, n_chunks) of each chunk in its file, in bytes; a negative size where it was not written.
    max_gap, max_read
        Chunks at most ``max_gap`` bytes apart are read together, up to ``max_read`` bytes.
    files
        (n_shards, 3) see :func:`describe_reads`; of none where files are not on a disk.

    Returns
    -------
    n_found
        :func:`count_rows` of the runs; nothing is planned if it is -1.
    reads
        (n, 5) shard, offset, bytes, and the half-open run of ``chunks``.
    chunks
        (n, 5) offset, size, the half-open run of ``pieces``, and the shard; by shard, and by offset within.
    pieces
        (n, 3) the rows ``[start, stop)`` of the chunk, and the row of the output where they go.
    missing
        (n, 2) half-open runs of ``pieces`` that are in no file.
    described, n_bytes, largest
        :func:`describe_reads` of these; -1 bytes without files.
    """
    n_found = count_rows(spans, n_rows)
    if n_found < 0:
        spans = spans[:0]
    pieces, rows, firsts = _cut(spans, chunk_len)
    chunks, missing = _look_up(rows, firsts, grid, offsets, sizes)
    reads = np.empty((len(chunks), 5), np.int64)
    n = 0
    for k in range(len(chunks)):
        offset, end = chunks[k, 0], chunks[k, 0] + chunks[k, 1]
        if n and reads[n - 1, 0] == chunks[k, 4]:
            start, so_far = reads[n - 1, 1], reads[n - 1, 2]
            if offset - start - so_far <= max_gap and end - start <= max_read:
                reads[n - 1, 2], reads[n - 1, 4] = max(so_far, end - start), k + 1
                continue
        reads[n, 0], reads[n, 1], reads[n, 2], reads[n, 3], reads[n, 4] = chunks[k, 4], offset, chunks[k, 1], k, k + 1
        n += 1
    described, n_bytes, largest = describe_reads(reads[: n if len(files) else 0], files)
    return n_found, reads[:n], chunks, pieces, missing, described, n_bytes if len(files) else -1, largest
