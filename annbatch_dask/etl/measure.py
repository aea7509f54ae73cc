"""measure: counts, genes and shares of each cell of the inputs, by which rules keep it or not. X is read once for it.

A task's verdict is in its receipt, a bit for each row; what it measured stays in the scratch folder, where a scatter
task takes it from for obs.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import numpy as np

from annbatch_dask.etl.job import KEPT_NBYTES, Job, JobFile, load_job, trim_memory
from annbatch_dask.etl.metrics import judge_rows, read_metrics, with_metrics, write_metrics
from annbatch_dask.etl.transpose import read_rows
from annbatch_dask.plan.layout import Block
from annbatch_dask.plan.narrow import Verdict, narrow_plan
from annbatch_dask.plan.plan import Plan
from annbatch_dask.sources.chosen import choose_rows
from annbatch_dask.sources.open import Source, WholeSource
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.scratch import find_receipt, write_receipt

__all__ = ["MeasureReceipt", "decide", "measure_rows", "measured_blocks", "with_verdicts"]


@dataclass(frozen=True)
class MeasureReceipt:
    """Receipt of a task that measured a block.

    Attributes
    ----------
    n_rows, n_bytes
        Rows of the block, and bytes read, uncompressed.
    bits
        Which rows are kept, packed, in base64.
    nnz, dropped
        As of :class:`annbatch_dask.plan.narrow.Verdict`.
    reused
        Whether the task had been run before.
    """

    n_rows: int
    n_bytes: int
    bits: str
    nnz: int
    dropped: Mapping[str, int]
    reused: bool = False

    @classmethod
    def of(cls, block: Block, verdict: Verdict) -> Self:
        """Receipt of a verdict."""
        bits = base64.b64encode(np.packbits(verdict.mask)).decode()
        return cls(block.n_rows, block.n_bytes, bits, verdict.nnz, dict(verdict.dropped))

    @property
    def verdict(self) -> Verdict:
        """What was decided."""
        bits = np.frombuffer(base64.b64decode(self.bits), np.uint8)
        return Verdict(np.unpackbits(bits, count=self.n_rows).astype(bool), self.nnz, self.dropped)

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values."""
        return {k: v for k, v in vars(self).items() if k != "reused"}


def measured_blocks(plan: Plan) -> list[int]:
    """Numbers of the blocks that are measured: those of the inputs, not of a collection's own datasets."""
    return [k for k, block in enumerate(plan.blocks) if not plan.sources[block.source].is_dataset]


def measure_rows(file: JobFile, index: int) -> MeasureReceipt:
    """Measure a block, unless it was measured before."""
    job = load_job(file)
    plan, block = job.plan, job.plan.blocks[index]
    assert plan.options.qc is not None  # else there is no such stage
    task, is_told = f"measure-{index:06d}", bool(plan.options.qc.annotate)
    found = find_receipt(file.scratch, task)
    if found is not None and (not is_told or read_metrics(file.scratch, index, plan.options.qc) is not None):
        return MeasureReceipt(**found, reused=True)
    source = plan.sources[block.source]
    try:
        metrics, verdict = read_rows(job, block, partial(judge_rows, plan.options.qc, source, block))
    except Exception as e:
        e.add_note(f"while measuring {source.path}, rows {block.start:,} to {block.stop:,}")
        raise
    if is_told:
        write_metrics(file.scratch, index, metrics.take(verdict.mask))
    receipt = MeasureReceipt.of(block, verdict)
    write_receipt(file.scratch, task, receipt.to_json())
    trim_memory(keep_nbytes=KEPT_NBYTES)
    return receipt


# --- the plan that follows -----------------------------------------------------------------------------------------


def with_verdicts(job: Job, measured: Folder, indices: Sequence[int], receipts: Sequence[MeasureReceipt]) -> Job:
    """The job of the rows that are kept; ``measured``: the folder in which it stands what they are like."""
    verdicts = {k: r.verdict for k, r in zip(indices, receipts, strict=True)}
    return replace(job, plan=narrow_plan(job.plan, verdicts), measured=measured)


def decide(plan: Plan, whole: WholeSource) -> tuple[Plan, Callable[[Block], Source]] | None:
    """The plan of the rows of its one input that are kept, and the input as each block has it; None if none is kept.

    What a build does in a stage of tasks, here and now.
    """
    qc, opened = plan.options.qc, choose_rows(whole, plan.sources[-1].kept)
    if qc is None:
        return plan, lambda _: opened
    found = {k: judge_rows(qc, plan.sources[-1], plan.blocks[k], opened) for k in measured_blocks(plan)}
    verdicts = {k: verdict for k, (_, verdict) in found.items()}
    if not any(v.n_kept for v in verdicts.values()):
        return None
    final = narrow_plan(plan, verdicts)
    source, left = final.sources[-1], choose_rows(whole, final.sources[-1].kept)

    def as_in(block: Block) -> Source:
        metrics = found[block.measured][0].take(verdicts[block.measured].mask)
        return with_metrics(left, qc, source, block, metrics) if qc.annotate else left

    return final, as_in
