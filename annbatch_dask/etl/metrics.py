"""What is measured of cells: worked out of the rows of X, kept in the scratch folder, told in obs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import google_crc32c
import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from annbatch_dask.etl.blocks import collect_values, map_genes
from annbatch_dask.kernels.measure import measure_dense, measure_sparse
from annbatch_dask.kernels.rows import names_twice
from annbatch_dask.plan.dtypes import index_dtype
from annbatch_dask.plan.layout import Block
from annbatch_dask.plan.narrow import Verdict
from annbatch_dask.plan.qc import QC, Metrics
from annbatch_dask.plan.schema import ColumnSchema, MatrixSchema, SourceSchema
from annbatch_dask.sources.columns import ColumnRows
from annbatch_dask.sources.matrices import CsrRows
from annbatch_dask.sources.open import Source
from annbatch_dask.storage.folder import Folder

__all__ = ["judge_rows", "read_metrics", "with_metrics", "write_metrics"]


def judge_rows(qc: QC, source: SourceSchema, block: Block, opened: Source) -> tuple[Metrics, Verdict]:
    """Measure the rows of a block, and decide which of them are kept."""
    found = opened.matrix(source.x, block.start, block.stop)
    counts = np.diff(found.offsets) if isinstance(found, CsrRows) else np.zeros(block.n_rows, np.int64)
    metrics = _measure(found, source.x, source.gene_sets, counts_genes=qc.counts_genes)
    mask, dropped = qc.judge(metrics)
    return metrics, Verdict(mask, int(counts[mask].sum()), dropped)


def _measure(
    found: CsrRows | NDArray, x: MatrixSchema, gene_sets: Sequence[NDArray[np.int32]], *, counts_genes: bool
) -> Metrics:
    bits = np.zeros(x.n_cols, np.uint64)
    for k, genes in enumerate(gene_sets):
        bits[genes] |= np.uint64(1 << k)
    sets: NDArray[np.unsignedinteger] = bits.astype(np.uint8) if len(gene_sets) <= 8 else bits  # noqa: PLR2004
    n_rows = len(found.offsets) - 1 if isinstance(found, CsrRows) else len(found)
    out = Metrics(np.zeros(n_rows), np.zeros(n_rows, np.int32), np.zeros((n_rows, len(gene_sets))))
    if isinstance(found, CsrRows):
        values, _ = collect_values(found, int(found.offsets[-1]), np.dtype(x.dtype))
        offsets, members = found.offsets, np.zeros(0, np.uint8)
        if gene_sets or counts_genes or values.dtype == bool:
            offsets, indices, values = _once(offsets, _indices(found, x.n_cols), values, x.n_cols)
            members = sets[indices] if gene_sets else members
        measure_sparse(offsets, _known(values), members, out.n_counts, out.n_genes, out.in_sets)
    else:
        measure_dense(_known(found), sets, out.n_counts, out.n_genes, out.in_sets)
    return out


def _indices(found: CsrRows, n_cols: int) -> NDArray:
    return map_genes(found, np.arange(n_cols, dtype=index_dtype(n_cols)), n_cols=n_cols)


def _once(
    offsets: NDArray[np.int64], indices: NDArray, values: NDArray, n_cols: int
) -> tuple[NDArray[np.int64], NDArray, NDArray]:
    """Rows that name each gene once: values of one that is named several times are added up, as a build does."""
    if not names_twice(offsets, indices, n_cols):
        return offsets, indices, values
    wide = values if values.dtype == bool else values.astype(np.float64)
    rows = sp.csr_matrix((wide, indices, offsets), shape=(len(offsets) - 1, n_cols))
    rows.sum_duplicates()
    return rows.indptr.astype(np.int64), rows.indices, rows.data


def _known(values: NDArray) -> NDArray:
    """Values in a dtype that kernels have."""
    return values.astype(np.float32) if values.dtype == np.float16 else values


# --- what was measured, as columns of obs --------------------------------------------------------------------------


def with_metrics(opened: Source, qc: QC, source: SourceSchema, block: Block, found: Metrics | None) -> Source:
    """An open input that has in obs, besides, what was measured of a block; None measures it again."""
    if found is None or len(found.n_counts) != block.n_rows:  # damaged since: the rows say it again
        found = judge_rows(qc, source, block, opened)[0]
    return _MeasuredSource(opened, block.start, {c.path: (c, found.of(c.stored, qc)) for c in qc.columns()})


class _MeasuredSource:
    def __init__(self, source: Source, first: int, found: Mapping[str, tuple[ColumnSchema, NDArray]]) -> None:
        self._source, self._first, self._found = source, first, found
        self.annotations, self.matrix, self.names = source.annotations, source.matrix, source.names

    def column(self, column: ColumnSchema, start: int, stop: int) -> ColumnRows:
        if column.path not in self._found:
            return self._source.column(column, start, stop)
        schema, values = self._found[column.path]
        return ColumnRows(values[start - self._first : stop - self._first].astype(schema.dtype))


def _name(index: int) -> str:
    return f"metrics-{index:06d}"


def write_metrics(folder: Folder, index: int, metrics: Metrics) -> None:
    """Keep what was measured of the rows of a block that are kept."""
    arrays = (metrics.n_counts, metrics.n_genes, metrics.in_sets)
    payload = b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)
    folder.write(_name(index), _crc(payload) + payload, durable=False, parents=False)


def read_metrics(folder: Folder, index: int, qc: QC) -> Metrics | None:
    """What was measured of a block's kept rows; None if it is missing or damaged."""
    found = folder.find(_name(index)) or b""
    crc, payload = found[:4], memoryview(found)[4:]
    row = 8 + 4 + 8 * len(qc.gene_sets)
    if crc != _crc(bytes(payload)) or len(payload) % row:
        return None
    n = len(payload) // row
    return Metrics(
        np.frombuffer(payload, np.float64, n),
        np.frombuffer(payload, np.int32, n, 8 * n),
        np.frombuffer(payload, np.float64, n * len(qc.gene_sets), 12 * n).reshape(n, len(qc.gene_sets)),
    )


def _crc(payload: bytes) -> bytes:
    return int(google_crc32c.value(payload)).to_bytes(4, "little")
