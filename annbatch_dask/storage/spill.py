"""Spill files: what a scatter task leaves for the gather tasks.

One file a row block. Its rows stand in the order of their part of the output, so a gather task reads one range of each
file; a file's header tells where, so the task reads of it only what concerns its own parts::

    uint64: length of the description, first byte of the table, crc32c of the description
    description (JSON: name, dtype, row shape of each array)
    part 0: fixed-size arrays (one entry a row), then ragged arrays (any number of entries a row)
    part 1: ...
    table: (n_parts, 6 + 2 * n_ragged) int64, per part: first byte, rows, entries of each ragged array, bytes of each,
    a number that the writer gave it, then the crc32c of its fixed-size arrays, of its ragged arrays, and of this line

Every array starts at a multiple of 8 bytes. Ragged arrays of integers may be packed: as pieces, each with its number of
entries and of bytes before it (int64), the bytes those of :func:`annbatch_dask.kernels.packing.pack`. A receipt that is
written after it says that a block is finished. Whatever is read is checked: a damaged file costs its block's work
again, and no more.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import IO

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from annbatch_dask.errors import IntegrityError
from annbatch_dask.kernels.rows import offsets_of, take_rows
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.pieces import ALIGN, Entries, PackedEntries, Pieces, pack_parts, some_rows
from annbatch_dask.storage.scratch import still_there

__all__ = ["SPILL", "SpillError", "SpillReader", "is_spilled", "write_spill"]

SPILL = "spill"
"""Kind of the files that hold the rows of a block. Other kinds are tables of a stage, in the same form."""
_HEADER_NBYTES = 24
_FRONT_NBYTES = 4096
"""Header and description are read together, as long as they are no longer."""
_N_FIELDS = 6
"""Of a line of the table, but for those of ragged arrays."""
_COPY_NBYTES = 8 * 2**20
"""About what is put in order at once."""

FixedArrays = Mapping[str, NDArray]
RaggedArrays = Mapping[str, tuple[NDArray, NDArray[np.int64]]]


class SpillError(IntegrityError):
    """A spill file is missing or damaged: what wrote it must be done again.

    Attributes
    ----------
    block, kind
        Number and kind of the file: a ``"spill"`` is that of a block, which must be read again.
    """

    def __init__(self, message: str, block: int, kind: str = SPILL) -> None:
        super().__init__(message)
        self.block, self.kind = block, kind


@dataclass(frozen=True)
class _Array:
    name: str
    dtype: np.dtype
    shape: tuple[int, ...] = ()
    is_packed: bool = False

    def nbytes(self, n: int) -> int:
        return n * self.dtype.itemsize * prod(self.shape)


def _body(block: int, kind: str = SPILL) -> str:
    return f"{kind}-{block:06d}.bin"


def is_spilled(folder: Folder, block: int, n_bytes: int, *, kind: str = SPILL) -> bool:
    """True if a block's spill file is there, with the size it was written with."""
    return folder.size(_body(block, kind)) == n_bytes


