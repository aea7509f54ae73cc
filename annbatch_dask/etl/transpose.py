"""transpose: read columns of an input that is stored by them, once, and write them in the order of its rows.

Only of inputs that would else be read again for each of their blocks, of which there are more than a few.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

from annbatch_dask.activities import activity
from annbatch_dask.etl.job import KEPT_NBYTES, Job, JobFile, load_job, trim_memory
from annbatch_dask.plan.layout import Block
from annbatch_dask.sources.identity import unchanged
from annbatch_dask.sources.open import Source
from annbatch_dask.sources.transposed import STRIP, write_strip
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.scratch import find_receipt, write_receipt
from annbatch_dask.storage.spill import SpillError, is_spilled

__all__ = ["TransposeReceipt", "read_rows", "transpose"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class TransposeReceipt:
    """Receipt of a strip: bytes read, uncompressed, and those of its file."""

    n_bytes: int
    spilled: int
    reused: bool = False

    def to_json(self) -> Mapping[str, Any]:
        """Convert to JSON values."""
        return {"n_bytes": self.n_bytes, "spilled": self.spilled}


def transpose(file: JobFile, index: int) -> TransposeReceipt:
    """Run one transpose task, unless it was run before."""
    if (found := find_receipt(file.scratch, _name(index))) is not None:
        done = TransposeReceipt(**found, reused=True)
        if is_spilled(file.scratch, index, done.spilled, kind=STRIP):
            return done
    receipt = _write(load_job(file), index, file.scratch)
    trim_memory(keep_nbytes=KEPT_NBYTES)
    return receipt


def read_rows(job: Job, block: Block, read: Callable[[Source], T]) -> T:
    """Read of a block's rows, as they are on condition that its input does not change; damaged strips are read anew."""
    ref, source = job.refs[block.source], job.plan.sources[block.source]
    mended: set[int] = set()
    while True:
        try:
            with activity("read"), unchanged(ref, source.identity), job.open_block(block) as opened:
                return read(opened)
        except SpillError as e:
            damaged = e.block
            if e.kind != STRIP or damaged in mended or job.transposed is None:
                raise
            logger.warning("%s: read anew", e)
        mended.add(damaged)
        _write(job, damaged, job.transposed)


def _name(index: int) -> str:
    return f"transpose-{index:06d}"


def _write(job: Job, index: int, folder: Folder) -> TransposeReceipt:
    plan, strip = job.plan, job.plan.strips[index]
    source, ref = plan.sources[strip.source], job.refs[strip.source]
    matrix = next(m for m in source.matrices if m.name == strip.matrix)
    transposed = next(t for t in plan.transposed if t.source == strip.source)
    try:
        with ExitStack() as files, activity("read"), unchanged(ref, source.identity):
            group = job.open_whole(strip.source, files).stored(matrix)
            spilled = write_strip(folder, index, strip, transposed, group)
    except Exception as e:
        e.add_note(f"while reading {source.path}, {strip.matrix} by columns, {strip.number + 1} of {strip.n_strips}")
        raise
    receipt = TransposeReceipt(strip.n_bytes, spilled)
    write_receipt(folder, _name(index), receipt.to_json())
    return receipt
