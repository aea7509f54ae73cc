"""An AnnData object as a source: in memory, backed or lazy."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import anndata as ad
import dask.array as da
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr
from anndata.experimental.backed import Dataset2D
from dask.local import get_sync
from dask.optimization import cull
from numpy.typing import NDArray

from annbatch_dask.errors import SchemaError, SourceError
from annbatch_dask.manifest import STATS
from annbatch_dask.plan.schema import OBS, ColumnSchema, Genes, MatrixSchema, SourceSchema
from annbatch_dask.sources.columns import (
    ColumnRows,
    check_text,
    describe_series,
    mean_width,
    names_of_column,
    series_rows,
)
from annbatch_dask.sources.files import GENE_WISE, PAIRED, no_cells
from annbatch_dask.sources.matrices import (
    CsrRows,
    are_whole,
    columnless,
    counted,
    describe_matrix,
    is_matrix,
    matrix_rows,
    row_of,
)
from annbatch_dask.sources.picked import pick_rows
from annbatch_dask.warn import muted

__all__ = ["AnnDataSource", "read_legacy"]


def read_legacy(item: Any) -> ad.AnnData:
    """A file of an old format, in memory: anndata knows them all."""
    with muted():  # that the format is old is known, and the file is not ours to mend
        if isinstance(item, zarr.Group) or os.path.isdir(item):
            return ad.io.read_zarr(item)
        return ad.read_h5ad(os.fspath(item))


class AnnDataSource:
    """An AnnData object: what ``load_adata`` returned, in memory, backed or lazy, or a file of an old format."""

    def __init__(self, label: str, adata: ad.AnnData) -> None:
        self._label, self._adata = label, adata
        obsm = {f"obsm/{k}": v for k, v in adata.obsm.items()}
        frames = {OBS: adata.obs} | {k: v for k, v in obsm.items() if hasattr(v, "columns")}
        self._frames = {k: _DataFrame(f) if isinstance(f, pd.DataFrame) else _LazyFrame(f) for k, f in frames.items()}
        for name, frame in (frames | _gene_frames(adata)).items():
            _check_names(label, name, self._frames[name].columns if name in self._frames else frame.columns)
            _check_index(label, name, frame)
        self._columns = {(f, str(k)): k for f, frame in self._frames.items() for k in frame.columns}
        self._blocks: dict[str, _DaskBlocks] = {}

    @property
    def n_obs(self) -> int:
        """Rows."""
        return int(self._adata.n_obs)

    @property
    def attributes(self) -> Mapping[str, Any]:
        """None: it is no group."""
        return {}

    def obs_columns(self) -> tuple[ColumnSchema, ...]:
        """Columns of obs."""
        return tuple(c for c in self._described() if c.frame == OBS)

    def _described(self) -> tuple[ColumnSchema, ...]:
        return tuple(
            replace(describe_series(name, self._frames[frame].rows(k, 0, self.n_obs)), frame=frame)
            for (frame, name), k in self._columns.items()
        )

    def schema(self, *, metadata_only: bool = False, rows: NDArray[np.bool_] | None = None) -> SourceSchema:
        """Schema of the input; stored values are counted of the ``rows``, (n_obs,), of which it is true."""
        adata = self._adata
        matrices, unsupported = [], []
        for name, genes, values in self._matrix_values():
            described = _describe(name, values, rows)
            if described is None:
                unsupported.append(name)
            else:
                matrices.append(replace(described, genes=genes))
        check_text("obs names", self._frames[OBS].names(0, adata.n_obs))
        return SourceSchema(
            path=self._label,
            n_obs=adata.n_obs,
            var_names=_names_of(adata.var),
            matrices=tuple(matrices),
            columns=self._described(),
            index_name=self._frames[OBS].index_name,
            left_out=tuple(f"{k}/{name}" for k in PAIRED for name in sorted(getattr(adata, k))),
            unsupported=tuple(unsupported),
            raw_names=None if adata.raw is None else _names_of(adata.raw.var),
            name_width=mean_width(lambda a, b: self._frames[OBS].names(a, b).astype(str), adata.n_obs),
            resident_nbytes=self._nbytes(),
            cuts=_cuts(matrix for _, _, matrix in self._matrix_values()),
        )

    def _nbytes(self) -> int:
        """Bytes of it in memory."""
        adata = self._adata
        values = [v for _, _, v in self._matrix_values()]
        for mapping in (adata.varm, adata.obsp, adata.varp):
            values += mapping.values()
        frames = [adata.obs, adata.var, *(v for k, v in adata.obsm.items() if f"obsm/{k}" in self._frames)]
        if adata.raw is not None:
            frames.append(adata.raw.var)
        tables = [f for f in frames if isinstance(f, pd.DataFrame)]
        return sum(map(_array_nbytes, values)) + sum(int(f.memory_usage(deep=True).sum()) for f in tables)

    def _matrix_values(self) -> Iterator[tuple[str, Genes, Any]]:
        """Name, what the columns are, and the values."""
        if self._adata.X is not None:
            yield "X", "var", self._adata.X
        elif not self._adata.n_vars:
            yield "X", "var", columnless(self._adata.n_obs)
        if self._adata.raw is not None:
            yield "raw/X", "raw", self._adata.raw.X
        for name in sorted(k for k in self._adata.layers if k is not None):  # anndata 0.13 lists X as layer None
            yield f"layers/{name}", "var", self._adata.layers[name]
        for name in sorted(self._adata.obsm):
            if f"obsm/{name}" not in self._frames:
                yield f"obsm/{name}", "", self._adata.obsm[name]

    def gene_column(self, frame: str, name: str) -> NDArray[np.object_] | None:
        """Values of a column of ``"var"`` or ``"raw/var"`` as names, None where missing; None if there is none."""
        found = self._adata.var if frame == "var" else self._adata.raw.var
        key = next((c for c in found.columns if str(c) == name), None)
        if key is None:
            return None
        values = _in_memory(found)[key]
        return names_of_column(describe_series(name, values), series_rows(describe_series(name, values), values))

    def gene_values(self, frame: str, name: str) -> NDArray | None:
        """Values of a column of ``"var"`` or ``"raw/var"`` as they are; None if there is none."""
        found = _in_memory(self._adata.var if frame == "var" else self._adata.raw.var)
        return np.asarray(found[name]) if name in found.columns else None

    def annotations(self) -> ad.AnnData:
        """Annotations of genes and of the input: an AnnData without cells, with var, varm, varp, uns and raw.var."""
        found = {k: _in_memory(getattr(self._adata, k)) for k in GENE_WISE}
        found["uns"] = {
            k: v for k, v in found["uns"].items() if k != STATS
        }  # statistics of a dataset, not of these rows
        return no_cells(**found, raw_var=None if self._adata.raw is None else _in_memory(self._adata.raw.var))

    def matrix(self, matrix: MatrixSchema, start: int, stop: int) -> CsrRows | NDArray:
        """Rows [start, stop) of a matrix: dense ones as an array."""
        values = self._values(matrix)
        if not isinstance(values, da.Array):
            return matrix_rows(values, matrix, start, stop)
        return matrix_rows(self._blocks_of(matrix, values).rows(start, stop), matrix, 0, stop - start)

    def stored(self, matrix: MatrixSchema) -> Any:
        """A matrix as it is stored, the group of a sparse one, or as it is in memory."""
        return self._values(matrix)

    def picked(self, matrix: MatrixSchema, rows: NDArray[np.int64]) -> CsrRows | NDArray:
        """Rows of a matrix by their numbers, ascending."""
        values = self._values(matrix)
        if not isinstance(values, da.Array):
            return pick_rows(values, matrix, rows)
        return matrix_rows(self._blocks_of(matrix, values).picked(rows), matrix, 0, len(rows))

    def _values(self, matrix: MatrixSchema) -> Any:
        values = next((v for name, _, v in self._matrix_values() if name == matrix.source_name), None)
        if values is not None and (row := row_of(values.shape))["n_cols"] != matrix.n_cols:
            msg = (
                f"{self._label} had {matrix.n_cols:,} columns in {matrix.source_name} when it was looked at first, and "
                f"has {row['n_cols']:,} now; load_adata must return the same each time it is called"
            )
            raise SourceError(msg)
        if values is None:
            msg = f"{self._label} had {matrix.source_name} when it was looked at first, and has it no more; call again"
            raise SourceError(msg)
        return _unwrap(values)

    def _blocks_of(self, matrix: MatrixSchema, values: da.Array) -> _DaskBlocks:
        if matrix.source_name not in self._blocks:
            self._blocks[matrix.source_name] = _DaskBlocks.of(values)
        return self._blocks[matrix.source_name]

    def column(self, column: ColumnSchema, start: int, stop: int) -> ColumnRows:
        """Rows [start, stop) of a column."""
        frame = self._frames[column.frame]
        return series_rows(column, frame.rows(self._columns[column.frame, column.source_name], start, stop))

    def names(self, start: int, stop: int) -> NDArray[np.object_]:
        """Obs names of rows [start, stop)."""
        return np.asarray(self._frames[OBS].names(start, stop).astype(str), object)


def _gene_frames(adata: ad.AnnData) -> dict[str, Any]:
    """Frames of genes, by name."""
    return {"var": adata.var} | ({} if adata.raw is None else {"raw.var": adata.raw.var})


def _check_index(label: str, name: str, frame: Any) -> None:
    """Refuse names of several parts: a store has one for each row."""
    if isinstance(frame, pd.DataFrame) and isinstance(frame.index, pd.MultiIndex):
        n = frame.index.nlevels
        msg = f"{label}: the index of {name} is a MultiIndex of {n} levels; give each row one name in load_adata"
        raise SchemaError(msg)


def _check_names(label: str, frame: str, columns: Iterable[Any]) -> None:
    """Refuse columns that files cannot tell apart, such as 1 and "1"."""
    seen: dict[str, Any] = {}
    for column in columns:
        if str(column) in seen:
            msg = (
                f"{label}: {frame} has columns {seen[str(column)]!r} and {column!r}, which are stored under one name; "
                "rename one in load_adata"
            )
            raise SchemaError(msg)
        seen[str(column)] = column


def _names_of(genes: Any) -> NDArray[np.object_]:
    """Names of genes; numbers may stand in their place in a lazy frame."""
    index = genes.true_index if isinstance(genes, Dataset2D) else genes.index
    return np.asarray(index.astype(str), object)


def _in_memory(value: Any) -> Any:
    """Load a value that may be lazy, stored, or a mapping of such values; a frame keeps the order of its columns."""
    if isinstance(value, Dataset2D):
        columns = _LazyFrame(value).columns
        return Dataset2D(value.ds.compute(scheduler="synchronous")).to_memory()[columns]
    if isinstance(value, da.Array):
        return value.compute(scheduler="synchronous")
    if isinstance(value, zarr.Array | h5py.Dataset):
        return value[...]
    if isinstance(value, ad.abc.CSRDataset | ad.abc.CSCDataset):
        return value.to_memory()
    if isinstance(value, Mapping):
        return {k: _in_memory(v) for k, v in value.items()}
    return value


def _array_nbytes(values: Any) -> int:
    """Bytes of an array in memory, dense or sparse; 0 for one that is stored or lazy."""
    if sp.issparse(values):
        return sum(int(getattr(values, k).nbytes) for k in ("data", "indices", "indptr") if hasattr(values, k))
    return int(values.nbytes) if isinstance(values, np.ndarray) else 0


class _DataFrame:
    """A frame in memory."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self._frame, self.columns = frame, frame.columns
        self.index_name = None if frame.index.name is None else str(frame.index.name)

    def rows(self, name: Any, start: int, stop: int) -> pd.Series:
        found: pd.Series = self._frame[name].iloc[start:stop]
        return found

    def names(self, start: int, stop: int) -> pd.Index:
        return self._frame.index[start:stop]


