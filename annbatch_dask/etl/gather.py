"""gather: read a dataset's part of every spill file, put its rows in their final order, write one sharded AnnData."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from uuid import uuid4

import numpy as np
import zarr

from annbatch_dask.activities import activity, during
from annbatch_dask.errors import IntegrityError
from annbatch_dask.etl.compare import repair
from annbatch_dask.etl.frames import annotation_frames, write_frames
from annbatch_dask.etl.job import GatherTask, Job, JobFile, forget_inputs, load_job
from annbatch_dask.etl.ours import ATTEMPT_NAME, dataset_attributes, first_document, write_first_document
from annbatch_dask.etl.receipts import GatherReceipt
from annbatch_dask.etl.rows import HASH, PLACE, all_columns, row_hashes, sum_hashes
from annbatch_dask.etl.slices import each_slice
from annbatch_dask.etl.spilled import Spilled
from annbatch_dask.etl.stats import DatasetSums
from annbatch_dask.etl.write import ObsColumns, matrix_writer, publish_dataset
from annbatch_dask.manifest import DATASET_PREFIX
from annbatch_dask.storage.checksums import FileSums, checksum
from annbatch_dask.storage.filesystems import name_errors
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.lock import is_held
from annbatch_dask.storage.metadata import METADATA
from annbatch_dask.storage.scratch import ScratchGoneError, check_scratch, find_receipt, write_receipt
from annbatch_dask.storage.spill import SPILL, SpillError
from annbatch_dask.storage.threads import codec_pool, one_ahead

__all__ = ["gather"]

logger = logging.getLogger(__name__)
_CHECK_S = 5.0  # a slice takes less time than a store to answer


def gather(file: JobFile, task: GatherTask) -> GatherReceipt:
    """Run one gather task, unless it was run before.

    Raises
    ------
    IntegrityError
        If the rows written are not the rows read.
    ScratchGoneError
        If the build has ended meanwhile; what was written is removed then.
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
        if isinstance(e, FileNotFoundError):  # of its own: the commit of another run has removed them
            check_scratch(job.scratch)
        e.add_note(f"while writing {job.target.url}/{dataset}")
        raise
    try:
        write_receipt(job.scratch, name, receipt.to_json())
    except ScratchGoneError:  # nobody will give it its name
        if ATTEMPT_NAME.fullmatch(receipt.folder):
            (job.target / receipt.folder).remove(last=METADATA)
        raise
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
    repaired: list[tuple[str, int]] = []
    while True:
        try:
            with name_errors(f"{job.target.url}/{dataset}"):  # of what zarr and anndata write
                again = tuple(block for kind, block in repaired if kind == SPILL)
                return replace(_write_dataset(job, task, dataset), scattered_again=again)
        except SpillError as e:
            damaged = e
        check_scratch(job.scratch)
        repair(file, damaged, repaired)


@contextlib.contextmanager
def _new_dataset(job: Job, dataset: str) -> Iterator[Folder]:
    """The folder to write a dataset in, which says whose it is.

    On a local disk each attempt has a folder of its own, which becomes the dataset at the commit: whatever a worker
    does that lost its scheduler, or whose build was given up, it does there. It is removed if the attempt fails; of one
    whose worker died, which its lock tells, by the next attempt. An object store cannot rename: all attempts at a
    dataset write the same bytes under the same names, which no other build writes.
    """
    about = dataset_attributes(job.plan.fingerprint, job.collection_id)
    if not job.target.is_local:
        folder = job.target / dataset
        write_first_document(folder, about)
        yield folder
        return
    _remove_dead_attempts(job, dataset)
    folder = job.target / f".attempt-{uuid4().hex[:8]}-{dataset}"
    try:
        with _locked(folder, first_document(about)):
            yield folder
    except BaseException:
        with contextlib.suppress(OSError):  # the next attempt removes it; the error that brought us here says more
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
    n_obs = stop - start - task.n_left_out
    obs = ObsColumns(all_columns(plan), n_obs)
    stats = DatasetSums(plan) if plan.options.stats else None
    total, n_bytes, due = 0, 0, 0.0
    with contextlib.ExitStack() as open_shards:
        with activity("wait"):
            spilled = open_shards.enter_context(Spilled.open(job, task))
        writers = [
            matrix_writer(
                m,
                plan.options,
                (n_obs, spilled.nnz.get(m.name, 0)),
                np.dtype(task.dtypes[m.name]),
                folder,
                group,
            )
            for m in plan.matrices
        ]
        for w in writers:
            open_shards.enter_context(w)
        slices = open_shards.enter_context(contextlib.closing(one_ahead(each_slice(job, task, spilled))))
        for fixed, ragged in during("wait", slices):
            if not folder.is_local and time.monotonic() >= due:  # nothing else tells a worker that its build is over
                check_scratch(job.scratch)
                due = time.monotonic() + _CHECK_S
            adding = None if stats is None else codec_pool().submit(stats.append, fixed, ragged)
            with activity("hash"):
                hashes = row_hashes(len(fixed[PLACE]), plan.matrices, (), fixed, ragged)
                total = (total + sum_hashes(hashes + fixed[HASH])) % 2**64
            with activity("encode"):
                for w in writers:
                    n_bytes += w.append(fixed, ragged)
            obs.append(fixed, ragged)
            if adding is not None:
                adding.result()
            del fixed, ragged, adding  # before obs is written
        for w in writers:
            w.end()
    if total != spilled.fingerprint:
        msg = (
            f"{dataset}: the rows written have fingerprint {total:016x} and those read {spilled.fingerprint:016x}; "
            "scratch files were damaged: remove the scratch folder and build again"
        )
        raise IntegrityError(msg)
    writing = None if stats is None else codec_pool().submit(stats.written)
    write_frames(group, obs.frames(plan.index_name) | annotation_frames(plan, job.annotations))
    for name, values in obs.strings():
        write_frames(group, {name: values})
    files |= {} if writing is None else writing.result()
    shards = {name: found for w in writers for name, found in w.files.items()}
    with activity("write"):
        sums = publish_dataset(folder, {name: content.to_bytes() for name, content in files.items()}, shards)
        folder.sync()
    return GatherReceipt(
        name=dataset,
        files=dict(sorted(sums.items())),
        n_rows=n_obs,
        nnz=spilled.nnz.get("X", 0),
        fingerprint=f"{total:016x}",
        n_bytes=n_bytes,
        folder=folder.url.rsplit("/", 1)[1],
    )
