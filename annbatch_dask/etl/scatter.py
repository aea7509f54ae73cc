"""scatter: read one row block, map its genes, put its rows in the order of their destination, write one spill file."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.activities import activity
from annbatch_dask.etl.blocks import BlockRows, exact_rows, hash_block, read_block
from annbatch_dask.etl.cells import hash_cells, n_bins, write_hashes
from annbatch_dask.etl.job import KEPT_NBYTES, JobFile, load_job, trim_memory
from annbatch_dask.etl.receipts import ScatterReceipt
from annbatch_dask.etl.rows import GROUP, PLACE, RaggedArrays, array_name, group_keys, sum_hashes
from annbatch_dask.etl.transpose import read_rows
from annbatch_dask.plan.layout import Block
from annbatch_dask.plan.plan import Plan
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.packed import packs
from annbatch_dask.storage.scratch import find_receipt, forget_receipt, write_receipt
from annbatch_dask.storage.spill import is_spilled, write_spill

__all__ = ["forget_task", "scatter", "scatter_again"]


_MATRIX_ARRAYS = ("indices", "values", "dense")


def scatter(file: JobFile, index: int) -> ScatterReceipt:
    """Run one scatter task, unless it was run before."""
    task = _name(index)
    if (found := find_receipt(file.scratch, task)) is not None:
        done = ScatterReceipt.from_json(found)
        if is_spilled(file.scratch, index, done.spilled):
            return done
    job = load_job(file)
    plan, block = job.plan, job.plan.blocks[index]
    source = plan.sources[block.source]
    try:
        rows = read_rows(job, block, partial(read_block, plan, block, source))
    except Exception as e:
        e.add_note(f"while reading {source.path}, rows {block.start:,} to {block.stop:,}")
        raise
    receipt = _spill(plan, block, index, rows, file.scratch)
    write_receipt(file.scratch, task, receipt.to_json())
    del rows
    trim_memory(keep_nbytes=KEPT_NBYTES)
    return receipt


def scatter_again(file: JobFile, index: int) -> None:
    """Write again the spill file of a task that was finished, because it was damaged since."""
    forget_task(file.scratch, index)
    scatter(file, index)


def forget_task(scratch: Folder, index: int) -> None:
    """Let a scatter task that was finished be run again."""
    forget_receipt(scratch, _name(index))


def _name(index: int) -> str:
    return f"scatter-{index:06d}"


def _spill(plan: Plan, block: Block, index: int, rows: BlockRows, scratch: Folder) -> ScatterReceipt:
    layout = plan.layout
    dest = plan.placement.forward(np.arange(block.first, block.first + block.n_rows))
    groups = None if plan.groups is None else plan.groups.codes(group_keys(plan, rows.fixed, rows.ragged))
    part, place = layout.locate(dest, groups)
    order = np.lexsort((place, part) if groups is None else (place, groups, part))  # of what gather writes
    part_rows = np.searchsorted(part[order], np.arange(layout.n_parts + 1))
    with activity("hash"):
        hashes, repeats = _hash(plan, block, index, rows, order, scratch)
    rows.exact.clear()
    fixed = {PLACE: place} | ({} if groups is None else {GROUP: groups.astype(np.uint32)}) | rows.fixed
    dense = [array_name(m.name, "dense") for m in plan.matrices if m.kind == "dense"]
    ragged = rows.ragged | {
        name: (values.reshape(-1), np.arange(len(values) + 1) * values.shape[1])  # read one block at a time
        for name, values in ((n, fixed.pop(n)) for n in dense)
    }
    small = _in_few_bits(plan, ragged)
    ordered = hashes[order]
    marks = np.array([sum_hashes(ordered[a:b]) for a, b in pairwise(part_rows.tolist())], np.uint64)
    with activity("spill"):
        spilled = write_spill(
            scratch, index, order=order, rows=part_rows, fixed=fixed, ragged=ragged, packed=small, marks=marks
        )
    return ScatterReceipt(
        n_rows=block.n_rows,
        n_bytes=block.n_bytes,
        spilled=spilled,
        ranges=rows.ranges,
        nnz={m.name: int(ragged[array_name(m.name, "indices")][1][-1]) for m in plan.matrices if m.kind == "csr"},
        fingerprint=f"{sum_hashes(hashes):016x}",
        repeats=repeats,
    )


def _in_few_bits(plan: Plan, ragged: RaggedArrays) -> dict[str, bool]:
    """The arrays of matrices that are spilled in fewer bits, and whether as differences, as columns ascend."""
    names = {array_name(m.name, what): what == "indices" for m in plan.matrices for what in _MATRIX_ARRAYS}
    return {n: differences for n, differences in names.items() if n in ragged and packs(ragged[n][0].dtype)}


def _hash(
    plan: Plan, block: Block, index: int, rows: BlockRows, order: NDArray[np.int64], scratch: Folder
) -> tuple[NDArray[np.uint64], bool]:
    """Hashes of a block's rows. Where duplicates are looked for, those of X alone become a file."""
    if plan.options.duplicates == "keep":
        return hash_block(plan, block, rows), False
    of_x = np.zeros(block.n_rows, np.uint64)
    hashes = hash_block(plan, block, rows, of_x=of_x)
    cells, repeats = hash_cells(plan.x, of_x, *exact_rows(rows), has_nan=rows.ranges["X"].n_nan > 0)
    write_hashes(scratch, index, cells, order, n_bins(plan.n_obs))
    return hashes, repeats
