"""Sources of rows: zarr arrays and CSR groups on disk, arrays and CSR matrices in memory.

A source answers in two steps. :meth:`RowSource.locate` says what the rows cost, so that bytes can be reserved
before they exist; :meth:`RowSource.open` takes buffers and returns a block together with the tasks that fill it.
"""

from __future__ import annotations

import math
import os
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import scipy.sparse as sp
import zarr
from anndata.abc import CSRDataset
from numpy.typing import DTypeLike, NDArray

from annbatch_dask.chunks.cache import RangeCache
from annbatch_dask.chunks.dealing import Task
from annbatch_dask.chunks.reader import RangeReader
from annbatch_dask.chunks.wanted import CoveredRows, WantedEntries
from annbatch_dask.errors import SourceError
from annbatch_dask.kernels.row_runs import find_runs, locate_rows, row_bounds
from annbatch_dask.kernels.values import range_of
from annbatch_dask.loader.blocks import Block, DenseBlock, PickedBlock, SparseBlock
from annbatch_dask.manifest import SOURCE_DTYPE
from annbatch_dask.storage.versions import Listing

__all__ = [
    "ArraySource",
    "CsrSource",
    "Located",
    "RowSource",
    "ValueBounds",
    "ZarrArraySource",
    "ZarrCsrSource",
    "make_source",
]

Array = NDArray[Any]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Located:
    """Rows of a request, resolved for one source.

    Attributes
    ----------
    nbytes
        Memory the block will take.
    spans
        (n, 2) ascending, disjoint runs of rows, or of entries for a CSR group on disk, to read.
    starts
        Where each row begins in what is read: a row, or an entry.
    lengths
        Entries of each row; all zero for dense sources.
    rows
        The runs of rows of a CSR group on disk, and which row of all of these each row is.
    """

    nbytes: int
    spans: Ints
    starts: Ints
    lengths: Ints
    rows: tuple[Ints, Ints] | None = None


class ValueBounds(NamedTuple):
    """The least and greatest of finite values and 0, and whether all values are whole numbers."""

    low: float
    high: float
    is_whole: bool

    @classmethod
    def of(cls, values: Array) -> ValueBounds:
        """Bounds of an array, which is read whole."""
        whole, low, high, *_ = range_of(values)
        return cls(low, high, whole)


