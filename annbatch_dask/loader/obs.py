"""``obs`` of all datasets, compact: columns as arrays over all rows, names compressed, label columns as codes."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annbatch_dask.chunks import native
from annbatch_dask.chunks.files import scratch
from annbatch_dask.errors import SelectionError
from annbatch_dask.formatting import first_few
from annbatch_dask.kernels.references import take_references
from annbatch_dask.loader.requests import Assignment
from annbatch_dask.storage.frames import stack

__all__ = ["Categories", "Labels", "Names", "ObsTable"]

Ints = NDArray[np.int64]
Codes = NDArray[Any]
Categories = tuple[Any, ...] | None
"""Values that codes stand for; None takes them from the data."""

_BLOCK = 128
"""Names compressed together: few enough that a window of scattered rows unpacks little else."""


@dataclass(frozen=True)
class Names:
    """Text, compressed in small blocks: a barcode takes 12 bytes instead of 100.

    Attributes
    ----------
    separator
        Stands between two names of a block, and in none.
    packed, ends
        The compressed blocks one after the other, and where each ends.
    largest
        Bytes of the largest block and of the largest name, with a separator.
    dtype, name
        Dtype and name of the index.
    """

    separator: str
    packed: bytes = field(repr=False)
    ends: Ints = field(repr=False)
    largest: tuple[int, int]
    n_rows: int
    dtype: Any
    name: Any

    @classmethod
    def of(cls, index: pd.Index) -> Names | None:
        """Compress an index; None if it holds anything but text."""
        if index.hasnans or pd.api.types.infer_dtype(index, skipna=False) != "string":
            return None  # pandas 3 has a dtype of text that may be missing
        values = index.to_numpy(object)
        pieces = [values[k : k + _BLOCK] for k in range(0, len(values), _BLOCK)]
        separator = next(c for c in map(chr, range(0xD800)) if not any(c in "".join(piece) for piece in pieces))
        texts = (separator.join(piece).encode("utf8", "surrogatepass") for piece in pieces)
        blocks, n_block, n_name = [], 0, 0
        for text in texts:
            blocks.append(zlib.compress(text, 1))
            n_block = max(n_block, len(text))
            n_name = max(n_name, *map(len, text.split(separator.encode())))
        ends = np.cumsum([len(block) for block in blocks], dtype=np.int64)
        largest = (n_block, n_name + len(separator.encode()))
        return cls(separator, b"".join(blocks), ends, largest, len(values), index.dtype, index.name)

    def __len__(self) -> int:
        return self.n_rows

    def take(self, rows: Ints) -> NDArray[np.object_]:
        """The names of some rows."""
        taken = np.empty(len(rows), object)
        blocks = rows // _BLOCK
        visits = blocks[np.flatnonzero(np.diff(blocks, prepend=-1))]
        order = slice(None) if len(set(visits.tolist())) == len(visits) else np.argsort(rows)
        names = self._pick(rows[order])
        taken[order] = self._pick_plainly(rows[order]) if names is None else names
        return taken

    def _pick(self, rows: Ints) -> list[str] | None:
        """Names, those of one block one after the other, in one call without the GIL; None where it has no way."""
        if not native.can_inflate() or not len(rows):
            return None
        separator, (n_block, n_name) = self.separator.encode(), self.largest
        out, given = np.empty(len(rows) * n_name, np.uint8), np.frombuffer(separator, np.uint8)
        packed, functions = np.frombuffer(self.packed, np.uint8), native.functions()
        spare = scratch("chunk", n_block)
        n_bytes = native.inflate_names(rows, _BLOCK, packed, self.ends, given, functions, spare, out)
        if n_bytes < 0:
            return None
        text = str(memoryview(out)[: n_bytes - len(separator)], "utf8", "surrogatepass")
        return text.split(self.separator)

    def _pick_plainly(self, rows: Ints) -> list[str]:
        """Like `_pick`, one block at a time."""
        blocks = rows // _BLOCK
        firsts = np.flatnonzero(np.diff(blocks, prepend=-1)).tolist()
        places = (rows - blocks * _BLOCK).tolist()
        names: list[str] = []
        unpacked: dict[int, list[str]] = {}
        for first, stop in pairwise([*firsts, len(rows)]):
            block = int(blocks[first])
            if block not in unpacked:
                unpacked[block] = self._unpack(block)
            names += map(unpacked[block].__getitem__, places[first:stop])
        return names

    def _unpack(self, block: int) -> list[str]:
        start = int(self.ends[block - 1]) if block else 0
        packed = memoryview(self.packed)[start : int(self.ends[block])]
        return zlib.decompress(packed).decode("utf8", "surrogatepass").split(self.separator)

    def whole(self) -> pd.Index:
        """All of them."""
        whole: pd.Index = pd.Index(self.take(np.arange(self.n_rows)), dtype=self.dtype, name=self.name)
        return whole


@dataclass(frozen=True)
class ObsTable:
    """``obs`` of all datasets, with dtypes that do not depend on the window.

    Attributes
    ----------
    columns
        Each over all rows: arrays of numpy or pandas.
    indexes
        For each dataset its compressed obs names, or the index of the user's frame; None where names were not
        read.
    bounds
        (n_datasets + 1,) dataset ``d`` has rows ``bounds[d]:bounds[d + 1]``.
    index
        The indexes of several datasets as one, of which theirs are parts; None where they are not alike.
    """

    columns: Mapping[Any, Any]
    indexes: tuple[Names | pd.Index | None, ...]
    bounds: Ints
    index: pd.Index | None = None

    @classmethod
    def of(cls, frame: pd.DataFrame, index: Names | pd.Index | None) -> ObsTable:
        """Make the table of one dataset; the frame's columns are not copied."""
        columns = {name: _array(frame[name]) for name in frame.columns}
        return cls(columns, (index,), np.array([0, len(frame)], np.int64))

    @classmethod
    def joined(cls, tables: Sequence[ObsTable]) -> ObsTable:
        """One below the other. A column that some lack is missing there; categories are united."""
        if len(tables) == 1:
            return tables[0]
        names = dict.fromkeys(name for table in tables for name in table.columns)
        sizes = [table.n_rows for table in tables]
        columns = {  # categories in order of first appearance, ordered or not: codes stay when datasets are appended
            name: stack([t.series(name) if name in t.columns else None for t in tables], sizes, ordered=False)
            for name in names
        }
        bounds = np.concatenate([[0], np.cumsum(np.concatenate([np.diff(table.bounds) for table in tables]))])
        indexes = tuple(index for table in tables for index in table.indexes)
        whole = _united(indexes)
        if whole is not None:
            indexes = tuple(whole[start:stop] for start, stop in pairwise(bounds.tolist()))
        return cls(columns, indexes, bounds, whole)

    def packed(self) -> ObsTable:
        """A copy with compressed names."""
        indexes = (Names.of(index) or index if isinstance(index, pd.Index) else index for index in self.indexes)
        return replace(self, indexes=tuple(indexes), index=None)

    @property
    def n_rows(self) -> int:
        """Rows of all datasets."""
        return int(self.bounds[-1])

    def series(self, name: Any) -> pd.Series:
        """A column over all rows, numbered through; missing everywhere where there is none."""
        if name not in self.columns:
            return pd.Series(np.nan, index=pd.RangeIndex(self.n_rows))
        array = self.columns[name]
        series: pd.Series = pd.Series(array, dtype=array.dtype, copy=False)
        return series

    def names(self) -> pd.Series:
        """The obs names of all rows."""
        return pd.concat([pd.Series(_whole(index)) for index in self.indexes], ignore_index=True)

    def shifts(self, name: Any) -> bool:
        """True if the codes of a column are ranks of its values, which other values that come later would shift."""
        dtype = self.columns[name].dtype
        return not isinstance(dtype, pd.CategoricalDtype) and not pd.api.types.is_bool_dtype(dtype)

    @property
    def index_names(self) -> set[str]:
        """Name of the index of obs."""
        return {str(index.name) for index in self.indexes if index is not None and index.name is not None}

    def ends(self) -> list[list[str]]:
        """The first and the last obs name of each dataset that has rows."""
        ends = []
        for index, n_rows in zip(self.indexes, np.diff(self.bounds).tolist(), strict=True):
            if index is not None and n_rows:
                ends.append([str(name) for name in _taken(index, np.array([0, n_rows - 1]))])
        return ends

    def select(self, names: Sequence[Any] | None) -> ObsTable:
        """Only these columns, in this order; None for all."""
        return self if names is None else replace(self, columns={name: self.columns[name] for name in names})

    def frames(self) -> list[pd.DataFrame]:
        """A frame for each dataset."""
        pairs = zip(self.bounds[:-1].tolist(), self.bounds[1:].tolist(), strict=True)
        return [
            self._frame(slice(start, stop), pd.RangeIndex(stop - start) if index is None else _whole(index))
            for index, (start, stop) in zip(self.indexes, pairs, strict=True)
        ]

    def take(self, assignments: Sequence[Assignment], rows: Ints, wanted: Ints, taken: Ints) -> pd.DataFrame:
        """Some of the rows of a window, by their places in its request, which has these ``rows`` of all.

        ``taken`` is ``rows[wanted]``.
        """
        if not assignments:
            return self.frames()[0].iloc[:0]
        if self.index is not None:
            return self._frame(taken, _dealt_out(self.index, rows, wanted))
        return self._frame(taken, self._index(assignments, len(rows), wanted))

    def _frame(self, rows: Ints | slice, index: pd.Index) -> pd.DataFrame:
        columns = {}
        for name, array in self.columns.items():
            taken = array[rows] if isinstance(rows, slice) else array.take(rows)
            # pandas would look for a dtype of objects; a Series says which, and takes as long as a frame.
            columns[name] = pd.Series(taken, index, array.dtype, copy=False) if array.dtype == object else taken
        if not columns:
            return pd.DataFrame(index=index, columns=[])
        return pd.DataFrame(columns, index=index, copy=False)  # told the columns, pandas takes six times as long

    def _index(self, assignments: Sequence[Assignment], n_rows: int, wanted: Ints) -> pd.Index:
        indexes = [self.indexes[a.dataset] for a in assignments]
        if len(indexes) == 1 and isinstance(indexes[0], pd.Index):
            return _dealt_out(indexes[0], assignments[0].rows, wanted)  # all in request order
        if any(isinstance(index, pd.Index) or index is None for index in indexes):
            parts = [_plain(index).take(a.rows) for index, a in zip(indexes, assignments, strict=True)]
            order = np.empty(n_rows, np.int64)
            order[np.concatenate([a.places for a in assignments])] = np.arange(n_rows)
            return parts[0].append(parts[1:]).take(order[wanted])
        taken = np.empty(n_rows, object)
        for index, a in zip(indexes, assignments, strict=True):
            taken[a.places] = _taken(index, a.rows)
        first = cast("Names", indexes[0])
        is_alike = all(index is not None and index.name == first.name for index in indexes)
        whole: pd.Index = pd.Index(taken[wanted], dtype=first.dtype, name=first.name if is_alike else None)
        return whole


