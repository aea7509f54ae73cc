"""scatter: read one row block, map its genes, put its rows in the order of their destination, write one spill file."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.etl.blocks import dense_to_csr, in_gene_order, join_dense, map_genes, read_column
from annbatch_dask.etl.job import JobFile, load_job, trim_memory
from annbatch_dask.etl.rows import NAMES, all_columns, group_keys, head, row_hashes, sum_hashes, write_column
from annbatch_dask.etl.totals import packed
from annbatch_dask.kernels.rows import bounds_of
from annbatch_dask.kernels.values import narrow_counts, range_of
from annbatch_dask.plan.dtypes import ValueRange, index_dtype, merge_ranges, smallest_dtype
from annbatch_dask.plan.layout import Block
from annbatch_dask.plan.plan import Plan
from annbatch_dask.plan.schema import ColumnSpec, MatrixSchema, MatrixSpec, SourceSchema
from annbatch_dask.sources.columns import ColumnRows
from annbatch_dask.sources.identity import unchanged
from annbatch_dask.sources.matrices import CsrRows
from annbatch_dask.sources.open import Source
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.spill import find_receipt, forget_receipt, is_spilled, write_receipt, write_spill

__all__ = ["GROUP", "PLACE", "forget_task", "hash_block", "read_block", "read_columns", "scatter", "scatter_again"]

PLACE = "#place"
"""Head array: a row's position within its part; with groupby, within its dataset."""
GROUP = "#group"
"""Head array: number of a row's group, with groupby."""
_STRINGS_NBYTES = 2**23
"""Of the strings that are read at a time, about, as Python holds them."""

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
    The task's receipt: the rows' ``fingerprint`` and each sparse matrix's ``nnz``, also of each dataset, see
    :class:`annbatch_dask.etl.totals.Totals`; ``ranges`` of values; ``n_rows``, ``n_bytes`` (uncompressed, read) and
    ``spilled`` bytes.
    """
    task = _name(index)
    if (done := find_receipt(file.scratch, task)) is not None and is_spilled(file.scratch, index, done["spilled"]):
        return done | {"reused": True}
    job = load_job(file)
    plan, block = job.plan, job.plan.blocks[index]
    source = plan.sources[block.source]
    try:
        with unchanged(job.refs[block.source], source.identity), job.open_source(block.source) as opened:
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
    forget_task(file.scratch, index)
    scatter(file, index)


def forget_task(scratch: Folder, index: int) -> None:
    """Let a scatter task that was finished be run again."""
    forget_receipt(scratch, _name(index))


def _name(index: int) -> str:
    return f"scatter-{index:06d}"


# --- read ----------------------------------------------------------------------------------------------------------


def read_block(plan: Plan, block: Block, source: SourceSchema, opened: Source) -> _Rows:
    """A block's rows in the form the collection has, in the source's order."""
    rows = _Rows()
    schemas = {m.name: m for m in source.matrices}
    for spec in plan.matrices:
        schema, read = schemas[spec.name], _read_sparse if spec.kind == "csr" else _read_dense
        gene_map = plan.gene_map(block.source, schema, spec)
        read(rows, spec, schema, opened.matrix(schema, block.start, block.stop), gene_map)
    _write_strings(NAMES, lambda a, b: ColumnRows(opened.names(a, b)), block, source.name_width, rows.heads, rows.flats)
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
    widths = {c.path: c.width for c in source.columns}
    for column in columns:
        if column.kind == "string":
            read = partial(_read_rows, column, block, source, opened)
            _write_strings(column, read, block, widths.get(column.path, 0), heads, flats)
        else:
            write_column(column, read_column(column, block, source, opened), heads, flats)
    return heads, flats


def _read_rows(column: ColumnSpec, block: Block, source: SourceSchema, opened: Source, a: int, b: int) -> ColumnRows:
    return read_column(column, replace(block, start=a, stop=b), source, opened)


def _write_strings(
    spec: ColumnSpec,
    read: Callable[[int, int], ColumnRows],
    block: Block,
    width: int,
    heads: Heads,
    flats: Flats,
) -> None:
    """Add a column of strings, some rows at a time: as Python has them, they take several times the bytes they have."""
    step = max(1, _STRINGS_NBYTES // (2 * width + 100))
    pieces: list[tuple[Heads, Flats]] = []
    for a in range(block.start, block.stop, step):
        pieces.append(({}, {}))
        write_column(spec, read(a, min(a + step, block.stop)), *pieces[-1])
    for name in pieces[0][0]:
        heads[name] = np.concatenate([h[name] for h, _ in pieces])
    for name in pieces[0][1]:
        flats[name] = np.concatenate([f[name][0] for _, f in pieces]), bounds_of(heads[head(spec, "length")])


def _read_sparse(
    rows: _Rows, spec: MatrixSpec, schema: MatrixSchema, found: CsrRows | NDArray, gene_map: NDArray[np.int32] | None
) -> None:
    csr = found if isinstance(found, CsrRows) else dense_to_csr(found)
    del found
    bounds, nnz = csr.bounds, int(csr.bounds[-1])
    if gene_map is None:
        gene_map = np.arange(spec.n_cols, dtype=np.int32)
    drops = bool((gene_map < 0).any())
    target = np.dtype(np.int32) if drops else index_dtype(spec.n_cols)
    indices = map_genes(csr, gene_map.astype(target), n_cols=schema.n_cols)
    exact, values_range = _collect_values(csr, nnz, np.dtype(schema.dtype))
    del csr  # and with it what it was made of
    bounds, indices, exact = in_gene_order(bounds, indices, exact, gene_map)
    if drops:
        indices = indices.astype(index_dtype(spec.n_cols))
        values_range = ValueRange(*range_of(exact))
    rows.heads[f"{spec.name}#length"] = np.diff(bounds).astype(np.uint32)
    rows.flats[f"{spec.name}#indices"] = indices, bounds
    rows.flats[f"{spec.name}#values"] = exact.astype(smallest_dtype(values_range, exact.dtype), copy=False), bounds
    rows.exact[f"{spec.name}#values"] = exact
    rows.ranges[spec.name] = values_range


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


def _read_dense(
    rows: _Rows, spec: MatrixSpec, schema: MatrixSchema, found: CsrRows | NDArray, gene_map: NDArray[np.int32] | None
) -> None:
    assert isinstance(found, np.ndarray), schema  # a collection's matrix is dense where all sources' are
    values = join_dense(found, spec, gene_map)
    del found
    step = max(1, 2**20 // max(1, spec.n_cols))
    pieces = (values[a : a + step] for a in range(0, len(values), step))
    values_range = merge_ranges(ValueRange(*range_of(p)) for p in pieces)
    name = f"{spec.name}#dense"
    rows.heads[name] = values.astype(smallest_dtype(values_range, values.dtype), copy=False)
    rows.exact[name] = values
    rows.ranges[spec.name] = values_range


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
    flats = rows.flats | {
        name: (values.reshape(-1), np.arange(len(values) + 1) * values.shape[1])  # read one block at a time
        for name, values in ((n, heads.pop(n)) for n in list(heads) if n.endswith("#dense"))
    }
    spilled = write_spill(scratch, index, order=order, rows=part_rows, heads=heads, flats=flats)
    nnz = {
        m.name: np.diff(bounds_of(heads[f"{m.name}#length"][order])[dataset_rows])
        for m in plan.matrices
        if m.kind == "csr"
    }
    ordered = hashes[order]
    pairs = zip(dataset_rows[:-1], dataset_rows[1:], strict=True)
    fingerprint = np.array([sum_hashes(ordered[a:b]) for a, b in pairs], np.uint64)
    return {
        "n_rows": block.n_rows,
        "n_bytes": block.n_bytes,
        "spilled": spilled,
        "ranges": {name: asdict(r) for name, r in rows.ranges.items()},
    } | packed(fingerprint, nnz)


def hash_block(plan: Plan, block: Block, rows: _Rows) -> NDArray[np.uint64]:
    """(n_rows,) hashes of the rows of a block."""
    heads = rows.heads | _of(rows.exact, rows.heads)
    return row_hashes(block.n_rows, plan.matrices, all_columns(plan), heads, _exact_flats(rows))


def _of(some: dict[str, NDArray], heads: Heads) -> Heads:
    return {name: values for name, values in some.items() if name in heads}


def _exact_flats(rows: _Rows) -> Flats:
    return {name: (rows.exact.get(name, values), bounds) for name, (values, bounds) in rows.flats.items()}