class _LazyFrame:
    """One that anndata keeps in xarray: read column by column, and of that what is asked for."""

    def __init__(self, frame: Any) -> None:
        known = set(frame.columns)  # which have no order; the dataset's variables have that of the file
        self._frame, self.columns = frame, [k for k in frame.ds.data_vars if k in known]
        self.index_name = None if frame.true_index_dim in _NO_NAMES else str(frame.true_index_dim)

    def rows(self, name: Any, start: int, stop: int) -> pd.Series:
        found = self._frame.ds[[name]].isel({self._frame.index_dim: slice(start, stop)})
        series: pd.Series = found.compute(scheduler="synchronous").to_dataframe()[name]  # this thread does the work
        return series.astype("string") if found[name].attrs.get("is_nullable_string") else series

    def names(self, start: int, stop: int) -> pd.Index:
        found: pd.Index = pd.Index(np.asarray(self._frame.true_xr_index[start:stop]))
        return found


_NO_NAMES = ("_index", "_anndata_concat_index", "_anndata_merge_index")
"""What anndata calls an index that has no name."""


@dataclass(frozen=True)
class _DaskBlocks:
    """Row blocks of a dask array, whose graph is optimised once and not for each range of rows."""

    graph: dict[Any, Any]
    keys: list[Any]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, values: da.Array) -> _DaskBlocks:
        values = values.rechunk(dict.fromkeys(range(1, values.ndim), -1))
        keys = [(values.name, i, *[0] * (values.ndim - 1)) for i in range(values.numblocks[0])]
        graph = dict(values.__dask_optimize__(values.dask, keys))
        return cls(graph, keys, np.concatenate([[0], np.cumsum(values.chunks[0])]).astype(np.int64))

    def rows(self, start: int, stop: int) -> Any:
        """Rows [start, stop), of the blocks they are in; this thread does the work."""
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        last = max(first + 1, int(np.searchsorted(self.starts, stop)))
        wanted = self.keys[first:last]
        whole = _stacked(get_sync(cull(self.graph, wanted)[0], wanted))
        low = int(self.starts[first])
        return whole if whole.shape[0] == stop - start else whole[start - low : stop - low]

    def picked(self, rows: NDArray[np.int64]) -> Any:
        """Rows by their numbers, ascending: a block after the other, so that one is whole in memory at a time."""
        block = np.searchsorted(self.starts, rows, side="right") - 1
        found = []
        for k in np.unique(block).tolist():
            whole = self.rows(int(self.starts[k]), int(self.starts[k + 1]))
            found.append(whole[rows[block == k] - int(self.starts[k])])
        return _stacked(found)