class Labels:
    """Columns of ``obs`` as integer codes, in one code space for all datasets.

    The categories of a column are those given; else those of all datasets in order of first appearance, False and True,
    or the sorted distinct values of any other column that is not categorical. A missing value has code -1.

    Parameters
    ----------
    table
        obs of all datasets.
    wanted
        For each column its categories, None for those of the data. With None as the last category, all other values
        have code -1 as well.
    rows
        The rows that take part; None for all.

    Raises
    ------
    SelectionError
        If a row that takes part has a value that is not among the categories given.
    """

    def __init__(self, table: ObsTable, wanted: Mapping[str, Categories], rows: Ints | None) -> None:
        self.categories: dict[str, pd.Index[Any]] = {}
        self._codes: dict[str, Codes] = {}
        for name, given in wanted.items():
            found, codes = _encoded(table.series(name))
            if given is not None:
                others = given[-1:] == (None,)
                kept = pd.Index(list(given[: len(given) - others]))
                codes = _recoded(name, found, codes, kept, rows, others=others)
                found = kept
            self.categories[name], self._codes[name] = found, codes

    def take(self, rows: Ints) -> dict[str, Ints]:
        """The codes of some rows of all."""
        return {name: codes[rows].astype(np.int64) for name, codes in self._codes.items()}


