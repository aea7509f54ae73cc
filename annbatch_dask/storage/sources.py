"""Inputs: what an AnnData file, or whatever ``load_adata`` returns, holds, and any rows of it."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import anndata as ad
import dask.array as da
import fsspec
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr
from numpy.typing import NDArray

from annbatch_dask.errors import SchemaError, SourceError, SourceNotFoundError
from annbatch_dask.plan.schema import ColumnSchema, MatrixSchema, SourceSchema
from annbatch_dask.storage.columns import ColumnRows, describe_elem, describe_series, elem_rows, series_rows
from annbatch_dask.storage.h5ad import SLAB_NBYTES, read_h5_rows, visit_h5
from annbatch_dask.storage.publish import Folder

__all__ = ["CsrRows", "Source", "SourceRef", "open_source"]

Visitor = Callable[[int, NDArray], None]
LoadAdata = Callable[[Any], ad.AnnData]
ROW_STEP = 64
"""Rows between the points at which the stored values of a source are counted."""
_PAIRED = ("varm", "obsp", "varp", "uns")


@dataclass(frozen=True)
class SourceRef:
    """An input as the user named it: what ``src_path`` says, and what a worker opens."""

    label: str
    item: Any
    load_adata: LoadAdata | None = None


@dataclass(frozen=True)
class CsrRows:
    """Rows of a sparse matrix, not yet read: visit each array at most once.

    Attributes
    ----------
    bounds
        (n_rows + 1,) int64 first entry of each row, from 0.
    indices, values
        Call with a visitor ``(first_entry, entries)``; pieces come in no order and from several threads.
    """

    bounds: NDArray[np.int64]
    indices: Callable[[Visitor], None]
    values: Callable[[Visitor], None]


class Source(Protocol):
    """An open input."""

    def schema(self) -> SourceSchema:
        """What it holds."""

    def var(self) -> pd.DataFrame:
        """Its var frame."""

    def matrix(self, matrix: MatrixSchema, start: int, stop: int) -> CsrRows | NDArray:
        """Rows [start, stop) of a matrix: dense ones as an array."""

    def column(self, column: ColumnSchema, start: int, stop: int) -> ColumnRows:
        """Rows [start, stop) of an obs column."""

    def names(self, start: int, stop: int) -> NDArray[np.object_]:
        """obs names of rows [start, stop)."""


@contextlib.contextmanager
def open_source(ref: SourceRef) -> Iterator[Source]:
    """Open an input, and close its files afterwards.

    Raises
    ------
    SourceNotFoundError
        If the path does not exist.
    SourceError
        If it is no AnnData file, or cut short.
    """
    if ref.load_adata is not None:
        yield AnnDataSource(ref.label, ref.load_adata(ref.item))
        return
    with contextlib.ExitStack() as files:
        group = _open_group(ref, files)
        if "obs" not in group or "var" not in group:
            msg = f"{ref.label} has no obs and var, so it is not an AnnData file; it holds {sorted(group)[:5]}"
            raise SourceError(msg)
        if _is_current(group):
            yield GroupSource(ref.label, group, _identity(ref))
        else:
            yield AnnDataSource(ref.label, _read_legacy(ref), _identity(ref))


def _open_group(ref: SourceRef, files: contextlib.ExitStack) -> Any:
    item = ref.item
    if isinstance(item, zarr.Group | h5py.Group):
        return item
    path = os.fspath(item)
    folder = Folder(path)
    if not folder.fs.exists(folder.path):
        msg = f"{path} does not exist; check the path" + (
            "" if os.path.isabs(path) or "://" in path else f" (looked in {os.getcwd()})"
        )
        raise SourceNotFoundError(msg)
    if folder.fs.isdir(folder.path):
        try:
            return zarr.open_group(folder.zarr_store(read_only=True), mode="r")
        except (FileNotFoundError, ValueError) as e:
            msg = f"{path} is a folder and not a zarr AnnData store ({e}); give an .h5ad file or a .zarr store"
            raise SourceError(msg) from e
    try:
        target = folder.path if folder.is_local else files.enter_context(fsspec.open(path, "rb"))
        return files.enter_context(h5py.File(target, "r"))
    except OSError as e:
        size = folder.fs.size(folder.path)
        msg = f"{path} ({size:,} bytes) is not a whole HDF5 file: {e}; copy it again, or leave it out"
        raise SourceError(msg) from e


def _identity(ref: SourceRef) -> str:
    """Size and time of change of a file, so that a resume notices that it was replaced."""
    if not isinstance(ref.item, str | os.PathLike):
        return ""
    folder = Folder(os.fspath(ref.item))
    info = folder.fs.info(folder.path)
    changed = info.get("mtime") or info.get("LastModified") or info.get("ETag")
    return f"{info.get('size')}/{changed}"


def _is_current(group: Any) -> bool:
    """Written by anndata 0.7 or later: frames are groups and categories stand with their column."""
    frames = [group["obs"], group["var"]]
    return all(not hasattr(f, "dtype") and "__categories" not in f and "_index" in f.attrs for f in frames)


def _read_legacy(ref: SourceRef) -> ad.AnnData:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the format is old is known, and the file is not ours to mend
        return ad.read_h5ad(os.fspath(ref.item)) if not isinstance(ref.item, zarr.Group) else ad.io.read_zarr(ref.item)


class GroupSource:
    """A file in anndata's format, HDF5 or zarr; reads only what it is asked for."""

    def __init__(self, label: str, group: Any, identity: str = "") -> None:
        self._label, self._group, self._identity = label, group, identity

    def schema(self) -> SourceSchema:
        """What it holds."""
        obs = self._group["obs"]
        index = str(obs.attrs["_index"])
        n_obs = int(_length(obs[index]))
        columns, left_out = [], []
        for name in map(str, obs.attrs["column-order"]):
            column = describe_elem(name, obs[name])
            if column is None:
                left_out.append(f"obs/{name}")
            else:
                columns.append(column)
        matrices = []
        for name, elem in self._matrix_elems():
            described = _describe_matrix(name, elem)
            if described is None:
                left_out.append(name)
            else:
                _check_rows(self._label, described, _n_rows(elem), n_obs)
                matrices.append(described)
        left_out += [k for k in ("raw", *_PAIRED) if k in self._group and len(self._group[k])]
        return SourceSchema(
            path=self._label,
            n_obs=n_obs,
            var_names=self.var_names(),
            matrices=tuple(matrices),
            columns=tuple(columns),
            index_name=None if index == "_index" else index,
            left_out=tuple(left_out),
            identity=self._identity,
        )

    def _matrix_elems(self) -> Iterator[tuple[str, Any]]:
        if "X" in self._group:
            yield "X", self._group["X"]
        for kind in ("layers", "obsm"):
            for name in sorted(self._group[kind] if kind in self._group else ()):
                yield f"{kind}/{name}", self._group[kind][name]

    def var_names(self) -> NDArray[np.object_]:
        """Gene names."""
        var = self._group["var"]
        names = ad.io.read_elem(var[str(var.attrs["_index"])])
        return np.asarray(names).astype(str).astype(object)

    def var(self) -> pd.DataFrame:
        """Its var frame."""
        return ad.io.read_elem(self._group["var"])

    def matrix(self, matrix: MatrixSchema, start: int, stop: int) -> CsrRows | NDArray:
        """Rows [start, stop) of a matrix: dense ones as an array."""
        return _matrix_rows(self._group[matrix.name], matrix, start, stop)

    def column(self, column: ColumnSchema, start: int, stop: int) -> ColumnRows:
        """Rows [start, stop) of an obs column."""
        return elem_rows(column, self._group["obs"][column.name], start, stop)

    def names(self, start: int, stop: int) -> NDArray[np.object_]:
        """Obs names of rows [start, stop)."""
        obs = self._group["obs"]
        column = ColumnSchema("", "string")
        rows = elem_rows(column, obs[str(obs.attrs["_index"])], start, stop).values
        return rows if rows.dtype == object else rows.astype(str).astype(object)


