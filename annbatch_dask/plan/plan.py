"""The plan of a build: a frozen value, which opens nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annbatch_dask.manifest import NamingRecord
from annbatch_dask.plan.digest import canonical, digest
from annbatch_dask.plan.dtypes import ValueRange, merge_ranges
from annbatch_dask.plan.genes import GeneSpace
from annbatch_dask.plan.grouping import Groups
from annbatch_dask.plan.layout import Block, Layout
from annbatch_dask.plan.memory import Budget
from annbatch_dask.plan.options import Extension, Options
from annbatch_dask.plan.permutation import Permutation
from annbatch_dask.plan.placement import ExtendPermutation
from annbatch_dask.plan.schema import OBS, ColumnSpec, MatrixSchema, MatrixSpec, SourceSchema
from annbatch_dask.plan.transposing import Strip, Transposed, strips_of

__all__ = ["WORK_DIGITS", "Plan"]

_WORK_VERSION = 8
"""Raised whenever spill files, receipts or row fingerprints change, so that no resume mixes two kinds."""
WORK_DIGITS = 16
"""Of a work key, those that do not depend on how the work is cut."""


@dataclass(frozen=True, repr=False)
class Plan:
    """A build, decided but not begun. :mod:`annbatch_dask.plan.summary` puts it in words.

    Attributes
    ----------
    sources
        What the scan found, in the order given.
    blocks
        Row blocks of the sources: one scatter task each.
    layout
        Datasets of the output: one gather task each.
    placement
        Output position of every input row.
    var
        (n_vars, n_columns) frame of the collection's genes.
    genes
        The collection's genes, ``"var"``, and, where it carries ``raw``, those of that, ``"raw"``.
    matrices, columns
        Row-aligned elements of the collection.
    source_column
        The obs column beside them that tells each row's source.
    left_out
        Elements the build does not carry, and the sources that have them.
    renamed
        Sources that have a column ``src_path`` of their own, which is ``input_src_path`` in the collection.
    groups
        The groups of ``options.groupby``, once they are counted; the layout's parts follow them.
    survey
        Fingerprint of the plan that this was until rows were measured, which keeps it; "" where it was none.
    naming
        What the manifest will say of how genes were named; None where by the inputs' indices.
    transposed
        Sources stored by columns that are put in the order of their rows first: one transpose task a strip.
    """

    options: Options
    sources: tuple[SourceSchema, ...]
    blocks: tuple[Block, ...]
    layout: Layout
    placement: Permutation | ExtendPermutation
    var: pd.DataFrame = field(repr=False)
    genes: Mapping[str, GeneSpace] = field(repr=False)
    matrices: tuple[MatrixSpec, ...]
    columns: tuple[ColumnSpec, ...]
    source_column: ColumnSpec
    left_out: Mapping[str, Sequence[str]] = field(repr=False)
    index_name: str | None
    peak_nbytes: tuple[int, int]
    budget: Budget
    extension: Extension | None = None
    renamed: tuple[str, ...] = ()
    groups: Groups | None = field(default=None, repr=False)
    survey: str = ""
    naming: NamingRecord | None = field(default=None, repr=False)
    transposed: tuple[Transposed, ...] = field(default=(), repr=False)

    @property
    def x(self) -> MatrixSpec:
        """Specification of X."""
        return next(m for m in self.matrices if m.name == "X")

    @property
    def group_columns(self) -> tuple[ColumnSpec, ...]:
        """Columns of ``options.groupby``."""
        by_name = {c.name: c for c in (*self.columns, self.source_column) if c.frame == OBS}
        return tuple(by_name[name] for name in self.options.groupby)

    @property
    def stats_column(self) -> ColumnSpec | None:
        """Column of ``options.stats_by``; None where there is none."""
        columns = (*self.columns, self.source_column)
        return next((c for c in columns if c.path == f"{OBS}/{self.options.stats_by}"), None)

    @property
    def first_dataset(self) -> int:
        """Number of the first dataset to write."""
        return 0 if self.extension is None else self.extension.first_dataset

    @property
    def n_obs(self) -> int:
        """Rows."""
        return self.layout.n_obs

    @property
    def is_survey(self) -> bool:
        """True if rules on counts have still to decide which of its rows are kept: figures are those of all."""
        return self.options.qc is not None and not self.survey

    @property
    def n_vars(self) -> int:
        """Genes."""
        return len(self.var)

    @property
    def n_datasets(self) -> int:
        """Datasets of the output, which is the number of gather tasks."""
        return self.layout.n_datasets

    @cached_property
    def strips(self) -> tuple[Strip, ...]:
        """The transpose tasks."""
        return strips_of(self.sources, self.transposed)

    @property
    def seed(self) -> int:
        """Seed of the permutation."""
        return self.options.seed

    @property
    def n_bytes_read(self) -> int:
        """Uncompressed bytes the scatter tasks read."""
        return sum(b.n_bytes for b in self.blocks)

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the result: builds with equal fingerprints write equal collections."""
        if self.survey:
            return self.survey
        sources = [
            {"path": s.path, "n_obs": s.n_obs, "matrices": canonical(s.matrices), "columns": canonical(s.columns)}
            | ({} if s.kept is None else {"kept": canonical(s.kept)})
            for s in self.sources
        ]
        var = pd.util.hash_pandas_object(self.var.astype(str)).to_numpy().tobytes()
        raw = pd.util.hash_array(self.genes["raw"].genes.to_numpy()).tobytes() if "raw" in self.genes else b""
        payload = {
            "options": canonical(replace(self.options, var_subset=None, allow_mixed_counts=False)),
            "layout": self.layout.sizes,
            "placement": canonical(self.placement),
            "extension": canonical(self.extension),
            "index_name": self.index_name,
            "sources": sources,
        }
        return digest(json.dumps(payload, sort_keys=True).encode(), var, raw)

    @cached_property
    def work_key(self) -> str:
        """Identity of the work: a resume takes up scratch files with this key and no other.

        Its first half does not depend on how the work is cut, which workers' memory decides.
        """
        what = [_WORK_VERSION, self.fingerprint, [s.identity for s in self.sources]]
        cut = [what, canonical(self.layout), canonical(self.blocks)]
        cut += [canonical(self.transposed)] if self.transposed else []
        return "".join(digest(json.dumps(payload).encode())[:WORK_DIGITS] for payload in (what, cut))

    def gene_map(self, source: int, matrix: MatrixSchema, spec: MatrixSpec) -> NDArray[np.int32] | None:
        """Map a source matrix's columns to the collection's, -1 for dropped ones; None if they are equal."""
        return self.genes[spec.genes].map_of(source, matrix.genes) if spec.genes else None

    @property
    def not_found(self) -> tuple[str, ...]:
        """Names of ``var_subset`` that are no genes of the collection."""
        return tuple(dict.fromkeys(n for n in self.options.var_subset or () if n not in self.genes["var"].genes))

    def n_genes_of(self, source: int) -> int:
        """Number of the collection's genes that a source has."""
        return self.genes["var"].n_genes_of(source, self.sources[source].x.genes)

    @cached_property
    def gene_overlaps(self) -> dict[int, int]:
        """Number of genes for each combination of inputs, by a bit mask of them, the most frequent mask first."""
        inputs = [(k, s.x.genes) for k, s in enumerate(self.sources) if not s.is_dataset]
        return self.genes["var"].overlaps(inputs)

    @property
    def values(self) -> dict[str, ValueRange]:
        """Range of each matrix's values; empty unless the scan read them, and where genes are added up."""
        if self.options.naming.adds:
            return {}
        found = {
            m.name: [x.values for s in self.sources for x in s.matrices if x.name == m.name] for m in self.matrices
        }
        return {name: merge_ranges(r for r in ranges if r) for name, ranges in found.items() if all(ranges)}

    def __repr__(self) -> str:
        """Show fingerprint and size."""
        return f"Plan({self.fingerprint[:12]}, {self.n_obs:,} cells x {self.n_vars:,} genes)"
