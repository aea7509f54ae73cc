"""Rows of a source as the collection has them: genes joined, categories united, gaps filled."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.errors import SchemaError
from annbatch_dask.etl.rows import NAMES, FixedArrays, RaggedArrays, all_columns, array_name, row_hashes, write_column
from annbatch_dask.etl.sums import add_met, added_columns, meets
from annbatch_dask.kernels.rows import map_indices, names_twice, offsets_of, slabs, sort_entries
from annbatch_dask.kernels.values import narrow_counts, range_of
from annbatch_dask.manifest import SRC_PATH
from annbatch_dask.plan.dtypes import ValueRange, index_dtype, is_wide, merge_ranges, signed_dtype, smallest_dtype
from annbatch_dask.plan.layout import Block
from annbatch_dask.plan.plan import Plan
from annbatch_dask.plan.schema import OBS, ColumnSpec, MatrixSchema, MatrixSpec, SourceSchema
from annbatch_dask.sources.columns import ColumnRows
from annbatch_dask.sources.matrices import CsrRows, Visitor
from annbatch_dask.sources.open import Source

__all__ = [
    "BlockRows",
    "cast_exactly",
    "collect_values",
    "dense_to_csr",
    "exact_rows",
    "hash_block",
    "in_gene_order",
    "join_dense",
    "map_genes",
    "read_block",
    "read_column",
    "read_columns",
]

_STRINGS_NBYTES = 2**23
"""Of the strings that are read at a time, about, as Python holds them."""


@dataclass
class BlockRows:
    """A block's rows in the source's order, and what was noticed while reading them."""

    fixed: FixedArrays = field(default_factory=dict)
    ragged: RaggedArrays = field(default_factory=dict)
    exact: dict[str, NDArray] = field(default_factory=dict)
    """Values in the source's dtype, of the arrays whose spilled form is smaller: what the fingerprint is taken of."""
    ranges: dict[str, ValueRange] = field(default_factory=dict)


def read_block(plan: Plan, block: Block, source: SourceSchema, opened: Source) -> BlockRows:
    """A block's rows in the form the collection has, in the source's order."""
    rows = BlockRows()
    schemas = {m.name: m for m in source.matrices}
    for spec in plan.matrices:
        schema = schemas[spec.name]
        read = partial(_read_sparse, is_ours=source.is_dataset) if spec.kind == "csr" else _read_dense
        gene_map = plan.gene_map(block.source, schema, spec)
        read(rows, spec, schema, opened.matrix(schema, block.start, block.stop), gene_map)
    _write_strings(
        NAMES, lambda a, b: ColumnRows(opened.names(a, b)), block, source.name_width, rows.fixed, rows.ragged
    )
    fixed, ragged = read_columns(plan, block, source, opened, (*plan.columns, plan.source_column))
    rows.fixed |= fixed
    rows.ragged |= ragged
    return rows


def read_columns(
    plan: Plan, block: Block, source: SourceSchema, opened: Source, columns: Sequence[ColumnSpec]
) -> tuple[FixedArrays, RaggedArrays]:
    """Some columns of a block's rows."""
    fixed: FixedArrays = {}
    ragged: RaggedArrays = {}
    widths = {c.path: c.width for c in source.columns}
    for column in columns:
        if column.kind == "string":
            read = partial(_read_rows, column, block, source, opened)
            _write_strings(column, read, block, widths.get(column.path, 0), fixed, ragged)
        else:
            write_column(column, read_column(column, block, source, opened), fixed, ragged)
    return fixed, ragged


def _read_rows(column: ColumnSpec, block: Block, source: SourceSchema, opened: Source, a: int, b: int) -> ColumnRows:
    return read_column(column, replace(block, start=a, stop=b), source, opened)