class AnnDataSource:
    """An AnnData object: what ``load_adata`` returned, in memory, backed or lazy, or a file of an old format."""

    def __init__(self, label: str, adata: ad.AnnData, identity: str = "") -> None:
        self._label, self._adata, self._identity = label, adata, identity
        obs = adata.obs
        self._obs: pd.DataFrame = obs if isinstance(obs, pd.DataFrame) else obs.to_memory()
        self._columns = {str(k): k for k in self._obs.columns}

    def schema(self) -> SourceSchema:
        """What it holds."""
        adata = self._adata
        matrices, left_out = [], []
        for name, values in self._matrix_values():
            described = _describe_matrix(name, values)
            if described is None:
                left_out.append(name)
            else:
                matrices.append(described)
        left_out += ["raw"] if adata.raw is not None else []
        left_out += [k for k in _PAIRED if len(getattr(adata, k))]
        return SourceSchema(
            path=self._label,
            n_obs=adata.n_obs,
            var_names=np.asarray(adata.var_names.astype(str), object),
            matrices=tuple(matrices),
            columns=tuple(describe_series(n, self._obs[k]) for n, k in self._columns.items()),
            index_name=None if self._obs.index.name is None else str(self._obs.index.name),
            left_out=tuple(left_out),
            identity=self._identity,
        )

    def _matrix_values(self) -> Iterator[tuple[str, Any]]:
        if self._adata.X is not None:
            yield "X", self._adata.X
        for kind in ("layers", "obsm"):
            mapping: Mapping[str, Any] = getattr(self._adata, kind)
            for name in sorted(mapping):
                yield f"{kind}/{name}", mapping[name]

    def var(self) -> pd.DataFrame:
        """Its var frame."""
        var = self._adata.var
        return var if isinstance(var, pd.DataFrame) else var.to_memory()

    def matrix(self, matrix: MatrixSchema, start: int, stop: int) -> CsrRows | NDArray:
        """Rows [start, stop) of a matrix: dense ones as an array."""
        kind, _, key = matrix.name.partition("/")
        values = getattr(self._adata, kind)[key] if key else self._adata.X
        return _matrix_rows(values, matrix, start, stop)

    def column(self, column: ColumnSchema, start: int, stop: int) -> ColumnRows:
        """Rows [start, stop) of an obs column."""
        return series_rows(column, self._obs[self._columns[column.name]].iloc[start:stop])

    def names(self, start: int, stop: int) -> NDArray[np.object_]:
        """Obs names of rows [start, stop)."""
        return np.asarray(self._obs.index[start:stop].astype(str), object)