class Arrays(Protocol):
    """Allocator of arrays for loaded rows."""

    def empty(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> Array:
        """An uninitialised array, C-contiguous."""


class RowSource(ABC):
    """Rows of one dataset.

    Attributes
    ----------
    shape
        The first axis is rows.
    dtype
        The dtype the values had in the source; the stored one may be smaller.
    stored_dtype
        What they are stored in.
    is_sparse
        Whether blocks are sparse.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    stored_dtype: np.dtype[Any]
    is_sparse: bool

    @property
    def is_remote(self) -> bool:
        """True if its tasks wait for a store most of the time."""
        return False

    @property
    def is_ready(self) -> bool:
        """True if :meth:`locate` reads no file."""
        return True

    @property
    def n_obs(self) -> int:
        """Number of rows."""
        return self.shape[0]

    @abstractmethod
    def values(self) -> ValueBounds | None:
        """Recorded range of the values; None if only their dtype is known."""

    @abstractmethod
    def locate(self, rows: Ints) -> Located:
        """Find the rows (any order, repeats allowed); reads no values."""

    def prepare(self, located: Located) -> list[Task]:  # noqa: ARG002
        """Tasks to run in threads before :meth:`open`."""
        return []

    @abstractmethod
    def open(self, located: Located, pool: Arrays) -> tuple[Block, list[Task]]:
        """The block, complete once every task has run; row ``i`` is the ``i``-th row located."""

    def open_wanted(
        self,
        located: Located,
        pool: Arrays,
        is_wanted: NDArray[np.uint8],  # noqa: ARG002
        *,
        with_totals: bool,  # noqa: ARG002
    ) -> tuple[Block, list[Task]]:
        """Like `open`; may drop entries of columns that are not wanted (0 of 0 and 1) from sparse rows.

        With ``with_totals`` a block that lacks some has the sum of each whole row.

        Until every task has run, where rows begin and how long they are may mean nothing.
        """
        return self.open(located, pool)

    def close(self) -> None:  # noqa: B027 - most hold none
        """Keep no file open until the next read. Takes no lock."""


def make_source(
    dataset: Any, cache: RangeCache | None = None, listing: Listing | None = None, recorded: ValueBounds | None = None
) -> RowSource:
    """The source for a dataset the loader accepts; a remote one's files are kept in the cache.

    ``listing`` says what the files of a folder above are; by default they are as they are now. ``recorded`` says what
    is known of the values of one on disk.

    Raises
    ------
    SourceError
        If it has no columns.
    """
    if len(dataset.shape) < 2:  # noqa: PLR2004
        place = f"{dataset.store_path}: " if isinstance(dataset, zarr.Array) else ""
        msg = f"{place}a dataset of shape {dataset.shape} has no columns; give one of rows and columns"
        raise SourceError(msg)
    if isinstance(dataset, CSRDataset):
        return ZarrCsrSource(dataset.group, cache, listing, recorded)
    if isinstance(dataset, zarr.Array):
        return ZarrArraySource(dataset, cache, listing, recorded)
    if isinstance(dataset, np.ndarray):
        return ArraySource(np.asarray(dataset))
    return CsrSource(dataset)


class ZarrCsrSource(RowSource):
    """A CSR group in a zarr store. Row pointers are kept in memory from the first use on."""

    is_sparse = True

    def __init__(
        self,
        group: zarr.Group,
        cache: RangeCache | None = None,
        listing: Listing | None = None,
        recorded: ValueBounds | None = None,
    ) -> None:
        self._group = group
        self._recorded = recorded
        self._values, self._columns, self._pointers = (
            RangeReader(_array(group, name), cache=cache, listing=listing) for name in ("data", "indices", "indptr")
        )
        shape: Any = group.attrs["shape"]
        self.shape = tuple(int(n) for n in shape)
        self.stored_dtype = self._values.dtype
        self.dtype = np.dtype(str(group.attrs.get(SOURCE_DTYPE, self.stored_dtype)))
        self._indptr: Ints | None = None
        self._locks: dict[int, threading.Lock] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_indptr": None, "_locks": {}}

    @property
    def _lock(self) -> threading.Lock:
        """One for each process: a forked one may get a copy that a thread of its parent holds, and never lets go."""
        return self._locks.setdefault(os.getpid(), threading.Lock())

    @property
    def indptr(self) -> Ints:
        """Row pointers, checked: a wrong one would make the kernels read foreign memory."""
        with self._lock:
            if self._indptr is None:
                self._indptr = self._read_indptr()
            return self._indptr

    @property
    def is_remote(self) -> bool:
        """True if it is in an object store."""
        return self._values.is_remote

    @property
    def is_ready(self) -> bool:
        """True if the row pointers are there."""
        return self._indptr is not None

    def values(self) -> ValueBounds | None:
        """Recorded range of the values."""
        return self._recorded

    def prepare(self, located: Located) -> list[Task]:
        """Find the chunks."""
        return [*self._values.index_tasks(located.spans), *self._columns.index_tasks(located.spans)]

    def _read_indptr(self) -> Ints:
        reader = self._pointers
        stored = np.empty(reader.shape, reader.dtype)
        reader.read(np.array([[0, len(stored)]]), stored)
        indptr: Ints = stored.astype(np.int64, copy=False)
        n_values, n_columns = self._values.shape[0], self._columns.shape[0]
        is_sound = len(indptr) == self.n_obs + 1 and indptr[0] == 0 and (np.diff(indptr) >= 0).all()
        if not is_sound or indptr[-1] > min(n_values, n_columns):
            msg = (
                f"{self._group.store_path}: indptr does not describe {self.n_obs} rows of {n_values} values "
                f"and {n_columns} indices"
            )
            raise SourceError(msg)
        return indptr

    def locate(self, rows: Ints) -> Located:
        """Find the rows' entries."""
        indptr = self.indptr
        row_spans, position, spans, starts, lengths, n_entries = locate_rows(indptr, rows)
        nbytes = n_entries * (self._values.dtype.itemsize + self._columns.dtype.itemsize)
        return Located(nbytes, spans, starts, lengths, (row_spans, position))

    def open(self, located: Located, pool: Arrays) -> tuple[Block, list[Task]]:
        """Values and columns, each in one buffer."""
        return self._filled(located, *self._buffers(located, pool))

    def open_wanted(
        self, located: Located, pool: Arrays, is_wanted: NDArray[np.uint8], *, with_totals: bool
    ) -> tuple[Block, list[Task]]:
        """Values and columns, each in one buffer, of which little is touched where few columns are wanted."""
        assert located.rows is not None
        row_spans, position = located.rows
        values, columns = self._buffers(located, pool)
        rows = CoveredRows(located.spans, row_bounds(self.indptr, row_spans), position)
        readers, outputs = (self._columns, self._values), (columns, values)
        wanted = WantedEntries.of(readers, rows, is_wanted, outputs, with_totals=with_totals)
        if wanted is None:
            return self._filled(located, values, columns)
        block = PickedBlock(values, columns, wanted.starts, wanted.lengths, wanted.used, wanted.totals, position)
        return block, [wanted]

    def _filled(self, located: Located, values: Array, columns: Array) -> tuple[Block, list[Task]]:
        tasks = [*self._values.tasks(located.spans, values), *self._columns.tasks(located.spans, columns)]
        return SparseBlock(values, columns, located.starts, located.lengths), tasks

    def _buffers(self, located: Located, pool: Arrays) -> tuple[Array, Array]:
        n_entries = located.nbytes // (self._values.dtype.itemsize + self._columns.dtype.itemsize)
        return pool.empty(n_entries, self._values.dtype), pool.empty(n_entries, self._columns.dtype)

    def close(self) -> None:
        """Let go of the shards."""
        for reader in (self._values, self._columns, self._pointers):
            reader.close()


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    array = group[name]
    if not isinstance(array, zarr.Array):
        msg = f"{group.store_path}: {name} is not an array"
        raise SourceError(msg)
    return array


class ZarrArraySource(RowSource):
    """A zarr array of two dimensions or more."""

    is_sparse = False

    def __init__(
        self,
        array: zarr.Array[Any],
        cache: RangeCache | None = None,
        listing: Listing | None = None,
        recorded: ValueBounds | None = None,
    ) -> None:
        self._recorded = recorded
        self._reader = RangeReader(array, cache=cache, listing=listing)
        self.shape = self._reader.shape
        self.stored_dtype = self._reader.dtype
        self.dtype = np.dtype(str(array.attrs.get(SOURCE_DTYPE, self.stored_dtype)))

    @property
    def is_remote(self) -> bool:
        """True if it is in an object store."""
        return self._reader.is_remote

    def values(self) -> ValueBounds | None:
        """Recorded range of the values."""
        return self._recorded

    def prepare(self, located: Located) -> list[Task]:
        """Find the chunks."""
        return self._reader.index_tasks(located.spans)

    def locate(self, rows: Ints) -> Located:
        """Find the rows."""
        spans, _, positions = find_runs(rows)
        n_rows = int((spans[:, 1] - spans[:, 0]).sum())
        nbytes = n_rows * math.prod(self.shape[1:]) * self._reader.dtype.itemsize
        return Located(nbytes, spans, positions, np.zeros(len(rows), np.int64))

    def open(self, located: Located, pool: Arrays) -> tuple[Block, list[Task]]:
        """All rows in one buffer."""
        n_rows = int((located.spans[:, 1] - located.spans[:, 0]).sum())
        values = pool.empty((n_rows, *self.shape[1:]), self._reader.dtype)
        return DenseBlock(values, located.starts), self._reader.tasks(located.spans, values)

    def close(self) -> None:
        """Let go of the shards."""
        self._reader.close()


class CsrSource(RowSource):
    """A CSR matrix in memory, used where it is."""

    is_sparse = True

    def __init__(self, matrix: sp.csr_matrix | sp.csr_array) -> None:
        self._values, self._columns = map(_native, (matrix.data, matrix.indices))
        self._indptr: Ints = matrix.indptr.astype(np.int64, copy=False)
        self.shape = tuple(matrix.shape)
        self.dtype = self.stored_dtype = self._values.dtype

    def values(self) -> ValueBounds:
        """Bounds of its entries; duplicate entries are summed."""
        matrix = sp.csr_matrix((self._values, self._columns, self._indptr), shape=self.shape, copy=False)
        if not matrix.has_canonical_format:
            matrix = matrix.copy()
            matrix.sum_duplicates()
        return ValueBounds.of(matrix.data)

    def locate(self, rows: Ints) -> Located:
        """Nothing to load."""
        starts = self._indptr[rows]
        return Located(0, np.zeros((0, 2), np.int64), starts, self._indptr[rows + 1] - starts)

    def open(self, located: Located, pool: Arrays) -> tuple[Block, list[Task]]:  # noqa: ARG002
        """The matrix itself."""
        return SparseBlock(self._values, self._columns, located.starts, located.lengths), []


def _native(array: Array) -> Array:
    """Values one behind the other, in the processor's byte order."""
    return np.ascontiguousarray(array, array.dtype.newbyteorder("="))


class ArraySource(RowSource):
    """An array in memory; used where it is if its rows are contiguous, else copied row by row."""

    is_sparse = False

    def __init__(self, array: Array) -> None:
        self._array = array
        self.shape = array.shape
        self.dtype = self.stored_dtype = array.dtype.newbyteorder("=")

    def values(self) -> ValueBounds:
        """Bounds of all values."""
        return ValueBounds.of(_native(self._array))

    @property
    def _is_direct(self) -> bool:
        return bool(self._array.flags.c_contiguous) and self._array.dtype.isnative

    def locate(self, rows: Ints) -> Located:
        """Nothing to load from a C-contiguous array."""
        nbytes = 0 if self._is_direct else len(rows) * math.prod(self.shape[1:]) * self.dtype.itemsize
        return Located(nbytes, np.zeros((0, 2), np.int64), rows, np.zeros(len(rows), np.int64))

    def open(self, located: Located, pool: Arrays) -> tuple[Block, list[Task]]:
        """The array itself, or a contiguous copy of the rows."""
        if self._is_direct:
            return DenseBlock(self._array, located.starts), []
        values = pool.empty((len(located.starts), *self.shape[1:]), self.dtype)

        def copy() -> None:
            values[...] = self._array[located.starts]

        return DenseBlock(values, np.arange(len(located.starts))), [copy]
