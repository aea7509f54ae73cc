"""Rows of any length, moved between flat arrays."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.kernels.compiled import compiled

__all__ = [
    "copy_runs",
    "count_bands",
    "find_rows",
    "map_indices",
    "names_twice",
    "offsets_of",
    "order_row",
    "place_columns",
    "put_in_bands",
    "slabs",
    "sort_entries",
    "sort_rows",
    "take_rows",
]


def offsets_of(counts: NDArray) -> NDArray[np.int64]:
    """(n + 1,) offsets, from 0, of (n,) counts."""
    out = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=out[1:])
    return out


@compiled
def _copy(src, src_start, dst, dst_start, length):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    for i in range(length.shape[0]):
        n = length[i]
        # views first: their plain loop becomes vector moves, four times as fast as indexing the whole arrays
        a, b = src[src_start[i] : src_start[i] + n], dst[dst_start[i] : dst_start[i] + n]
        for k in range(n):
            b[k] = a[k]


def copy_runs(
    src: NDArray, src_start: NDArray[np.int64], dst: NDArray, dst_start: NDArray[np.int64], length: NDArray[np.int64]
) -> None:
    """For each i copy ``src[src_start[i]:][:length[i]]`` to ``dst[dst_start[i]:]``.

    Parameters
    ----------
    src, dst
        1-D, contiguous, of one dtype; the bytes are moved, so one compiled kernel serves each item size.
    src_start, dst_start, length
        (n_runs,) int64.
    """
    if src.dtype != dst.dtype:
        msg = f"copy_runs moves bytes, so dtypes must be equal; got {src.dtype} and {dst.dtype}"
        raise TypeError(msg)
    raw = np.dtype(f"u{src.dtype.itemsize}")
    _copy(src.view(raw), src_start, dst.view(raw), dst_start, length)


def take_rows(
    values: NDArray, offsets: NDArray[np.int64], rows: NDArray[np.integer]
) -> tuple[NDArray, NDArray[np.int64]]:
    """Some rows of a ragged array, in any order: their entries, and the (n + 1,) offsets of each row's."""
    counts = np.diff(offsets)[rows]
    new_offsets = offsets_of(counts)
    out = np.empty(int(new_offsets[-1]), values.dtype)
    copy_runs(values, offsets[:-1][rows], out, new_offsets[:-1], counts)
    return out, new_offsets


@compiled
def map_indices(indices, gene_map, out):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """``out[k] = gene_map[indices[k]]``; False, and nothing mapped, where an index is out of range."""
    worst, widest = np.uint32(0), np.uint64(0)  # a negative index becomes a large one
    if indices.itemsize > 4:  # noqa: PLR2004 - 2**32 + 1 is no 1
        for k in range(indices.shape[0]):
            widest = max(widest, np.uint64(indices[k]))
    else:
        for k in range(indices.shape[0]):
            worst = max(worst, np.uint32(indices[k]))
    if max(widest, np.uint64(worst)) >= np.uint64(gene_map.shape[0]) and indices.shape[0]:
        return False
    for k in range(indices.shape[0]):
        out[k] = gene_map[np.uint32(indices[k])]
    return True


@compiled
def names_twice(offsets, indices, n_cols):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """True if a row has an index twice; all are in [0, n_cols). Rows in their order are seen to be so at a glance."""
    n_falls, n_edges = 0, 0
    for k in range(1, indices.shape[0]):
        n_falls += indices[k] <= indices[k - 1]
    for r in range(offsets.shape[0] - 1):
        if 0 < offsets[r] < offsets[r + 1]:
            n_edges += indices[offsets[r]] <= indices[offsets[r] - 1]
    if n_falls == n_edges:
        return False
    last = np.full(n_cols, -1, np.int64)
    for r in range(offsets.shape[0] - 1):
        for k in range(offsets[r], offsets[r + 1]):
            if last[indices[k]] == r:
                return True
            last[indices[k]] = r
    return False


@compiled
def order_row(keys, order, spare):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """``order`` = stable order of ``keys``, none of them negative; ``spare`` is as long.

    A byte of the keys at a time, the lowest first (radix sort; D. Knuth, The Art of Computer Programming, volume 3,
    section 5.2.5): a sixth of the time of numba's merge sort for rows of 1,500 genes, and of the time to compile it.
    """
    n, n_down, highest = keys.shape[0], 0, np.uint64(0)
    for k in range(n):
        order[k] = k
        n_down += k > 0 and keys[k] < keys[k - 1]
        highest = max(highest, np.uint64(keys[k]))
    if n_down == 0:
        return
    places = np.empty(256, np.int64)
    shift = np.uint64(0)
    while shift < 64 and highest >> shift:
        for digit in range(256):
            places[digit] = 0
        for k in range(n):
            places[(np.uint64(keys[k]) >> shift) & np.uint64(255)] += 1
        total = 0
        for digit in range(256):
            total, places[digit] = total + places[digit], total
        for k in range(n):
            at = (np.uint64(keys[order[k]]) >> shift) & np.uint64(255)
            spare[places[at]] = order[k]
            places[at] += 1
        for k in range(n):
            order[k] = spare[k]
        shift += np.uint64(8)