# --- matrices: stored elements and arrays alike --------------------------------------------------------------------


def _length(elem: Any) -> int:
    return int(elem["values"].shape[0] if hasattr(elem, "keys") else elem.shape[0])


def _n_rows(elem: Any) -> int:
    shape = elem.attrs.get("shape", elem.attrs.get("h5sparse_shape")) if hasattr(elem, "keys") else elem.shape
    return int(shape[0])


def _check_rows(label: str, matrix: MatrixSchema, n_rows: int, n_obs: int) -> None:
    if n_rows != n_obs:
        msg = f"{label}: {matrix.name} has {n_rows:,} rows and obs has {n_obs:,}; the file is damaged, write it anew"
        raise SchemaError(msg)


def _unwrap(values: Any) -> Any:
    """The stored group behind anndata's backed sparse wrapper."""
    return values.group if isinstance(values, ad.abc.CSRDataset | ad.abc.CSCDataset) else values


def _describe_matrix(name: str, values: Any) -> MatrixSchema | None:
    """Schema of a matrix; None for an element that is no numeric matrix."""
    values = _unwrap(values)
    if hasattr(values, "keys") and hasattr(values, "attrs") and not isinstance(values, pd.DataFrame):
        return _describe_stored_sparse(name, values)
    dtype, ndim = getattr(values, "dtype", None), getattr(values, "ndim", 0)
    if isinstance(values, pd.DataFrame) or dtype is None or dtype.kind not in "biuf" or ndim != 2:  # noqa: PLR2004
        return None
    if isinstance(values, da.Array):
        return _describe_lazy(name, values)
    if sp.issparse(values):
        kind = "csc" if values.format == "csc" else "csr"
        counts = _row_counts(values)
        return MatrixSchema(name, kind, dtype.name, "int32", values.shape[1], ROW_STEP, _knots(np.cumsum(counts)))
    return MatrixSchema(name, "dense", dtype.newbyteorder("=").name, "", int(values.shape[1]))


def _row_counts(matrix: Any) -> NDArray[np.int64]:
    return np.bincount(matrix.indices, minlength=matrix.shape[0]) if matrix.format == "csc" else np.diff(matrix.tocsr().indptr)