def _write_strings(
    spec: ColumnSpec,
    read: Callable[[int, int], ColumnRows],
    block: Block,
    width: int,
    fixed: FixedArrays,
    ragged: RaggedArrays,
) -> None:
    """Add a column of strings, some rows at a time: as Python has them, they take several times the bytes they have."""
    step = max(1, _STRINGS_NBYTES // (2 * width + 100))
    pieces: list[tuple[FixedArrays, RaggedArrays]] = []
    for a in range(block.start, block.stop, step):
        pieces.append(({}, {}))
        write_column(spec, read(a, min(a + step, block.stop)), *pieces[-1])
    for name in pieces[0][0]:
        fixed[name] = np.concatenate([h[name] for h, _ in pieces])
    for name in pieces[0][1]:
        ragged[name] = (
            np.concatenate([f[name][0] for _, f in pieces]),
            offsets_of(fixed[array_name(spec.path, "length")]),
        )


def _read_sparse(
    rows: BlockRows,
    spec: MatrixSpec,
    schema: MatrixSchema,
    found: CsrRows | NDArray,
    gene_map: NDArray[np.int32] | None,
    *,
    is_ours: bool,
) -> None:
    csr = found if isinstance(found, CsrRows) else dense_to_csr(found)
    del found
    offsets, nnz = csr.offsets, int(csr.offsets[-1])
    if gene_map is None:
        gene_map = np.arange(spec.n_cols, dtype=np.int32)
    drops = bool((gene_map < 0).any())
    target = np.dtype(np.int32) if drops else index_dtype(spec.n_cols)
    indices = map_genes(csr, gene_map.astype(target), n_cols=schema.n_cols)
    exact, values_range = collect_values(csr, nnz, np.dtype(schema.dtype))
    del csr  # and with it what it was made of
    offsets, indices, exact = in_gene_order(offsets, indices, exact, gene_map)
    met = meets(gene_map)
    twice = not (met or is_ours) and names_twice(offsets, indices, spec.n_cols)  # files of ours stay as they are
    if twice:
        sort_entries(offsets, indices, exact)
    if met or twice:
        offsets, indices, exact = add_met(offsets, indices, exact, spec, are_genes=met)
    if drops:
        indices = indices.astype(index_dtype(spec.n_cols))
    if drops or met or twice:
        values_range = ValueRange(*range_of(exact))
    rows.fixed[array_name(spec.name, "length")] = np.diff(offsets).astype(np.uint32)
    rows.ragged[array_name(spec.name, "indices")] = indices, offsets
    rows.ragged[array_name(spec.name, "values")] = (
        exact.astype(smallest_dtype(values_range, exact.dtype), copy=False),
        offsets,
    )
    rows.exact[array_name(spec.name, "values")] = exact
    rows.ranges[spec.name] = values_range


def collect_values(csr: CsrRows, nnz: int, dtype: np.dtype) -> tuple[NDArray, ValueRange]:
    """Stored values in a dtype that holds them exactly, and their range: uint16 at once where they are counts."""
    if dtype in (np.float32, np.float64) and (counts := _collect_counts(csr, nnz, dtype)) is not None:
        return counts
    out = np.empty(nnz, dtype)
    ranges: list[ValueRange] = []
    lock = threading.Lock()

    def visit(first: int, piece: NDArray) -> None:
        out[first : first + len(piece)] = piece
        found = ValueRange(*range_of(out[first : first + len(piece)]))
        with lock:
            ranges.append(found)

    csr.values(visit)
    return out, merge_ranges(ranges)


class _NotCountsError(Exception):
    """Some value is no whole number in [0, 65535]."""


def _collect_counts(csr: CsrRows, nnz: int, dtype: np.dtype) -> tuple[NDArray[np.uint16], ValueRange] | None:
    """Values narrowed while each piece is hot in its thread's cache; None, soon, where they are no counts."""
    out = np.empty(nnz, np.uint16)
    greatest: list[int] = [0]

    def visit(first: int, piece: NDArray) -> None:
        piece = np.ascontiguousarray(piece, dtype)
        fits, high = narrow_counts(piece, piece.view(f"u{dtype.itemsize}"), out[first : first + len(piece)])
        if not fits:
            raise _NotCountsError
        greatest.append(int(high))

    try:
        csr.values(visit)
    except _NotCountsError:
        return None
    return out, ValueRange(integral=True, low=0, high=max(greatest), single=True)


def _read_dense(
    rows: BlockRows,
    spec: MatrixSpec,
    schema: MatrixSchema,
    found: CsrRows | NDArray,
    gene_map: NDArray[np.int32] | None,
) -> None:
    assert isinstance(found, np.ndarray), schema  # a collection's matrix is dense where all sources' are
    values = join_dense(found, spec, gene_map)
    del found
    step = max(1, 2**20 // max(1, spec.n_cols))
    pieces = (values[a : a + step] for a in range(0, len(values), step))
    values_range = merge_ranges(ValueRange(*range_of(p)) for p in pieces)
    name = array_name(spec.name, "dense")
    rows.fixed[name] = values.astype(smallest_dtype(values_range, values.dtype), copy=False)
    rows.exact[name] = values
    rows.ranges[spec.name] = values_range


def hash_block(
    plan: Plan, block: Block, rows: BlockRows, *, of_x: NDArray[np.uint64] | None = None
) -> NDArray[np.uint64]:
    """(n_rows,) hashes of the rows of a block; ``of_x`` as for :func:`annbatch_dask.etl.rows.row_hashes`."""
    return row_hashes(block.n_rows, plan.matrices, all_columns(plan), *exact_rows(rows), of_x=of_x)


def exact_rows(rows: BlockRows) -> tuple[FixedArrays, RaggedArrays]:
    """A block's rows, of which the values have the dtype of the source."""
    return rows.fixed | _of(rows.exact, rows.fixed), _exact_ragged(rows)


def _of(some: dict[str, NDArray], fixed: FixedArrays) -> FixedArrays:
    return {name: values for name, values in some.items() if name in fixed}


def _exact_ragged(rows: BlockRows) -> RaggedArrays:
    return {name: (rows.exact.get(name, values), offsets) for name, (values, offsets) in rows.ragged.items()}


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
    offsets = offsets_of(np.concatenate([np.zeros(0, np.int64), *(np.count_nonzero(p, axis=1) for p in pieces)]))
    firsts = offsets[::step].tolist()

    def indices(visit: Visitor) -> None:
        for first, piece in zip(firsts, pieces, strict=False):
            visit(first, np.nonzero(piece)[1].astype(np.int32))

    def stored(visit: Visitor) -> None:
        for first, piece in zip(firsts, pieces, strict=False):
            visit(first, piece[piece != 0])

    return CsrRows(offsets, indices, stored)


def map_genes(csr: CsrRows, gene_map: NDArray, *, n_cols: int) -> NDArray:
    """Column indices in the collection's gene space; each piece is mapped while it is hot in its thread's cache.

    Raises
    ------
    SchemaError
        For an index outside the ``n_cols`` columns of the source.
    """
    out = np.empty(int(csr.offsets[-1]), gene_map.dtype)

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
    offsets: NDArray[np.int64], indices: NDArray, values: NDArray, gene_map: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray, NDArray]:
    """Mapped rows without the genes that are left out (-1), each in the order of its genes.

    ``indices`` and ``values`` are changed in place: the rows may be all that fits into memory.
    """
    if (gene_map < 0).any():
        n_before = np.zeros(len(offsets), np.int64)
        n_kept = 0
        for a, b in slabs(offsets, _STEP):
            at = slice(int(offsets[a]), int(offsets[b]))
            keep = indices[at] >= 0
            n_before[a + 1 : b + 1] = n_kept + offsets_of(keep)[offsets[a + 1 : b + 1] - offsets[a]]
            kept = slice(n_kept, int(n_before[b]))
            indices[kept], values[kept] = indices[at][keep], values[at][keep]
            n_kept = kept.stop
        offsets, indices, values = n_before, indices[:n_kept], values[:n_kept]
    if (np.diff(gene_map[gene_map >= 0]) <= 0).any():  # equal ones, too, need not stand together in a row
        sort_entries(offsets, indices, values)
    return offsets, indices, values


def join_dense(values: NDArray, spec: MatrixSpec, gene_map: NDArray[np.int32] | None) -> NDArray:
    """Dense rows on the collection's genes, in a dtype that holds all sources' values; NaN where a gene is absent.

    Values of genes that become one are added up.
    """
    dtype = np.dtype(spec.source_dtype)
    if gene_map is None or np.array_equal(gene_map, np.arange(spec.n_cols)):
        return cast_exactly(values, dtype, spec.name)
    joined = np.full((len(values), spec.n_cols), np.nan if dtype.kind == "f" else 0, dtype)
    to, of = gene_map[gene_map >= 0], np.flatnonzero(gene_map >= 0)
    met = np.flatnonzero(np.bincount(to, minlength=1) > 1)
    step = max(1, _STEP // max(1, values.shape[1]))
    for a in range(0, len(values), step):
        joined[a : a + step, to] = cast_exactly(values[a : a + step], dtype, spec.name)[:, of]
        for gene in met:
            joined[a : a + step, gene] = added_columns(values[a : a + step][:, of[to == gene]], spec)
    return joined


def read_column(column: ColumnSpec, block: Block, source: SourceSchema, opened: Source) -> ColumnRows:
    """A block's rows of a column: codes mapped, dtypes promoted, gaps filled."""
    if column.path == f"{OBS}/{SRC_PATH}" and not source.is_dataset:
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
