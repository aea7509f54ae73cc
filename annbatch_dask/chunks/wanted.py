"""The entries of wanted columns of CSR rows on disk: what is not wanted is written nowhere.

:class:`WantedEntries` picks them natively (:mod:`annbatch_dask.chunks.native_wanted`). What is not sound goes the
plain way: that of :mod:`annbatch_dask.chunks.reader`, which says what is wrong, and then numpy.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.chunks import native
from annbatch_dask.chunks.dealing import MIN_PART_NBYTES, Divisible, Task
from annbatch_dask.chunks.files import scratch
from annbatch_dask.chunks.layout import Array, Ints
from annbatch_dask.chunks.native_wanted import STEP, hand_out, pick
from annbatch_dask.chunks.reader import LocalChunks, RangeReader
from annbatch_dask.errors import IntegrityError
from annbatch_dask.kernels.assemble import sum_dtype
from annbatch_dask.kernels.wanted import add_up, adder, finder, taker

__all__ = ["CoveredRows", "WantedEntries", "say_outside"]

_ITEM_NBYTES = (1, 2, 4, 8)


class CoveredRows(NamedTuple):
    """Rows whose entries are wanted.

    Attributes
    ----------
    spans
        (n, 2) half-open runs of entries of the matrix: those of all rows that are covered, ascending.
    bounds
        (n_covered + 1,) where the entries of each covered row begin among those of all runs, and end.
    position
        (n,) of each row that was asked for, which of the covered ones it is.
    """

    spans: Ints
    bounds: Ints
    position: Ints


@dataclass(frozen=True)
class WantedEntries(Divisible):
    """Picks the entries of some rows whose column is wanted; within a row they stay in their order.

    Attributes
    ----------
    readers
        Of columns and values.
    local
        Where columns and values are.
    rows
        Which ones.
    is_wanted
        (n_columns,) uint8, 0 or 1.
    outputs
        For columns and values: room for all entries of the rows, of which no more is touched than is picked.
    starts, lengths
        (n,) of each row that was asked for: where it begins in the outputs, and how many of its entries were picked.
    used
        (1,) how many entries were picked so far.
    totals
        float64, of each covered row the sum of all its values, picked or not; None where nobody asked for them.
    """

    readers: tuple[RangeReader, RangeReader]
    local: tuple[LocalChunks, LocalChunks]
    rows: CoveredRows
    is_wanted: NDArray[np.uint8]
    outputs: tuple[Array, Array]
    starts: Ints
    lengths: Ints
    used: Ints
    totals: NDArray[np.float64] | None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(
        cls,
        readers: tuple[RangeReader, RangeReader],
        rows: CoveredRows,
        is_wanted: NDArray[np.uint8],
        outputs: tuple[Array, Array],
        *,
        with_totals: bool = False,
    ) -> WantedEntries | None:
        """None where no one call can do it: both arrays must be in local files, in chunks of the same entries."""
        if readers[0].dtype.kind not in "iu" or any(reader.dtype.itemsize not in _ITEM_NBYTES for reader in readers):
            return None
        if with_totals and sum_dtype(readers[1].dtype) is None:
            return None
        spans = np.ascontiguousarray(rows.spans[rows.spans[:, 1] > rows.spans[:, 0]])
        columns, values = (reader.local_chunks(spans) for reader in readers)
        if columns is None or values is None or columns.how[2] != values.how[2]:
            return None
        n = len(rows.position)
        found = np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros(1, np.int64)
        totals = np.zeros(len(rows.bounds) - 1) if with_totals else None
        return cls(readers, (columns, values), rows, is_wanted, outputs, *found, totals)

    def cut(self, n_parts: int) -> list[Task]:
        """Runs of rows with about as many entries."""
        bounds, nbytes = self.rows.bounds, sum(int(local.reads[:, 4].sum()) for local in self.local)
        n_parts = max(1, min(n_parts, nbytes // MIN_PART_NBYTES))
        cuts = np.searchsorted(bounds, bounds[-1] * np.arange(1, n_parts) // n_parts)
        firsts = np.unique([0, *cuts, len(bounds) - 1]).tolist()
        columns = self.local[0]
        chunk = np.repeat(np.arange(len(columns.runs)), np.diff(columns.runs).reshape(-1))
        pieces = np.concatenate([columns.pieces, chunk[:, None]], axis=1)
        return [partial(self._run, first, stop, pieces) for first, stop in pairwise(firsts)]

    def _run(self, first: int, stop: int, pieces: Ints) -> None:
        """Pick the entries of rows [first, stop), and put them behind those of other parts."""
        counts = np.zeros(stop - first, np.int64)
        n_entries = int(self.rows.bounds[stop] - self.rows.bounds[first])
        # What is kept from call to call is touched where something is written alone, at its beginning.
        picked = tuple(
            scratch(f"picked_{number}", n_entries * reader.dtype.itemsize).view(reader.dtype)
            for number, reader in enumerate(self.readers)
        )
        if not self._pick(first, pieces, picked, counts):
            picked = self.pick_plainly(first, counts)
        n = int(counts.sum())
        with self._lock:
            begin = int(self.used[0])
            self.used[0] += n
        for out, found in zip(self.outputs, picked, strict=True):
            out[begin : begin + n] = found[:n]
        hand_out(first, begin, counts, self.rows.position, self.starts, self.lengths)

    def _pick(self, first: int, pieces: Ints, out: tuple[Array, ...], counts: Ints) -> bool:
        columns, values = (self._given(number, out[number]) for number in (0, 1))
        find = finder(self.readers[0].dtype.itemsize).address
        wanted = np.array([find, self.is_wanted.ctypes.data, len(self.is_wanted)])
        kept = scratch("kept", 4 * STEP).view(np.uint32)
        given = (first, self.rows.bounds, pieces, columns, values, wanted, native.functions(), kept, counts)
        totals = np.zeros(3, np.int64)
        if self.totals is not None:
            totals[:] = adder(self.readers[1].dtype).address, self.rows.bounds.ctypes.data, self.totals.ctypes.data
        return bool(pick(*given, totals))

    def _given(self, number: int, out: Array) -> tuple[Any, ...]:
        """Description of how columns or values are read."""
        local = self.local[number]
        how = np.array([*local.how, out.ctypes.data, taker(out.itemsize).address])
        raw = scratch(f"raw_{number}", int(local.reads[:, 4].max()))
        spare = scratch(f"chunk_{number}", local.how[2] * out.itemsize)
        return local.reads, how, raw, spare, scratch(f"step_{number}", STEP * out.itemsize)

    def pick_plainly(self, first: int, counts: Ints) -> tuple[Array, ...]:
        """Columns and values, without what is compiled for it; IntegrityError where a column does not exist."""
        bounds = self.rows.bounds[first : first + len(counts) + 1]
        columns, values = (self._read(reader, bounds[0], bounds[-1]) for reader in self.readers)
        n_outside = int(((columns < 0) | (columns >= len(self.is_wanted))).sum())
        if n_outside:
            raise IntegrityError(say_outside(n_outside, len(self.is_wanted)))
        if self.totals is not None:
            self.totals[first : first + len(counts)] = 0
            room = np.empty(1, sum_dtype(values.dtype))
            add_up(values, bounds[0], self.rows.bounds, first, room, self.totals)
        kept = np.flatnonzero(self.is_wanted[columns])
        counts[:] = np.diff(np.searchsorted(kept, bounds - bounds[0]))
        return columns[kept], values[kept]

    def _read(self, reader: RangeReader, begin: int, end: int) -> Array:
        """Entries [begin, end) of those of all runs."""
        starts, stops = self.rows.spans.T
        shifts = starts - (np.cumsum(stops - starts) - (stops - starts))
        spans = np.stack([np.maximum(starts, begin + shifts), np.minimum(stops, end + shifts)], axis=1)
        out = np.empty(int(end - begin), reader.dtype)
        reader.read(spans[spans[:, 0] < spans[:, 1]], out)
        return out


def say_outside(n_outside: int, n_columns: int) -> str:
    """Describe entries that name no existing column."""
    return f"{n_outside} entries name a column beyond the {n_columns} the data has: the data is damaged"
