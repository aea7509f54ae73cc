"""scan: what the inputs hold, from their metadata and row pointers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annbatch_dask.errors import AnnbatchDaskError, SourceError
from annbatch_dask.etl.choose import rows_where
from annbatch_dask.etl.readable import check_dataset_there
from annbatch_dask.kernels.values import range_of
from annbatch_dask.manifest import STATS
from annbatch_dask.plan.columns import unsure
from annbatch_dask.plan.dtypes import ValueRange, merge_ranges
from annbatch_dask.plan.elements import choose_counts
from annbatch_dask.plan.layout import cut_blocks
from annbatch_dask.plan.naming import INPUT_VAR_NAMES
from annbatch_dask.plan.qc import QC, find_genes
from annbatch_dask.plan.schema import MatrixSchema, SourceSchema, shared_names
from annbatch_dask.sources.chosen import choose_rows, chosen_schema
from annbatch_dask.sources.identity import identity_of, unique_identity
from annbatch_dask.sources.matrices import CsrRows
from annbatch_dask.sources.open import Source, SourceRef, WholeSource, open_source
from annbatch_dask.sources.transposed import visit_values
from annbatch_dask.storage.metadata import FILES

__all__ = ["Scanned", "look", "merge_annotations", "scan", "with_ranges"]

_READ_NBYTES = 2**26
_SAMPLE_RUNS, _SAMPLE_ROWS = 16, 64
"""Runs of cells, and cells in each, that are looked at for which genes many cells have."""


@dataclass(frozen=True)
class Scanned:
    """An input's schema, and what it says of genes and of itself where asked for: an AnnData of no cells."""

    schema: SourceSchema
    annotations: ad.AnnData | None


def scan(  # a task's arguments are positional
    ref: SourceRef,
    want_annotations: bool,  # noqa: FBT001
    read_values: bool = False,  # noqa: FBT001, FBT002
    metadata_only: bool = False,  # noqa: FBT001, FBT002
    sample_genes: bool = False,  # noqa: FBT001, FBT002
    qc: QC | None = None,
) -> Scanned:
    """Look at one input.

    ``read_values`` reads every value of its matrices, which is as much work as a scatter; ``metadata_only`` none at
    all, so that the stored values of each row are guessed; ``sample_genes`` some cells, for how many have each gene.
    ``qc``: find the genes of its sets.

    Raises
    ------
    SourceError
        If it cannot be read.
    IntegrityError
        If it is a dataset of this package, and a file of it is missing.
    SchemaError
        If it contradicts itself.
    SelectionError
        If its obs has not what its condition asks for.
    """
    identity = identity_of(ref, at_a_glance=metadata_only) or unique_identity()
    try:
        with open_source(ref) as whole:
            if ref.is_dataset or FILES in whole.attributes:
                _check_there(ref)
            kept = rows_where(whole, ref.label, ref.where)
            source = choose_rows(whole, kept)
            schema = _with_shared_names(_keyed(whole, chosen_schema(whole, kept, metadata_only=metadata_only), ref))
            schema = _without_stats(schema)
            schema = choose_counts(replace(schema, is_dataset=ref.is_dataset), ref.counts)
            if read_values:
                found = tuple(replace(m, values=_range_of_matrix(whole, schema, m)) for m in schema.matrices)
                schema = replace(schema, matrices=found)
            if sample_genes:
                schema = replace(schema, abundance=_abundance(source, schema))
            if qc is not None and not ref.is_dataset:
                schema = replace(schema, gene_sets=_gene_sets(whole, schema, qc))
            annotations = _annotations(source, ref.counts) if want_annotations else None
        return Scanned(replace(schema, identity=identity), annotations)
    except Exception as e:
        e.add_note(f"while scanning {ref.label}")
        if _is_of_file(e) and ref.load_adata is None and not ref.is_dataset:
            text = e.args[0] if isinstance(e, KeyError) and e.args else e
            msg = (
                f"{ref.label} is not as anndata writes files: {type(e).__name__}: {text}; it is damaged, or another "
                "program wrote it: write it anew with anndata, or read it in load_adata"
            )
            raise SourceError(msg) from e
        raise


def _is_of_file(error: Exception) -> bool:
    """True of what libraries raise, and our own code, where a file lacks what anndata writes."""
    kinds = (LookupError, AttributeError, TypeError, ValueError)
    return isinstance(error, kinds) and not isinstance(error, AnnbatchDaskError)


def _check_there(ref: SourceRef) -> None:
    """Refuse a dataset of this package of which files are missing, where it is at a path."""
    if isinstance(ref.item, str | os.PathLike):
        check_dataset_there(ref.folder)


