"""Narrows a plan to the rows that are kept, once rules on counts have decided. Pure, as the plan is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.errors import SelectionError
from annbatch_dask.formatting import plural
from annbatch_dask.plan.build import place_rows
from annbatch_dask.plan.kept import KeptRows
from annbatch_dask.plan.layout import Block, Layout
from annbatch_dask.plan.plan import Plan
from annbatch_dask.plan.schema import MatrixSchema, SourceSchema, heaviest_at
from annbatch_dask.plan.sizing import Sizing

__all__ = ["Verdict", "narrow_plan"]


@dataclass(frozen=True)
class Verdict:
    """Rows of a block that are kept.

    Attributes
    ----------
    mask
        (n_rows,) bool.
    nnz
        Stored values of X in those that are kept; 0 where it is dense.
    dropped
        Rows that each rule dropped.
    """

    mask: NDArray[np.bool_]
    nnz: int
    dropped: Mapping[str, int]

    @property
    def n_kept(self) -> int:
        """How many rows are kept."""
        return int(np.count_nonzero(self.mask))


def narrow_plan(plan: Plan, verdicts: Mapping[int, Verdict]) -> Plan:
    """The plan of the rows that are kept: each block has what is left of it, and datasets have the size asked for.

    Parameters
    ----------
    verdicts
        By the number of a block: of all blocks of inputs. Rows that the collection has are kept.

    Raises
    ------
    SelectionError
        If nothing of any input is left.
    MemoryBudgetError
        If datasets of the rows that are left do not fit a worker.
    """
    of_source: dict[int, list[int]] = {}
    for k in verdicts:
        of_source.setdefault(plan.blocks[k].source, []).append(k)
    sources = tuple(
        _narrow_source(s, [plan.blocks[i] for i in of_source[k]], [verdicts[i] for i in of_source[k]])
        if k in of_source
        else s
        for k, s in enumerate(plan.sources)
    )
    inputs = [s for s in sources if not s.is_dataset]
    if not any(s.n_obs for s in inputs):
        raise _nothing_left(inputs)
    n_kept = 0 if plan.extension is None else plan.extension.n_kept
    placement = place_rows(plan.options, [s.n_obs for s in sources], plan.extension)
    columns = (*plan.columns, plan.source_column)
    costs = Sizing.of(sources, plan.matrices, columns, plan.genes, plan.options, plan.budget, n_kept)
    blocks, layout = _narrow_blocks(plan, verdicts), costs.lay_out(placement)
    if layout.n_datasets > plan.n_datasets:  # of a few rows each, by rounding: so many names are claimed
        layout = Layout.even(layout.n_obs, -(-layout.n_obs // plan.n_datasets), layout.part_rows)
    peak = costs.peaks(blocks, layout, plan.transposed)
    plan.budget.check(
        f"gathering a dataset of {max(layout.sizes):,} cells",
        peak[1],
        f"lower {costs.lowered(layout)}, or start workers with more memory or fewer threads",
    )
    return replace(
        plan,
        sources=sources,
        blocks=blocks,
        layout=layout,
        placement=placement,
        peak_nbytes=peak,
        survey=plan.fingerprint,
    )


def _nothing_left(inputs: Sequence[SourceSchema]) -> SelectionError:
    dropped: Counter[str] = Counter()
    for s in inputs:
        dropped.update(dict(s.kept.dropped) if s.kept is not None else {})
    rules = ", ".join(f"{rule} drops {n:,}" for rule, n in dropped.items())
    n_rows = sum(s.kept.n_rows for s in inputs if s.kept is not None)
    return SelectionError(
        f"qc keeps none of the {plural(n_rows, 'cell')} of {plural(len(inputs), 'input')}: {rules}; loosen that, or "
        "see with counts whether X holds the counts"
    )


def _narrow_source(source: SourceSchema, blocks: Sequence[Block], verdicts: Sequence[Verdict]) -> SourceSchema:
    mask = np.concatenate([v.mask for v in verdicts])
    dropped: Counter[str] = Counter()
    for v in verdicts:
        dropped.update(v.dropped)
    whole = source.kept or KeptRows.of(np.ones(source.n_obs, bool), where="", dropped={})
    kept = whole.narrowed(mask, dict(dropped))
    matrices = tuple(_narrow_matrix(m, source.n_obs, blocks, verdicts) for m in source.matrices)
    return replace(source, n_obs=kept.n_kept, kept=kept, matrices=matrices, cuts=None)


def _narrow_matrix(
    matrix: MatrixSchema, n_rows: int, blocks: Sequence[Block], verdicts: Sequence[Verdict]
) -> MatrixSchema:
    """What is known of the rows that are left: the values of X by block, of other matrices about their share.

    The sums, of which the size of a dataset follows, do not depend on how rows were cut into blocks.
    """
    if not len(matrix.nnz):
        return matrix
    n_kept = np.array([v.n_kept for v in verdicts], np.int64)
    total = int(n_kept.sum())
    values = np.array([v.nnz for v in verdicts], np.int64)
    n_values = int(values.sum())
    if matrix.name != "X":
        n_values = int(matrix.nnz[-1]) * total // max(1, n_rows)
        values = n_kept * n_values // max(1, total)
    at = np.minimum(np.arange(-(-total // matrix.row_step) + 1) * matrix.row_step, total)
    nnz = np.interp(at, np.append(0, np.cumsum(n_kept)), np.append(0, np.cumsum(values))).astype(np.int64)
    nnz[-1] = n_values
    places = heaviest_at(total)
    heaviest = np.interp(places, heaviest_at(n_rows), matrix.heaviest) if total else np.zeros(0)
    heaviest = np.maximum(heaviest, n_values * (places + 1) / max(1, total))
    return replace(matrix, nnz=nnz, heaviest=np.ceil(heaviest).astype(np.int64), exact=False)


def _narrow_blocks(plan: Plan, verdicts: Mapping[int, Verdict]) -> tuple[Block, ...]:
    """The blocks in which something is left, in the numbers that rows have now."""
    out: list[Block] = []
    source, start, first = -1, 0, 0
    for k, block in enumerate(plan.blocks):
        start = 0 if block.source != source else start
        source = block.source
        n = verdicts[k].n_kept if k in verdicts else block.n_rows
        if n:
            n_bytes = block.n_bytes * n // block.n_rows
            out.append(replace(block, start=start, stop=start + n, first=first, n_bytes=n_bytes, measured=k))
        start, first = start + n, first + n
    return tuple(out)
