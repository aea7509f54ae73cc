"""A file in anndata's format, HDF5 or zarr. Needs no anndata, whose import is slow, but to read var."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annbatch_dask.errors import SchemaError
from annbatch_dask.manifest import STATS
from annbatch_dask.plan.schema import OBS, ColumnSchema, Genes, MatrixSchema, SourceSchema
from annbatch_dask.sources.columns import ColumnRows, describe_elem, elem_rows, mean_width, names_of_column, to_pandas
from annbatch_dask.sources.matrices import (
    CsrRows,
    are_whole,
    check_rows,
    columnless,
    describe_matrix,
    matrix_rows,
    n_rows_of,
)
from annbatch_dask.sources.picked import pick_rows
from annbatch_dask.storage.frames import n_rows

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["GENE_WISE", "PAIRED", "GroupSource", "is_current", "no_cells"]

PAIRED = ("varm", "obsp", "varp", "uns")
"""Mappings that are not row-aligned, or with both axes."""
GENE_WISE = ("var", "varm", "varp", "uns")
"""What does not depend on which cells there are."""


def is_current(group: Any) -> bool:
    """Written by anndata 0.7 or later: frames are groups."""
    return all(not hasattr(f, "dtype") and "_index" in f.attrs for f in (group["obs"], group["var"]))


def no_cells(
    var: pd.DataFrame, *, varm: Any = None, varp: Any = None, uns: Any = None, raw_var: pd.DataFrame | None = None
) -> AnnData:
    """An AnnData of no cells."""
    import anndata as ad

    obs = pd.DataFrame(index=pd.Index([], dtype=object))
    out = ad.AnnData(obs=obs, var=var, varm=varm, varp=varp, uns=uns)
    if raw_var is not None:
        out.raw = ad.AnnData(X=np.zeros((0, len(raw_var)), np.float32), obs=obs, var=raw_var)
    return out


class GroupSource:
    """A file in anndata's format, HDF5 or zarr; reads only what it is asked for."""

    def __init__(self, label: str, group: Any) -> None:
        self._label, self._group = label, group

    @property
    def n_obs(self) -> int:
        """Rows."""
        return n_rows(self._group["obs"])

    @property
    def attributes(self) -> Mapping[str, Any]:
        """Attributes of its group."""
        attributes: Mapping[str, Any] = self._group.attrs
        return attributes

    def obs_columns(self) -> tuple[ColumnSchema, ...]:
        """Columns of obs, without looking at their values."""
        return tuple(self._columns(OBS, metadata_only=True))

    def schema(self, *, metadata_only: bool = False, rows: NDArray[np.bool_] | None = None) -> SourceSchema:
        """Schema of the input. With ``metadata_only``, no matrix value is read; stored values per row are guessed.

        ``rows``, (n_obs,): the stored values that are counted are those of the rows of which it is true.
        """
        obs = self._group["obs"]
        index, n_obs = str(obs.attrs["_index"]), n_rows(obs)
        columns = self._columns(OBS, metadata_only=metadata_only)
        matrices: list[MatrixSchema] = []
        unsupported = [f"{OBS}/{c}" for c in self._unsupported_columns(OBS)]
        if self._is_absent("X") and not n_rows(self._group["var"]):
            matrices += filter(None, [describe_matrix("X", columnless(n_obs))])
        for name, genes, elem in self._matrix_elems():
            if elem.attrs.get("encoding-type") == "dataframe":
                columns += self._columns(name, metadata_only=metadata_only)
                unsupported += [f"{name}/{c}" for c in self._unsupported_columns(name)]
                continue
            described = describe_matrix(name, elem, metadata_only=metadata_only, rows=rows)
            if described is None:
                unsupported.append(name)
            else:
                check_rows(self._label, name, n_rows_of(elem), n_obs)
                integral = are_whole(elem) if genes and not metadata_only else None
                matrices.append(replace(described, genes=genes, integral=integral))
        return SourceSchema(
            path=self._label,
            n_obs=n_obs,
            var_names=self._gene_names("var"),
            matrices=tuple(matrices),
            columns=tuple(columns),
            index_name=None if index == "_index" else index,
            left_out=tuple(f"{k}/{name}" for k in PAIRED if not self._is_absent(k) for name in sorted(self._group[k])),
            unsupported=tuple(unsupported),
            raw_names=self._gene_names("raw/var") if self._has_raw() else None,
            name_width=0 if metadata_only else mean_width(self.names, n_obs),
        )

    def _is_absent(self, key: str) -> bool:
        """Not there, stored as anndata's "null", or a group of nothing."""
        if key not in self._group or self._group[key].attrs.get("encoding-type") == "null":
            return True
        return hasattr(self._group[key], "keys") and not len(self._group[key])

    def _has_raw(self) -> bool:
        return not self._is_absent("raw") and "X" in self._group["raw"]

    def _matrix_elems(self) -> Iterator[tuple[str, Genes, Any]]:
        """Name, what the columns are, and the element."""
        if not self._is_absent("X"):
            yield "X", "var", self._group["X"]
        if self._has_raw():
            yield "raw/X", "raw", self._group["raw/X"]
        for kind, genes in (("layers", "var"), ("obsm", "")):
            for name in sorted(() if self._is_absent(kind) else self._group[kind]):
                yield f"{kind}/{name}", genes, self._group[kind][name]  # type: ignore[misc]

    def _element(self, name: str) -> Any:
        is_missing = name == "X" and self._is_absent("X")
        return columnless(n_rows(self._group["obs"])) if is_missing else self._group[name]

    def _columns(self, frame: str, *, metadata_only: bool) -> list[ColumnSchema]:
        found = self._described(frame, metadata_only=metadata_only).values()
        return [replace(c, frame=frame) for c in found if c is not None]

    def _unsupported_columns(self, frame: str) -> list[str]:
        return [name for name, c in self._described(frame).items() if c is None]

    def _described(self, frame: str, *, metadata_only: bool = True) -> dict[str, ColumnSchema | None]:
        group = self._group[frame]
        beside = group["__categories"] if "__categories" in group else {}
        names = list(map(str, group.attrs["column-order"]))
        if not metadata_only:
            self._check_lengths(frame, names)
        return {
            c: describe_elem(c, group[c], beside[c] if c in beside else None, metadata_only=metadata_only)
            for c in names
        }

    def _check_lengths(self, frame: str, names: list[str]) -> None:
        """Refuse columns that have not a value for each cell."""
        for name in names:
            elem = self._group[frame][name]
            parts = [elem[k] for k in ("codes", "values", "mask") if k in elem] if hasattr(elem, "keys") else [elem]
            for part in parts:
                check_rows(self._label, f"{frame}/{name}", part.shape[0] if part.ndim else 1, self.n_obs)
        check_rows(self._label, frame, n_rows(self._group[frame]), self.n_obs)

    def _gene_names(self, frame: str) -> NDArray[np.object_]:
        var = self._group[frame]
        index = var[str(var.attrs["_index"])]
        names = elem_rows(ColumnSchema("", "string"), index, 0, n_rows(var)).values
        return names.astype(str).astype(object)

    def gene_column(self, frame: str, name: str) -> NDArray[np.object_] | None:
        """Values of a column of ``"var"`` or ``"raw/var"`` as names, None where missing; None if there is none."""
        group = self._group[frame]
        if name not in map(str, group.attrs["column-order"]):
            return None
        column = self._described(frame)[name]
        if column is None:
            msg = f"{self._label}: {frame} column {name!r} is of a kind that cannot be read; convert it in load_adata"
            raise SchemaError(msg)
        return names_of_column(column, elem_rows(column, group[name], 0, n_rows(group)))

    def gene_values(self, frame: str, name: str) -> NDArray | None:
        """Values of a column of ``"var"`` or ``"raw/var"`` as they are; None if there is none."""
        found = self._described(frame).get(name)
        if found is None:
            return None
        rows = elem_rows(found, self._group[frame][name], 0, n_rows(self._group[frame]))
        return np.asarray(to_pandas(found, rows.values, rows.mask))

    def annotations(self) -> AnnData:
        """Annotations of genes and of the input: an AnnData without cells, with var, varm, varp, uns and raw.var."""
        import anndata as ad  # see the module's first line

        found = {k: ad.io.read_elem(self._group[k]) for k in GENE_WISE if not self._is_absent(k) and k != "uns"}
        if not self._is_absent("uns"):  # statistics of a dataset may be large, and are not carried on
            uns = self._group["uns"]
            found["uns"] = {k: ad.io.read_elem(uns[k]) for k in uns if k != STATS}
        raw = ad.io.read_elem(self._group["raw/var"]) if self._has_raw() else None
        return no_cells(**found, raw_var=raw)

    def matrix(self, matrix: MatrixSchema, start: int, stop: int) -> CsrRows | NDArray:
        """Rows [start, stop) of a matrix: dense ones as an array."""
        return matrix_rows(self._element(matrix.source_name), matrix, start, stop)

    def stored(self, matrix: MatrixSchema) -> Any:
        """A matrix as it is stored: an array, or the group of a sparse one."""
        return self._element(matrix.source_name)

    def picked(self, matrix: MatrixSchema, rows: NDArray[np.int64]) -> CsrRows | NDArray:
        """Rows of a matrix by their numbers, ascending."""
        return pick_rows(self._element(matrix.source_name), matrix, rows)

    def column(self, column: ColumnSchema, start: int, stop: int) -> ColumnRows:
        """Rows [start, stop) of a column."""
        return elem_rows(column, self._group[column.frame][column.source_name], start, stop)

    def names(self, start: int, stop: int) -> NDArray[np.object_]:
        """Obs names of rows [start, stop)."""
        obs = self._group["obs"]
        column = ColumnSchema("", "string")
        rows = elem_rows(column, obs[str(obs.attrs["_index"])], start, stop).values
        return rows if rows.dtype == object else rows.astype(str).astype(object)
