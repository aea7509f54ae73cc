"""scatter: read one row block, map its genes, put its rows in the order of their destination, write one spill file."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.errors import SchemaError
from annbatch_dask.etl.job import JobFile, load_job, trim_memory
from annbatch_dask.etl.rows import NAMES, all_columns, group_keys, row_hashes, sum_hashes, write_column
from annbatch_dask.kernels.rows import bounds_of, map_indices, sort_rows
from annbatch_dask.kernels.values import narrow_counts, range_of
from annbatch_dask.plan.build import Plan
from annbatch_dask.plan.dtypes import ValueRange, index_dtype, merge_ranges, signed_dtype, smallest_dtype
from annbatch_dask.plan.layout import Block
from annbatch_dask.plan.schema import ColumnSpec, MatrixSchema, MatrixSpec, SourceSchema
from annbatch_dask.storage.columns import ColumnRows
from annbatch_dask.storage.matrices import CsrRows
from annbatch_dask.storage.publish import Folder
from annbatch_dask.storage.sources import Source
from annbatch_dask.storage.spill import find_receipt, forget_receipt, is_spilled, write_receipt, write_spill

__all__ = ["PLACE", "GROUP", "hash_block", "read_block", "read_columns", "scatter", "scatter_again"]

PLACE = "#place"
"""Head array: a row's position within its part; with groupby, within its dataset."""
GROUP = "#group"
"""Head array: number of a row's group, with groupby."""

Heads = dict[str, NDArray]
Flats = dict[str, tuple[NDArray, NDArray[np.int64]]]


@dataclass
class _Rows:
    """A block's rows in the source's order, and what was noticed while reading them."""

    heads: Heads = field(default_factory=dict)
    flats: Flats = field(default_factory=dict)
    exact: dict[str, NDArray] = field(default_factory=dict)
    """Values in the source's dtype, of the arrays whose spilled form is smaller: what the fingerprint is taken of."""
    ranges: dict[str, ValueRange] = field(default_factory=dict)


def scatter(file: JobFile, index: int) -> dict[str, Any]:
    """Run one scatter task, unless it was run before.

    Returns
    -------
    The task's receipt: per dataset the rows' ``fingerprint`` and each sparse matrix's ``nnz``; ``ranges`` of values;
    ``n_rows``, ``n_bytes`` (uncompressed, read) and ``spilled`` bytes.
    """
    task = _name(index)
    if (done := find_receipt(file.scratch, task)) is not None and is_spilled(file.scratch, index, done["spilled"]):
        return done | {"reused": True}
    job = load_job(file)
    plan, block = job.plan, job.plan.blocks[index]
    source = plan.sources[block.source]
    try:
        with job.open_source(block.source) as opened:
            rows = read_block(plan, block, source, opened)
    except Exception as e:
        e.add_note(f"while reading {source.path}, rows {block.start:,} to {block.stop:,}")
        raise
    receipt = _spill(plan, block, index, rows, file.scratch)
    write_receipt(file.scratch, task, receipt)
    del rows
    trim_memory()
    return receipt


def scatter_again(file: JobFile, index: int) -> None:
    """Write anew the spill file of a task that was finished, because it was damaged since."""
    forget_receipt(file.scratch, _name(index))
    scatter(file, index)


def _name(index: int) -> str:
    return f"scatter-{index:06d}"


# --- read ----------------------------------------------------------------------------------------------------------


def read_block(plan: Plan, block: Block, source: SourceSchema, opened: Source) -> _Rows:
    """A block's rows in the form the collection has, in the source's order."""
    rows = _Rows()
    schemas = {m.name: m for m in source.matrices}
    for spec in plan.matrices:
        found = opened.matrix(schemas[spec.name], block.start, block.stop)
        gene_map = plan.gene_map(block.source, schemas[spec.name], spec)
        if spec.kind == "csr":
            csr = found if isinstance(found, CsrRows) else _dense_to_csr(found)
            _read_sparse(rows, spec, schemas[spec.name], csr, gene_map)
        else:
            _read_dense(rows, spec, np.asarray(found), gene_map)
    names = opened.names(block.start, block.stop)
    write_column(NAMES, ColumnRows(names), rows.heads, rows.flats)
    heads, flats = read_columns(plan, block, source, opened, (*plan.columns, plan.source_column))
    rows.heads |= heads
    rows.flats |= flats
    return rows


