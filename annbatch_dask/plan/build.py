"""From what the scan found to a frozen plan. Pure: the same schemas and options give the same plan."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from hashlib import blake2b
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annbatch_dask.errors import LayoutError, SchemaError
from annbatch_dask.html import overlap_rows, render
from annbatch_dask.plan.columns import texts_of, unite_columns, unite_tags
from annbatch_dask.plan.costs import (
    Weight,
    categories_nbytes,
    fixed_nbytes,
    frame_nbytes,
    heaviest_rows,
    held_weight,
    part_weight,
    read_weight,
    shared_nbytes,
)
from annbatch_dask.plan.dtypes import ValueRange, common_dtype, index_dtype, merge_ranges, smallest_dtype
from annbatch_dask.plan.elements import Elements, check_counts
from annbatch_dask.plan.genes import GeneSpace, check_unique, join_genes, order_genes
from annbatch_dask.plan.grouping import Groups
from annbatch_dask.plan.layout import Block, Layout, Room, cut_blocks
from annbatch_dask.plan.memory import (
    IN_FLIGHT_NBYTES,
    MIB,
    SMALL_NBYTES,
    Budget,
    format_nbytes,
    gather_peak_nbytes,
)
from annbatch_dask.plan.permutation import IDENTITY, SWAP_OR_NOT, Permutation
from annbatch_dask.plan.placement import Dealt, deal
from annbatch_dask.plan.schema import (
    INPUT_SRC_PATH,
    OBS,
    SRC_PATH,
    ColumnSpec,
    Genes,
    MatrixSchema,
    MatrixSpec,
    SourceSchema,
)

__all__ = ["WORK_DIGITS", "Extension", "Options", "Plan", "build_plan", "canonical"]

_BLOCK_NBYTES = 128 * MIB
"""Default size of a row block: far above the cost of a task, small beside a worker's memory."""
_JOB_NBYTES = 16 * MIB
"""Of a job in a worker process, that the process itself is taken to hold."""
_WORK_VERSION = 6
"""Raised whenever spill files, receipts or row fingerprints change, so that no resume mixes two kinds."""
_MAX_CHUNK_NBYTES = 2**31 - 1
"""What blosc takes at once."""
WORK_DIGITS = 16
"""Of a work key, those that do not depend on how the work is cut."""
_MAX_TASKS = 4096
"""Blocks grow, as far as memory allows, so that a stage stays below about so many tasks."""


@dataclass(frozen=True)
class Options:
    """What a user asked for, resolved to numbers.

    Attributes
    ----------
    dataset_size
        Rows of a dataset, or bytes of one uncompressed: exactly one of ``dataset_rows`` and ``dataset_nbytes`` is set.
    shard_rows, shard_nbytes
        Size of a shard, likewise.
    compressor
        Zarr v3 metadata of the bytes-to-bytes codec of the sharded arrays, None for none.
    groupby
        Columns of obs by which the rows of each dataset are sorted.
    elements
        Which elements to carry.
    allow_mixed_counts
        Do not mind where some inputs have whole numbers in X and others have not.
    layout
        How sparse matrices are stored: ``"open"``, by the compressor, or ``"packed"``, integers by our own codec.
    gene_order
        Of a new collection's genes: ``"names"``, as anndata joins them, or ``"abundance"``, those that most cells have
        first.
    """

    seed: int
    shuffle: bool = True
    dataset_rows: int | None = None
    dataset_nbytes: int | None = None
    n_obs_per_chunk: int = 64
    shard_rows: int | None = None
    shard_nbytes: int | None = None
    compressor: str | None = None
    var_subset: tuple[str, ...] | None = None
    groupby: tuple[str, ...] = ()
    elements: Elements = Elements()
    allow_mixed_counts: bool = False
    layout: str = "open"
    gene_order: str = "names"

    def request(self, inputs: Sequence[tuple[str, str]], mode: str, genes: str, merge: str | None) -> str:
        """Identity of a call: everything that a user asks for, 32 hex digits. What the inputs hold is not in it.

        ``inputs``: each one's label, and which of its matrices becomes X.
        """
        payload = {"options": canonical(self), "inputs": inputs, "mode": mode, "genes": genes, "merge": merge}
        return _digest(json.dumps(payload, sort_keys=True).encode())


