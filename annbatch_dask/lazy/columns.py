"""obs as xarray variables, which read the rows they are asked for when they are used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from uuid import uuid4

import dask.array as da
import numpy as np
import pandas as pd
import xarray as xr
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph
from numpy.typing import NDArray
from xarray.backends import BackendArray
from xarray.core.extension_array import PandasExtensionArray
from xarray.core.indexing import ExplicitIndexer, IndexingSupport, LazilyIndexedArray, explicit_indexing_adapter

from annbatch_dask.etl.blocks import read_column
from annbatch_dask.lazy.opened import open_as_opened
from annbatch_dask.plan.layout import Block
from annbatch_dask.plan.plan import Plan
from annbatch_dask.plan.schema import ColumnSpec, SourceSchema
from annbatch_dask.sources.columns import ColumnRows, to_pandas
from annbatch_dask.sources.open import Source, SourceRef

__all__ = ["SourceRows"]

Reader = Callable[[ColumnSpec, Block, SourceSchema, Source], ColumnRows]


@dataclass(frozen=True)
class SourceRows:
    """The rows of some sources, one after the other. Small to pickle; opens nothing until it is read."""

    refs: tuple[SourceRef, ...]
    identities: tuple[str, ...] = field(repr=False)
    sources: tuple[SourceSchema, ...] = field(repr=False)

    @classmethod
    def of(cls, plan: Plan, refs: tuple[SourceRef, ...], identities: tuple[str, ...]) -> SourceRows:
        """Those of a plan, with what is known of their columns alone."""
        return cls(refs, identities, tuple(replace(s, matrices=()) for s in plan.sources))

    @property
    def n_obs(self) -> int:
        """Rows of all."""
        return int(self.starts[-1])

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """(n_sources + 1,) first row of each source, and the end."""
        return np.concatenate([[0], np.cumsum([s.n_obs for s in self.sources])]).astype(np.int64)

    def column(self, spec: ColumnSpec, dim: str, *, keep_unused: bool = True) -> xr.Variable:
        """A column that reads what it is asked for.

        ``keep_unused=False`` leaves out categories that no cell of a selection has, as slices of AnnData do.
        """
        return self._variable(spec, _read_stored, dim, keep_unused=keep_unused)

    def numbers(self, spec: ColumnSpec, dim: str) -> xr.Variable:
        """A column of numbers none of which is missing, as a dask array: what is worked out of it is lazy, too.

        Parameters are those of :meth:`column`. There is a task for each source that has rows.
        """
        name = f"{spec.path.replace('/', '-')}-{self._token}"
        starts = np.unique(self.starts).tolist()
        pieces = list(zip(starts[:-1], starts[1:], strict=True))
        tasks: dict[Any, Any] = {(name, k): (_read_numbers, name, spec, a, b) for k, (a, b) in enumerate(pieces)}
        graph = HighLevelGraph.from_collections(name, tasks | {name: self})
        chunks = (tuple(b - a for a, b in pieces) or (0,),)
        if not pieces:
            return xr.Variable((dim,), da.zeros(0, spec.dtype))
        return xr.Variable((dim,), da.Array(graph, name, chunks, dtype=spec.dtype))

    @cached_property
    def _token(self) -> str:
        """Deterministic token: equal for equal sources, if their identity is known."""
        known = all(self.identities)
        return str(tokenize([s.path for s in self.sources], self.identities) if known else uuid4().hex)

    def names(self, dim: str) -> xr.Variable:
        """The obs names, likewise."""
        return self._variable(_NAMES, _read_names, dim)

    def labels(self, spec: ColumnSpec, dim: str) -> xr.Variable:
        """The source of each row; ``spec`` is a plan's ``source_column``."""
        return self._variable(spec, _read_label, dim)

    def _variable(self, spec: ColumnSpec, reader: Reader, dim: str, *, keep_unused: bool = True) -> xr.Variable:
        # what anndata calls a column that it must make pandas strings of (pydata/xarray issue 10419)
        attrs = {"is_nullable_string": True} if spec.kind == "string" and spec.nullable else None
        return xr.Variable((dim,), LazilyIndexedArray(_LazyColumn(self, spec, reader, keep_unused=keep_unused)), attrs)

    def read(self, spec: ColumnSpec, reader: Reader, start: int, stop: int) -> ColumnRows:
        """Rows [start, stop) of a column. Files without such rows stay closed, but for one where there are none."""
        found: list[ColumnRows] = []
        for k, (low, high) in enumerate(zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True)):
            first, last = max(start, low), min(stop, high)
            if first < last or (start == stop and not found):
                with open_as_opened(self.refs[k], self.identities[k]) as source:
                    block = Block(k, first - low, max(first, last) - low, first, 0)
                    found.append(reader(spec, block, self.sources[k], source))
        values = np.concatenate([f.values for f in found])
        if not spec.nullable:
            return ColumnRows(values)
        masks = [np.zeros(len(f.values), bool) if f.mask is None else f.mask for f in found]
        return ColumnRows(values, np.concatenate(masks))


