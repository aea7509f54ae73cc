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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.errors import IntegrityError
from annbatch_dask.storage.publish import Folder

__all__ = ["SpillReader", "find_receipt", "write_receipt", "write_spill"]

_ALIGN = 8


@dataclass(frozen=True)
class _Array:
    name: str
    dtype: np.dtype
    shape: tuple[int, ...] = ()

    def nbytes(self, n: int) -> int:
        return n * self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


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
    rows: NDArray[np.int64],
    heads: Mapping[str, NDArray],
    flats: Mapping[str, tuple[NDArray, NDArray[np.int64]]],
) -> int:
    """Write a block's rows, which stand in the order of their part.

    Parameters
    ----------
    folder, block
        Where, and which block.
    rows
        (n_parts + 1,) first row of each part within the block.
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
        table[:, 2 + k] = np.diff(bounds[rows])
    sizes = np.array([_sizes(arrays, len(heads), line).sum() for line in table], np.int64)
    start = 8 + len(about) + table.nbytes
    table[:, 0] = start + np.concatenate([[0], np.cumsum(sizes)[:-1]]) if len(sizes) else 0
    with folder.create(_body(block), durable=False) as f:
        f.write(np.uint64(len(about)).tobytes() + about)
        f.write(table.tobytes())
        for a, b in zip(rows[:-1], rows[1:], strict=True):
            if a < b:
                for values in heads.values():
                    _write_aligned(f, values[a:b])
                for values, bounds in flats.values():
                    _write_aligned(f, values[bounds[a] : bounds[b]])
    return int(start + sizes.sum())


def _sizes(arrays: Sequence[_Array], n_heads: int, line: NDArray[np.int64]) -> NDArray[np.int64]:
    """Padded bytes of each array of a part, from its line of the table."""
    counts = [line[1]] * n_heads + list(line[2:])
    return np.array([_aligned(a.nbytes(int(n))) for a, n in zip(arrays, counts, strict=True)], np.int64)


def _write_aligned(f: IO[bytes], values: NDArray) -> None:
    raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    f.write(memoryview(raw))
    f.write(bytes(-raw.nbytes % _ALIGN))


class SpillReader:
    """Some consecutive parts of one spill file. Opens the file for each read, so thousands can exist.

    Parameters
    ----------
    folder, block
        Where, and which block.
    parts
        The parts wanted.
    """

    def __init__(self, folder: Folder, block: int, parts: range) -> None:
        self._folder, self._block, self._first = folder, block, parts.start
        with self._open() as f:
            n = int(_read(f, 0, np.empty(8, np.uint8)).view(np.uint64)[0])
            about = json.loads(_read(f, 8, np.empty(n, np.uint8)).tobytes())
            self._arrays = [_Array(name, np.dtype(d), tuple(shape)) for name, d, shape in about["arrays"]]
            self._n_heads: int = about["n_heads"]
            width = 8 * (2 + len(self._arrays) - self._n_heads)
            raw = _read(f, 8 + n + parts.start * width, np.empty(len(parts) * width, np.uint8))
        self._table = raw.view(np.int64).reshape(len(parts), -1)

    def _open(self) -> IO[bytes]:
        return self._folder.open(_body(self._block))

    def n_rows(self, part: int) -> int:
        """Rows of the block that go to a part."""
        return int(self._table[part - self._first, 1])

    def flat_nbytes(self, part: int, name: str) -> int:
        """Bytes of one flat array of a part."""
        k = self._position(name)
        return self._arrays[k].nbytes(int(self._table[part - self._first, 2 + k - self._n_heads]))

    def _position(self, name: str) -> int:
        return next(i for i, a in enumerate(self._arrays) if a.name == name)

    def read_heads(self, part: int) -> dict[str, NDArray]:
        """Arrays with one entry a row, each (n_rows(part), ...), from one read."""
        line = self._table[part - self._first]
        sizes = _sizes(self._arrays, self._n_heads, line)[: self._n_heads]
        with self._open() as f:
            raw = _read(f, int(line[0]), np.empty(int(sizes.sum()), np.uint8))
        out, at, n = {}, 0, int(line[1])
        for a, size in zip(self._arrays, sizes.tolist(), strict=False):
            out[a.name] = raw[at : at + a.nbytes(n)].view(a.dtype).reshape(n, *a.shape)
            at += size
        return out

    def read_flat(self, part: int, name: str, buffer: NDArray[np.uint8] | None = None) -> NDArray:
        """Entries of one flat array of a part; in the front of ``buffer`` where one is given that is large enough."""
        line = self._table[part - self._first]
        k = self._position(name)
        start = int(line[0] + _sizes(self._arrays, self._n_heads, line)[:k].sum())
        size = self.flat_nbytes(part, name)
        raw = np.empty(size, np.uint8) if buffer is None or len(buffer) < size else buffer[:size]
        with self._open() as f:
            return _read(f, start, raw).view(self._arrays[k].dtype)


def _read(f: IO[bytes], start: int, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
    f.seek(start)
    view = memoryview(out)
    while view:
        n = f.readinto(view)  # type: ignore[attr-defined]
        if not n:
            msg = f"a spill file ends {len(view):,} bytes early; remove the scratch folder and build again"
            raise IntegrityError(msg)
        view = view[n:]
    return out
