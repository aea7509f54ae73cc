"""Assigns rows to row blocks of the sources, and to datasets and partitions of the output. Ranges are half-open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.errors import LayoutError
from annbatch_dask.plan.costs import Weight, read_weight
from annbatch_dask.plan.memory import scatter_peak_nbytes
from annbatch_dask.plan.schema import SourceSchema

_PASSED = 4
"""Times the size of a block that the rows may have which it is picked from."""

__all__ = ["MAX_READS", "Block", "Layout", "Room", "cut_blocks"]

MAX_READS = 2
"""Blocks for each of which a matrix of columns is read; one of more is put in the order of its rows first."""


@dataclass(frozen=True)
class Block:
    """Rows [start, stop) of a source: the work of one scatter task.

    ``first`` is the global input row of its first row; ``n_bytes`` what its matrices and obs take
    uncompressed, as the source stores them; ``peak_nbytes`` is the task's peak memory, 0 if not computed. ``measured``
    is the number of the task that measured its rows, -1 if none did.
    """

    source: int
    start: int
    stop: int
    first: int
    n_bytes: int
    peak_nbytes: int = field(default=0, compare=False, repr=False)
    measured: int = field(default=-1, compare=False, repr=False)

    @property
    def n_rows(self) -> int:
        """Rows in the block."""
        return self.stop - self.start


@dataclass(frozen=True)
class Layout:
    """The output rows [0, n_obs): cut into datasets, and each dataset into parts that fit memory.

    Datasets are what users see. Parts are what a gather task holds at once; they leave no trace in the result.

    Parameters
    ----------
    sizes
        Rows of each dataset.
    part_rows
        Rows of each part but the last of a dataset.
    """

    sizes: tuple[int, ...]
    part_rows: int

    def __post_init__(self) -> None:
        """Refuse sizes below one row."""
        if min(self.sizes) < 1 or self.part_rows < 1:
            msg = f"a dataset of {min(self.sizes)} rows in parts of {self.part_rows}; both must be 1 or more"
            raise LayoutError(msg)

    @classmethod
    def even(cls, n_obs: int, dataset_rows: int, part_rows: int) -> Layout:
        """Datasets of ``dataset_rows`` rows each; the last one may be smaller."""
        if dataset_rows < 1:
            msg = f"dataset_size is {dataset_rows} rows; it must be 1 or more"
            raise LayoutError(msg)
        full, rest = divmod(n_obs, dataset_rows)
        return cls((dataset_rows,) * full + ((rest,) if rest else ()), part_rows)

    @cached_property
    def dataset_starts(self) -> NDArray[np.int64]:
        """(n_datasets + 1,) first output row of each dataset, and the end."""
        return np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)

    @property
    def n_obs(self) -> int:
        """Rows of all datasets."""
        return int(self.dataset_starts[-1])

    @property
    def n_datasets(self) -> int:
        """Number of datasets."""
        return len(self.sizes)

    def dataset_bounds(self, dataset: int) -> tuple[int, int]:
        """Output rows [start, stop) of a dataset."""
        return int(self.dataset_starts[dataset]), int(self.dataset_starts[dataset + 1])

    @cached_property
    def part_starts(self) -> NDArray[np.int64]:
        """(n_parts + 1,) first output row of each part, and the end; no part crosses a dataset's border."""
        starts = [np.arange(*self.dataset_bounds(k), self.part_rows, dtype=np.int64) for k in range(self.n_datasets)]
        return np.concatenate([*starts, [self.n_obs]]).astype(np.int64)

    @cached_property
    def first_part(self) -> NDArray[np.int64]:
        """(n_datasets + 1,) first part of each dataset, and the number of parts."""
        return np.searchsorted(self.part_starts, self.dataset_starts)

    def parts_of(self, dataset: int) -> range:
        """Parts of a dataset."""
        return range(int(self.first_part[dataset]), int(self.first_part[dataset + 1]))

    @property
    def n_parts(self) -> int:
        """Number of parts."""
        return len(self.part_starts) - 1

    def locate(
        self, rows: NDArray[np.int64], groups: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
        """Part of each output row, and its place in it; the rows' ``groups`` do not matter to either."""
        part = np.searchsorted(self.part_starts, rows, side="right") - 1
        return part, (rows - self.part_starts[part]).astype(np.uint32)


@dataclass(frozen=True)
class Room:
    """Memory that a scatter task may hold.

    Attributes
    ----------
    nbytes
        Bytes of a worker that are one task's.
    held
        Bytes per row of each source in a task.
    fixed
        Bytes that a task needs for any rows of each source.
    """

    nbytes: int
    held: Sequence[Weight]
    fixed: Sequence[int]


def cut_blocks(
    sources: Sequence[SourceSchema],
    *,
    block_nbytes: int,
    csc_nbytes: int,
    obs_nbytes: int,
    skip: int = 0,
    room: Room | None = None,
    max_reads: int | None = None,
) -> tuple[Block, ...]:
    """Cut every source into row blocks of about ``block_nbytes``, at the steps at which its bytes are known.

    A block holds at least one step; an empty source has none. A source that names its ``cuts`` is cut there alone.
    A source with a CSC matrix is read whole for each of its blocks, so it is cut into blocks of ``csc_nbytes``, as few
    as memory allows; where they would be more than ``max_reads``, it is put in the order of its rows before
    (:mod:`annbatch_dask.plan.transposing`), and cut as any other. The first ``skip`` sources have none:
    their rows stay where they are. With ``room``, what counts is what a task holds of the rows, and blocks are no
    larger than that allows. Where few rows are kept, a block spans
    at most a few times as many bytes as it may have, so that many tasks share in reading what lies between.
    """
    blocks: list[Block] = []
    first = 0
    for s, source in enumerate(sources[skip:], skip):
        is_csc = any(m.kind == "csc" for m in source.matrices)
        size = csc_nbytes if is_csc else block_nbytes
        edges = _edges(source)
        read = read_weight(source, obs_nbytes=obs_nbytes).before(source, edges)
        held, fixed = read, 0
        if room is not None:
            held, fixed = room.held[s].before(source, edges), room.fixed[s]
            size = min(size, max(1, (room.nbytes - scatter_peak_nbytes(0, fixed)) // 2))
        passed = held if is_csc or source.kept is None else _passed(source, edges, float(held[-1]))
        cuts = _cuts(held, passed, size)
        if max_reads is not None and len(cuts) > max_reads and any(m.is_by_columns for m in source.matrices):
            cuts = _cuts(held, passed, min(size, block_nbytes))
        for at, end in cuts:
            start, stop = int(edges[at]), int(edges[end])
            peak = scatter_peak_nbytes(held[end] - held[at], fixed)
            blocks.append(Block(s, start, stop, first + start, int(read[end] - read[at]), peak))
        first += source.n_obs
    return tuple(blocks)


def _cuts(held: NDArray[np.float64], passed: NDArray[np.float64], size: float) -> list[tuple[int, int]]:
    """Edges between which there are about so many bytes, one step at least."""
    out, at = [], 0
    while at < len(held) - 1:
        end = max(min(_last(held, at, size), _last(passed, at, _PASSED * size)), at + 1)
        out.append((at, end))
        at = end
    return out


def _last(before: NDArray[np.float64], at: int, size: float) -> int:
    """The last edge up to which there are so many bytes."""
    return int(np.searchsorted(before, before[at] + size, side="right")) - 1


def _passed(source: SourceSchema, edges: NDArray[np.int64], total: float) -> NDArray[np.float64]:
    """About the bytes of rows before each edge, those that are not kept among them: rows are taken to be alike."""
    assert source.kept is not None
    return source.kept.spread(edges) * (total / max(1, source.n_obs))


def _edges(source: SourceSchema) -> NDArray[np.int64]:
    """Rows at which a source may be cut."""
    if source.cuts is not None:
        return np.asarray(source.cuts, np.int64)
    step = max((m.row_step for m in source.matrices if len(m.nnz)), default=64)
    return np.minimum(np.arange(-(-source.n_obs // step) + 1) * step, source.n_obs)