def _read_numbers(rows: SourceRows, spec: ColumnSpec, start: int, stop: int) -> NDArray:
    return rows.read(spec, _read_stored, start, stop).values


_NAMES = ColumnSpec("", "string")


def _read_names(_: ColumnSpec, block: Block, __: SourceSchema, opened: Source) -> ColumnRows:
    return ColumnRows(opened.names(block.start, block.stop))


def _read_stored(spec: ColumnSpec, block: Block, source: SourceSchema, opened: Source) -> ColumnRows:
    return read_column(spec, block, replace(source, is_dataset=True), opened)  # a src_path column is one like any other


def _read_label(spec: ColumnSpec, block: Block, source: SourceSchema, opened: Source) -> ColumnRows:
    return read_column(spec, block, replace(source, is_dataset=False), opened)


class _LazyColumn(BackendArray):
    """One column of all sources, as xarray reads it."""

    def __init__(self, rows: SourceRows, spec: ColumnSpec, reader: Reader, *, keep_unused: bool) -> None:
        self._rows, self._spec, self._reader, self._keep_unused = rows, spec, reader, keep_unused
        self.shape = (rows.n_obs,)

    @cached_property
    def dtype(self) -> Any:
        """A pandas dtype where numpy has none that says the same."""
        none = np.zeros(0, self._spec.dtype or np.int8)
        return self._array(ColumnRows(none, none.astype(bool) if self._spec.nullable else None)).dtype

    def __getitem__(self, key: ExplicitIndexer) -> Any:
        """Read rows."""
        return explicit_indexing_adapter(key, self.shape, IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> Any:
        (index,) = key
        rows = np.arange(*index.indices(self.shape[0])) if isinstance(index, slice) else np.atleast_1d(index)
        low, high = (int(rows.min()), int(rows.max()) + 1) if len(rows) else (0, 0)
        found = self._rows.read(self._spec, self._reader, low, high)
        if len(rows) != high - low or (np.diff(rows) != 1).any():
            found = ColumnRows(found.values[rows - low], None if found.mask is None else found.mask[rows - low])
        array = self._array(found)
        if self._spec.categories is not None and len(rows) < self.shape[0] and not self._keep_unused:
            array = PandasExtensionArray(array.array.remove_unused_categories())
        return array[0] if isinstance(index, int | np.integer) else array

    def _array(self, found: ColumnRows) -> Any:
        if self._spec.kind == "string":
            return _strings(found)
        if self._spec.categories is not None:
            categories = pd.Index(list(self._spec.categories.values))  # of the dtype that this pandas has for strings
            codes = found.values
            return PandasExtensionArray(pd.Categorical.from_codes(codes, categories, self._spec.categories.ordered))
        array = to_pandas(self._spec, found.values, found.mask)
        return PandasExtensionArray(array) if isinstance(array, pd.api.extensions.ExtensionArray) else array


def _strings(found: ColumnRows) -> NDArray:
    """Strings, those of numpy where some may be missing: xarray takes no strings of pandas."""
    if found.mask is None:
        return found.values.astype(object, copy=False)
    values = found.values.astype(np.dtypes.StringDType(na_object=pd.NA))
    values[found.mask] = pd.NA
    return values
