"""An AnnData object as a source: in memory, backed or lazy."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import anndata as ad
import dask.array as da
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr
from numpy.typing import NDArray

from annbatch_dask.plan.schema import ColumnSchema, MatrixSchema, SourceSchema
from annbatch_dask.storage.columns import ColumnRows, describe_series, series_rows
from annbatch_dask.storage.groups import PAIRED
from annbatch_dask.storage.matrices import ROW_STEP, CsrRows, describe_matrix, knots, matrix_rows

__all__ = ["AnnDataSource", "read_legacy"]


def read_legacy(item: Any) -> ad.AnnData:
    """A file of an old format, in memory: anndata knows them all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the format is old is known, and the file is not ours to mend
        return ad.read_h5ad(os.fspath(item)) if not isinstance(item, zarr.Group) else ad.io.read_zarr(item)


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
            described = _describe(name, values)
            if described is None:
                left_out.append(name)
            else:
                matrices.append(described)
        left_out += ["raw"] if adata.raw is not None else []
        left_out += [k for k in PAIRED if len(getattr(adata, k))]
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
            for name in sorted(k for k in mapping if k is not None):  # anndata 0.13 lists X as layer None
                yield f"{kind}/{name}", mapping[name]

    def var(self) -> pd.DataFrame:
        """Its var frame."""
        var = self._adata.var
        return var if isinstance(var, pd.DataFrame) else var.to_memory()

    def matrix(self, matrix: MatrixSchema, start: int, stop: int) -> CsrRows | NDArray:
        """Rows [start, stop) of a matrix: dense ones as an array."""
        kind, _, key = matrix.name.partition("/")
        values = getattr(self._adata, kind)[key] if key else self._adata.X
        values = _unwrap(values)
        if not isinstance(values, da.Array):
            return matrix_rows(values, matrix, start, stop)
        block = values[start:stop].compute(scheduler="synchronous")  # within a task: its thread does the work
        return matrix_rows(block, matrix, 0, stop - start)

    def column(self, column: ColumnSchema, start: int, stop: int) -> ColumnRows:
        """Rows [start, stop) of an obs column."""
        return series_rows(column, self._obs[self._columns[column.name]].iloc[start:stop])

    def names(self, start: int, stop: int) -> NDArray[np.object_]:
        """Obs names of rows [start, stop)."""
        return np.asarray(self._obs.index[start:stop].astype(str), object)


def _unwrap(values: Any) -> Any:
    """The stored group behind anndata's backed sparse wrapper."""
    return values.group if isinstance(values, ad.abc.CSRDataset | ad.abc.CSCDataset) else values


def _describe(name: str, values: Any) -> MatrixSchema | None:
    values = _unwrap(values)
    return _describe_lazy(name, values) if isinstance(values, da.Array) else describe_matrix(name, values)


def _describe_lazy(name: str, values: da.Array) -> MatrixSchema | None:
    """A dask array; where sparse, stored values are extrapolated from its first block, which is computed."""
    if values.dtype.kind not in "biuf" or values.ndim != 2:  # noqa: PLR2004
        return None
    n_rows, n_cols = (int(n) for n in values.shape)
    if not n_rows or not sp.issparse(values._meta):  # noqa: SLF001 - dask's only word on what a block will be
        return MatrixSchema(name, "dense", values.dtype.name, "", n_cols)
    first = min(n_rows, int(values.chunks[0][0]), 4096)
    nnz = values[:first].compute(scheduler="synchronous").nnz
    ends = np.ceil(np.arange(1, n_rows + 1) * (nnz / first))
    return MatrixSchema(name, "csr", values.dtype.name, "int32", n_cols, ROW_STEP, knots(ends), exact=False)