@dataclass(frozen=True)
class Extension:
    """A build on top of a collection, whose datasets are the plan's first sources.

    Attributes
    ----------
    mode
        ``"extend"``: new rows are dealt into the existing datasets. ``"append"``: new rows make new datasets, the
        existing ones stay. ``"reshuffle"``: all rows are shuffled anew.
    n_datasets
        Datasets the collection has.
    first_dataset
        Number of the first dataset to write: names are never used twice.
    union
        Add the genes the collection lacks behind its own; else leave them out.
    """

    mode: Literal["extend", "append", "reshuffle"]
    n_datasets: int
    first_dataset: int
    union: bool = False

    @property
    def n_kept(self) -> int:
        """Sources whose rows stay where they are."""
        return self.n_datasets if self.mode == "append" else 0


@dataclass(frozen=True, repr=False)
class Plan:
    """A build, decided but not begun. Its repr says tasks, bytes and peak memory.

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
    """

    options: Options
    sources: tuple[SourceSchema, ...]
    blocks: tuple[Block, ...]
    layout: Layout
    placement: Permutation | Dealt
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

    @property
    def group_columns(self) -> tuple[ColumnSpec, ...]:
        """Columns of ``options.groupby``."""
        by_name = {c.name: c for c in (*self.columns, self.source_column) if c.frame == OBS}
        return tuple(by_name[name] for name in self.options.groupby)

    @property
    def first_dataset(self) -> int:
        """Number of the first dataset to write."""
        return 0 if self.extension is None else self.extension.first_dataset

    @property
    def n_obs(self) -> int:
        """Rows."""
        return self.layout.n_obs

    @property
    def n_vars(self) -> int:
        """Genes."""
        return len(self.var)

    @property
    def n_datasets(self) -> int:
        """Datasets of the output, which is the number of gather tasks."""
        return self.layout.n_datasets

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
        sources = [
            {"path": s.path, "n_obs": s.n_obs, "matrices": canonical(s.matrices), "columns": canonical(s.columns)}
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
        return _digest(json.dumps(payload, sort_keys=True).encode(), var, raw)

    @cached_property
    def work_key(self) -> str:
        """Identity of the work: a resume takes up scratch files with this key and no other.

        Its first half does not depend on how the work is cut, which workers' memory decides.
        """
        what = [_WORK_VERSION, self.fingerprint, [s.identity for s in self.sources]]
        cut = [what, canonical(self.layout), canonical(self.blocks)]
        return "".join(_digest(json.dumps(payload).encode())[:WORK_DIGITS] for payload in (what, cut))

    def gene_map(self, source: int, matrix: MatrixSchema, spec: MatrixSpec) -> NDArray[np.int32] | None:
        """Where a source matrix's columns are in the collection's, -1 where left out; None where they stay."""
        return self.genes[spec.genes].map_of(source, matrix.genes) if spec.genes else None

    def n_genes_of(self, source: int) -> int:
        """How many of the collection's genes a source has."""
        return int((self.genes["var"].map_of(source, self.sources[source].x.genes) >= 0).sum())

    @cached_property
    def gene_overlaps(self) -> dict[int, int]:
        """How many genes exactly the same inputs have, by a bit mask of them, the most frequent mask first."""
        inputs = [(k, s.x.genes) for k, s in enumerate(self.sources) if not s.tagged]
        return self.genes["var"].overlaps(inputs)

    @property
    def values(self) -> dict[str, ValueRange]:
        """Range of each matrix's values; empty unless the scan read them."""
        found = {
            m.name: [x.values for s in self.sources for x in s.matrices if x.name == m.name] for m in self.matrices
        }
        return {name: merge_ranges(r for r in ranges if r) for name, ranges in found.items() if all(ranges)}

    @property
    def title(self) -> str:
        """What comes of what, in one line."""
        return (
            f"Plan {self.fingerprint[:12]}: {self.n_obs:,} cells x {self.n_vars:,} genes "
            f"from {_plural(len(self.sources), 'source')} into {_plural(self.n_datasets, 'dataset')} "
            f"of up to {max(self.layout.sizes):,} cells"
        )

    def figures(self) -> list[tuple[str, str]]:
        """What the plan says, each with a name: tasks, bytes, peak memory and the like."""
        scatter, gather = self.peak_nbytes
        exact = all(m.exact for s in self.sources for m in s.matrices)
        about = "" if exact else "about "
        n = len(self.blocks) + self.n_datasets
        groupby = f", each dataset sorted by {', '.join(self.options.groupby)}" if self.options.groupby else ""
        texts = self._texts()
        missing = [f"{name} ({_plural(len(paths), 'source')})" for name, paths in self.left_out.items()]
        return [
            ("order", f"{self.placement.name}, seed {self.seed}{groupby}"),
            ("carried", ", ".join([*(m.name for m in self.matrices), *self._frames()])),
            ("X from", self._counts()),
            *([("left out", ", ".join(missing))] if missing else []),
            *([("strings", f"{', '.join(texts)}: categories in the inputs, nearly one a cell")] if texts else []),
            ("tasks", f"{n:,}: {len(self.blocks):,} scatter + {self.n_datasets:,} gather"),
            (
                "bytes",
                f"{about}{format_nbytes(self.n_bytes_read)} to read (uncompressed); "
                "at most as much to spill and to write, less with smaller dtypes",
            ),
            (
                "peak",
                f"{format_nbytes(scatter)} a scatter task, {format_nbytes(gather)} a gather task; "
                f"{format_nbytes(self.budget.task_nbytes)} available to each",
            ),
            *self._stored(),
            *self._chosen(),
        ]

    def summary(self) -> str:
        """The plan in words: tasks, bytes and peak memory."""
        return "\n".join([self.title, *(f"  {name:<8} {text}" for name, text in self.figures())])

    __repr__ = summary

    def _repr_html_(self) -> str:
        """The same in a notebook, with the genes that inputs share."""
        inputs = [(s.path, s.n_obs, self.n_genes_of(k)) for k, s in enumerate(self.sources) if not s.tagged]
        genes = overlap_rows(self.gene_overlaps, len(inputs))
        return render("plan.html", title=self.title, figures=self.figures(), inputs=inputs, genes=genes)

    def _stored(self) -> list[tuple[str, str]]:
        """How matrices will be stored, where the scan read their values."""
        found = [(m, self.values.get(m.name)) for m in self.matrices]
        return [
            (
                m.name,
                f"stored as {smallest_dtype(v, np.dtype(m.source_dtype))}; "
                f"{v.n_nan:,} NaN and {v.n_inf:,} infinite values, kept as they are",
            )
            for m, v in found
            if v is not None
        ]

    def _chosen(self) -> list[tuple[str, str]]:
        """How matrices will be laid out, where that is not the default."""
        layout = "packed: columns and whole numbers in as few bits as most need; annbatch_dask reads them"
        return [
            *([("layout", layout)] if self.options.layout == "packed" else []),
            *([("genes", "in the order of how many cells have them")] if self.options.gene_order != "names" else []),
        ]

    def _texts(self) -> list[str]:
        """Columns that are categorical in every input and are carried as strings."""
        kinds: dict[str, set[str]] = {}
        for s in self.sources:
            for c in s.columns:
                kinds.setdefault(c.path, set()).add(c.kind)
        return [c.name for c in self.columns if c.kind == "string" and kinds.get(c.path) == {"categorical"}]

    def _frames(self) -> list[str]:
        n_columns = Counter(c.frame for c in (self.source_column, *self.columns))
        return [f"{frame} ({_plural(n, 'column')})" for frame, n in n_columns.items()]

    def _counts(self) -> str:
        """Which matrix of the sources is X, and whether its values are counts."""
        words = {True: "whole numbers", False: "fractions", None: "zeros alone"}
        found = Counter((s.x.source_name, s.x.integral) for s in self.sources)
        parts = [f"{name} in {_plural(n, 'source')}: {words[whole]}" for (name, whole), n in found.items()]
        return f"{'; '.join(parts)} (of a sample)"


def _plural(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def canonical(value: object) -> object:
    """A record as JSON values, by the names of its fields, for digests that mean the same in every release.

    Fields that say nothing of its identity (``compare=False``), or have their default, are left out: so one that a
    later release adds changes no digest. A default must never be changed.
    """
    if is_dataclass(value):
        there = ((f, getattr(value, f.name)) for f in fields(value) if f.compare)
        return {f.name: canonical(v) for f, v in there if f.default is MISSING or v != f.default}
    if isinstance(value, tuple | list):
        return value if all(type(v) is str for v in value) else [canonical(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _digest(*parts: bytes) -> str:
    h = blake2b(digest_size=16)
    for part in parts:
        h.update(part)
    return h.hexdigest()


def build_plan(
    sources: Sequence[SourceSchema],
    options: Options,
    *,
    budget: Budget,
    var: pd.DataFrame | None = None,
    annotated: frozenset[str] = frozenset(),
    extension: Extension | None = None,
) -> Plan:
    """Decide a build.

    Parameters
    ----------
    sources
        One schema per input, in the user's order.
    options
        Sizes, seed and switches.
    budget
        Memory of a worker; sizes blocks and parts, and is enforced.
    var
        Columns to keep for the genes, indexed by every gene of the join; None keeps none.
    annotated
        Gene-wise and other elements that the collection gets beside var, such as ``"varm/PCs"``.
    extension
        For a build on top of a collection, whose datasets are the first sources.

    Returns
    -------
    The frozen plan.

    Raises
    ------
    SchemaError
        Where sources contradict each other.
    MemoryBudgetError
        Where a task cannot fit a worker.
    """
    n_kept, n_old = (0, 0) if extension is None else (extension.n_kept, extension.n_datasets)
    if not any(s.n_obs for s in sources[n_old:]):
        msg = f"the {len(sources) - n_old} inputs hold 0 cells in all; give at least one file that has cells"
        raise SchemaError(msg)
    sources = [s if s.tagged else options.elements.select(s) for s in sources]
    renamed = tuple(s.path for s in sources if not s.tagged and _has_own_tag(s))
    sources = [s if s.tagged else _rename_own_tag(s) for s in sources]
    for source in sources:
        check_unique(source)
        _check_has_x(source)
    if not options.allow_mixed_counts:
        check_counts(sources)
    common = _in_all(sources)
    genes = _gene_spaces(sources, options, extension, common)
    matrices = _unite_matrices(sources, genes, common)
    if extension is not None:
        _check_carried(sources[:n_old], matrices, common)
    left_out = _left_out(sources, common, annotated)
    options.elements.refuse(left_out, n_sources=len(sources) - n_old)
    sources = tuple(_keep(s, common) for s in sources)
    columns = tuple(c for c in unite_columns(sources) if c.path != f"{OBS}/{SRC_PATH}")
    columns = texts_of(columns, sources)
    _check_names(matrices, columns)
    _check_groupby(options.groupby, sources[n_kept:])
    placement = _place(options, [s.n_obs for s in sources], extension)
    costs = _Costs.of(sources, matrices, (*columns, unite_tags(sources)), genes, options, budget, n_kept)
    _check_chunk(options.n_obs_per_chunk, costs.row_nbytes)
    blocks = costs.cut()
    layout = costs.lay_out(placement)
    peak = costs.peaks(blocks, layout)
    budget.check(costs.name_largest(blocks), peak[0], costs.remedy(blocks))
    budget.check(
        f"gathering a dataset of {max(layout.sizes):,} cells",
        peak[1],
        f"lower {costs.lowered(layout)}, or start workers with more memory or fewer threads",
    )
    return Plan(
        options=options,
        sources=sources,
        blocks=blocks,
        layout=layout,
        placement=placement,
        var=pd.DataFrame(index=genes["var"].genes) if var is None else var.loc[genes["var"].genes],
        genes=genes,
        matrices=matrices,
        columns=columns,
        source_column=unite_tags(sources),
        left_out=left_out,
        index_name=_index_name(sources, columns),
        renamed=renamed,
        peak_nbytes=peak,
        budget=budget,
        extension=extension,
    )


def _has_own_tag(source: SourceSchema) -> bool:
    return any(c.path == f"{OBS}/{SRC_PATH}" for c in source.columns)


def _rename_own_tag(source: SourceSchema) -> SourceSchema:
    """A source whose own column ``src_path`` has another name, since the collection's says where a row came from."""
    if not _has_own_tag(source):
        return source
    if any(c.path == f"{OBS}/{INPUT_SRC_PATH}" for c in source.columns):
        msg = (
            f"{source.path}: obs has {SRC_PATH} and {INPUT_SRC_PATH}, which the first would be called, as the "
            f"collection has its own; rename one in load_adata, or leave it out with elements=['-{OBS}/{SRC_PATH}']"
        )
        raise SchemaError(msg)
    own = f"{OBS}/{SRC_PATH}"
    columns = (replace(c, name=INPUT_SRC_PATH, stored=SRC_PATH) if c.path == own else c for c in source.columns)
    return replace(source, columns=tuple(columns))


def _check_names(matrices: Sequence[MatrixSpec], columns: Sequence[ColumnSpec]) -> None:
    """Refuse names that are no name of a file: a store would take them for a path."""
    named = [(c.path, c.frame, c.name) for c in columns]
    split = [(m.name, m.name.partition("/")) for m in matrices]
    named += [(name, parent, key) for name, (parent, slash, key) in split if slash]
    for path, where, name in named:
        if "/" in name or name in ("", ".", ".."):
            msg = (
                f"{where} has {name!r}, which cannot be a name in a store; rename it in load_adata, or leave it out "
                f"with elements=['-{path}']"
            )
            raise SchemaError(msg)


def _index_name(sources: Sequence[SourceSchema], columns: Sequence[ColumnSpec]) -> str | None:
    """Name of the obs index, where all agree on one and no column has it: that keeps it, and the index has none."""
    names = {s.index_name for s in sources} - {c.name for c in columns if c.frame == OBS} - {SRC_PATH, "_index"}
    return names.pop() if len({s.index_name for s in sources}) == 1 and names else None


def _check_has_x(source: SourceSchema) -> None:
    if not any(m.name == "X" for m in source.matrices):
        msg = f"{source.path} has no X; name the matrix to shuffle with counts, or put it into X with load_adata"
        raise SchemaError(msg)


def _in_all(sources: Sequence[SourceSchema]) -> set[str]:
    """Matrices and frames that every source has; a column of obs may be missing, an element may not."""
    return set.intersection(*({m.name for m in s.matrices} | {c.frame for c in s.columns} | {OBS} for s in sources))


def _keep(source: SourceSchema, common: set[str]) -> SourceSchema:
    matrices = tuple(m for m in source.matrices if m.name in common)
    columns = tuple(c for c in source.columns if c.frame in common)
    none = np.zeros(0, object)  # the gene maps say what tasks need of the names
    return replace(source, matrices=matrices, columns=columns, var_names=none, raw_names=None, abundance=None)


def _left_out(sources: Sequence[SourceSchema], common: set[str], annotated: frozenset[str]) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for s in sources:
        names = dict.fromkeys([*(m.name for m in s.matrices), *(c.frame for c in s.columns), *s.left_out])
        for name in (n for n in names if n not in common and n not in annotated):
            out.setdefault(name, []).append(s.path)
    return out


def _check_groupby(names: Sequence[str], sources: Sequence[SourceSchema]) -> None:
    for name in names:
        lacking = [s.path for s in sources if name != SRC_PATH and f"{OBS}/{name}" not in {c.path for c in s.columns}]
        if len(lacking) == len(sources):
            msg = f"Could not find groupby columns: {name!r} is in no input's obs"
            raise SchemaError(msg)
        if lacking:
            msg = f"groupby columns {name!r} not present in all anndatas: {lacking[0]} lacks it; add it in load_adata"
            raise SchemaError(msg)


def _gene_spaces(
    sources: Sequence[SourceSchema], options: Options, extension: Extension | None, common: set[str]
) -> dict[str, GeneSpace]:
    """The collection's genes, which are those of X, and those of raw; with every source's place in them."""
    out = {}
    for name in ("X", "raw/X") if "raw/X" in common else ("X",):
        found = [next(m for m in s.matrices if m.name == name) for s in sources]
        listed = [s.genes_of(m) for s, m in zip(sources, found, strict=True)]
        genes = _join(listed, options.var_subset if name == "X" else None, extension)
        if name == "X" and options.gene_order == "abundance" and extension is None:
            genes = order_genes(genes, listed, [s.abundance for s in sources if s.abundance is not None])
        space = "var" if name == "X" else "raw"
        used: dict[tuple[int, str], NDArray[np.object_]] = {
            (k, m.genes): s.genes_of(m)
            for k, s in enumerate(sources)
            for m in s.matrices
            if m.name in common and m.genes and (m.name == "raw/X") == (space == "raw")
        }
        out[space] = GeneSpace.of(genes, used)
    return out


def _join(listed: Sequence[NDArray[np.object_]], subset: Sequence[str] | None, extension: Extension | None) -> pd.Index:
    """Genes of a join, or those a collection has, then perhaps new ones in the order of a join."""
    if extension is None:
        return join_genes(listed, subset)
    genes: pd.Index = pd.Index(listed[0], dtype=object)
    if extension.union:
        joined = join_genes(listed[extension.n_datasets :], subset)
        return genes.append(joined[~joined.isin(genes)])
    return genes


def _check_carried(datasets: Sequence[SourceSchema], matrices: Sequence[MatrixSpec], common: set[str]) -> None:
    """What the collection has must not get lost because new inputs lack it, and keeps its kind."""
    kinds = {m.name: m.kind for m in matrices}
    for name in dict.fromkeys(
        [m.name for s in datasets for m in s.matrices] + [c.frame for s in datasets for c in s.columns]
    ):
        if name not in kinds and name not in common:
            msg = f"the collection has {name} and an input lacks it; add it in load_adata"
            raise SchemaError(msg)
    for m in (m for s in datasets for m in s.matrices):
        if m.kind != kinds[m.name]:
            msg = f"{m.name} is {m.kind} in the collection and sparse in an input; make it dense in load_adata"
            raise SchemaError(msg)


def _place(options: Options, sizes: Sequence[int], extension: Extension | None) -> Permutation | Dealt:
    name = SWAP_OR_NOT if options.shuffle else IDENTITY
    if extension is not None and extension.mode == "extend":
        old = tuple(sizes[: extension.n_datasets])
        return Dealt(old, deal(old, sum(sizes[extension.n_datasets :])), options.seed, name)
    return Permutation(sum(sizes if extension is None else sizes[extension.n_kept :]), options.seed, name)


def _unite_matrices(
    sources: Sequence[SourceSchema], genes: Mapping[str, GeneSpace], common: set[str]
) -> tuple[MatrixSpec, ...]:
    """Matrices that every source has."""
    return tuple(
        _unite_matrix(m.name, [(s, x) for s in sources for x in s.matrices if x.name == m.name], genes)
        for m in sources[0].matrices
        if m.name in common
    )


def _unite_matrix(
    name: str, found: Sequence[tuple[SourceSchema, MatrixSchema]], genes: Mapping[str, GeneSpace]
) -> MatrixSpec:
    dtype = common_dtype(name, [(s.path, m.dtype, m.values) for s, m in found])
    dense, first = all(m.kind == "dense" for _, m in found), found[0][1]
    if first.genes:
        space: Genes = "raw" if name == "raw/X" else "var"
        n_cols = len(genes[space].genes)
        if dense and dtype.kind != "f" and any(m.n_cols < n_cols for _, m in found):
            absent = next(s.path for s, m in found if m.n_cols < n_cols)  # genes that are NaN in a dense join
            dtype = common_dtype(name, [*((s.path, m.dtype, m.values) for s, m in found), (absent, "float32", None)])
    else:
        space, n_cols = "", first.n_cols
        other = next(((s, m) for s, m in found if (m.n_cols, m.row_shape) != (n_cols, first.row_shape)), None)
        if other is not None:
            msg = (
                f"{name} has {_row_words(first)} in {found[0][0].path} and {_row_words(other[1])} in {other[0].path}; "
                f"make them equal in load_adata, or leave it out with elements=['-{name}']"
            )
            raise SchemaError(msg)
    return MatrixSpec(name, "dense" if dense else "csr", dtype.name, n_cols, space, first.row_shape)


def _row_words(matrix: MatrixSchema) -> str:
    return f"rows of shape {matrix.row_shape}" if matrix.row_shape else f"{matrix.n_cols} columns"


def _piece_nbytes(total: int, budget: Budget) -> int:
    """Size of a block or part: the default, more where that means too many tasks, less where memory is short."""
    room = (budget.task_nbytes - SMALL_NBYTES) // 4  # see plan/memory.py: a gather holds two parts and a segment
    return max(1, min(max(_BLOCK_NBYTES, total // _MAX_TASKS), room))


def _check_chunk(n_obs_per_chunk: int, row_nbytes: float) -> None:
    """Refuse chunks that no codec takes, each of which is held in memory whole."""
    if n_obs_per_chunk * row_nbytes > _MAX_CHUNK_NBYTES:
        msg = (
            f"n_obs_per_chunk is {n_obs_per_chunk:,} and a cell takes {row_nbytes:,.0f} bytes: a chunk would take "
            f"{format_nbytes(n_obs_per_chunk * row_nbytes)}, and holds {format_nbytes(_MAX_CHUNK_NBYTES)} at most; "
            f"give {max(1, int(_MAX_CHUNK_NBYTES / row_nbytes)):,} or fewer"
        )
        raise LayoutError(msg)


@dataclass(frozen=True)
class _Costs:
    """What the rows of a build weigh, and the blocks and parts that fit a worker."""

    sources: tuple[SourceSchema, ...]
    matrices: tuple[MatrixSpec, ...]
    columns: tuple[ColumnSpec, ...]
    options: Options
    budget: Budget
    n_kept: int
    shared_nbytes: int

    @classmethod
    def of(
        cls,
        sources: tuple[SourceSchema, ...],
        matrices: tuple[MatrixSpec, ...],
        columns: tuple[ColumnSpec, ...],
        genes: Mapping[str, GeneSpace],
        options: Options,
        budget: Budget,
        n_kept: int,
    ) -> _Costs:
        maps = [m for space in genes.values() for m in space.maps]
        shared = max(0, int(shared_nbytes(sources, columns, maps)) - _JOB_NBYTES) // budget.n_threads
        return cls(sources, matrices, columns, options, budget, n_kept, shared)

    @property
    def _obs_nbytes(self) -> int:
        return 8 * (len(self.columns) + 1) + 24  # numbers and codes, the name, the place

    @cached_property
    def _total(self) -> int:
        """Bytes of all rows that move, as the sources store them."""
        return int(_whole(self._moved, [read_weight(s, obs_nbytes=self._obs_nbytes) for s in self._moved]))

    @property
    def _moved(self) -> tuple[SourceSchema, ...]:
        return self.sources[self.n_kept :]

    @property
    def _piece(self) -> int:
        return _piece_nbytes(self._total, self.budget)

    @cached_property
    def _part_weights(self) -> list[Weight]:
        obs = self._obs_nbytes
        return [part_weight(s, self.matrices, self.columns, obs_nbytes=obs) for s in self._moved]

    def cut(self) -> tuple[Block, ...]:
        """The blocks of the scatter tasks."""
        obs, room = self._obs_nbytes, self.budget.task_nbytes - self.shared_nbytes
        return cut_blocks(
            self.sources,
            skip=self.n_kept,
            block_nbytes=self._piece,
            csc_nbytes=max(_BLOCK_NBYTES, (room - SMALL_NBYTES) // 2),
            obs_nbytes=obs,
            room=Room(
                room,
                [held_weight(s, self.matrices, self.columns, obs_nbytes=obs) for s in self.sources],
                [fixed_nbytes(s) for s in self.sources],
            ),
        )

    @cached_property
    def row_nbytes(self) -> float:
        """Bytes of an output row on average."""
        return max(1.0, _whole(self._moved, self._part_weights) / sum(s.n_obs for s in self._moved))

    @cached_property
    def _heaviest(self) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """Bytes of the heaviest rows, where a part's rows are not drawn from all alike."""
        is_mixed = self.options.shuffle and not self.options.groupby
        return None if is_mixed else heaviest_rows(self._moved, self._part_weights)

    def lay_out(self, placement: Permutation | Dealt) -> Layout:
        """Datasets of the size asked for, and parts that fit memory."""
        rows = int(self._piece / self.row_nbytes)
        if self._heaviest is not None:
            rows = int(np.interp(self._piece, self._heaviest[1], self._heaviest[0]))
        return _lay_out(self.options, placement, row_nbytes=self.row_nbytes, part_rows=max(1, rows))

    def peaks(self, blocks: Sequence[Block], layout: Layout) -> tuple[int, int]:
        """Of a scatter task, and of a gather task."""
        part = layout.part_rows * self.row_nbytes
        if self._heaviest is not None:
            part = float(np.interp(layout.part_rows, *self._heaviest))
        n_rows = max(layout.sizes)
        collected, written = frame_nbytes(self._moved, self.columns, mixed=self.options.shuffle)
        gather = gather_peak_nbytes(
            part_nbytes=int(part),
            segment_nbytes=int(min(max(b.n_bytes for b in blocks), part)),
            obs_nbytes=int(n_rows * max(3 * self._obs_nbytes, collected)),
            frame_nbytes=int(n_rows * written + categories_nbytes(self.columns)),
            chunk_nbytes=int(self._chunks(n_rows)),
        )
        return max(b.peak_nbytes for b in blocks) + self.shared_nbytes, gather + self.shared_nbytes

    def lowered(self, layout: Layout) -> str:
        """The options that make a gather task smaller."""
        is_large = self._chunks(max(layout.sizes)) > IN_FLIGHT_NBYTES
        return "n_obs_per_chunk or dataset_size" if is_large else "dataset_size"

    def _chunks(self, n_rows: int) -> float:
        """Bytes of chunks that are filled or encoded: those of the largest dataset."""
        rows = min(self.options.n_obs_per_chunk, n_rows)
        sizes = [rows * n for m in self.matrices for n in self._array_rows(m)]
        return sum(sizes) + 3 * max(sizes)

    def _array_rows(self, spec: MatrixSpec) -> list[float]:
        """Bytes of a row in each of the arrays that a matrix is stored as."""
        item = np.dtype(spec.source_dtype).itemsize
        if spec.kind == "dense":
            return [float(spec.n_cols * item)]
        found = [(s, m) for s in self._moved for m in s.matrices if m.name == spec.name]
        n_values = sum(s.n_obs * m.n_cols if m.kind == "dense" else int(m.nnz[-1]) for s, m in found)
        mean = n_values / sum(s.n_obs for s in self._moved)
        return [mean * item, mean * index_dtype(spec.n_cols).itemsize, mean * 8]  # indptr's chunks are as long

    def _largest(self, blocks: Sequence[Block]) -> SourceSchema:
        return self.sources[max(blocks, key=lambda b: b.peak_nbytes).source]

    def name_largest(self, blocks: Sequence[Block]) -> str:
        """The largest scatter task, in words."""
        source = self._largest(blocks)
        if source.resident_nbytes:
            return f"a scatter task of {source.path}, which is {format_nbytes(source.resident_nbytes)} in memory,"
        if fixed := fixed_nbytes(source):
            return f"a scatter task of {source.path}, whose chunks take {format_nbytes(fixed + IN_FLIGHT_NBYTES)},"
        return "the largest scatter task"

    def remedy(self, blocks: Sequence[Block]) -> str:
        """What helps where it is too large."""
        source, more = self._largest(blocks), "start workers with more memory or fewer threads"
        if source.resident_nbytes:
            return f"return a backed or lazy AnnData from load_adata, or write the file with anndata anew; or {more}"
        return f"write the file with smaller chunks, or {more}" if fixed_nbytes(source) else more


def _whole(sources: Sequence[SourceSchema], weights: Sequence[Weight]) -> float:
    """Bytes of all rows."""
    return sum(float(w.before(s, np.array([s.n_obs]))[0]) for s, w in zip(sources, weights, strict=True))


def _lay_out(options: Options, placement: Permutation | Dealt, *, row_nbytes: float, part_rows: int) -> Layout:
    n_obs = placement.n_obs
    if isinstance(placement, Dealt):
        sizes = tuple(a + b for a, b in zip(placement.old, placement.new, strict=True))
        return Layout(sizes, min(part_rows, max(sizes)))
    if options.dataset_rows is not None:
        rows = options.dataset_rows
    elif options.dataset_nbytes is not None:
        rows = int(options.dataset_nbytes / row_nbytes)
    else:
        rows = n_obs
    if rows < 1:
        msg = (
            f"dataset_size holds {options.dataset_nbytes or options.dataset_rows:,} and a cell takes "
            f"{row_nbytes:,.0f} bytes, so not one fits; raise dataset_size"
        )
        raise LayoutError(msg)
    return Layout.even(n_obs, min(rows, n_obs), min(part_rows, rows, n_obs))