def _gene_sets(source: WholeSource, schema: SourceSchema, qc: QC) -> tuple[NDArray[np.int32], ...]:
    x = next((m for m in schema.matrices if m.name == "X"), None)
    if x is None:
        return ()  # which the plan refuses
    frame = "raw/var" if x.genes == "raw" else "var"
    return find_genes(qc, schema.path, schema.names_in(x.genes), partial(source.gene_values, frame))


def _with_shared_names(schema: SourceSchema) -> SourceSchema:
    return replace(
        schema,
        var_names=shared_names(schema.var_names),
        raw_names=_shared(schema.raw_names),
        index_names=_shared(schema.index_names),
        raw_index_names=_shared(schema.raw_index_names),
    )


def _shared(names: NDArray[np.object_] | None) -> NDArray[np.object_] | None:
    return None if names is None else shared_names(names)


def _keyed(source: WholeSource, schema: SourceSchema, ref: SourceRef) -> SourceSchema:
    """A schema whose genes are named by the column that was asked for; a dataset knows what inputs called its genes."""
    has_raw = schema.raw_names is not None
    if ref.is_dataset:
        return replace(
            schema,
            index_names=source.gene_column("var", INPUT_VAR_NAMES),
            raw_index_names=source.gene_column("raw/var", INPUT_VAR_NAMES) if has_raw else None,
        )
    if ref.var_key is None:
        return schema
    out = replace(schema, index_names=schema.var_names, raw_index_names=schema.raw_names)
    if not ref.var_key:
        return out
    names, problem = _named_by(ref, "var", source.gene_column("var", ref.var_key), schema.var_names)
    unnamed = {"var": problem} if problem else {}
    out = replace(out, var_names=names)
    if schema.raw_names is not None:
        names, problem = _named_by(ref, "raw.var", source.gene_column("raw/var", ref.var_key), schema.raw_names)
        unnamed |= {"raw": problem} if problem else {}
        out = replace(out, raw_names=names)
    return replace(out, unnamed=unnamed)


def _named_by(
    ref: SourceRef, frame: str, found: NDArray[np.object_] | None, index: NDArray[np.object_]
) -> tuple[NDArray[np.object_], str]:
    """Names of genes by a column; or those of the index, and why it does not name them."""
    remedy = "fill it in load_adata, or give var_key for this input by its path"
    if found is None:
        return index, f"{ref.label}: {frame} has no column {ref.var_key!r}, which var_key names; {remedy}"
    missing = np.flatnonzero([name in (None, "") for name in found])
    if not len(missing):
        return found, ""
    shown = ", ".join(index[missing[:3]])
    return index, (
        f"{ref.label}: {frame} column {ref.var_key!r}, which var_key names, has no value for {len(missing):,} of "
        f"{len(found):,} genes ({shown}); {remedy}"
    )


def _without_stats(schema: SourceSchema) -> SourceSchema:
    """The schema without the statistics of a dataset, which nothing that is made of it has."""
    return replace(schema, left_out=tuple(name for name in schema.left_out if name != f"uns/{STATS}"))


def _annotations(source: Source, counts: str) -> ad.AnnData:
    found = source.annotations()
    if counts != "raw/X":
        return found
    assert found.raw is not None  # choose_counts found it
    return ad.AnnData(obs=found.obs, var=found.raw.var, uns=found.uns)


def _range_of_matrix(whole: WholeSource, schema: SourceSchema, matrix: MatrixSchema) -> ValueRange:
    """Range of all values of a matrix, read in blocks."""
    ranges: list[ValueRange] = []

    def visit(_: int, piece: NDArray) -> None:
        ranges.append(ValueRange(*range_of(np.ascontiguousarray(piece))))

    if matrix.is_by_columns:
        visit_values(whole.stored(matrix), None if schema.kept is None else schema.kept.mask(), visit)
        return merge_ranges(ranges)
    only = replace(schema, matrices=(matrix,))
    source = choose_rows(whole, schema.kept)
    for block in cut_blocks([only], block_nbytes=_READ_NBYTES, csc_nbytes=8 * _READ_NBYTES, obs_nbytes=1):
        rows = source.matrix(matrix, block.start, block.stop)
        if isinstance(rows, CsrRows):
            rows.values(visit)
        else:
            visit(0, rows)
    return merge_ranges(ranges)


