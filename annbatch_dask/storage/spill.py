"""Spill files: what a scatter task leaves for the gather tasks.

One file a row block. Its rows stand in the order of their part of the output, so a gather task reads one range of each
file; a file's header tells where, so the task reads of it only what concerns its own parts::

    uint64 length of the description | description (JSON: name, dtype, row shape of each array)
    table: (n_parts, 2 + n_flats) int64, per part: first byte, rows, entries of each flat array
    part 0: head arrays (one entry a row), then flat arrays (any number of entries a row)
    part 1: ...

Every array starts at a multiple of 8 bytes. The receipt, a JSON file written after it, says that a block is finished.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.errors import IntegrityError
from annbatch_dask.kernels.rows import bounds_of, copy_runs
from annbatch_dask.storage.publish import Folder

__all__ = ["SpillReader", "find_receipt", "write_receipt", "write_spill"]

_ALIGN = 8
_COPY_NBYTES = 8 * 2**20
"""About what is put in order at once."""

Heads = Mapping[str, NDArray]
Flats = Mapping[str, tuple[NDArray, NDArray[np.int64]]]


@dataclass(frozen=True)
class _Array:
    name: str
    dtype: np.dtype
    shape: tuple[int, ...] = ()

    def nbytes(self, n: int) -> int:
        return n * self.dtype.itemsize * prod(self.shape)


def _aligned(n: int) -> int:
    return -(-n // _ALIGN) * _ALIGN


def _body(block: int) -> str:
    return f"spill-{block:06d}.bin"


def find_receipt(folder: Folder, task: str) -> dict[str, Any] | None:
    """What a finished task reported, or None where it is not finished."""
    name = f"{task}.json"
    return json.loads(folder.read(name)) if folder.exists(name) else None


def write_receipt(folder: Folder, task: str, receipt: Mapping[str, Any]) -> None:
    """Say that a task is finished.

    Scratch files are not synced: after a power cut they may be gone or damaged, which costs their work again (a damaged
    one is found by its rows' fingerprint), while syncing them would cost every build the disk's full write time.
    """
    folder.write(f"{task}.json", json.dumps(receipt).encode(), durable=False)


def write_spill(
    folder: Folder,
    block: int,
    *,
    order: NDArray[np.int64],
    rows: NDArray[np.int64],
    heads: Heads,
    flats: Flats,
) -> int:
    """Write a block's rows in the order of their part; a few parts at a time, so that no second copy of all is held.

    Parameters
    ----------
    folder, block
        Where, and which block.
    order
        (n_rows,) the rows in the order of their part.
    rows
        (n_parts + 1,) first entry of ``order`` of each part.
    heads
        Arrays with one entry (or one row) a row.
    flats
        Arrays with any number of entries a row: the entries, and the (n_rows + 1,) bounds of each row's.

    Returns
    -------
    Bytes written.
    """
    arrays = [_Array(n, h.dtype, h.shape[1:]) for n, h in heads.items()]
    arrays += [_Array(n, v.dtype) for n, (v, _) in flats.items()]
    about = json.dumps({"n_heads": len(heads), "arrays": [(a.name, a.dtype.str, a.shape) for a in arrays]}).encode()
    about += b" " * (-len(about) % _ALIGN)
    table = np.zeros((len(rows) - 1, 2 + len(flats)), np.int64)
    table[:, 1] = np.diff(rows)
    for k, (_, bounds) in enumerate(flats.values()):
        table[:, 2 + k] = np.diff(bounds_of(np.diff(bounds)[order])[rows])
    sizes = np.array([_sizes(arrays, len(heads), line).sum() for line in table], np.int64)
    start = 8 + len(about) + table.nbytes
    table[:, 0] = start + bounds_of(sizes)[:-1]
    with folder.create(_body(block), durable=False) as f:
        f.write(np.uint64(len(about)).tobytes() + about)
        f.write(table.tobytes())
        for first, last in _runs(sizes):
            write = _write_part if last - first == 1 else _write_parts
            write(f, order[rows[first] : rows[last]], rows[first : last + 1] - rows[first], heads, flats)
    return int(start + sizes.sum())


def _runs(sizes: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Runs [first, last) of parts of about ``_COPY_NBYTES``: many small ones share the cost of a step."""
    first = nbytes = 0
    for last, size in enumerate(sizes.tolist(), 1):
        nbytes += size
        if nbytes >= _COPY_NBYTES or last == len(sizes):
            yield first, last
            first, nbytes = last, 0


def _write_parts(f: IO[bytes], order: NDArray[np.int64], rows: NDArray[np.int64], heads: Heads, flats: Flats) -> None:
    """Small parts, put in order together."""
    sorted_heads = [values[order] for values in heads.values()]
    sorted_flats = [_reorder(values, bounds, order) for values, bounds in flats.values()]
    for a, b in pairwise(rows.tolist()):
        if a < b:
            for values in sorted_heads:
                _write_aligned(f, [values[a:b]])
            for values, bounds in sorted_flats:
                _write_aligned(f, [values[bounds[a] : bounds[b]]])


def _write_part(f: IO[bytes], order: NDArray[np.int64], _: NDArray[np.int64], heads: Heads, flats: Flats) -> None:
    """One part of any size, some rows of an array at a time."""
    for values in heads.values():
        step = max(1, _COPY_NBYTES // max(1, values[:1].nbytes))
        _write_aligned(f, (values[order[at : at + step]] for at in range(0, len(order), step)))
    for values, bounds in flats.values():
        step = max(1, _COPY_NBYTES * len(order) // max(1, values.nbytes))
        _write_aligned(f, (_reorder(values, bounds, order[at : at + step])[0] for at in range(0, len(order), step)))


def _reorder(values: NDArray, bounds: NDArray[np.int64], order: NDArray[np.int64]) -> tuple[NDArray, NDArray[np.int64]]:
    """Some rows of a flat array, in any order."""
    counts = np.diff(bounds)[order]
    new_bounds = bounds_of(counts)
    out = np.empty(int(new_bounds[-1]), values.dtype)
    copy_runs(values, bounds[:-1][order], out, new_bounds[:-1], counts)
    return out, new_bounds


def _sizes(arrays: Sequence[_Array], n_heads: int, line: NDArray[np.int64]) -> NDArray[np.int64]:
    """Padded bytes of each array of a part, from its line of the table."""
    counts = [line[1]] * n_heads + list(line[2:])
    return np.array([_aligned(a.nbytes(int(n))) for a, n in zip(arrays, counts, strict=True)], np.int64)


def _write_aligned(f: IO[bytes], pieces: Iterable[NDArray]) -> None:
    nbytes = 0
    for values in pieces:
        raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        f.write(memoryview(raw))
        nbytes += raw.nbytes
    f.write(bytes(-nbytes % _ALIGN))


class SpillReader(AbstractContextManager["SpillReader"]):
    """Some consecutive parts of one spill file.

    Parameters
    ----------
    folder, block
        Where, and which block.
    parts
        The parts wanted.
    keep_open
        Keep a local file open until the reader is closed; False where there are too many.
    """

    def __init__(self, folder: Folder, block: int, parts: range, *, keep_open: bool = True) -> None:
        self._first = parts.start
        self._file = folder.ranges(_body(block), keep_open=keep_open)
        n = int(self._read(0, np.empty(8, np.uint8)).view(np.uint64)[0])
        about = json.loads(self._read(8, np.empty(n, np.uint8)).tobytes())
        self._arrays = [_Array(name, np.dtype(d), tuple(shape)) for name, d, shape in about["arrays"]]
        self._n_heads: int = about["n_heads"]
        width = 8 * (2 + len(self._arrays) - self._n_heads)
        raw = self._read(8 + n + parts.start * width, np.empty(len(parts) * width, np.uint8))
        self._table = raw.view(np.int64).reshape(len(parts), -1)

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._file.close()

    def _read(self, start: int, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
        n = self._file.read_into(start, memoryview(out))
        if n < len(out):
            msg = f"a spill file ends {len(out) - n:,} bytes early; remove the scratch folder and build again"
            raise IntegrityError(msg)
        return out

    def n_rows(self, part: int) -> int:
        """Rows of the block that go to a part."""
        return int(self._table[part - self._first, 1])

    def flats_nbytes(self, part: int) -> int:
        """Bytes of all flat arrays of a part, as they lie in the file."""
        return int(_sizes(self._arrays, self._n_heads, self._table[part - self._first])[self._n_heads :].sum())

    def read_heads(self, part: int) -> dict[str, NDArray]:
        """Arrays with one entry a row, each (n_rows(part), ...), from one read."""
        line = self._table[part - self._first]
        sizes = _sizes(self._arrays, self._n_heads, line)[: self._n_heads]
        raw = self._read(int(line[0]), np.empty(int(sizes.sum()), np.uint8))
        out, at, n = {}, 0, int(line[1])
        for a, size in zip(self._arrays, sizes.tolist(), strict=False):
            out[a.name] = raw[at : at + a.nbytes(n)].view(a.dtype).reshape(n, *a.shape)
            at += size
        return out

    def read_flats(self, part: int, buffer: NDArray[np.uint8]) -> dict[str, NDArray]:
        """Entries of each flat array, from one read into the front of ``buffer``, which holds ``flats_nbytes``."""
        line = self._table[part - self._first]
        sizes = _sizes(self._arrays, self._n_heads, line)
        raw = self._read(int(line[0] + sizes[: self._n_heads].sum()), buffer[: self.flats_nbytes(part)])
        out, at = {}, 0
        flats = zip(self._arrays[self._n_heads :], line[2:].tolist(), sizes[self._n_heads :].tolist(), strict=True)
        for a, n, size in flats:
            out[a.name] = raw[at : at + a.nbytes(n)].view(a.dtype)
            at += size
        return out
