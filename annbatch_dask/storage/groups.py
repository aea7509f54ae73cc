"""A file in anndata's format, HDF5 or zarr. Needs no anndata, whose import is slow, but to read var."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annbatch_dask.plan.schema import ColumnSchema, MatrixSchema, SourceSchema
from annbatch_dask.storage.columns import ColumnRows, describe_elem, elem_rows
from annbatch_dask.storage.matrices import CsrRows, check_rows, describe_matrix, matrix_rows, n_rows_of

__all__ = ["PAIRED", "GroupSource", "is_current"]

PAIRED = ("varm", "obsp", "varp", "uns")
"""Elements that are not row-aligned, or with both axes: left out."""


def is_current(group: Any) -> bool:
    """Written by anndata 0.7 or later: frames are groups and categories stand with their column."""
    frames = [group["obs"], group["var"]]
    return all(not hasattr(f, "dtype") and "__categories" not in f and "_index" in f.attrs for f in frames)


def _length(elem: Any) -> int:
    return int(elem["values"].shape[0] if hasattr(elem, "keys") else elem.shape[0])


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
            described = describe_matrix(name, elem)
            if described is None:
                left_out.append(name)
            else:
                check_rows(self._label, described, n_rows_of(elem), n_obs)
                matrices.append(described)
        left_out += [k for k in ("raw", *PAIRED) if not self._is_absent(k)]
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

    def _is_absent(self, key: str) -> bool:
        """Not there, stored as anndata's "null", or a group of nothing."""
        if key not in self._group or self._group[key].attrs.get("encoding-type") == "null":
            return True
        return hasattr(self._group[key], "keys") and not len(self._group[key])

    def _matrix_elems(self) -> Iterator[tuple[str, Any]]:
        if not self._is_absent("X"):
            yield "X", self._group["X"]
        for kind in ("layers", "obsm"):
            for name in sorted(() if self._is_absent(kind) else self._group[kind]):
                yield f"{kind}/{name}", self._group[kind][name]

    def var_names(self) -> NDArray[np.object_]:
        """Gene names."""
        var = self._group["var"]
        index = var[str(var.attrs["_index"])]
        names = elem_rows(ColumnSchema("", "string"), index, 0, _length(index)).values
        return names.astype(str).astype(object)

    def var(self) -> pd.DataFrame:
        """Its var frame."""
        from anndata.io import read_elem  # see the module's first line

        frame: pd.DataFrame = read_elem(self._group["var"])
        return frame

    def matrix(self, matrix: MatrixSchema, start: int, stop: int) -> CsrRows | NDArray:
        """Rows [start, stop) of a matrix: dense ones as an array."""
        return matrix_rows(self._group[matrix.name], matrix, start, stop)

    def column(self, column: ColumnSchema, start: int, stop: int) -> ColumnRows:
        """Rows [start, stop) of an obs column."""
        return elem_rows(column, self._group["obs"][column.name], start, stop)

    def names(self, start: int, stop: int) -> NDArray[np.object_]:
        """Obs names of rows [start, stop)."""
        obs = self._group["obs"]
        column = ColumnSchema("", "string")
        rows = elem_rows(column, obs[str(obs.attrs["_index"])], start, stop).values
        return rows if rows.dtype == object else rows.astype(str).astype(object)