def _abundance(source: Source, schema: SourceSchema) -> NDArray[np.float64]:
    """About how many cells of an input have a value of each gene of X: of all, what a sample spread over it has."""
    runs = _sample_runs(schema)
    found = [np.zeros(schema.x.n_cols, np.int64)]

    def visit(_: int, piece: NDArray) -> None:  # in any thread
        found.append(np.bincount(piece.astype(np.int64), minlength=schema.x.n_cols)[: schema.x.n_cols])

    for start, stop in runs:
        rows = source.matrix(schema.x, start, stop)
        if isinstance(rows, CsrRows):
            rows.indices(visit)
        else:
            found.append((rows != 0).sum(0, dtype=np.int64))
    share = schema.n_obs / max(1, sum(stop - start for start, stop in runs))
    counts: NDArray[np.float64] = np.sum(found, axis=0) * share
    return counts


def _sample_runs(schema: SourceSchema) -> list[tuple[int, int]]:
    """Runs of cells from the first to the last, at steps; as few as possible where each means reading everything."""
    n_runs, n_rows = (1, _SAMPLE_RUNS * _SAMPLE_ROWS) if schema.x.kind == "csc" else (_SAMPLE_RUNS, _SAMPLE_ROWS)
    if schema.cuts is not None:  # its blocks are computed whole
        cuts = schema.cuts.tolist()
        blocks = sorted({0, (len(cuts) - 1) // 2, len(cuts) - 2} if len(cuts) > 1 else set())
        return [(cuts[k], cuts[k + 1]) for k in blocks if cuts[k] < cuts[k + 1]]
    if schema.n_obs <= n_runs * n_rows:
        return [(0, schema.n_obs)] if schema.n_obs else []
    starts = np.linspace(0, schema.n_obs - n_rows, n_runs).astype(int).tolist()
    return [(start, start + n_rows) for start in starts]


def look(ref: SourceRef, schema: SourceSchema, names: frozenset[str]) -> dict[str, ValueRange]:
    """Range of the values of some matrices and columns of an input, by name; missing ones do not count."""
    found: dict[str, ValueRange] = {}
    try:
        with open_source(ref) as whole:
            for matrix in (m for m in schema.matrices if m.name in names):
                found[matrix.name] = _range_of_matrix(whole, schema, matrix)
            source = choose_rows(whole, schema.kept)
            for column in (c for c in schema.columns if c.path in names):
                rows = source.column(column, 0, schema.n_obs)
                values = rows.values if rows.mask is None else rows.values[~rows.mask]
                found[column.path] = ValueRange(*range_of(np.ascontiguousarray(values)))
    except Exception as e:
        e.add_note(f"while looking at {', '.join(sorted(names))} of {ref.label}")
        raise
    return found


def with_ranges(
    refs: Sequence[SourceRef],
    schemas: Sequence[SourceSchema],
    run: Callable[[list[tuple[SourceRef, SourceSchema, frozenset[str]]]], list[dict[str, ValueRange]]],
) -> list[SourceSchema]:
    """The schemas, with the ranges of values on which it depends whether one dtype holds those of all: see ``unsure``.

    ``run``: calls :func:`look` for each.
    """
    names = unsure(schemas)
    which = [k for k, some in enumerate(names) if some]
    out = list(schemas)
    for k, found in zip(which, run([(refs[k], schemas[k], names[k]) for k in which]) if which else (), strict=True):
        out[k] = replace(
            out[k],
            matrices=tuple(replace(m, values=found.get(m.name, m.values)) for m in out[k].matrices),
            columns=tuple(replace(c, values=found.get(c.path, c.values)) for c in out[k].columns),
        )
    return out


def merge_annotations(found: Sequence[ad.AnnData], merge: str | None) -> ad.AnnData:
    """Gene-wise elements and uns of the collection: all of a single input's; of several, what ``merge`` keeps.

    ``merge`` is that of :func:`anndata.concat`, and serves uns as well.
    """
    if len(found) == 1:
        return found[0]
    strategy: Any = merge
    out: ad.AnnData = ad.concat(found, join="outer", merge=strategy, uns_merge=strategy)
    raws = [ad.AnnData(obs=a.obs, var=a.raw.var) for a in found if a.raw is not None]
    if len(raws) == len(found):
        raw = ad.concat(raws, join="outer", merge=strategy)
        raw.X = np.zeros(raw.shape, np.float32)
        out.raw = raw
    return out


def raw_var(genes: pd.Index, annotations: ad.AnnData | None) -> pd.DataFrame:
    """Annotations of the genes of ``raw``, in their order; no columns if there are none."""
    raw = None if annotations is None else annotations.raw
    return pd.DataFrame(index=genes) if raw is None else raw.var.loc[genes]
