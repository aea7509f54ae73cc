"""The rows of a dataset in their final order, a slice at a time, out of the spill files of all blocks.

The rows of a part are read as they are in the files, packed, and lie there in the order in which they are written; so a
slice of them, small enough for a processor's cache, takes the next few rows of each block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, pairwise

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.errors import IntegrityError
from annbatch_dask.etl.compare import left_out_of
from annbatch_dask.etl.job import GatherTask, Job
from annbatch_dask.etl.rows import (
    GROUP,
    HASH,
    PLACE,
    FixedArrays,
    RaggedArrays,
    all_columns,
    array_name,
    ragged_arrays,
    row_hashes,
)
from annbatch_dask.etl.spilled import Spilled
from annbatch_dask.kernels.rows import copy_runs, offsets_of, slabs
from annbatch_dask.plan.plan import Plan
from annbatch_dask.storage.packed import unpack_chunk_runs
from annbatch_dask.storage.pieces import Entries, PackedEntries
from annbatch_dask.storage.spill import SpillReader

__all__ = ["each_slice"]

_SLICE_NBYTES = 2**23
"""Of matrices in a slice, about; one row at least. Two are held, one is written while the other fills."""
_GROUPED_NBYTES = 2**25
"""The same where rows are added up by group: each group's sums, megabytes, are in the cache once a slice."""


def each_slice(job: Job, task: GatherTask, spilled: Spilled) -> Iterator[tuple[FixedArrays, RaggedArrays]]:
    """The dataset's rows, and the hashes of their columns; arrays of matrices are used again for the slice after next.

    Raises
    ------
    IntegrityError
        If a row is not there, or twice.
    """
    plan = job.plan
    raw: dict[str, NDArray] = {}
    buffer_sets: Iterator[dict[str, NDArray]] = cycle(({}, {}))
    left_out = left_out_of(job, task.dataset) if task.n_left_out else None
    for part in spilled.each_part():
        segments = [_Segment.read(r, part) for r in spilled.readers if r.n_rows(part)]
        if plan.groups is None:
            n_rows = int(plan.layout.part_starts[part + 1] - plan.layout.part_starts[part])
            if left_out is not None:
                n_rows = _leave_out(segments, left_out[_places(plan, task.dataset, part)], is_place=True)
        else:
            if left_out is not None:
                _leave_out(segments, left_out, is_place=False)
            n_rows = _place_by_group([s.fixed for s in segments])
        if not n_rows:  # a piece of a large group may have none, and all rows may be left out
            continue
        _check_places(segments, n_rows)
        yield from _slices(plan, task, _GatheredPart.read(plan, task, segments, part, n_rows, raw), buffer_sets)


