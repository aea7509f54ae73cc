"""Packed arrays of a spill file: pieces, each with its number of entries and of bytes before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.kernels.packing import pack
from annbatch_dask.kernels.rows import take_rows
from annbatch_dask.storage.packed import unpack_chunk

__all__ = ["ALIGN", "Entries", "PackedEntries", "Pieces", "pack_parts", "some_rows"]

ALIGN = 8
_FRAME_NBYTES = 16
Pieces = list[NDArray[np.uint8]]


def pack_parts(  # noqa: PLR0913, PLR0917 - a block
    values: NDArray,
    offsets: NDArray[np.int64],
    order: NDArray[np.int64],
    rows: NDArray[np.int64],
    runs: Sequence[tuple[int, int]],
    piece_nbytes: int,
    *,
    differences: bool,
) -> list[Pieces]:
    """The pieces of each part of a ragged array, as they are written; the first arguments are those of a spill file.

    ``runs``: parts [first, last) that are worked on together; one alone is cut into pieces of about ``piece_nbytes``.
    """
    parts: list[Pieces] = []
    for first, last in runs:
        some = order[rows[first] : rows[last]]
        if last - first == 1:
            found = some_rows(values, offsets, some, piece_nbytes)
            parts.append([_pack_piece(piece, differences=differences) for piece in found])
            continue
        entries, at = take_rows(values, offsets, some)
        edges = at[rows[first : last + 1] - rows[first]].tolist()
        parts += [[_pack_piece(entries[a:b], differences=differences)] if a < b else [] for a, b in pairwise(edges)]
    return parts


def some_rows(values: NDArray, offsets: NDArray[np.int64], order: NDArray[np.int64], nbytes: int) -> Iterator[NDArray]:
    """Entries of rows of a ragged array, about ``nbytes`` at a time."""
    step = max(1, nbytes * len(offsets) // max(1, values.nbytes))
    return (take_rows(values, offsets, order[at : at + step])[0] for at in range(0, len(order), step))


def _pack_piece(values: NDArray, *, differences: bool) -> NDArray[np.uint8]:
    """A piece of integers, as it is stored: a multiple of 8 bytes."""
    raw = pack(values, differences=differences)
    end = _FRAME_NBYTES + len(raw)
    out = np.empty(end + -end % ALIGN, np.uint8)
    out[:_FRAME_NBYTES].view(np.int64)[:] = len(values), len(raw)
    out[_FRAME_NBYTES:end] = raw
    out[end:] = 0
    return out


@dataclass(frozen=True)
class PackedEntries:
    """Entries of a ragged array that are packed: a slice of them is an array.

    Attributes
    ----------
    raw
        All its bytes.
    pieces
        First entry, number of entries, first byte and packed bytes of each.
    """

    dtype: np.dtype
    raw: NDArray[np.uint8]
    pieces: Sequence[tuple[int, int, int, int]]

    @classmethod
    def of(cls, dtype: np.dtype, raw: NDArray[np.uint8]) -> PackedEntries:
        """Entries of an array from all its bytes."""
        pieces, first, at = [], 0, 0
        while at < len(raw):
            n, size = raw[at : at + _FRAME_NBYTES].view(np.int64).tolist()
            if min(n, size) < 0:  # no piece, and no way to the next
                return cls(dtype, raw, ())
            at += _FRAME_NBYTES
            pieces.append((first, n, at, size))
            first, at = first + n, at + size + -size % ALIGN
        return cls(dtype, raw, pieces)

    def __len__(self) -> int:
        """Number of entries."""
        return sum(n for _, n, _, _ in self.pieces)

    def __getitem__(self, wanted: slice) -> NDArray:
        """Unpack some, without a step."""
        start, stop, _ = wanted.indices(len(self))
        out = np.empty(max(0, stop - start), self.dtype)
        for first, n, at, size in self.pieces:
            a, b = max(start, first), min(stop, first + n)
            if a < b:
                unpack_chunk(self.raw[at : at + size], out[a - start : b - start], n_values=n, start=a - first)
        return out


Entries = NDArray | PackedEntries
