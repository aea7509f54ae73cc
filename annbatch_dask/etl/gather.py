"""gather: read a dataset's part of every spill file, put its rows in their final order, write one sharded AnnData."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any
from uuid import uuid4

import numpy as np
import zarr
from numpy.typing import NDArray

from annbatch_dask.errors import IntegrityError
from annbatch_dask.etl.frames import annotation_frames, write_frames
from annbatch_dask.etl.job import GatherTask, Job, JobFile, forget_inputs, load_job
from annbatch_dask.etl.ours import ATTEMPT_NAME, dataset_attributes, first_document
from annbatch_dask.etl.receipts import GatherReceipt
from annbatch_dask.etl.rows import (
    GROUP,
    PLACE,
    FixedArrays,
    RaggedArrays,
    all_columns,
    array_name,
    row_hashes,
    sum_hashes,
)
from annbatch_dask.etl.scatter import scatter_again
from annbatch_dask.etl.stats import DatasetSums
from annbatch_dask.etl.write import ObsColumns, matrix_writer, publish_dataset
from annbatch_dask.kernels.rows import copy_runs, offsets_of
from annbatch_dask.manifest import DATASET_PREFIX
from annbatch_dask.plan.dtypes import index_dtype
from annbatch_dask.plan.plan import Plan
from annbatch_dask.storage.checksums import FileSums, checksum
from annbatch_dask.storage.filesystems import name_errors
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.lock import is_held
from annbatch_dask.storage.metadata import METADATA
from annbatch_dask.storage.spill import SpillError, SpillReader, check_scratch, find_receipt, write_receipt
from annbatch_dask.storage.threads import one_ahead

__all__ = ["gather"]

logger = logging.getLogger(__name__)
_MAX_OPEN = 128
"""Spill files a task keeps open; with more of them, each read opens its file."""


def gather(file: JobFile, task: GatherTask) -> GatherReceipt:
    """Run one gather task, unless it was run before.

    Raises
    ------
    IntegrityError
        If the rows written are not the rows read.
    """
    name = f"gather-{task.dataset:06d}"
    forget_inputs()  # all of them have been scattered
    job = load_job(file)
    dataset = f"{DATASET_PREFIX}_{job.first_dataset + task.dataset}"
    # a receipt is in the scratch folder, its dataset in the target, which others may have removed or replaced since
    if (found := find_receipt(job.scratch, name)) is not None:
        done = GatherReceipt.from_json(found)  # on a store perhaps of another run of this build, under its own name
        for folder in (done.folder, dataset) if ATTEMPT_NAME.fullmatch(done.folder) else (dataset,):
            if _is_intact(job.target / folder, done.files):
                return replace(done, name=dataset, folder=folder)
    try:
        receipt = _write_and_repair(file, job, task, dataset)
    except Exception as e:
        e.add_note(f"while writing {job.target.url}/{dataset}")
        raise
    write_receipt(job.scratch, name, receipt.to_json())
    return receipt


def _is_intact(folder: Folder, files: FileSums) -> bool:
    """True if a dataset's files are those that were written, by their sizes, and by content where they are metadata."""
    if folder.sizes() != {name: size for name, (size, _) in files.items()}:
        return False
    return checksum(folder, METADATA) == tuple(files[METADATA])


def _write_and_repair(file: JobFile, job: Job, task: GatherTask, dataset: str) -> GatherReceipt:
    """Write a dataset; a block whose spill file turns out to be damaged is scattered again, by this task, once.

    That needs the memory of a scatter task, and not that of the gather task beside it, which has ended by then.
    """
    again: list[int] = []
    while True:
        try:
            with name_errors(f"{job.target.url}/{dataset}"):  # of what zarr and anndata write
                return replace(_write_dataset(job, task, dataset), scattered_again=tuple(again))
        except SpillError as e:
            if e.block in again:
                msg = f"{e}, and so it was after it was written anew; check the disk under the scratch folder"
                raise IntegrityError(msg) from e
            logger.warning("%s: block %d is read again", e, e.block)
            again.append(e.block)
        check_scratch(job.scratch)
        scatter_again(file, again[-1])
        forget_inputs()  # that block's too


@contextlib.contextmanager
def _new_dataset(job: Job, dataset: str) -> Iterator[Folder]:
    """The folder to write a dataset in, which says whose it is.

    On a local disk each attempt has a folder of its own, which becomes the dataset at the commit: whatever a worker
    does that lost its scheduler, or whose build was given up, it does there. It is removed if the attempt fails; of one
    whose worker died, which its lock tells, by the next attempt. An object store cannot rename: all attempts at a
    dataset write the same bytes under the same names, which no other build writes.
    """
    document = first_document(dataset_attributes(job.plan.fingerprint, job.collection_id))
    if not job.target.is_local:
        folder = job.target / dataset
        folder.write(METADATA, document)
        yield folder
        return
    _remove_dead_attempts(job, dataset)
    folder = job.target / f".attempt-{uuid4().hex[:8]}-{dataset}"
    try:
        with _locked(folder, document):
            yield folder
    except BaseException:
        folder.remove(last=METADATA)
        raise