def write_spill(  # noqa: PLR0913 - a block
    folder: Folder,
    block: int,
    *,
    order: NDArray[np.int64],
    rows: NDArray[np.int64],
    fixed: FixedArrays,
    ragged: RaggedArrays,
    packed: Mapping[str, bool] | None = None,
    marks: NDArray[np.uint64] | None = None,
    kind: str = SPILL,
) -> int:
    """Write a block's rows in the order of their part; a few parts at a time, so that no second copy of all is held.

    But for those that are packed: how long they are has to be known before the first is written.

    Parameters
    ----------
    folder, block, kind
        Where, and which block; or which other file.
    order
        (n_rows,) the rows in the order of their part.
    rows
        (n_parts + 1,) first entry of ``order`` of each part.
    fixed
        Arrays with one entry (or one row) a row.
    ragged
        Arrays with any number of entries a row: the entries, and the (n_rows + 1,) offsets of each row's.
    packed
        Which of the ragged ones, of integers, are packed, and whether their differences are.
    marks
        (n_parts,) a number that stands beside each part.

    Returns
    -------
    Bytes written.
    """
    packed = packed or {}
    arrays = [_Array(n, h.dtype, h.shape[1:]) for n, h in fixed.items()]
    arrays += [_Array(n, v.dtype, is_packed=n in packed) for n, (v, _) in ragged.items()]
    described = [(a.name, a.dtype.str, a.shape, a.is_packed) for a in arrays]
    about = json.dumps({"n_heads": len(fixed), "arrays": described}).encode()
    about += b" " * (-len(about) % ALIGN)
    table = np.zeros((len(rows) - 1, _N_FIELDS + 2 * len(ragged)), np.int64)
    entries, nbytes = table[:, 2 : 2 + len(ragged)], table[:, 2 + len(ragged) : -4]
    table[:, 1] = np.diff(rows)
    if marks is not None:
        table[:, -4] = marks.view(np.int64)
    for k, (values, offsets) in enumerate(ragged.values()):
        entries[:, k] = np.diff(offsets_of(np.diff(offsets)[order])[rows])
        nbytes[:, k] = entries[:, k] * values.itemsize
    runs = list(_runs(_sizes(arrays, len(fixed), table).sum(axis=1)))
    ready = {n: pack_parts(*ragged[n], order, rows, runs, _COPY_NBYTES, differences=packed[n]) for n in packed}
    for k, name in enumerate(ragged):
        if name in ready:
            nbytes[:, k] = [sum(piece.nbytes for piece in pieces) for pieces in ready[name]]
    sizes = _sizes(arrays, len(fixed), table).sum(axis=1)
    start = _HEADER_NBYTES + len(about)
    table[:, 0] = start + offsets_of(sizes)[:-1]
    end = int(start + sizes.sum())
    with still_there(folder), folder.create(_body(block, kind), durable=False, parents=False) as f:
        f.write(np.array([len(about), end, google_crc32c.value(about)], np.uint64).tobytes() + about)
        for first, last in runs:
            some = {n: pieces[first:last] for n, pieces in ready.items()}
            write = _write_part if last - first == 1 else _write_parts
            crcs = write(f, order[rows[first] : rows[last]], rows[first : last + 1] - rows[first], fixed, ragged, some)
            table[first:last, -3:-1] = crcs
        table[:, -1] = [google_crc32c.value(line[:-1]) for line in table]
        f.write(table.tobytes())
    return end + table.nbytes