def _slice_nbytes(plan: Plan, part_nbytes: int) -> int:
    """Bytes of a slice; the larger ones take no more of the planned memory than they may."""
    return _SLICE_NBYTES if plan.stats_column is None else max(_SLICE_NBYTES, min(_GROUPED_NBYTES, part_nbytes // 4))


def _slices(
    plan: Plan, task: GatherTask, part: _GatheredPart, buffer_sets: Iterator[dict[str, NDArray]]
) -> Iterator[tuple[FixedArrays, RaggedArrays]]:
    arrays = list(ragged_arrays(plan, task.dtypes))
    of_matrices = {array_name(m.name, what) for m in plan.matrices for what in ("indices", "values", "dense")}
    strings: RaggedArrays = {
        name: part.take(name, dtype, length, 0, part.n_rows, partial(np.empty, dtype=dtype))
        for name, dtype, length in arrays
        if name not in of_matrices
    }
    columns = all_columns(plan)
    hashes = row_hashes(part.n_rows, (), columns, part.fixed, strings)
    nbytes = np.zeros(part.n_rows, np.int64)
    for name, dtype, length in arrays:
        if name in of_matrices:
            nbytes += part.lengths(length) * dtype.itemsize
    edges = offsets_of(nbytes)
    for a, b in slabs(edges, _slice_nbytes(plan, int(edges[-1]))):
        buffers = next(buffer_sets)
        fixed: FixedArrays = {name: values[a:b] for name, values in part.fixed.items()} | {HASH: hashes[a:b]}
        ragged: RaggedArrays = {
            name: (values[offsets[a] : offsets[b]], offsets[a : b + 1] - offsets[a])
            for name, (values, offsets) in strings.items()
        }
        for name, dtype, length in arrays:
            if name in of_matrices:
                ragged[name] = part.take(name, dtype, length, a, b, partial(_buffer, buffers, name, dtype=dtype))
        for m in plan.matrices:
            if m.kind == "dense":
                name = array_name(m.name, "dense")
                fixed[name] = ragged.pop(name)[0].reshape(b - a, m.n_cols)
        yield fixed, ragged


@dataclass
class _Segment:
    """Rows of one block in a part: all of them as they are in the file, and those that stay, which ``kept`` says."""

    reader: SpillReader
    whole: FixedArrays
    fixed: FixedArrays
    kept: NDArray[np.bool_] | None = None

    @classmethod
    def read(cls, reader: SpillReader, part: int) -> _Segment:
        whole = reader.read_fixed(part)
        return cls(reader, whole, dict(whole))

    def lengths(self, length: str | int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """Where the entries of each row that stays begin in the file, how many it has, and how many the file has."""
        n = len(self.whole[PLACE])
        lengths = self.whole[length].astype(np.int64) if isinstance(length, str) else np.full(n, length, np.int64)
        starts = offsets_of(lengths)
        kept = slice(None) if self.kept is None else self.kept
        return starts[:-1][kept], lengths[kept], int(starts[-1])


def _places(plan: Plan, dataset: int, part: int) -> slice:
    """Places in a dataset of the rows of one of its parts."""
    start, _ = plan.layout.dataset_bounds(dataset)
    first, last = plan.layout.part_starts[part : part + 2].tolist()
    return slice(first - start, last - start)


def _leave_out(segments: Sequence[_Segment], left_out: NDArray[np.bool_], *, is_place: bool) -> int:
    """Take rows out, and move the others together, which stay in their order; returns how many places are left.

    ``left_out``: by the place that each row has; ``is_place``: that place is the one in the part.
    """
    place = (np.cumsum(~left_out) - 1).astype(np.uint32)
    for s in segments:
        s.kept = ~left_out[s.whole[PLACE]]
        s.fixed = {name: values[s.kept] for name, values in s.whole.items()}
        if is_place:
            s.fixed[PLACE] = place[s.fixed[PLACE]]
    return int(place[-1]) + 1 if not left_out.all() else 0


def _place_by_group(fixed: Sequence[FixedArrays]) -> int:
    """Give each row its place in the part, by group and then by its position in the dataset; returns their number."""
    if not fixed:
        return 0
    counts = [len(h[PLACE]) for h in fixed]
    keys = [np.concatenate([h.pop(name) for h in fixed]) for name in (PLACE, GROUP)]
    place = np.empty(sum(counts), np.uint32)
    place[np.lexsort(keys)] = np.arange(len(place))
    for h, rows in zip(fixed, np.split(place, np.cumsum(counts)[:-1]), strict=True):
        h[PLACE] = rows
    return len(place)


def _check_places(segments: Sequence[_Segment], n_rows: int) -> None:
    """Every row of the part must be there exactly once."""
    seen = np.zeros(n_rows, np.uint8)
    for s in segments:
        np.add.at(seen, s.fixed[PLACE], 1)
    if not (seen == 1).all():
        missing, twice = int((seen == 0).sum()), int((seen > 1).sum())
        msg = f"{missing:,} of {n_rows:,} rows are missing from the spill files, {twice:,} are there twice"
        raise IntegrityError(msg)


@dataclass(frozen=True)
class _GatheredPart:
    """Rows of a part: fixed-size arrays in their final order, ragged ones as they are in the files.

    Attributes
    ----------
    fixed
        (n_rows, ...) each.
    segment
        (n_rows,) where each row is.
    raw
        Ragged arrays of all segments, one behind the other.
    stored
        How they are stored there, by name.
    rows
        Where each row's entries begin, and how many it has, by what counts them: (n_rows,) each. They begin after those
        of all segments before.
    """

    n_rows: int
    fixed: FixedArrays
    segment: NDArray[np.int32]
    raw: NDArray[np.uint8]
    stored: Mapping[str, Sequence[_Stored]]
    rows: Mapping[str | int, tuple[NDArray[np.int64], NDArray[np.int64]]]

    @classmethod
    def read(  # noqa: PLR0913, PLR0917 - a buffer
        cls,
        plan: Plan,
        task: GatherTask,
        segments: Sequence[_Segment],
        part: int,
        n_rows: int,
        buffers: dict[str, NDArray],
    ) -> _GatheredPart:
        """Read what the segments have not read, into a buffer that the next part is read into."""
        segment = np.empty(n_rows, np.int32)
        for k, s in enumerate(segments):
            segment[s.fixed[PLACE]] = k
        arrays = list(ragged_arrays(plan, task.dtypes))
        rows, before = {}, {}
        for length in {length for _, _, length in arrays}:
            rows[length], before[length] = _rows_of(segments, length, n_rows)
        edges = offsets_of(np.array([s.reader.ragged_nbytes(part) for s in segments])).tolist()
        raw = _buffer(buffers, "raw", edges[-1], np.dtype(np.uint8))
        stored: dict[str, list[_Stored]] = {name: [] for name, _, _ in arrays}
        for k, (s, (start, stop)) in enumerate(zip(segments, pairwise(edges), strict=True)):
            found, at = s.reader.read_ragged(part, raw[start:stop]), s.reader.ragged_starts(part)
            for name, _, length in arrays:
                _Stored.add(stored[name], k, found[name], start + at[name], int(before[length][k]))
        return cls(n_rows, _fixed(segments, n_rows), segment, raw, stored, rows)

    def lengths(self, length: str | int) -> NDArray[np.int64]:
        """(n_rows,) entries of each row."""
        return self.rows[length][1]

    def take(  # noqa: PLR0913, PLR0917 - a slice
        self, name: str, dtype: np.dtype, length: str | int, a: int, b: int, make: partial[NDArray]
    ) -> tuple[NDArray, NDArray[np.int64]]:
        """Entries of rows [a, b) of an array, in an array that ``make`` gives of their number, and their offsets."""
        starts, lengths = (x[a:b] for x in self.rows[length])
        offsets = offsets_of(lengths)
        out = make(int(offsets[-1]))
        segment = self.segment[a:b]
        order = np.argsort(segment, kind="stable")  # so each block of packed entries is unpacked once
        ordered = segment[order]
        for stored in self.stored[name]:
            rows = order if len(self.stored[name]) == 1 else order[np.isin(ordered, stored.segments)]
            stored.take(self.raw, (starts[rows], lengths[rows]), out, offsets[rows])
        return out, offsets


@dataclass(frozen=True)
class _Stored:
    """Entries of a ragged array in some segments, which are all stored in one way.

    Attributes
    ----------
    dtype, is_packed
        Which way.
    segments
        Their numbers.
    pieces
        For each piece of entries that lie together: the number of those before it, in all segments, its own, its first
        byte, and its bytes.
    """

    dtype: np.dtype
    is_packed: bool
    segments: list[int]
    pieces: list[tuple[int, int, int, int]]

    @classmethod
    def add(cls, found: list[_Stored], segment: int, entries: Entries, start: int, before: int) -> None:
        """Add a segment's entries, which begin at a byte, after so many others, to those stored in the same way."""
        is_packed = isinstance(entries, PackedEntries)
        alike = next((x for x in found if (x.dtype, x.is_packed) == (entries.dtype, is_packed)), None)
        if alike is None:
            found.append(alike := cls(entries.dtype, is_packed, [], []))
        alike.segments.append(segment)
        pieces = entries.pieces if isinstance(entries, PackedEntries) else [(0, len(entries), 0, entries.nbytes)]
        alike.pieces.extend((before + first, n, start + at, nbytes) for first, n, at, nbytes in pieces)

    def take(
        self,
        raw: NDArray[np.uint8],
        rows: tuple[NDArray[np.int64], NDArray[np.int64]],
        out: NDArray,
        places: NDArray[np.int64],
    ) -> None:
        """Put rows, of which ``rows`` has the first entry and the number of entries, to their places in ``out``."""
        starts, lengths = rows
        if self.dtype != out.dtype:
            edges = offsets_of(lengths)
            own = np.empty(int(edges[-1]), self.dtype)
            self.take(raw, rows, own, edges[:-1])
            copy_runs(own.astype(out.dtype), edges[:-1], out, places, lengths)
            return
        pieces = np.array(self.pieces, np.int64).reshape(-1, 4)
        if self.is_packed:
            unpack_chunk_runs(raw, pieces, starts, lengths, out, places)
            return
        piece = np.searchsorted(pieces[:, 0], starts, side="right") - 1
        at = starts - pieces[piece, 0] + pieces[piece, 2] // self.dtype.itemsize
        copy_runs(raw.view(self.dtype), at, out, places, lengths)


def _rows_of(
    segments: Sequence[_Segment], length: str | int, n_rows: int
) -> tuple[tuple[NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]]:
    """First entry and number of entries of each row of a part; and how many entries there are before each segment."""
    starts, counts = np.empty(n_rows, np.int64), np.empty(n_rows, np.int64)
    before = np.zeros(len(segments) + 1, np.int64)
    for k, s in enumerate(segments):
        at, lengths, total = s.lengths(length)
        starts[s.fixed[PLACE]], counts[s.fixed[PLACE]] = before[k] + at, lengths
        before[k + 1] = before[k] + total
    return (starts, counts), before


def _fixed(segments: Sequence[_Segment], n_rows: int) -> FixedArrays:
    out: FixedArrays = {}
    for name, like in segments[0].fixed.items():
        values = np.empty((n_rows, *like.shape[1:]), like.dtype)
        for s in segments:
            values[s.fixed[PLACE]] = s.fixed[name]
        out[name] = values
    return out


def _buffer(buffers: dict[str, NDArray], name: str, size: int, dtype: np.dtype) -> NDArray:
    """A reused buffer: fresh pages for every slice would cost as much as filling them."""
    if name not in buffers or len(buffers[name]) < size:
        buffers[name] = np.empty(size + size // 16, dtype)
    return buffers[name][:size]