@contextlib.contextmanager
def _locked(folder: Folder, document: bytes) -> Iterator[None]:
    """A new local folder with this document, which is locked before it has its name."""
    path = f"{folder.path}/{METADATA}"
    os.makedirs(folder.path)
    fd = os.open(f"{path}~", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with contextlib.suppress(OSError):  # no locks there: what a dead worker left stays until the commit
            fcntl.flock(fd, fcntl.LOCK_SH)
        os.write(fd, document)
        os.rename(f"{path}~", path)
        yield
    finally:
        os.close(fd)


def _remove_dead_attempts(job: Job, dataset: str) -> None:
    """Remove what workers left that died while they wrote this dataset; whole datasets stay."""
    first = first_document(dataset_attributes(job.plan.fingerprint, job.collection_id))
    for name in job.target.names():
        if (match := ATTEMPT_NAME.fullmatch(name)) and match[1] == dataset:
            folder = job.target / name
            if is_held(f"{folder.path}/{METADATA}") is False and folder.find(METADATA) == first:
                folder.remove(last=METADATA)


def _write_dataset(job: Job, task: GatherTask, dataset: str) -> GatherReceipt:
    with _new_dataset(job, dataset) as folder:
        return _fill_dataset(job, task, dataset, folder)


def _fill_dataset(job: Job, task: GatherTask, dataset: str, folder: Folder) -> GatherReceipt:
    plan = job.plan
    attributes = {"encoding-type": "anndata", "encoding-version": "0.1.0"}
    attributes |= dataset_attributes(plan.fingerprint, job.collection_id)
    files: dict[str, Any] = {}  # all but the shards
    group = zarr.create_group(zarr.storage.MemoryStore(files), attributes=attributes)
    start, stop = plan.layout.dataset_bounds(task.dataset)
    obs = ObsColumns(all_columns(plan), stop - start)
    stats = DatasetSums(plan) if plan.options.stats else None
    total, n_bytes = 0, 0
    with contextlib.ExitStack() as open_shards:
        writers = [matrix_writer(m, plan.options, stop - start, task, folder, group) for m in plan.matrices]
        for w in writers:
            open_shards.enter_context(w)
        parts = open_shards.enter_context(contextlib.closing(one_ahead(_parts(job, task))))
        for fixed, ragged in parts:
            if not folder.is_local:  # where nothing else tells a worker that its build is over
                check_scratch(job.scratch)
            hashes = row_hashes(len(fixed[PLACE]), plan.matrices, all_columns(plan), fixed, ragged)
            total = (total + sum_hashes(hashes)) % 2**64
            for w in writers:
                n_bytes += w.append(fixed, ragged)
            obs.append(fixed, ragged)
            if stats is not None:
                stats.append(fixed, ragged)
            del fixed, ragged  # before obs is written
    if total != task.fingerprint:
        msg = (
            f"{dataset}: the rows written have fingerprint {total:016x} and those read {task.fingerprint:016x}; "
            "scratch files were damaged: remove the scratch folder and build again"
        )
        raise IntegrityError(msg)
    write_frames(group, obs.frames(plan.index_name) | annotation_frames(plan, job.annotations))
    for name, values in obs.strings():
        write_frames(group, {name: values})
    if stats is not None:
        stats.write(group)
    shards = {name: found for w in writers for name, found in w.files.items()}
    sums = publish_dataset(folder, {name: content.to_bytes() for name, content in files.items()}, shards)
    folder.sync()
    return GatherReceipt(
        name=dataset,
        files=dict(sorted(sums.items())),
        n_rows=stop - start,
        nnz=task.nnz.get("X", 0),
        fingerprint=f"{total:016x}",
        n_bytes=n_bytes,
        folder=folder.url.rsplit("/", 1)[1],
    )


def _parts(job: Job, task: GatherTask) -> Iterator[tuple[FixedArrays, RaggedArrays]]:
    """The dataset's rows in their final order, part by part; the arrays are reused for the part after the next."""
    plan = job.plan
    parts = plan.layout.parts_of(task.dataset)
    n_blocks = len(plan.blocks)
    buffer_sets: Iterator[dict[str, NDArray]] = cycle(({}, {}))  # one is written while the other fills
    raw: dict[str, NDArray] = {}
    with contextlib.ExitStack() as files:
        readers = [
            files.enter_context(SpillReader(job.scratch, b, parts, keep_open=n_blocks <= _MAX_OPEN))
            for b in range(n_blocks)
        ]
        for part in parts:
            segments = [(r, r.read_fixed(part)) for r in readers if r.n_rows(part)]
            if plan.groups is None:
                n_rows = int(plan.layout.part_starts[part + 1] - plan.layout.part_starts[part])
            else:
                n_rows = _place_by_group([fixed for _, fixed in segments])
            if not n_rows:  # a piece of a large group may have none
                continue
            _check_places(segments, n_rows)
            ragged = _gather_ragged(segments, n_rows, part, plan, task, next(buffer_sets), raw)
            fixed = _gather_fixed(segments, n_rows)
            for m in plan.matrices:
                if m.kind == "dense":
                    fixed[array_name(m.name, "dense")] = ragged.pop(array_name(m.name, "dense"))[0].reshape(
                        n_rows, m.n_cols
                    )
            yield fixed, ragged


def _place_by_group(fixed: Sequence[FixedArrays]) -> int:
    """Give each row its place in the part, by group and then by its position in the dataset; returns their number."""
    if not fixed:
        return 0
    counts = [len(h[PLACE]) for h in fixed]
    keys = [np.concatenate([h.pop(name) for h in fixed]) for name in (PLACE, GROUP)]
    place = np.empty(sum(counts), np.uint32)
    place[np.lexsort(keys)] = np.arange(len(place))
    for h, rows in zip(fixed, np.split(place, np.cumsum(counts)[:-1]), strict=True):
        h[PLACE] = rows
    return len(place)


def _check_places(segments: Sequence[tuple[SpillReader, FixedArrays]], n_rows: int) -> None:
    """Every row of the part must be there exactly once."""
    seen = np.zeros(n_rows, np.uint8)
    for _, fixed in segments:
        np.add.at(seen, fixed[PLACE], 1)
    if not (seen == 1).all():
        missing, twice = int((seen == 0).sum()), int((seen > 1).sum())
        msg = f"{missing:,} of {n_rows:,} rows are missing from the spill files, {twice:,} are there twice"
        raise IntegrityError(msg)


def _gather_fixed(segments: Sequence[tuple[SpillReader, FixedArrays]], n_rows: int) -> FixedArrays:
    out: FixedArrays = {}
    for name, like in segments[0][1].items():
        values = np.empty((n_rows, *like.shape[1:]), like.dtype)
        for _, fixed in segments:
            values[fixed[PLACE]] = fixed[name]
        out[name] = values
    return out


def _gather_ragged(  # noqa: PLR0913 - buffers
    segments: Sequence[tuple[SpillReader, FixedArrays]],
    n_rows: int,
    part: int,
    plan: Plan,
    task: GatherTask,
    buffers: dict[str, NDArray],
    raw_buffers: dict[str, NDArray],
) -> RaggedArrays:
    arrays = list(_ragged_arrays(plan, task))
    out: RaggedArrays = {}
    for name, dtype, length in arrays:
        counts = np.empty(n_rows, np.int64)
        for _, fixed in segments:
            counts[fixed[PLACE]] = fixed[length] if isinstance(length, str) else length
        offsets = offsets_of(counts)
        out[name] = _buffer(buffers, name, int(offsets[-1]), dtype), offsets
    raw = _buffer(raw_buffers, "raw", max(reader.ragged_nbytes(part) for reader, _ in segments), np.dtype(np.uint8))
    for reader, fixed in segments:
        found = reader.read_ragged(part, raw)
        for name, dtype, length in arrays:
            values, offsets = out[name]
            n = len(fixed[PLACE])
            lengths = fixed[length].astype(np.int64) if isinstance(length, str) else np.full(n, length, np.int64)
            source = found[name].astype(dtype, copy=False)
            copy_runs(source, offsets_of(lengths)[:-1], values, offsets[fixed[PLACE]], lengths)
    return out


def _ragged_arrays(plan: Plan, task: GatherTask) -> Iterator[tuple[str, np.dtype, str | int]]:
    """Name and dtype of every ragged array, and the array that counts its entries, or how many each row has."""
    for m in plan.matrices:
        if m.kind == "csr":
            yield array_name(m.name, "indices"), index_dtype(m.n_cols), array_name(m.name, "length")
            yield array_name(m.name, "values"), np.dtype(task.dtypes[m.name]), array_name(m.name, "length")
        else:
            yield array_name(m.name, "dense"), np.dtype(task.dtypes[m.name]), m.n_cols
    for c in all_columns(plan):
        if c.kind == "string":
            yield array_name(c.path, "bytes"), np.dtype(np.uint8), array_name(c.path, "length")


def _buffer(buffers: dict[str, NDArray], name: str, size: int, dtype: np.dtype) -> NDArray:
    """A reused buffer: fresh pages for every part would cost as much as filling them."""
    if name not in buffers or len(buffers[name]) < size:
        buffers[name] = np.empty(size + size // 16, dtype)
    return buffers[name][:size]