def read_columns(
    plan: Plan, block: Block, source: SourceSchema, opened: Source, columns: Sequence[ColumnSpec]
) -> tuple[Heads, Flats]:
    """Some columns of a block's rows."""
    heads: Heads = {}
    flats: Flats = {}
    for column in columns:
        tag = column.path == plan.source_column.path
        found = _read_tag(plan, block, source, opened) if tag else _read_column(column, block, source, opened)
        write_column(column, found, heads, flats)
    return heads, flats


def _read_tag(plan: Plan, block: Block, source: SourceSchema, opened: Source) -> ColumnRows:
    """The source of each row: the input itself, or what a collection's rows say of where they came from."""
    if source.tagged:
        return _read_column(plan.source_column, block, source, opened)
    categories = plan.source_column.categories
    assert categories is not None  # it always is a categorical
    code = categories.values.index(source.path)
    return ColumnRows(np.full(block.n_rows, code, signed_dtype(len(categories.values))))


def _dense_to_csr(values: NDArray) -> CsrRows:
    """A dense source among sparse ones: its non-zeros (a NaN is not zero, a negative zero is)."""
    at, cols = np.nonzero(values)
    bounds = bounds_of(np.bincount(at, minlength=len(values)))
    stored = values[at, cols]
    return CsrRows(bounds, lambda visit: visit(0, cols.astype(np.int32)), lambda visit: visit(0, stored))


def _read_sparse(
    rows: _Rows, spec: MatrixSpec, schema: MatrixSchema, csr: CsrRows, gene_map: NDArray[np.int32] | None
) -> None:
    bounds, nnz = csr.bounds, int(csr.bounds[-1])
    if gene_map is None:
        gene_map = np.arange(spec.n_cols, dtype=np.int32)
    drops = bool((gene_map < 0).any())
    target = np.dtype(np.int32) if drops else index_dtype(spec.n_cols)
    indices = _collect_indices(csr, nnz, gene_map.astype(target), n_cols=schema.n_cols)
    exact, values_range = _collect_values(csr, nnz, np.dtype(schema.dtype))
    if drops:
        keep = indices >= 0
        kept = np.add.reduceat(np.append(keep, [False]), bounds[:-1], dtype=np.int64)  # wrong for empty rows
        bounds = bounds_of(kept * (np.diff(bounds) > 0))
        indices, exact = indices[keep].astype(index_dtype(spec.n_cols)), exact[keep]
        values_range = ValueRange(*range_of(exact))
    if (np.diff(gene_map[gene_map >= 0]) < 0).any():
        order = np.empty(len(indices), np.int64)
        sort_rows(bounds, indices, order)
        indices, exact = indices[order], exact[order]
    rows.heads[f"{spec.name}#length"] = np.diff(bounds).astype(np.uint32)
    rows.flats[f"{spec.name}#indices"] = indices, bounds
    rows.flats[f"{spec.name}#values"] = exact.astype(smallest_dtype(values_range, exact.dtype), copy=False), bounds
    rows.exact[f"{spec.name}#values"] = exact
    rows.ranges[spec.name] = values_range


def _collect_indices(csr: CsrRows, nnz: int, gene_map: NDArray, *, n_cols: int) -> NDArray:
    """Column indices in the collection's gene space; each piece is mapped while it is hot in its thread's cache."""
    out = np.empty(nnz, gene_map.dtype)

    def visit(first: int, piece: NDArray) -> None:
        if not map_indices(piece, gene_map, out[first : first + len(piece)]):
            msg = (
                f"column indices run from {piece.min():,} to {piece.max():,} in a matrix of {n_cols:,} columns; "
                "write the file anew"
            )
            raise SchemaError(msg)

    csr.indices(visit)
    return out


