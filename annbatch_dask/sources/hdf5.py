"""Rows of an HDF5 dataset, its chunks inflated in threads.

h5py inflates gzip under one global lock. Here only the raw read of a chunk takes that lock; libdeflate then inflates
in the pool, several chunks at a time. Other filters, and chunks that skip theirs, go through h5py itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice, product
from math import prod

import deflate
import h5py
import numpy as np
from numpy.typing import NDArray

from annbatch_dask.activities import activity
from annbatch_dask.storage.ahead import AheadFile, ahead_file
from annbatch_dask.storage.threads import MAX_THREADS, map_ordered

__all__ = ["SLAB_NBYTES", "in_flight_nbytes", "read_h5_rows", "visit_h5"]

Visitor = Callable[[int, NDArray], None]
RawChunk = tuple[tuple[int, ...], bytes | NDArray]
"""Origin of a chunk, and its stored bytes, or its values where these had to come from h5py."""
SLAB_NBYTES = 2**22
_GROUP_NBYTES = 2**20
_WAITING_NBYTES = 2**24
"""Of chunks that wait for a thread, or are at work in one, about; one chunk always is."""
_SPREAD = 2
"""Chunks that are further apart in their file, by their bytes when inflated, are not in its order."""
_SMALL = 8
"""Datasets of so many chunks or groups are asked how many bytes they take: that looks at the place of each chunk."""
_SHUFFLE, _DEFLATE = h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE


def visit_h5(dataset: h5py.Dataset, start: int, stop: int, visit: Visitor) -> None:
    """Call ``visit(first_row, rows)`` over pieces that tile rows [start, stop) of a 1-D dataset.

    Pieces come in no order and from several threads at once; ``rows`` is only valid during the call.

    Parameters
    ----------
    dataset
        1-D.
    start, stop
        Rows, half-open.
    visit
        Takes the first row of a piece, relative to ``start``, and its values.
    """
    if start >= stop:
        return
    _read_ahead(dataset, start, stop)
    if _fast_filters(dataset) is None:
        _visit_plain(dataset, start, stop, visit)
        return

    dtype, chunks, shuffled = dataset.dtype, dataset.chunks, bool(_fast_filters(dataset))

    def work(group: list[RawChunk]) -> None:
        for (first,), payload in group:
            values = _decode(dtype, chunks, payload, shuffled=shuffled)
            lo, hi = max(first, start), min(first + chunks[0], stop)
            visit(lo - start, values if hi - lo == len(values) else values[lo - first : hi - first])

    _for_each_group(work, dataset, start, stop)


def read_h5_rows(dataset: h5py.Dataset, start: int, stop: int) -> NDArray:
    """Rows [start, stop) of a dataset of any number of dimensions, as h5py would give them."""
    out = np.empty((stop - start, *dataset.shape[1:]), dataset.dtype)
    _read_ahead(dataset, start, stop)
    if dataset.dtype.hasobject or start >= stop or _fast_filters(dataset) is None:
        return np.asarray(dataset[start:stop])
    dtype, chunks, shuffled = dataset.dtype, dataset.chunks, bool(_fast_filters(dataset))

    bounds = [(start, stop), *((0, n) for n in dataset.shape[1:])]

    def work(group: list[RawChunk]) -> None:
        for origin, payload in group:
            into, of = [], []
            for first, size, (low, high) in zip(origin, chunks, bounds, strict=True):
                a, b = max(first, low), min(first + size, high)
                into.append(slice(a - low, b - low))
                of.append(slice(a - first, b - first))
            out[tuple(into)] = _decode(dtype, chunks, payload, shuffled=shuffled)[tuple(of)]

    _for_each_group(work, dataset, start, stop)
    return out


def _read_ahead(dataset: h5py.Dataset, start: int, stop: int) -> None:
    """Have the bytes of rows [start, stop) of a remote file read before HDF5 asks for them, one after another."""
    if start >= stop or (file := ahead_file(dataset.file.filename)) is None:
        return
    if dataset.chunks is None:
        row_nbytes = prod(dataset.shape[1:]) * dataset.dtype.itemsize
        if (first := dataset.id.get_offset()) is not None:
            file.expect(first + start * row_nbytes, first + stop * row_nbytes)
        return
    ends = (start, *(0 for _ in dataset.shape[1:])), (stop - 1, *(n - 1 for n in dataset.shape[1:]))
    if min(ends[1]) < 0:  # of no columns
        return
    origins = (tuple(at // c * c for at, c in zip(end, dataset.chunks, strict=True)) for end in ends)
    front, back = (_place(dataset, file, origin) for origin in origins)
    if front is None or back is None:
        return
    first, last = front[0], back[1]
    if 0 < last - first <= _SPREAD * _n_chunks(dataset, start, stop) * prod(dataset.chunks) * dataset.dtype.itemsize:
        file.expect(first, last)


def _place(dataset: h5py.Dataset, file: AheadFile, origin: tuple[int, ...]) -> tuple[int, int] | None:
    """Where a chunk begins and ends in its file; None if it was never written.

    HDF5 can be asked for that, and then looks at every chunk until it comes to it, which would read the file.
    """
    try:
        _, stored = dataset.id.read_direct_chunk(origin)
    except (OSError, RuntimeError):
        return None
    return file.tell() - len(stored), file.tell()


def _n_chunks(dataset: h5py.Dataset, start: int, stop: int) -> int:
    """Chunks that hold a row of [start, stop)."""
    rows = -(-stop // dataset.chunks[0]) - start // dataset.chunks[0]
    return int(rows * prod(-(-n // c) for n, c in zip(dataset.shape[1:], dataset.chunks[1:], strict=True)))


def _for_each_group(work: Callable[[list[RawChunk]], None], dataset: h5py.Dataset, start: int, stop: int) -> None:
    """Hand stored chunks to the pool by the dozen: chunks of h5py's default size inflate faster than a hand-over."""
    n_chunk_bytes = prod(dataset.chunks) * dataset.dtype.itemsize
    stored = _raw_chunks(dataset, start, stop)
    groups = iter(lambda: list(islice(stored, max(1, _GROUP_NBYTES // n_chunk_bytes))), [])
    with activity("inflate"), closing(map_ordered(work, groups, in_flight=_in_flight(n_chunk_bytes))) as results:
        for _ in results:
            pass


def _in_flight(n_chunk_bytes: int) -> int:
    """Number of groups of chunks to read ahead: fewer if a chunk is large."""
    return max(1, min(2 * MAX_THREADS, _WAITING_NBYTES // max(_GROUP_NBYTES, n_chunk_bytes)))


def in_flight_nbytes(dataset: h5py.Dataset) -> int:
    """Bytes at most that reading any rows of a dataset holds beside them: chunks, stored and inflated."""
    if dataset.chunks is None:
        return SLAB_NBYTES
    n = prod(dataset.chunks) * dataset.dtype.itemsize
    stored = max(n, _GROUP_NBYTES)
    if _n_chunks(dataset, 0, dataset.shape[0]) * n <= _SMALL * stored:  # of a large one the whole file would be read
        stored = min(stored, dataset.id.get_storage_size())
    if (shuffled := _fast_filters(dataset)) is None:
        return int(stored + n + SLAB_NBYTES)
    waiting = _in_flight(n)
    return int(waiting * stored + min(waiting, MAX_THREADS) * n * (2 if shuffled else 1))


def _fast_filters(dataset: h5py.Dataset) -> bool | None:
    """True if bytes are shuffled, for a chunked dataset with deflate, or shuffle and deflate; None for any other.

    Nor for one whose values are not stored as numpy has them, as float32 of two bytes: HDF5 converts these.
    """
    if dataset.chunks is None or dataset.dtype.hasobject:
        return None
    if dataset.id.get_type() != h5py.h5t.py_create(dataset.dtype, logical=True):
        return None
    plist = dataset.id.get_create_plist()
    codes = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
    return {(_DEFLATE,): False, (_SHUFFLE, _DEFLATE): True}.get(tuple(codes))


def _visit_plain(dataset: h5py.Dataset, start: int, stop: int, visit: Visitor) -> None:
    step = max(1, SLAB_NBYTES // max(1, dataset.dtype.itemsize))
    for a in range(start, stop, step):
        visit(a - start, dataset[a : min(a + step, stop)])


def _raw_chunks(dataset: h5py.Dataset, start: int, stop: int) -> Iterator[RawChunk]:
    """Every chunk that holds a row of [start, stop)."""
    chunks = dataset.chunks
    first = start // chunks[0] * chunks[0]
    axes = [range(first, stop, chunks[0])]
    axes += [range(0, n, c) for n, c in zip(dataset.shape[1:], chunks[1:], strict=True)]
    for origin in product(*axes):
        try:
            skipped_filters, stored = dataset.id.read_direct_chunk(origin)
        except (OSError, RuntimeError):  # never written: h5py knows its fill value, and says so if it is damage
            skipped_filters, stored = 1, b""
        yield origin, _plain_chunk(dataset, origin) if skipped_filters else stored


def _plain_chunk(dataset: h5py.Dataset, origin: tuple[int, ...]) -> NDArray:
    """A whole chunk through h5py, padded at the dataset's edges like a stored one."""
    out = np.zeros(dataset.chunks, dataset.dtype)
    ends = [min(o + c, n) for o, c, n in zip(origin, dataset.chunks, dataset.shape, strict=True)]
    values = dataset[tuple(slice(o, e) for o, e in zip(origin, ends, strict=True))]
    out[tuple(slice(0, n) for n in values.shape)] = values
    return out


def _decode(dtype: np.dtype, chunks: tuple[int, ...], payload: bytes | NDArray, *, shuffled: bool) -> NDArray:
    if isinstance(payload, np.ndarray):
        return payload
    n_bytes = prod(chunks) * dtype.itemsize
    raw = np.frombuffer(deflate.zlib_decompress(payload, n_bytes), np.uint8)
    if shuffled:
        raw = np.ascontiguousarray(raw.reshape(dtype.itemsize, -1).T).reshape(-1)
    return raw.view(dtype) if len(chunks) == 1 else raw.view(dtype).reshape(chunks)