def _stacked(found: Sequence[Any]) -> Any:
    return sp.vstack(found, format="csr") if sp.issparse(found[0]) else np.concatenate(found)


def _cuts(matrices: Iterable[Any]) -> NDArray[np.int64] | None:
    """Rows between which the blocks of the first lazy matrix are, since a part of one costs as much as all of it."""
    lazy = next((m for m in matrices if isinstance(m, da.Array)), None)
    return None if lazy is None else np.unique(np.concatenate([[0], np.cumsum(lazy.chunks[0])])).astype(np.int64)


def _unwrap(values: Any) -> Any:
    """The stored group behind anndata's backed sparse wrapper."""
    return values.group if isinstance(values, ad.abc.CSRDataset | ad.abc.CSCDataset) else values


def _describe(name: str, values: Any, rows: NDArray[np.bool_] | None) -> MatrixSchema | None:
    values = _unwrap(values)
    if isinstance(values, da.Array):
        return _describe_lazy(name, values, rows)
    described = describe_matrix(name, values, rows=rows)
    return None if described is None else replace(described, integral=are_whole(values))


def _describe_lazy(name: str, values: da.Array, rows: NDArray[np.bool_] | None) -> MatrixSchema | None:
    """A dask array; where sparse, stored values are extrapolated from its first block, which is computed."""
    if not is_matrix(name, values.dtype, values.ndim):
        return None
    n_rows, row = int(values.shape[0]), row_of(values.shape)
    dense = MatrixSchema(name, "dense", values.dtype.name, "", **row)
    if not n_rows:
        return dense
    n_first = min(n_rows, int(values.chunks[0][0]), 4096)
    first = values[:n_first].compute(scheduler="synchronous")
    integral = are_whole(first)
    if not sp.issparse(first):
        return replace(dense, integral=integral)
    ends = np.ceil(np.arange(1, n_rows + 1) * (first.nnz / n_first))
    schema = MatrixSchema(name, "csr", values.dtype.name, "int32", row["n_cols"], integral=integral)
    return counted(schema, ends, exact=False, rows=rows)