def _collect_values(csr: CsrRows, nnz: int, dtype: np.dtype) -> tuple[NDArray, ValueRange]:
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


def _read_dense(rows: _Rows, spec: MatrixSpec, values: NDArray, gene_map: NDArray[np.int32] | None) -> None:
    values = values.astype(np.promote_types(values.dtype, spec.source_dtype), copy=False)
    if gene_map is not None and not np.array_equal(gene_map, np.arange(spec.n_cols)):
        joined = np.full((len(values), spec.n_cols), np.nan if values.dtype.kind == "f" else 0, values.dtype)
        joined[:, gene_map[gene_map >= 0]] = values[:, gene_map >= 0]
        values = joined
    found = ValueRange(*range_of(values))
    name = f"{spec.name}#dense"
    rows.heads[name] = values.astype(smallest_dtype(found, values.dtype), copy=False)
    rows.exact[name] = values
    rows.ranges[spec.name] = found


def _read_column(column: ColumnSpec, block: Block, source: SourceSchema, opened: Source) -> ColumnRows:
    """A column's rows as the collection holds them: codes mapped, dtypes promoted, gaps filled."""
    schema = next((c for c in source.columns if c.path == column.path), None)
    n = block.n_rows
    if schema is None:
        return _missing(column, n)
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
        values = np.append(schema.categories.index().to_numpy(), [fill])[found.values]
        found = ColumnRows(values.astype(object if column.kind == "string" else column.dtype), missing)
    if column.kind == "string":
        return found
    values = found.values.astype(column.dtype, copy=False)
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


# --- partition and write -------------------------------------------------------------------------------------------


def _spill(plan: Plan, block: Block, index: int, rows: _Rows, scratch: Folder) -> dict[str, Any]:
    layout = plan.layout
    dest = plan.placement.forward(np.arange(block.first, block.first + block.n_rows))
    groups = None if plan.groups is None else plan.groups.codes(group_keys(plan, rows.heads, rows.flats))
    part, place = layout.locate(dest, groups)
    order = np.argsort(part, kind="stable")
    part_rows = np.searchsorted(part[order], np.arange(layout.n_parts + 1))
    dataset_rows = part_rows[layout.first_part]
    hashes = hash_block(plan, block, rows)
    rows.exact.clear()
    heads = {PLACE: place} | ({} if groups is None else {GROUP: groups.astype(np.uint32)}) | rows.heads
    spilled = write_spill(scratch, index, order=order, rows=part_rows, heads=heads, flats=rows.flats)
    nnz = {
        m.name: np.diff(bounds_of(heads[f"{m.name}#length"][order])[dataset_rows]).tolist()
        for m in plan.matrices
        if m.kind == "csr"
    }
    ordered = hashes[order]
    pairs = zip(dataset_rows[:-1], dataset_rows[1:], strict=True)
    return {
        "n_rows": block.n_rows,
        "n_bytes": block.n_bytes,
        "spilled": spilled,
        "nnz": nnz,
        "ranges": {name: asdict(r) for name, r in rows.ranges.items()},
        "fingerprint": [f"{sum_hashes(ordered[a:b]):016x}" for a, b in pairs],
    }


def hash_block(plan: Plan, block: Block, rows: _Rows) -> NDArray[np.uint64]:
    """(n_rows,) hashes of the rows of a block."""
    heads = rows.heads | _of(rows.exact, rows.heads)
    return row_hashes(block.n_rows, plan.matrices, all_columns(plan), heads, _exact_flats(rows))


def _of(some: dict[str, NDArray], heads: Heads) -> Heads:
    return {name: values for name, values in some.items() if name in heads}


def _exact_flats(rows: _Rows) -> Flats:
    return {name: (rows.exact.get(name, values), bounds) for name, (values, bounds) in rows.flats.items()}
