"""Matrices as dask arrays: a task for each row block of a source, which opens the file and reads its rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import dask.array as da
import numpy as np
import scipy.sparse as sp
from dask.highlevelgraph import HighLevelGraph
from numpy.typing import NDArray

from annbatch_dask.etl.blocks import dense_to_csr, in_gene_order, join_dense, map_genes
from annbatch_dask.lazy.opened import open_as_opened
from annbatch_dask.plan.plan import Plan
from annbatch_dask.plan.schema import MatrixSchema, MatrixSpec
from annbatch_dask.sources.matrices import CsrRows
from annbatch_dask.sources.open import SourceRef

__all__ = ["lazy_matrix"]

_NO_COUNTS = np.zeros(0, np.int64)


def lazy_matrix(plan: Plan, refs: tuple[SourceRef, ...], identities: tuple[str, ...], spec: MatrixSpec) -> da.Array:
    """A matrix of a plan, (n_obs, ...): blocks of CSR where any source is sparse, else dense ones.

    Tasks share the maps of genes by key, so a task is a few hundred bytes.
    """
    name = f"{spec.name.replace('/', '-')}-{plan.work_key}"
    maps = {} if not spec.genes else {(f"genes-{name}", k): m.places for k, m in enumerate(plan.genes[spec.genes].maps)}
    schemas = [
        next(replace(m, nnz=_NO_COUNTS) for m in source.matrices if m.name == spec.name) for source in plan.sources
    ]
    tasks: dict[Any, Any] = {}
    row = spec.shape(0)[1:]
    columns = (0,) * len(row)
    for i, block in enumerate(plan.blocks):
        schema = schemas[block.source]
        which = plan.genes[spec.genes].which[block.source, schema.genes] if spec.genes else None
        gene_map = None if which is None else (f"genes-{name}", which)
        source = refs[block.source], identities[block.source]
        tasks[name, i, *columns] = (_read_block, *source, schema, spec, block.start, block.stop, gene_map)
    dtype = np.dtype(spec.source_dtype)
    meta = sp.csr_matrix((0, 0), dtype=dtype) if spec.kind == "csr" else np.zeros((0, *columns), dtype)
    chunks = (tuple(b.n_rows for b in plan.blocks), *((n,) for n in row))
    return da.Array(HighLevelGraph.from_collections(name, tasks | maps), name, chunks, meta=meta)


def _read_block(  # noqa: PLR0913, PLR0917 - a task's parts
    ref: SourceRef,
    identity: str,
    schema: MatrixSchema,
    spec: MatrixSpec,
    start: int,
    stop: int,
    gene_map: NDArray[np.int32] | None,
) -> Any:
    """Rows [start, stop) of a source's matrix on the columns of the view."""
    try:
        with open_as_opened(ref, identity) as source:
            found = source.matrix(schema, start, stop)
            if spec.kind == "dense":
                return join_dense(np.asarray(found), spec, gene_map).reshape(spec.shape(stop - start))
            csr = found if isinstance(found, CsrRows) else dense_to_csr(found)
            return _read_csr(csr, schema, spec, gene_map)
    except Exception as e:
        e.add_note(f"while reading {schema.source_name} of {ref.label}, rows {start:,} to {stop:,}")
        raise


def _read_csr(csr: CsrRows, schema: MatrixSchema, spec: MatrixSpec, gene_map: NDArray[np.int32] | None) -> Any:
    if gene_map is None:
        gene_map = np.arange(spec.n_cols, dtype=np.int32)
    indices = map_genes(csr, gene_map, n_cols=schema.n_cols)
    values = np.empty(len(indices), spec.source_dtype)

    def visit(first: int, piece: NDArray) -> None:
        values[first : first + len(piece)] = piece

    csr.values(visit)
    offsets, indices, values = in_gene_order(csr.offsets, indices, values, gene_map)
    pointers = offsets.astype(np.int32) if offsets[-1] < 2**31 else offsets
    return sp.csr_matrix((values, indices, pointers), shape=(len(offsets) - 1, spec.n_cols))