@compiled
def sort_rows(offsets, keys, order):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """``order[a:b]`` = stable order of ``keys[a:b]``, as positions in the whole, for each row [a, b)."""
    longest = 0
    for r in range(offsets.shape[0] - 1):
        longest = max(longest, offsets[r + 1] - offsets[r])
    spare = np.empty(longest, np.int64)
    for r in range(offsets.shape[0] - 1):
        a, b = offsets[r], offsets[r + 1]
        order_row(keys[a:b], order[a:b], spare)
        for k in range(a, b):
            order[k] += a


def slabs(offsets: NDArray[np.int64], size: int) -> Iterator[tuple[int, int]]:
    """Cut rows [a, b) of about ``size`` entries, one row at least, from all."""
    a, n = 0, len(offsets) - 1
    while a < n:
        b = min(max(a + 1, int(np.searchsorted(offsets, offsets[a] + size, side="right")) - 1), n)
        yield a, b
        a = b


_SORT = 2**20


def sort_entries(offsets: NDArray[np.int64], keys: NDArray, *values: NDArray) -> None:
    """Put each row's keys, and the values beside them, in the stable order of the keys: in place, slab by slab."""
    for a, b in slabs(offsets, _SORT):
        at = slice(int(offsets[a]), int(offsets[b]))
        order = np.empty(at.stop - at.start, np.int64)
        sort_rows(offsets[a : b + 1] - offsets[a], keys[at], order)
        for entries in (keys, *values):
            entries[at] = entries[at][order]


@compiled
def find_rows(rows, start, stop, at):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """``at[:n]`` = where ``rows`` are in [start, stop); returns n. ``at`` has one place more than there are rows."""
    n = 0
    for k in range(rows.shape[0]):
        at[n] = k
        n += start <= rows[k] < stop
    return n


@compiled
def _place(column, offsets, rows, values, at, out_columns, out_values):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    for c in range(offsets.shape[0] - 1):
        for k in range(offsets[c], offsets[c + 1]):
            place = at[rows[k]]
            out_columns[place] = column + c
            out_values[place] = values[k]
            at[rows[k]] = place + 1


def place_columns(
    column: int,
    offsets: NDArray[np.int64],
    entries: tuple[NDArray, NDArray],
    at: NDArray[np.int64],
    out: tuple[NDArray[np.int32], NDArray],
) -> None:
    """Put the entries of some columns into their rows.

    Parameters
    ----------
    column, offsets
        The first column, and the (n_columns + 1,) offsets of the entries of each.
    entries
        Rows and values, of which the second dtype is that of ``out``.
    at
        (n_rows,) the next free place of each row; moved on.
    out
        Columns and values, row after row.
    """
    raw = np.dtype(f"u{entries[1].dtype.itemsize}")  # one compiled kernel serves each item size
    _place(column, offsets, entries[0], entries[1].view(raw), at, out[0], out[1].view(raw))


@compiled
def count_bands(rows, band_of, counts):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Add to ``counts`` how many entries are in rows of each band; those of band -1 are in none."""
    for k in range(rows.shape[0]):
        band = band_of[rows[k]]
        if band >= 0:
            counts[band] += 1


@compiled
def _put(columns, entries, band_of, first, at, out):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    (rows, values), (out_columns, out_rows, out_values) = entries, out
    for c in range(columns.shape[0] - 1):
        for k in range(columns[c], columns[c + 1]):
            band = band_of[rows[k]]
            if band >= 0:
                place = at[band]
                out_columns[place] = c
                out_rows[place] = rows[k] - first[band]
                out_values[place] = values[k]
                at[band] = place + 1


def put_in_bands(
    columns: NDArray[np.int64],
    entries: tuple[NDArray, NDArray],
    bands: tuple[NDArray[np.int32], NDArray[np.int64]],
    at: NDArray[np.int64],
    out: tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray],
) -> None:
    """Put the entries of some columns in the order of bands of rows, and in each as they come.

    Parameters
    ----------
    columns
        (n_columns + 1,) offsets of the entries of each column.
    entries
        Rows and values.
    bands
        (n_rows,) the band of each row, -1 for none; and the first row of each band.
    at
        (n_bands,) the next free place of each band; moved on.
    out
        Columns, from 0; rows, counted in their band; and values, in the dtype of those of ``entries``.
    """
    raw = np.dtype(f"u{entries[1].dtype.itemsize}")  # see place_columns
    _put(columns, (entries[0], entries[1].view(raw)), *bands, at, (out[0], out[1], out[2].view(raw)))
