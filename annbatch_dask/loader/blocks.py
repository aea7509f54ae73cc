"""Rows that were loaded, as they are in memory, and which of them a window holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.kernels.assemble import has_kernels
from annbatch_dask.kernels.entries import Entries
from annbatch_dask.kernels.row_runs import deal_batches, deal_entries, pick_rows, place_rows
from annbatch_dask.kernels.shared import address_of
from annbatch_dask.storage.threads import unlocked_property

__all__ = [
    "BatchRows",
    "Block",
    "DealtRows",
    "DenseBlock",
    "Loaded",
    "PickedBlock",
    "SparseBlock",
    "SparseRun",
]

Array = NDArray[Any]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SparseBlock:
    """Loaded sparse rows: row ``i`` is ``starts[i]:starts[i] + lengths[i]`` of both flat arrays."""

    values: Array
    columns: Array
    starts: Ints
    lengths: Ints

    @property
    def totals(self) -> Floats | None:
        """The sum of all values of each row, where the block lacks some and it was asked for."""
        return None


@dataclass(frozen=True)
class PickedBlock(SparseBlock):
    """A block without the entries of columns that are not wanted.

    Like all else, what follows is known once all tasks have run.

    Attributes
    ----------
    n_used
        Of how many entries of its room there are any.
    covered_totals, covered
        The sum of all values of some rows, those that were left out among them, and which of these rows each row is;
        None where nobody asked for it.
    """

    n_used: Ints
    covered_totals: Floats | None
    covered: Ints

    @property
    def totals(self) -> Floats | None:
        """The sum of all values of each row, where it was asked for."""
        return None if self.covered_totals is None else self.covered_totals[self.covered]

    @property
    def spare_nbytes(self) -> int:
        """Room that was never touched."""
        return (len(self.values) - int(self.n_used[0])) * (self.values.itemsize + self.columns.itemsize)


@dataclass(frozen=True)
class DenseBlock:
    """Loaded dense rows: row ``i`` is ``values[positions[i]]``; ``values`` is C-contiguous."""

    values: Array
    positions: Ints


Block = SparseBlock | DenseBlock


@dataclass(frozen=True)
class BatchRows:
    """The rows of one batch.

    Attributes
    ----------
    dealt
        The rows of all batches of its window.
    number, start, stop
        Which batch this is, and the run of its rows among those of all batches.
    """

    dealt: DealtRows
    number: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def slots(self) -> Ints:
        """Where each row is in the batch, by the block that holds it."""
        return self.dealt.slots[self.start : self.stop]

    @property
    def rows(self) -> Ints:
        """Where each row is among the rows of all blocks, one behind the other; in the order of ``slots``."""
        return self.dealt.rows[self.start : self.stop]

    @property
    def cuts(self) -> list[int]:
        """The rows in block ``k`` are ``cuts[k]:cuts[k + 1]`` of both."""
        cuts: list[int] = (self.dealt.cuts[self.number] - self.start).tolist()
        return cuts

    def pieces(self, n_parts: int) -> Iterator[tuple[int, slice]]:
        """Runs of rows that are in one block, and its number: about ``n_parts`` of about equal length."""
        for block, (first, stop) in enumerate(pairwise(self.cuts)):
            n_rows = stop - first
            n = min(n_rows, -(-n_parts * n_rows // len(self))) if n_rows else 0
            yield from ((block, slice(first + n_rows * k // n, first + n_rows * (k + 1) // n)) for k in range(n))


@dataclass(frozen=True)
class DealtRows(Sequence[BatchRows]):
    """The rows of all batches of a window.

    Attributes
    ----------
    dealt
        Which rows of the window all batches have, one behind the other.
    ends
        Where those of each batch end.
    block, position
        The block of each row of the window, and which row of the block it is.
    firsts
        Where the rows of each block begin among those of all.
    """

    dealt: Ints
    ends: Ints
    block: Ints
    position: Ints
    firsts: Ints

    @classmethod
    def of(cls, dealt: Ints, sizes: Sequence[int], places: tuple[Ints, Ints], n_each: Sequence[int]) -> DealtRows:
        """Deal the rows out.

        ``dealt`` has those of all batches, ``sizes`` of each, one behind the other; ``places`` are the block and the
        position of each row of the window, ``n_each`` the rows of each block.
        """
        ends = np.cumsum(sizes, dtype=np.int64)
        firsts = np.cumsum([0, *n_each[:-1]], dtype=np.int64)[: len(n_each)]
        return cls(dealt, ends, *places, firsts)

    @unlocked_property
    def _by_block(self) -> tuple[Ints, Ints, Ints]:
        slots, rows, cuts = deal_batches(self.dealt, self.ends, self.block, self.position, self.firsts)
        return slots, rows, cuts

    @property
    def slots(self) -> Ints:
        """Where each row is in its batch; by batch, and then by the block that holds it."""
        return self._by_block[0]

    @property
    def rows(self) -> Ints:
        """Where each row is among the rows of all blocks, one behind the other; in the order of ``slots``."""
        return self._by_block[1]

    @property
    def cuts(self) -> Ints:
        """(n_batches, n_blocks + 1) the rows of a batch in block ``k`` are ``cuts[batch, k]:cuts[batch, k + 1]``."""
        return self._by_block[2]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: Any) -> Any:
        """One batch."""
        number = range(len(self.ends))[number]
        start = int(self.ends[number - 1]) if number else 0
        return BatchRows(self, number, start, int(self.ends[number]))


class SparseRun(NamedTuple):
    """Rows of one batch in sparse blocks.

    Attributes
    ----------
    starts, lengths
        Where each begins in its block, and how many entries it has.
    dest
        Where the entries of each go, if those of the batch stand one behind the other in the order of its rows.
    pointers
        0, and where each row of the batch ends.
    """

    starts: Ints
    lengths: Ints
    dest: Ints
    pointers: Ints


@dataclass(frozen=True)
class SparseBatches:
    """Rows of all batches in sparse blocks, as a :class:`SparseRun` has those of one."""

    picked: Ints
    dest: Ints
    pointers: Ints

    @classmethod
    def of(cls, dealt: DealtRows, blocks: Sequence[SparseBlock]) -> SparseBatches:
        """Find them."""
        picked = np.empty((2, len(dealt.rows)), np.int64)
        for number, (block, first) in enumerate(zip(blocks, dealt.firsts.tolist(), strict=True)):
            pick_rows(dealt.rows, dealt.cuts, number, first, block.starts, block.lengths, picked)
        pointers, dest = place_rows(dealt.slots, dealt.cuts, picked[1])
        return cls(picked, dest, pointers)

    def run(self, rows: BatchRows) -> SparseRun:
        """Those of one batch."""
        start, stop = rows.start, rows.stop
        pointers = self.pointers[start + rows.number : stop + rows.number + 1]
        starts, lengths = self.picked[:, start:stop]
        return SparseRun(starts, lengths, self.dest[start:stop], pointers)


@dataclass(frozen=True)
class EntriesOfBatches:
    """Entries of the rows of all batches, as :class:`Entries` has those of one; in memory as long as the blocks are."""

    values: Ints
    columns: Ints
    pointers: Ints
    short: NDArray[np.int32]

    @classmethod
    def of(cls, dealt: DealtRows, blocks: Sequence[SparseBlock]) -> EntriesOfBatches:
        """Find them."""
        rows = [(np.ascontiguousarray(b.starts, np.int64), np.ascontiguousarray(b.lengths, np.int64)) for b in blocks]
        parts = [
            (address_of(starts), address_of(lengths), *_items(block.values), *_items(block.columns))
            for block, (starts, lengths) in zip(blocks, rows, strict=True)
        ]
        return cls(*deal_entries(dealt.dealt, dealt.ends, dealt.block, dealt.position, np.array(parts, np.int64)))

    def of_batch(self, rows: BatchRows) -> Entries:
        """Those of one batch."""
        own, ends = slice(rows.start, rows.stop), slice(rows.start + rows.number, rows.stop + rows.number + 1)
        return Entries(self.values[own], self.columns[own], self.pointers[ends], self.short[ends])


def _items(array: Array) -> tuple[int, int]:
    return address_of(array), array.itemsize


@dataclass(frozen=True)
class Loaded:
    """The rows of one matrix in a load window.

    Attributes
    ----------
    blocks, block, position
        Row ``j`` is row ``position[j]`` of ``blocks[block[j]]``.
    lengths
        Entries of each row, zeros for dense blocks; of a window that is made into batches on a device alone.
    dtype
        The dtype the values had in the sources.
    rows
        Position of row ``j`` among all.
    dealt
        The rows of all batches; None where batches are made on a device.
    """

    blocks: list[Block]
    block: Ints
    position: Ints
    lengths: Ints
    dtype: np.dtype[Any]
    rows: Ints
    dealt: DealtRows | None = None

    @unlocked_property
    def sparse_rows(self) -> SparseBatches:
        """Locations of the rows of all batches in sparse blocks. To be asked for once they were read."""
        assert self.dealt is not None  # noqa: S101
        return SparseBatches.of(self.dealt, [block for block in self.blocks if isinstance(block, SparseBlock)])

    @unlocked_property
    def entries(self) -> EntriesOfBatches | None:
        """Entries of the rows of all batches; None unless they can be copied as if they were of one block."""
        blocks = [block for block in self.blocks if isinstance(block, SparseBlock)]
        kinds = {kind for block in blocks for kind in (block.values.dtype, block.columns.dtype)}
        is_one = len({(block.values.dtype, block.columns.dtype) for block in blocks}) == 1
        if self.dealt is None or not is_one or not all(map(has_kernels, kinds)):
            return None
        return EntriesOfBatches.of(self.dealt, blocks)

    @unlocked_property
    def totals(self) -> Floats | None:
        """The sum of all values of each row of all sparse blocks, also where entries were left out of them.

        Zeros for blocks that hold all entries; None if all do, or nobody asked.
        """
        blocks = [block for block in self.blocks if isinstance(block, SparseBlock)]
        found = [block.totals for block in blocks]
        if all(totals is None for totals in found):
            return None
        pairs = zip(blocks, found, strict=True)
        return np.concatenate([np.zeros(len(b.starts)) if totals is None else totals for b, totals in pairs])

    @unlocked_property
    def dense_rows(self) -> Ints:
        """The position of each row of all dense blocks, one behind the other, in its own."""
        return _joined([block.positions for block in self.blocks if isinstance(block, DenseBlock)])

    @unlocked_property
    def numbers(self) -> Ints:
        """The position among all of each row of all blocks, one behind the other."""
        n_each = np.bincount(self.block, minlength=1)
        found = np.empty(len(self.rows), np.int64)
        found[(np.cumsum(n_each) - n_each)[self.block] + self.position] = self.rows
        return found


def _joined(parts: Sequence[Ints]) -> Ints:
    return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.int64), *parts])