def _knots(ends: NDArray[np.integer]) -> NDArray[np.int64]:
    """Stored values before every ROW_STEP-th row and before the end, from those up to and with each row."""
    at = np.minimum(np.arange(-(-len(ends) // ROW_STEP) + 1) * ROW_STEP, len(ends))
    return np.concatenate([[0], ends])[at].astype(np.int64)


def _describe_stored_sparse(name: str, group: Any) -> MatrixSchema | None:
    encoding = str(group.attrs.get("encoding-type", ""))
    if encoding not in ("csr_matrix", "csc_matrix"):
        return None
    n_rows, n_cols = (int(n) for n in group.attrs["shape"])
    if encoding == "csr_matrix":
        kind, ends = "csr", group["indptr"][1:]
    else:
        kind, counts = "csc", np.zeros(n_rows, np.int64)
        n = group["indices"].shape[0]
        for a in range(0, n, SLAB_NBYTES):
            counts += np.bincount(group["indices"][a : min(a + SLAB_NBYTES, n)], minlength=n_rows)
        ends = np.cumsum(counts)
    dtypes = (group["data"].dtype.newbyteorder("=").name, group["indices"].dtype.name)
    return MatrixSchema(name, kind, *dtypes, n_cols, ROW_STEP, _knots(ends))  # type: ignore[arg-type]


def _describe_lazy(name: str, values: da.Array) -> MatrixSchema:
    """A dask array; where sparse, stored values are extrapolated from its first block, which is computed."""
    meta = values._meta  # noqa: SLF001 - dask's only word on what a block will be
    n_rows, n_cols = (int(n) for n in values.shape)
    if not sp.issparse(meta) or not n_rows:
        return MatrixSchema(name, "dense" if not sp.issparse(meta) else "csr", values.dtype.name, "" if not sp.issparse(meta) else "int32", n_cols)
    first = min(n_rows, int(values.chunks[0][0]), 4096)
    nnz = values[:first].compute(scheduler="synchronous").nnz
    ends = np.ceil(np.arange(1, n_rows + 1) * (nnz / first))
    return MatrixSchema(name, "csr", values.dtype.name, "int32", n_cols, ROW_STEP, _knots(ends), exact=False)


def _matrix_rows(values: Any, matrix: MatrixSchema, start: int, stop: int) -> CsrRows | NDArray:
    values = _unwrap(values)
    if isinstance(values, da.Array):
        values = values[start:stop].compute(scheduler="synchronous")
    elif hasattr(values, "keys"):
        return _stored_csr(values, start, stop) if matrix.kind == "csr" else _csc_rows(values, start, stop)
    elif isinstance(values, h5py.Dataset):
        values = read_h5_rows(values, start, stop)
    else:
        values = values[start:stop]
    if sp.issparse(values):
        return _csr_in_memory(values.tocsr())
    return np.asarray(values).astype(matrix.dtype, copy=False)


def _csr_in_memory(rows: Any) -> CsrRows:
    bounds = rows.indptr.astype(np.int64)
    return CsrRows(bounds, lambda visit: visit(0, rows.indices), lambda visit: visit(0, rows.data))


def _stored_csr(group: Any, start: int, stop: int) -> CsrRows:
    bounds = np.asarray(group["indptr"][start : stop + 1]).astype(np.int64)
    if len(bounds) != stop - start + 1:
        msg = f"indptr ends after {start + len(bounds) - 1:,} rows and shape says at least {stop:,}; write the file anew"
        raise SchemaError(msg)
    low, high = int(bounds[0]), int(bounds[-1])
    return CsrRows(
        bounds - low,
        lambda visit: _visit(group["indices"], low, high, visit),
        lambda visit: _visit(group["data"], low, high, visit),
    )


def _visit(array: Any, start: int, stop: int, visit: Visitor) -> None:
    if isinstance(array, h5py.Dataset):
        visit_h5(array, start, stop, visit)
        return
    shards = array.shards or array.chunks
    step = max(1, shards[0], SLAB_NBYTES // array.dtype.itemsize)
    first = start // step * step
    for a in range(first, stop, step):
        lo, hi = max(a, start), min(a + step, stop)
        visit(lo - start, np.asarray(array[lo:hi]))


def _csc_rows(group: Any, start: int, stop: int) -> CsrRows:
    """Rows of a column-compressed matrix: all of it goes by, in slabs, and what lies in the rows stays."""
    indptr = np.asarray(group["indptr"][:]).astype(np.int64)
    kept: list[tuple[NDArray, NDArray, NDArray]] = []
    for a in range(0, int(indptr[-1]), SLAB_NBYTES):
        b = min(a + SLAB_NBYTES, int(indptr[-1]))
        rows, values = np.asarray(group["indices"][a:b]), np.asarray(group["data"][a:b])
        inside = np.flatnonzero((rows >= start) & (rows < stop))
        cols = (np.searchsorted(indptr, inside + a, side="right") - 1).astype(np.int32)
        kept.append((rows[inside] - start, cols, values[inside]))
    rows, cols, values = (
        (np.concatenate(x) for x in zip(*kept, strict=True)) if kept else (np.zeros(0, t) for t in ("i4", "i4", "f4"))
    )
    order = np.argsort(rows, kind="stable")
    bounds = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=stop - start))]).astype(np.int64)
    return CsrRows(bounds, lambda visit: visit(0, cols[order]), lambda visit: visit(0, values[order]))
