"""Rows of a source as the collection has them: genes joined, categories united, gaps filled."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.errors import SchemaError
from annbatch_dask.kernels.rows import bounds_of, map_indices, slabs, sort_entries
from annbatch_dask.manifest import SRC_PATH
from annbatch_dask.plan.dtypes import is_wide, signed_dtype
from annbatch_dask.plan.layout import Block
from annbatch_dask.plan.schema import OBS, ColumnSpec, MatrixSpec, SourceSchema
from annbatch_dask.sources.columns import ColumnRows
from annbatch_dask.sources.matrices import CsrRows, Visitor
from annbatch_dask.sources.open import Source

__all__ = ["cast_exactly", "dense_to_csr", "in_gene_order", "join_dense", "map_genes", "read_column"]


def cast_exactly(values: NDArray, dtype: str | np.dtype, what: str, used: NDArray[np.bool_] | None = None) -> NDArray:
    """Values in another dtype, which must hold them: integers beyond 2**53 are no floats.

    ``used``: which of them count, as others only fill the place of missing ones.

    Raises
    ------
    SchemaError
        With the values' range, where it does not.
    """
    target = np.dtype(dtype)
    if is_wide(values.dtype.name) and target != values.dtype and values.size:
        counted = values if used is None else values[used]
        low, high = (int(counted.min()), int(counted.max())) if counted.size else (0, 0)
        least, most = (-(2**53), 2**53) if target.kind == "f" else (np.iinfo(target).min, np.iinfo(target).max)
        if low < least or high > most:
            msg = (
                f"{what} holds whole numbers from {low:,} to {high:,}, which {target.name} cannot hold exactly, and "
                "other inputs make it that; make them one kind in load_adata, or leave it out with elements"
            )
            raise SchemaError(msg)
    return values.astype(target, copy=False)


_STEP = 2**20
"""About so many values are worked on at a time: what stands beside the rows themselves stays small."""


def dense_to_csr(values: NDArray) -> CsrRows:
    """A dense source among sparse ones: its non-zeros (a NaN is not zero, a negative zero is), some rows at a time."""
    step = max(1, _STEP // max(1, values.shape[1]))
    pieces = [values[a : a + step] for a in range(0, len(values), step)]
    bounds = bounds_of(np.concatenate([np.zeros(0, np.int64), *(np.count_nonzero(p, axis=1) for p in pieces)]))
    firsts = bounds[::step].tolist()

    def indices(visit: Visitor) -> None:
        for first, piece in zip(firsts, pieces, strict=False):
            visit(first, np.nonzero(piece)[1].astype(np.int32))

    def stored(visit: Visitor) -> None:
        for first, piece in zip(firsts, pieces, strict=False):
            visit(first, piece[piece != 0])

    return CsrRows(bounds, indices, stored)


def map_genes(csr: CsrRows, gene_map: NDArray, *, n_cols: int) -> NDArray:
    """Column indices in the collection's gene space; each piece is mapped while it is hot in its thread's cache.

    Raises
    ------
    SchemaError
        For an index outside the ``n_cols`` columns of the source.
    """
    out = np.empty(int(csr.bounds[-1]), gene_map.dtype)

    def visit(first: int, piece: NDArray) -> None:
        if not map_indices(piece, gene_map, out[first : first + len(piece)]):
            msg = (
                f"column indices run from {piece.min():,} to {piece.max():,} in a matrix of {n_cols:,} columns; "
                "write the file anew"
            )
            raise SchemaError(msg)

    csr.indices(visit)
    return out


def in_gene_order(
    bounds: NDArray[np.int64], indices: NDArray, values: NDArray, gene_map: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray, NDArray]:
    """Mapped rows without the genes that are left out (-1), each in the order of its genes.

    ``indices`` and ``values`` are changed in place: the rows may be all that fits into memory.
    """
    if (gene_map < 0).any():
        n_before = np.zeros(len(bounds), np.int64)
        n_kept = 0
        for a, b in slabs(bounds, _STEP):
            at = slice(int(bounds[a]), int(bounds[b]))
            keep = indices[at] >= 0
            n_before[a + 1 : b + 1] = n_kept + bounds_of(keep)[bounds[a + 1 : b + 1] - bounds[a]]
            kept = slice(n_kept, int(n_before[b]))
            indices[kept], values[kept] = indices[at][keep], values[at][keep]
            n_kept = kept.stop
        bounds, indices, values = n_before, indices[:n_kept], values[:n_kept]
    if (np.diff(gene_map[gene_map >= 0]) < 0).any():
        sort_entries(bounds, indices, values)
    return bounds, indices, values


def join_dense(values: NDArray, spec: MatrixSpec, gene_map: NDArray[np.int32] | None) -> NDArray:
    """Dense rows on the collection's genes, in a dtype that holds all sources' values; NaN where a gene is absent."""
    dtype = np.dtype(spec.source_dtype)
    if gene_map is None or np.array_equal(gene_map, np.arange(spec.n_cols)):
        return cast_exactly(values, dtype, spec.name)
    joined = np.full((len(values), spec.n_cols), np.nan if dtype.kind == "f" else 0, dtype)
    to, of = gene_map[gene_map >= 0], np.flatnonzero(gene_map >= 0)
    step = max(1, _STEP // max(1, values.shape[1]))
    for a in range(0, len(values), step):
        joined[a : a + step, to] = cast_exactly(values[a : a + step], dtype, spec.name)[:, of]
    return joined


def read_column(column: ColumnSpec, block: Block, source: SourceSchema, opened: Source) -> ColumnRows:
    """A block's rows of a column: codes mapped, dtypes promoted, gaps filled."""
    if column.path == f"{OBS}/{SRC_PATH}" and not source.tagged:
        assert column.categories is not None  # it always is a categorical
        code = column.categories.values.index(source.path)
        return ColumnRows(np.full(block.n_rows, code, signed_dtype(len(column.categories.values))))
    schema = next((c for c in source.columns if c.path == column.path), None)
    if schema is None:
        return _missing(column, block.n_rows)
    found = opened.column(schema, block.start, block.stop)
    if column.categories is not None:
        code_map = column.code_maps[block.source]
        assert code_map is not None  # the source has the column, and it is categorical
        dtype = signed_dtype(len(column.categories.values))
        mapped = np.append(code_map, -1)[found.values]  # code -1 takes the last entry
        return ColumnRows(mapped.astype(dtype))
    if schema.categories is not None:  # a categorical that becomes plain because another file has it plain
        missing = found.values < 0
        fill = "" if column.kind == "string" else 0
        known = schema.categories.index().to_numpy()
        known = known if column.kind == "string" else cast_exactly(known, column.dtype, f"column {column.path}")
        values = np.append(known, np.asarray([fill], known.dtype))[found.values]
        found = ColumnRows(values.astype(object if column.kind == "string" else column.dtype), missing)
    if column.kind == "string":
        return found
    used = None if found.mask is None else ~found.mask
    values = cast_exactly(found.values, column.dtype, f"column {column.path}", used)
    if found.mask is not None:
        masked = np.asarray(np.nan if values.dtype.kind == "f" else 0, values.dtype)
        values = np.where(found.mask, masked, values)
    return ColumnRows(values, found.mask)


def _missing(column: ColumnSpec, n: int) -> ColumnRows:
    if column.categories is not None:
        return ColumnRows(np.full(n, -1, signed_dtype(len(column.categories.values))))
    if column.kind == "string":
        return ColumnRows(np.full(n, "", object), np.ones(n, bool))
    if column.nullable:
        return ColumnRows(np.zeros(n, column.dtype), np.ones(n, bool))
    return ColumnRows(np.full(n, np.nan, column.dtype))
