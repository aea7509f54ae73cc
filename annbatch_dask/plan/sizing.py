"""Cuts the work into blocks, datasets and partitions that fit a worker's memory, and sizes the tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.errors import LayoutError
from annbatch_dask.formatting import format_bytes
from annbatch_dask.plan.costs import (
    Weight,
    categories_nbytes,
    fixed_nbytes,
    frame_nbytes,
    heaviest_rows,
    held_weight,
    part_weight,
    read_weight,
    shared_nbytes,
)
from annbatch_dask.plan.dtypes import index_dtype
from annbatch_dask.plan.genes import GeneSpace
from annbatch_dask.plan.layout import MAX_READS, Block, Layout, Room, cut_blocks
from annbatch_dask.plan.memory import IN_FLIGHT_NBYTES, MIB, SMALL_NBYTES, Budget, gather_peak_nbytes
from annbatch_dask.plan.options import Options
from annbatch_dask.plan.permutation import Permutation
from annbatch_dask.plan.placement import ExtendPermutation
from annbatch_dask.plan.schema import OBS, ColumnSpec, MatrixSpec, SourceSchema
from annbatch_dask.plan.transposing import Transposed, find_transposed, strips_of

__all__ = ["Sizing", "check_chunk"]

_JOB_NBYTES = 16 * MIB
"""Of a job in a worker process, that the process itself is taken to hold."""
_MAX_CHUNK_NBYTES = 2**31 - 1
"""What blosc takes at once."""
_MAX_CSC_NBYTES = 2**30
"""Of a matrix of columns that are held at once, whatever the memory: where a block's rows are read as they are."""
_MAX_TASKS = 4096
"""Blocks grow, as far as memory allows, so that a stage stays below about so many tasks."""

_SUMS_NBYTES = 160
"""Of a gene in a group of cells: 64 of its sums, as much of what is written of them, one array of it at work."""


