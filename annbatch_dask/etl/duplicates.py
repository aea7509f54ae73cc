"""Looks for cells whose X is equal to an earlier cell's, and says how many of which file stand in which other one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from annbatch_dask.engines.base import Engine, run_stage
from annbatch_dask.errors import DuplicateCellsError
from annbatch_dask.etl.cells import comparable_dtype, n_bins
from annbatch_dask.etl.compare import Candidates, LeftOut, collect, compare, find
from annbatch_dask.etl.job import Job, JobFile
from annbatch_dask.etl.receipts import CompareReceipt, FindReceipt, ScatterReceipt, decode
from annbatch_dask.events import Callback
from annbatch_dask.formatting import first_few
from annbatch_dask.manifest import DuplicatesRecord
from annbatch_dask.plan.dtypes import merge_ranges
from annbatch_dask.plan.plan import Plan

__all__ = ["Duplicates", "find_duplicates"]

_MAX_PAIRS = 64
"""Pairs of files that the manifest counts, which keeps it small with a thousand inputs."""


@dataclass(frozen=True)
class Duplicates:
    """Duplicates of a build, and what is left out for their sake.

    Attributes
    ----------
    record
        For the manifest.
    datasets, sources
        What is left out of each dataset of the build, and of each source of its plan.
    """

    record: DuplicatesRecord
    datasets: LeftOut
    sources: LeftOut


def find_duplicates(
    job: Job, file: JobFile, engine: Engine, callback: Callback, scattered: Sequence[ScatterReceipt]
) -> Duplicates | None:
    """Look for duplicates if the build asks for it, and refuse them if it asks for that.

    Raises
    ------
    DuplicateCellsError
        With the files they are in.
    """
    plan = job.plan
    if plan.options.duplicates == "keep":
        return None
    found = run_stage(
        engine,
        "find",
        find,
        [(file, k) for k in range(n_bins(plan.n_obs))],
        callback,
        size=(0, 0),
        measure=lambda _, r: (r.n_rows, 0),
        describe="hashes {}".format,
    )
    compared = _compare_all(job, file, engine, callback, scattered, found) if any(r.cells for r in found) else []
    pairs: Counter[tuple[int, int]] = Counter()
    for receipt in compared:
        pairs.update({(a, b): n for a, b, n in receipt.pairs})
    names = [m.name for m in plan.matrices if m.kind == "csr"]
    result = Duplicates(
        _record(plan, pairs),
        LeftOut.of([r.datasets for r in compared if r.datasets], plan.n_datasets, names),
        LeftOut.of([r.sources for r in compared if r.sources], len(plan.sources), names),
    )
    if plan.options.duplicates == "error" and result.record.n_obs:
        raise _refused(plan, result.record)
    return result


def _compare_all(
    job: Job,
    file: JobFile,
    engine: Engine,
    callback: Callback,
    scattered: Sequence[ScatterReceipt],
    found: Sequence[FindReceipt],
) -> list[CompareReceipt]:
    """Compare cells whose hashes are equal."""
    plan = job.plan
    n_cells = np.zeros(len(plan.blocks), np.int64)
    for receipt in found:
        n_cells += decode(receipt.cells) if receipt.cells else 0
    nbytes = sum(n * b.n_bytes / b.n_rows for n, b in zip(n_cells.tolist(), plan.blocks, strict=True) if b.n_rows)
    blocks = np.flatnonzero(n_cells).tolist()
    dtype = comparable_dtype(
        plan.x, merge_ranges(r.ranges["X"] for r in scattered), repeats=any(r.repeats for r in scattered)
    )
    candidates = Candidates(
        bins=tuple(k for k, r in enumerate(found) if r.cells),
        blocks=tuple(blocks),
        n_pieces=max(1, round(nbytes / max(b.n_bytes for b in plan.blocks))),
        dtype=dtype.name,
    )
    candidates.save(job.scratch)
    run_stage(
        engine,
        "collect",
        collect,
        [(file, b) for b in blocks],
        callback,
        size=(int(n_cells.sum()), 0),
        measure=lambda _, r: (r.n_rows, r.n_bytes),
        describe=lambda k: f"{plan.sources[plan.blocks[blocks[k]].source].path}, block {blocks[k]}",
    )
    return run_stage(
        engine,
        "compare",
        compare,
        [(file, k) for k in range(candidates.n_pieces)],
        callback,
        size=(int(n_cells.sum()), 0),
        measure=lambda _, r: (r.n_rows, 0),
        describe="cells {}".format,
    )


def _record(plan: Plan, pairs: Counter[tuple[int, int]]) -> DuplicatesRecord:
    assert plan.source_column.categories is not None  # it always is a categorical
    names = [str(v) for v in plan.source_column.categories.values]
    ordered = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(n for _, n in ordered[_MAX_PAIRS:])
    shown = tuple((names[a], names[b], n) for (a, b), n in ordered[:_MAX_PAIRS])
    return DuplicatesRecord(plan.options.duplicates, pairs.total(), shown + ((("", "", rest),) if rest else ()))


def _refused(plan: Plan, record: DuplicatesRecord) -> DuplicateCellsError:
    shown = first_few((f"{n:,} of {a} in {b}" for a, b, n in record.pairs if a), separator="; ")
    msg = (
        f"{record.n_obs:,} of {plan.n_obs:,} cells have the X of an earlier cell: {shown}; give "
        "duplicates='drop' to leave them out, 'report' to have them counted, or leave a file out"
    )
    return DuplicateCellsError(msg)
