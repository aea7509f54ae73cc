"""Turns the scanned schemas into a frozen plan. Pure: equal schemas and options give equal plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annbatch_dask.errors import SchemaError
from annbatch_dask.formatting import first_few
from annbatch_dask.manifest import SRC_PATH
from annbatch_dask.plan.columns import texts_of, unite_columns, unite_tags
from annbatch_dask.plan.dtypes import common_dtype, sum_dtype
from annbatch_dask.plan.elements import check_counts
from annbatch_dask.plan.genes import GeneSpace, check_genes, join_genes, order_genes
from annbatch_dask.plan.memory import Budget
from annbatch_dask.plan.naming import naming_record, original_names
from annbatch_dask.plan.options import Extension, Options
from annbatch_dask.plan.permutation import IDENTITY, SWAP_OR_NOT, Permutation
from annbatch_dask.plan.placement import ExtendPermutation, deal
from annbatch_dask.plan.plan import Plan
from annbatch_dask.plan.schema import INPUT_SRC_PATH, OBS, ColumnSpec, Genes, MatrixSchema, MatrixSpec, SourceSchema
from annbatch_dask.plan.sizing import Sizing, check_chunk

__all__ = ["build_plan", "place_rows"]


def build_plan(
    sources: Sequence[SourceSchema],
    options: Options,
    *,
    budget: Budget,
    var: pd.DataFrame | None = None,
    annotated: frozenset[str] = frozenset(),
    extension: Extension | None = None,
    transposes: bool = True,
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
    transposes
        Whether inputs that are stored by columns may be put in the order of their rows before blocks are read.

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
        msg = "no input has a cell; give at least one file that has cells"
        raise SchemaError(msg)
    sources = [s if s.is_dataset else options.elements.select(s) for s in sources]
    renamed = tuple(s.path for s in sources if not s.is_dataset and _has_own_tag(s))
    sources = [s if s.is_dataset else _rename_own_tag(s) for s in sources]
    for source in sources:
        _check_has_x(source)
    check_genes(sources, options.naming)
    if not options.allow_mixed_counts:
        check_counts(sources)
    common = _in_all(sources)
    genes, called = _gene_spaces(sources, options, extension, common)
    matrices = _unite_matrices(sources, genes, common, adds=options.naming.adds)
    if extension is not None:
        _check_carried(sources[:n_old], matrices, common)
    left_out = _left_out(sources, common, annotated)
    options.elements.refuse(left_out, n_sources=len(sources) - n_old)
    naming = naming_record(sources, options.naming, called)
    sources = tuple(_keep(s, common) for s in sources)
    columns = tuple(c for c in unite_columns(sources) if c.path != f"{OBS}/{SRC_PATH}")
    columns = texts_of(columns, sources)
    _check_names(matrices, columns)
    _check_groupby(options.groupby, sources[n_kept:])
    _check_stats(options, matrices, (*columns, unite_tags(sources)))
    placement = place_rows(options, [s.n_obs for s in sources], extension)
    costs = Sizing.of(sources, matrices, (*columns, unite_tags(sources)), genes, options, budget, n_kept)
    check_chunk(options.n_obs_per_chunk, costs.row_nbytes)
    blocks = costs.cut(transposes=transposes)
    layout = costs.lay_out(placement)
    transposed = costs.transposed(blocks) if transposes else ()
    peak = costs.peaks(blocks, layout, transposed)
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
        var=genes["var"].frame(var),
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
        naming=naming,
        transposed=transposed,
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
    slim = replace(source, matrices=matrices, columns=columns, var_names=none, raw_names=None, abundance=None)
    return replace(slim, index_names=None, raw_index_names=None, unnamed={})


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
            known = dict.fromkeys(c.name for s in sources for c in s.columns if c.frame == OBS)
            there = first_few(map(repr, known), 10)
            msg = f"Could not find groupby columns: {name!r} is in no input's obs, which has {there}"
            raise SchemaError(msg)
        if lacking:
            msg = f"groupby columns {name!r} not present in all anndatas: {lacking[0]} lacks it; add it in load_adata"
            raise SchemaError(msg)


def _check_stats(options: Options, matrices: Sequence[MatrixSpec], columns: Sequence[ColumnSpec]) -> None:
    """Refuse statistics of what is no number to sum up, or by a column that has no categories."""
    if not options.stats:
        return
    x = next(m for m in matrices if m.name == "X")
    if np.dtype(x.source_dtype).kind not in "buif":
        msg = f"X is {x.source_dtype}, of which there are no statistics; leave stats out"
        raise SchemaError(msg)
    if not options.stats_by:
        return
    found = {c.name: c for c in columns if c.frame == OBS}
    column = found.get(options.stats_by)
    if column is None:
        msg = f"stats_by={options.stats_by!r} is in no input's obs, which has {', '.join(map(repr, found))}; name one"
        raise SchemaError(msg)
    if column.categories is None:
        msg = (
            f"stats_by={options.stats_by!r} is a column of {column.dtype or column.kind}, and statistics are by "
            "categories; make it categorical in load_adata, or name another column"
        )
        raise SchemaError(msg)


def _gene_spaces(
    sources: Sequence[SourceSchema], options: Options, extension: Extension | None, common: set[str]
) -> tuple[dict[str, GeneSpace], dict[str, tuple[str, ...]]]:
    """The collection's genes, which are those of X, and those of raw, with every source's place in them.

    And what inputs call the genes of X that they call differently.
    """
    out: dict[str, GeneSpace] = {}
    called: dict[str, tuple[str, ...]] = {}
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
        out[space] = GeneSpace.of(genes, used, first=options.naming.on_duplicate == "first")
        if not options.naming.is_plain:
            names, many = original_names(genes, [s.names_in(m.genes) for s, m in zip(sources, found, strict=True)])
            kept = extension is not None and extension.n_kept  # datasets that stay have a var, as all shall have it
            known = (sources[0].index_names if space == "var" else sources[0].raw_index_names) if kept else names
            out[space] = replace(out[space], input_names=known)
            called = many if space == "var" else called
    return out, called


def _join(listed: Sequence[NDArray[np.object_]], subset: Sequence[str] | None, extension: Extension | None) -> pd.Index:
    """Genes of a join, or those a collection has, then perhaps new ones in the order of a join."""
    if extension is None:
        return join_genes(listed, subset)
    genes: pd.Index = pd.Index(listed[0], dtype=object)
    if extension.union:
        joined = join_genes(listed[extension.n_datasets :], subset)
        return genes.append(joined[~joined.isin(genes)])
    if subset is not None and len(others := genes[~genes.isin(list(subset))]):
        msg = (
            f"var_subset lacks {len(others):,} of the collection's {len(genes):,} genes, such as {list(others[:3])}, "
            "and an extension keeps them all; leave var_subset out, or build a new collection of all inputs"
        )
        raise SchemaError(msg)
    return genes


def _check_carried(datasets: Sequence[SourceSchema], matrices: Sequence[MatrixSpec], common: set[str]) -> None:
    """Refuse new inputs that lack an element of the collection or have it in another kind."""
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


def place_rows(options: Options, sizes: Sequence[int], extension: Extension | None) -> Permutation | ExtendPermutation:
    """Where rows go, from the numbers of rows of all sources."""
    name = SWAP_OR_NOT if options.shuffle else IDENTITY
    if extension is not None and extension.mode == "extend":
        old = tuple(sizes[: extension.n_datasets])
        return ExtendPermutation(old, deal(old, sum(sizes[extension.n_datasets :])), options.seed, name)
    return Permutation(sum(sizes if extension is None else sizes[extension.n_kept :]), options.seed, name)


def _unite_matrices(
    sources: Sequence[SourceSchema], genes: Mapping[str, GeneSpace], common: set[str], *, adds: bool
) -> tuple[MatrixSpec, ...]:
    """Matrices that every source has. ``adds``: values of genes that become one are added up."""
    return tuple(
        _unite_matrix(m.name, [(s, x) for s in sources for x in s.matrices if x.name == m.name], genes, adds=adds)
        for m in sources[0].matrices
        if m.name in common
    )


def _unite_matrix(
    name: str, found: Sequence[tuple[SourceSchema, MatrixSchema]], genes: Mapping[str, GeneSpace], *, adds: bool
) -> MatrixSpec:
    dense, first = all(m.kind == "dense" for _, m in found), found[0][1]
    space: Genes = "" if not first.genes else "raw" if name == "raw/X" else "var"
    dtypes = [(s.path, m.dtype, m.values) for s, m in found]
    if space and adds:
        met = [genes[space].most_met(k, m.genes) for k, (_, m) in enumerate(found)]
        dtypes = [(path, sum_dtype(d, n), values) for (path, d, values), n in zip(dtypes, met, strict=True)]
    dtype = common_dtype(name, dtypes)
    if space:
        n_cols = len(genes[space].genes)
        lacking = (s.path for k, (s, m) in enumerate(found) if genes[space].n_genes_of(k, m.genes) < n_cols)
        if dense and dtype.kind != "f" and (absent := next(lacking, None)) is not None:  # NaN in a dense join
            dtype = common_dtype(name, [*dtypes, (absent, "float32", None)])
    else:
        n_cols = first.n_cols
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