@dataclass(frozen=True)
class Sizing:
    """Bytes per row of a build, and the blocks and partitions that fit a worker."""

    sources: tuple[SourceSchema, ...]
    matrices: tuple[MatrixSpec, ...]
    columns: tuple[ColumnSpec, ...]
    options: Options
    budget: Budget
    n_kept: int
    shared_nbytes: int

    @classmethod
    def of(
        cls,
        sources: tuple[SourceSchema, ...],
        matrices: tuple[MatrixSpec, ...],
        columns: tuple[ColumnSpec, ...],
        genes: Mapping[str, GeneSpace],
        options: Options,
        budget: Budget,
        n_kept: int,
    ) -> Sizing:
        """Sizing of sources united to these matrices and columns."""
        maps = [m.stored for space in genes.values() for m in space.maps]
        shared = max(0, int(shared_nbytes(sources, columns, maps)) - _JOB_NBYTES) // budget.n_threads
        return cls(sources, matrices, columns, options, budget, n_kept, shared)

    @property
    def _obs_nbytes(self) -> int:
        return 8 * (len(self.columns) + 1) + 24  # numbers and codes, the name, the place

    @cached_property
    def _total(self) -> int:
        """Bytes of all rows that move, as the sources store them."""
        return int(_whole(self._moved, [read_weight(s, obs_nbytes=self._obs_nbytes) for s in self._moved]))

    @property
    def _moved(self) -> tuple[SourceSchema, ...]:
        return self.sources[self.n_kept :]

    @property
    def _piece(self) -> int:
        return _piece_nbytes(self._total, self.budget, self._upload_nbytes)

    @cached_property
    def _part_weights(self) -> list[Weight]:
        obs = self._obs_nbytes
        return [part_weight(s, self.matrices, self.columns, obs_nbytes=obs) for s in self._moved]

    def cut(self, *, transposes: bool = True) -> tuple[Block, ...]:
        """The blocks of the scatter tasks; ``transposes``: see :func:`annbatch_dask.plan.build.build_plan`."""
        obs, room = self._obs_nbytes, self.budget.task_nbytes - self.shared_nbytes
        return cut_blocks(
            self.sources,
            skip=self.n_kept,
            block_nbytes=self._piece,
            csc_nbytes=min(max(self.budget.block_nbytes, (room - SMALL_NBYTES) // 2), _MAX_CSC_NBYTES),
            obs_nbytes=obs,
            room=Room(
                room,
                [held_weight(s, self.matrices, self.columns, obs_nbytes=obs) for s in self.sources],
                [fixed_nbytes(s) for s in self.sources],
            ),
            max_reads=MAX_READS if transposes else None,
        )

    def transposed(self, blocks: Sequence[Block]) -> tuple[Transposed, ...]:
        """The sources that are put in the order of their rows before their blocks are read."""
        room = self.budget.task_nbytes - self.shared_nbytes
        return find_transposed(self.sources, blocks, strip_nbytes=self._piece, task_nbytes=room)

    @cached_property
    def row_nbytes(self) -> float:
        """Bytes of an output row on average."""
        return max(1.0, _whole(self._moved, self._part_weights) / sum(s.n_obs for s in self._moved))

    @cached_property
    def _heaviest(self) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """Bytes of the heaviest rows, where a part's rows are not drawn from all alike."""
        is_mixed = self.options.shuffle and not self.options.groupby
        return None if is_mixed else heaviest_rows(self._moved, self._part_weights)

    def lay_out(self, placement: Permutation | ExtendPermutation) -> Layout:
        """Datasets of the size asked for, and parts that fit memory."""
        rows = int(self._piece / self.row_nbytes)
        if self._heaviest is not None:
            rows = int(np.interp(self._piece, self._heaviest[1], self._heaviest[0]))
        return _lay_out(self.options, placement, row_nbytes=self.row_nbytes, part_rows=max(1, rows))

    def peaks(self, blocks: Sequence[Block], layout: Layout, transposed: Sequence[Transposed] = ()) -> tuple[int, int]:
        """Peak bytes of a scatter task, or one that comes before these, and of a gather task."""
        part = layout.part_rows * self.row_nbytes
        if self._heaviest is not None:
            part = float(np.interp(layout.part_rows, *self._heaviest))
        n_rows = max(layout.sizes)
        collected, written = frame_nbytes(self._moved, self.columns, mixed=self.options.shuffle)
        gather = gather_peak_nbytes(
            part_nbytes=int(part),
            segment_nbytes=int(min(max(b.n_bytes for b in blocks), part)),
            obs_nbytes=int(n_rows * max(3 * self._obs_nbytes, collected)),
            frame_nbytes=int(n_rows * written + categories_nbytes(self.columns)),
            chunk_nbytes=int(self._chunks(n_rows)),
            stats_nbytes=self._stats_nbytes,
            upload_nbytes=self._upload_nbytes,
        )
        strips = strips_of(self.sources, transposed)
        scatter = max(*(b.peak_nbytes for b in blocks), *(s.peak_nbytes for s in strips), 0)
        return scatter + self.shared_nbytes, gather + self.shared_nbytes

    @cached_property
    def _stats_nbytes(self) -> int:
        """Bytes of a dataset's statistics: its sums, and what is stored of them."""
        if not self.options.stats:
            return 0
        by = next((c for c in self.columns if c.path == f"{OBS}/{self.options.stats_by}"), None)
        n_groups = 1 + (0 if by is None or by.categories is None else len(by.categories.values))
        n_vars = next(m.n_cols for m in self.matrices if m.name == "X")
        return n_groups * n_vars * _SUMS_NBYTES

    @property
    def _upload_nbytes(self) -> int:
        """Bytes of arrays on their way to a store; row pointers, a few for each row, are none of them."""
        return self.budget.upload_nbytes * sum(1 if m.kind == "dense" else 2 for m in self.matrices)

    def lowered(self, layout: Layout) -> str:
        """The options that make a gather task smaller."""
        is_large = self._chunks(max(layout.sizes)) > IN_FLIGHT_NBYTES
        return "n_obs_per_chunk or dataset_size" if is_large else "dataset_size"

    def _chunks(self, n_rows: int) -> float:
        """Bytes of chunks that are filled or encoded: those of the largest dataset."""
        rows = min(self.options.n_obs_per_chunk, n_rows)
        sizes = [rows * n for m in self.matrices for n in self._array_rows(m)]
        return sum(sizes) + 3 * max(sizes)

    def _array_rows(self, spec: MatrixSpec) -> list[float]:
        """Bytes of a row in each of the arrays that a matrix is stored as."""
        item = np.dtype(spec.source_dtype).itemsize
        if spec.kind == "dense":
            return [float(spec.n_cols * item)]
        found = [(s, m) for s in self._moved for m in s.matrices if m.name == spec.name]
        n_values = sum(s.n_obs * m.n_cols if m.kind == "dense" else int(m.nnz[-1]) for s, m in found)
        mean = n_values / sum(s.n_obs for s in self._moved)
        return [mean * item, mean * index_dtype(spec.n_cols).itemsize, mean * 8]  # indptr's chunks are as long

    def _largest(self, blocks: Sequence[Block]) -> SourceSchema:
        return self.sources[max(blocks, key=lambda b: b.peak_nbytes).source]

    def name_largest(self, blocks: Sequence[Block]) -> str:
        """The largest scatter task, in words."""
        source = self._largest(blocks)
        if source.resident_nbytes:
            return f"a scatter task of {source.path}, which is {format_bytes(source.resident_nbytes)} in memory,"
        if fixed := fixed_nbytes(source):
            return f"a scatter task of {source.path}, whose chunks take {format_bytes(fixed + IN_FLIGHT_NBYTES)},"
        return "the largest scatter task"

    def remedy(self, blocks: Sequence[Block]) -> str:
        """Remedy for a task that is too large."""
        source, more = self._largest(blocks), "start workers with more memory or fewer threads"
        if source.resident_nbytes:
            return f"return a backed or lazy AnnData from load_adata, or write the file with anndata anew; or {more}"
        return f"write the file with smaller chunks, or {more}" if fixed_nbytes(source) else more


def _whole(sources: Sequence[SourceSchema], weights: Sequence[Weight]) -> float:
    """Bytes of all rows."""
    return sum(float(w.before(s, np.array([s.n_obs]))[0]) for s, w in zip(sources, weights, strict=True))


def _lay_out(
    options: Options, placement: Permutation | ExtendPermutation, *, row_nbytes: float, part_rows: int
) -> Layout:
    n_obs = placement.n_obs
    if isinstance(placement, ExtendPermutation):
        sizes = tuple(a + b for a, b in zip(placement.old, placement.new, strict=True))
        return Layout(sizes, min(part_rows, max(sizes)))
    if options.dataset_rows is not None:
        rows = options.dataset_rows
    elif options.dataset_nbytes is not None:
        rows = int(options.dataset_nbytes / row_nbytes)
    else:
        rows = n_obs
    if rows < 1:
        msg = (
            f"dataset_size holds {options.dataset_nbytes or options.dataset_rows:,} and a cell takes "
            f"{row_nbytes:,.0f} bytes, so not one fits; raise dataset_size"
        )
        raise LayoutError(msg)
    return Layout.even(n_obs, min(rows, n_obs), min(part_rows, rows, n_obs))


def _piece_nbytes(total: int, budget: Budget, upload_nbytes: int) -> int:
    """Size of a block or part: the default, more where that means too many tasks, less where memory is short."""
    # see plan/memory.py: a gather holds two parts and a segment
    room = (budget.task_nbytes - SMALL_NBYTES - upload_nbytes) // 4
    return max(1, min(max(budget.block_nbytes, total // _MAX_TASKS), room))


def check_chunk(n_obs_per_chunk: int, row_nbytes: float) -> None:
    """Refuse chunks that no codec takes, each of which is held in memory whole."""
    if n_obs_per_chunk * row_nbytes > _MAX_CHUNK_NBYTES:
        msg = (
            f"n_obs_per_chunk is {n_obs_per_chunk:,} and a cell takes {row_nbytes:,.0f} bytes: a chunk would take "
            f"{format_bytes(n_obs_per_chunk * row_nbytes)}, and holds {format_bytes(_MAX_CHUNK_NBYTES)} at most; "
            f"give {max(1, int(_MAX_CHUNK_NBYTES / row_nbytes)):,} or fewer"
        )
        raise LayoutError(msg)
