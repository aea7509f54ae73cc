"""group: count the rows of each group in each dataset of the output, from obs alone, before anything is spilled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from annbatch_dask.etl.blocks import read_columns
from annbatch_dask.etl.job import Job, JobFile, load_job
from annbatch_dask.etl.rows import group_keys
from annbatch_dask.plan.grouping import Groups, group_layout

__all__ = ["count_groups", "with_groups"]

_DATASET, _N_ROWS = "dataset", "n_rows"


def count_groups(file: JobFile, index: int) -> pd.DataFrame:
    """Distinct keys of a block's rows and the datasets they go to, and how many rows each: a small frame."""
    job = load_job(file)
    plan, block = job.plan, job.plan.blocks[index]
    with job.open_block(block) as opened:
        fixed, ragged = read_columns(plan, block, plan.sources[block.source], opened, plan.group_columns)
    keys = group_keys(plan, fixed, ragged)
    dest = plan.placement.forward(np.arange(block.first, block.first + block.n_rows))
    frame = pd.DataFrame({_DATASET: np.searchsorted(plan.layout.dataset_starts, dest, side="right") - 1})
    for k, values in enumerate(keys):
        frame[k] = values
    return frame.groupby(list(frame.columns), as_index=False, sort=False).size().rename(columns={"size": _N_ROWS})


def with_groups(job: Job, counted: Sequence[pd.DataFrame]) -> Job:
    """The job with the groups that were counted, and a layout in which its parts follow them."""
    counts = pd.concat(counted)
    keys = [counts[k].to_numpy() for k in counts.columns if k not in (_DATASET, _N_ROWS)]
    groups = Groups.of(keys)
    layout = group_layout(
        job.plan.layout,
        groups.n_groups,
        counts[_DATASET].to_numpy(),
        groups.codes(keys),
        counts[_N_ROWS].to_numpy(),
    )
    return replace(job, plan=replace(job.plan, layout=layout, groups=groups))