def _encoded(column: pd.Series) -> tuple[pd.Index, Codes]:
    """The categories of a column, and its codes in the fewest bytes."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        return column.cat.categories, column.cat.codes.to_numpy()
    is_flag = pd.api.types.is_bool_dtype(column.dtype)
    categories = pd.Index([False, True] if is_flag else sorted(set(column.dropna().unique())))
    return categories, pd.Categorical(column, categories=categories).codes


def _recoded(  # noqa: PLR0913
    name: str,
    found: pd.Index,
    codes: Codes,
    kept: pd.Index,
    rows: Ints | None,
    *,
    others: bool,
) -> Codes:
    """The codes by categories of the user's."""
    places = np.append(kept.get_indexer(found), -1)
    if not others:
        n_each = np.bincount((codes if rows is None else codes[rows]).astype(np.int64) + 1, minlength=len(places))[1:]
        unknown = [(found[k], n) for k, n in enumerate(n_each.tolist()) if n and places[k] < 0]
        if unknown:
            shown = first_few(f"{value!r} ({n:,} rows)" for value, n in unknown)
            msg = (
                f"obs_codes gives {len(kept)} categories of {name!r}, rows that take part have {len(unknown)} others: "
                f"{shown}; add them, leave such rows out with where=, or end the list with None to give all "
                "other values code -1"
            )
            raise SelectionError(msg)
    recoded: Codes = places.astype(np.min_scalar_type(-max(len(kept), 1)))[codes]
    return recoded