def _runs(sizes: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Runs [first, last) of parts of about ``_COPY_NBYTES``: many small ones share the cost of a step."""
    first = nbytes = 0
    for last, size in enumerate(sizes.tolist(), 1):
        if size >= _COPY_NBYTES and first < last - 1:  # which is written by itself, in pieces
            yield first, last - 1
            first = last - 1
        nbytes += size
        if nbytes >= _COPY_NBYTES or last == len(sizes):
            yield first, last
            first, nbytes = last, 0


def _write_parts(  # noqa: PLR0913, PLR0917 - a block
    f: IO[bytes],
    order: NDArray[np.int64],
    rows: NDArray[np.int64],
    fixed: FixedArrays,
    ragged: RaggedArrays,
    ready: Mapping[str, list[Pieces]],
) -> list[tuple[int, int]]:
    """Small parts, put in order together; returns the crc32c of the fixed-size and of the ragged arrays of each."""
    sorted_fixed = [values[order] for values in fixed.values()]
    plain = {n: take_rows(values, offsets, order) for n, (values, offsets) in ragged.items() if n not in ready}
    crcs = []
    for k, (a, b) in enumerate(pairwise(rows.tolist())):
        flat = ([plain[n][0][plain[n][1][a] : plain[n][1][b]]] if n in plain else ready[n][k] for n in ragged)
        fixed_crc = _write_aligned(f, ([values[a:b]] for values in sorted_fixed))
        crcs.append((fixed_crc, _write_aligned(f, flat)))
    return crcs


def _write_part(  # noqa: PLR0913, PLR0917 - a block
    f: IO[bytes],
    order: NDArray[np.int64],
    _: NDArray[np.int64],
    fixed: FixedArrays,
    ragged: RaggedArrays,
    ready: Mapping[str, list[Pieces]],
) -> list[tuple[int, int]]:
    """One part of any size, some rows of an array at a time."""

    def head(values: NDArray) -> Iterator[NDArray]:
        step = max(1, _COPY_NBYTES // max(1, values[:1].nbytes))
        return (values[order[at : at + step]] for at in range(0, len(order), step))

    flat = (ready[n][0] if n in ready else some_rows(*ragged[n], order, _COPY_NBYTES) for n in ragged)
    fixed_crc = _write_aligned(f, map(head, fixed.values()))
    return [(fixed_crc, _write_aligned(f, flat))]


def _sizes(arrays: Sequence[_Array], n_fixed: int, table: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n_parts, n_arrays) padded bytes of each array of some parts, from their lines of the table."""
    n_ragged = len(arrays) - n_fixed
    fixed = np.array([a.nbytes(1) for a in arrays[:n_fixed]], np.int64) * table[:, 1:2]
    nbytes: NDArray[np.int64] = np.hstack([fixed.reshape(len(table), n_fixed), table[:, 2 + n_ragged : -4]])
    return -(-nbytes // ALIGN) * ALIGN


def _write_aligned(f: IO[bytes], arrays: Iterable[Iterable[NDArray]]) -> int:
    """Write arrays, each given in pieces; returns the crc32c of all bytes."""
    crc = 0
    for pieces in arrays:
        nbytes = 0
        for values in pieces:
            raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
            crc = google_crc32c.extend(crc, raw)
            f.write(memoryview(raw))
            nbytes += raw.nbytes
        padding = bytes(-nbytes % ALIGN)
        crc = google_crc32c.extend(crc, padding)
        f.write(padding)
    return crc


_NOTHING = np.zeros(0, np.uint8)


@lru_cache(64)
def _arrays_of(about: bytes) -> tuple[tuple[_Array, ...], int]:
    """The arrays of a description, of which all blocks have about the same, and how many of them are fixed-size."""
    found = json.loads(about)
    arrays = (_Array(name, np.dtype(d), tuple(shape), packed) for name, d, shape, packed in found["arrays"])
    return tuple(arrays), found["n_heads"]


class SpillReader(AbstractContextManager["SpillReader"]):
    """Some consecutive parts of one spill file.

    Parameters
    ----------
    folder, block, kind
        Where, and which block; or which other file.
    parts
        The parts wanted.
    keep_open
        Keep a local file open until the reader is closed; False where there are too many.

    Raises
    ------
    SpillError
        From any method, if the file is missing, ends early, or is not what was written.
    """

    def __init__(self, folder: Folder, block: int, parts: range, *, keep_open: bool = True, kind: str = SPILL) -> None:
        name = _body(block, kind)
        self._first, self._block, self._kind, self._path = parts.start, block, kind, f"{folder.url}/{name}"
        self._held: tuple[int, NDArray[np.uint8]] = (0, _NOTHING)
        with ExitStack() as opened:
            try:
                self._file = folder.ranges(name, keep_open=keep_open)
                opened.callback(self._file.close)
                self._read_table(parts)
            except FileNotFoundError:
                raise self._damaged("is missing") from None
            opened.pop_all()

    def _read_table(self, parts: range) -> None:
        front = self._read_front()
        n, table, crc = front[:_HEADER_NBYTES].view(np.uint64).tolist()
        if n > table:
            raise self._damaged("has a damaged header")
        about = front[_HEADER_NBYTES : _HEADER_NBYTES + n]
        if len(about) < n:
            about = self._read(_HEADER_NBYTES, np.empty(n, np.uint8))
        self._arrays, self._n_fixed = _arrays_of(self._checked(about, crc).tobytes())
        if any(array.dtype.hasobject for array in self._arrays):  # its bytes would be taken for addresses
            raise self._damaged("names a dtype that no spill file has")
        width = 8 * (_N_FIELDS + 2 * (len(self._arrays) - self._n_fixed))
        raw = self._read(table + parts.start * width, np.empty(len(parts) * width, np.uint8))
        self._table = raw.view(np.int64).reshape(len(parts), -1)
        for line in self._table:
            self._checked(line[:-1], int(line[-1]))

    def _read_front(self) -> NDArray[np.uint8]:
        """The first bytes of the file: of a short one, all."""
        out = np.empty(_FRONT_NBYTES, np.uint8)
        front = out[: self._file.read_into(0, memoryview(out))]
        if len(front) < _HEADER_NBYTES:
            raise self._damaged(f"ends {_HEADER_NBYTES - len(front):,} bytes early")
        return front

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file, and let go of what is held."""
        self._held = (0, _NOTHING)
        self._file.close()

    def _read(self, start: int, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
        first, held = self._held
        if first <= start and start + len(out) <= first + len(held):
            return held[start - first : start - first + len(out)]
        return self._fill(start, out) if len(out) else out

    def _fill(self, start: int, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
        try:
            n = self._file.read_into(start, memoryview(out))
        except FileNotFoundError:  # one that is opened by each read
            raise self._damaged("is missing") from None
        if n < len(out):
            raise self._damaged(f"ends {len(out) - n:,} bytes early")
        return out

    def hold(self, parts: range) -> None:
        """Read all of some consecutive parts in one go, in the place of those that were held before."""
        self._held = (0, _NOTHING)  # before the next take its memory
        lines = self._table[parts.start - self._first : parts.stop - self._first]
        n_bytes = int(_sizes(self._arrays, self._n_fixed, lines).sum())
        if n_bytes:
            self._held = int(lines[0, 0]), self._fill(int(lines[0, 0]), np.empty(n_bytes, np.uint8))

    def _checked(self, raw: NDArray, crc: int) -> NDArray:
        if (found := google_crc32c.value(raw)) != crc:
            raise self._damaged(f"has crc32c {found:08x} where {crc:08x} was written")
        return raw

    def _damaged(self, how: str) -> SpillError:
        return SpillError(f"{self._path} {how}", self._block, self._kind)

    def n_rows(self, part: int) -> int:
        """Rows of the block that go to a part."""
        return int(self._table[part - self._first, 1])

    def ragged_nbytes(self, part: int) -> int:
        """Bytes of all ragged arrays of a part, as they are in the file."""
        return int(self._sizes(part)[self._n_fixed :].sum())

    @property
    def part_nbytes(self) -> NDArray[np.int64]:
        """(n_parts,) bytes of each of the parts wanted."""
        nbytes: NDArray[np.int64] = _sizes(self._arrays, self._n_fixed, self._table).sum(axis=1)
        return nbytes

    @property
    def marks(self) -> NDArray[np.uint64]:
        """(n_parts,) the numbers beside the parts wanted."""
        return self._table[:, -4].view(np.uint64)

    def n_entries(self, name: str) -> int:
        """Entries of a ragged array in all parts wanted."""
        k = [a.name for a in self._arrays[self._n_fixed :]].index(name)
        return int(self._table[:, 2 + k].sum())

    def _line(self, part: int) -> NDArray[np.int64]:
        line: NDArray[np.int64] = self._table[part - self._first]
        return line

    def _sizes(self, part: int) -> NDArray[np.int64]:
        """Padded bytes of each array of a part."""
        sizes: NDArray[np.int64] = _sizes(self._arrays, self._n_fixed, self._line(part).reshape(1, -1)).reshape(-1)
        return sizes

    def read_fixed(self, part: int) -> dict[str, NDArray]:
        """Arrays with one entry a row, each (n_rows(part), ...), from one read."""
        line, sizes = self._line(part), self._sizes(part)[: self._n_fixed]
        raw = self._checked(self._read(int(line[0]), np.empty(int(sizes.sum()), np.uint8)), int(line[-3]))
        out, at, n = {}, 0, int(line[1])
        for a, size in zip(self._arrays, sizes.tolist(), strict=False):
            out[a.name] = raw[at : at + a.nbytes(n)].view(a.dtype).reshape(n, *a.shape)
            at += size
        return out

    def read_ragged(self, part: int, buffer: NDArray[np.uint8]) -> dict[str, Entries]:
        """Entries of each ragged array, which lie in the front of ``buffer``; it has to hold ``ragged_nbytes``.

        A slice of them is an array; those that are packed are unpacked then.
        """
        line, sizes, n_ragged = self._line(part), self._sizes(part), len(self._arrays) - self._n_fixed
        raw = buffer[: self.ragged_nbytes(part)]
        found = self._read(int(line[0] + sizes[: self._n_fixed].sum()), raw)
        if found is not raw:  # of what is held
            raw[:] = found
        self._checked(raw, int(line[-2]))
        out: dict[str, Entries] = {}
        at = 0
        entries, nbytes = line[2 : 2 + n_ragged].tolist(), sizes[self._n_fixed :].tolist()
        ragged = zip(self._arrays[self._n_fixed :], entries, nbytes, strict=True)
        for a, n, size in ragged:
            found = raw[at : at + size]
            out[a.name] = self._unframed(a.dtype, n, found) if a.is_packed else found[: a.nbytes(n)].view(a.dtype)
            at += size
        return out

    def ragged_starts(self, part: int) -> dict[str, int]:
        """Where each ragged array of a part begins in the buffer that :meth:`read_ragged` fills."""
        starts = offsets_of(self._sizes(part)[self._n_fixed :]).tolist()
        return {a.name: start for a, start in zip(self._arrays[self._n_fixed :], starts, strict=False)}

    def _unframed(self, dtype: np.dtype, n_entries: int, raw: NDArray[np.uint8]) -> PackedEntries:
        found = PackedEntries.of(dtype, raw)
        if len(found) != n_entries:
            raise self._damaged(f"holds {len(found):,} entries of {n_entries:,} in a packed array")
        return found
