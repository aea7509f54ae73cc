"""A plan in words: its tasks, bytes and peak memory, as text and for a notebook."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from annbatch_dask.formatting import format_bytes, plural
from annbatch_dask.html import overlap_rows, render
from annbatch_dask.plan.costs import bounds_of, csc_nbytes
from annbatch_dask.plan.dtypes import smallest_dtype
from annbatch_dask.plan.layout import MAX_READS
from annbatch_dask.plan.plan import Plan
from annbatch_dask.plan.reads import MAX_OPEN, expected_reads

__all__ = ["as_html", "figures", "summary", "title"]

_DUPLICATES = {
    "report": "cells with the X of an earlier cell are looked for, and counted by file",
    "drop": "cells with the X of an earlier cell are looked for, and left out: datasets become a little uneven",
    "error": "cells with the X of an earlier cell are looked for, and refused before datasets are written",
}

_TRANSPOSED = (
    "once: {} that are put in the order of rows first, in the scratch folder, and are read from there; written by rows "
    "(adata.X.tocsr()) they need not be"
)


def title(plan: Plan) -> str:
    """Title of the plan: inputs and outputs in one line."""
    upto = "up to " if plan.is_survey else ""
    return (
        f"Plan {plan.fingerprint[:12]}: {upto}{plan.n_obs:,} cells x {plan.n_vars:,} genes "
        f"from {plural(len(plan.sources), 'source')} into {plural(plan.n_datasets, 'dataset')} "
        f"of up to {max(plan.layout.sizes):,} cells"
    )


def figures(plan: Plan, notes: Sequence[tuple[str, str]] = ()) -> list[tuple[str, str]]:
    """Named figures of the plan: tasks, bytes, peak memory and others, after notes of the same form."""
    scatter, gather = plan.peak_nbytes
    exact = all(m.exact for s in plan.sources for m in s.matrices)
    about = "" if exact else "about "
    n_measured = sum(not plan.sources[b.source].is_dataset for b in plan.blocks) if plan.is_survey else 0
    n = len(plan.blocks) + plan.n_datasets + n_measured + len(plan.strips)
    first = f"{len(plan.strips):,} transpose + " if plan.strips else ""
    first += f"{n_measured:,} measure + " if n_measured else ""
    groupby = f", each dataset sorted by {', '.join(plan.options.groupby)}" if plan.options.groupby else ""
    texts = _texts(plan)
    missing = [f"{name} ({plural(len(paths), 'source')})" for name, paths in plan.left_out.items()]
    return [
        *notes,
        ("order", f"{plan.placement.name}, seed {plan.seed}{groupby}"),
        ("carried", ", ".join([*(m.name for m in plan.matrices), *_frames(plan)])),
        ("X from", _counts(plan)),
        *_dropped(plan),
        *([("qc", f"{', '.join(plan.options.qc.rules)}: X is read once more")] if plan.options.qc is not None else []),
        *([("genes", plan.naming.rules), *plan.naming.effects] if plan.naming is not None else []),
        *_new_genes(plan),
        *([("not found", f"{plural(len(plan.not_found), 'name')} of var_subset")] if plan.not_found else []),
        *([("left out", ", ".join(missing))] if missing else []),
        *([("strings", f"{', '.join(texts)}: categories in the inputs, nearly one a cell")] if texts else []),
        ("tasks", f"{n:,}: {first}{len(plan.blocks):,} scatter + {plan.n_datasets:,} gather"),
        (
            "bytes",
            f"{about}{format_bytes(plan.n_bytes_read)} to read (uncompressed); "
            "at most as much to spill and to write, less with smaller dtypes",
        ),
        ("limit", _limit(plan)),
        *_spilled(plan),
        *_columnwise(plan),
        (
            "peak",
            f"{format_bytes(scatter)} a scatter task, {format_bytes(gather)} a gather task; "
            f"{format_bytes(plan.budget.task_nbytes)} available to each",
        ),
        *_stored(plan),
        *_chosen(plan),
    ]


def summary(plan: Plan, notes: Sequence[tuple[str, str]] = (), first: str = "") -> str:
    """The plan in words: tasks, bytes and peak memory."""
    return "\n".join([first or title(plan), *(f"  {name:<8} {text}" for name, text in figures(plan, notes))])


def as_html(plan: Plan, notes: Sequence[tuple[str, str]] = (), first: str = "") -> str:
    """The plan for a notebook, with the genes that inputs share."""
    inputs = [(s.path, s.n_obs, plan.n_genes_of(k)) for k, s in enumerate(plan.sources) if not s.is_dataset]
    genes = overlap_rows(plan.gene_overlaps, len(inputs))
    return render("plan.html", title=first or title(plan), figures=figures(plan, notes), inputs=inputs, genes=genes)


def _stored(plan: Plan) -> list[tuple[str, str]]:
    """Describe the stored dtypes, if the scan read the values."""
    found = [(m, plan.values.get(m.name)) for m in plan.matrices]
    return [
        (
            m.name,
            f"stored as {smallest_dtype(v, np.dtype(m.source_dtype))}; "
            f"{v.n_nan:,} NaN and {v.n_inf:,} infinite values, kept as they are",
        )
        for m, v in found
        if v is not None
    ]


def _chosen(plan: Plan) -> list[tuple[str, str]]:
    """Describe layout and gene order, if not the defaults."""
    layout = "packed: columns and whole numbers in as few bits as most need; annbatch_dask reads them"
    return [
        *([("layout", layout)] if plan.options.layout == "packed" else []),
        *([("twice", _DUPLICATES[plan.options.duplicates])] if plan.options.duplicates != "keep" else []),
        *([("genes", "in the order of how many cells have them")] if plan.options.gene_order != "names" else []),
        *([("stats", f"of each gene{_by(plan)}")] if plan.options.stats else []),
    ]


def _new_genes(plan: Plan) -> list[tuple[str, str]]:
    """Describe the genes that an extension adds, if any: of the cells that are there nobody knows their counts."""
    n_new = plan.n_vars - plan.n_genes_of(0) if plan.extension is not None and plan.extension.union else 0
    what = f"{n_new:,}, of which the collection's cells have no counts, even where their files had some"
    return [("new genes", what)] if n_new else []


def _dropped(plan: Plan) -> list[tuple[str, str]]:
    """Describe the rows that are kept, and what drops the others, if rows were chosen."""
    kept = [s.kept for s in plan.sources if s.kept is not None]
    if not kept:
        return []
    n_all = sum(s.n_obs for s in plan.sources if not s.is_dataset and s.kept is None) + sum(k.n_rows for k in kept)
    n_kept = sum(s.n_obs for s in plan.sources if not s.is_dataset)
    rules: Counter[str] = Counter()
    for k in kept:
        rules.update(dict(k.dropped))
    dropped = ", ".join(f"{rule} drops {n:,}" for rule, n in rules.items()) or "none is dropped"
    return [("cells", f"{n_kept:,} of {n_all:,}: {dropped}")]


def _by(plan: Plan) -> str:
    """Describe the groups of statistics."""
    column = plan.stats_column
    if column is None or column.categories is None:
        return ""
    return f", by {column.name} ({plural(len(column.categories.values), 'group')})"


def _limit(plan: Plan) -> str:
    """What takes longest: inflating, unless a disk is slower than it."""
    work = bounds_of([plan.sources[k] for k in sorted({b.source for b in plan.blocks})], plan.n_bytes_read)
    seconds = max(work.inflate_s, 0.1)
    return (
        f"inflate, about {seconds:,.1f} s of one core; spill, where the scratch folder takes less than "
        f"{format_bytes(int(work.spill_nbytes / seconds))} a second for each core; write, where the collection's takes "
        f"less than {format_bytes(int(work.write_nbytes / seconds))}"
    )


def _spilled(plan: Plan) -> list[tuple[str, str]]:
    """Describe the reads of spill files, if there are many."""
    if len(plan.blocks) <= MAX_OPEN:
        return []
    n, nbytes = expected_reads(plan)
    return [
        (
            "spill",
            f"{len(plan.blocks):,} files, of which a gather task reads about {n:,} ranges of "
            f"{format_bytes(int(nbytes))}; fewer with more memory a worker thread",
        )
    ]


def _columnwise(plan: Plan) -> list[tuple[str, str]]:
    """Describe how often inputs are read that are stored by columns, and larger than a task."""
    n_blocks = Counter(b.source for b in plan.blocks)
    twice = [s for k, s in enumerate(plan.sources) if 1 < n_blocks[k] <= MAX_READS and csc_nbytes(s)]
    once = [plan.sources[t.source] for t in plan.transposed]
    words = "stored by columns (CSC), and read"
    return [
        *(
            ("columns", f"{plural(len(some), 'input')} {words} {how.format(format_bytes(sum(map(csc_nbytes, some))))}")
            for some, how in ((twice, f"{MAX_READS} times: {{}} more to read"), (once, _TRANSPOSED))
            if some
        )
    ]


def _texts(plan: Plan) -> list[str]:
    """Columns that are categorical in every input and are carried as strings."""
    kinds: dict[str, set[str]] = {}
    for s in plan.sources:
        for c in s.columns:
            kinds.setdefault(c.path, set()).add(c.kind)
    return [c.name for c in plan.columns if c.kind == "string" and kinds.get(c.path) == {"categorical"}]


def _frames(plan: Plan) -> list[str]:
    n_columns = Counter(c.frame for c in (plan.source_column, *plan.columns))
    return [f"{frame} ({plural(n, 'column')})" for frame, n in n_columns.items()]


def _counts(plan: Plan) -> str:
    """Describe which matrix of the sources becomes X, and whether its values are counts."""
    words = {True: "whole numbers", False: "fractions", None: "zeros alone"}
    found = Counter((s.x.source_name, s.x.integral) for s in plan.sources)
    parts = [f"{name} in {plural(n, 'source')}: {words[whole]}" for (name, whole), n in found.items()]
    return f"{'; '.join(parts)} (of a sample)"