def _united(indexes: Sequence[Names | pd.Index | None]) -> pd.Index | None:
    """Some indexes as one; None unless they are alike, and stay what they are."""
    plain = [index for index in indexes if type(index) is pd.Index]
    if len(plain) < len(indexes) or any((i.dtype, i.name) != (plain[0].dtype, plain[0].name) for i in plain):
        return None
    whole: pd.Index = plain[0].append(plain[1:])
    return whole if (type(whole), whole.dtype) == (pd.Index, plain[0].dtype) else None


def _dealt_out(index: pd.Index, rows: Ints, wanted: Ints) -> pd.Index:
    """Some of the rows of a window, by their places in its request."""
    is_text = isinstance(index.dtype, pd.StringDtype) and index.dtype.storage == "python"  # pandas 3 without pyarrow
    if type(index) is not pd.Index or not (is_text or index.dtype == object):
        return index.take(rows[wanted])
    return pd.Index(take_references(index.to_numpy(), rows, wanted), dtype=index.dtype, name=index.name, copy=False)


def _whole(index: Names | pd.Index | None) -> pd.Index:
    return index.whole() if isinstance(index, Names) else _plain(index)


def _plain(index: Names | pd.Index | None) -> pd.Index:
    """Convert to a pandas index; SelectionError if names are needed that were not read."""
    if index is None:
        msg = "obs names were not read, as obs_columns=[] asks for; name a column"
        raise SelectionError(msg)
    return index.whole() if isinstance(index, Names) else index


def _taken(index: Names | pd.Index | None, rows: Ints) -> Any:
    return index.take(rows) if isinstance(index, Names) else _plain(index).take(rows)


def _array(column: pd.Series) -> Any:
    return column.to_numpy() if isinstance(column.dtype, np.dtype) else column.array
