"""The build as Dask runs it: two stages of independent tasks with a small barrier between them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from annbatch_dask.engines.base import Engine, run_stage
from annbatch_dask.engines.dask import LocalEngine
from annbatch_dask.engines.needs import Needs, SharedFile
from annbatch_dask.errors import CollectionBusyError, IntegrityError, SelectionError
from annbatch_dask.etl.commit import commit, make_manifest, merged_range, source_fingerprints
from annbatch_dask.etl.compare import LeftOut
from annbatch_dask.etl.duplicates import find_duplicates
from annbatch_dask.etl.gather import gather
from annbatch_dask.etl.group import count_groups, with_groups
from annbatch_dask.etl.inputs import forget_inputs_of
from annbatch_dask.etl.job import GatherTask, Job, JobFile, forget_job, own_scratch, save_job
from annbatch_dask.etl.measure import measure_rows, measured_blocks, with_verdicts
from annbatch_dask.etl.receipts import GatherReceipt, ScatterReceipt
from annbatch_dask.etl.scatter import forget_task, scatter
from annbatch_dask.etl.sweep import clean_up, withdraw
from annbatch_dask.etl.transpose import transpose
from annbatch_dask.events import BuildEnd, BuildStart, Callback
from annbatch_dask.manifest import DATASET_PREFIX, Manifest
from annbatch_dask.plan.dtypes import index_dtype, smallest_dtype
from annbatch_dask.plan.plan import Plan
from annbatch_dask.sources.identity import has_many_files, raise_if_changed
from annbatch_dask.storage.claims import end_claim
from annbatch_dask.storage.lock import check_unchanged
from annbatch_dask.storage.private import make_private

__all__ = ["build"]

logger = logging.getLogger(__name__)


def build(job: Job, engine: Engine, callback: Callback) -> Manifest:
    """Run a plan and commit its result.

    Each task leaves a receipt in the scratch folder, so a build that was interrupted continues where it stopped when it
    is called again with the same plan. The scratch folder is removed after the commit.
    """
    plan = job.plan
    callback.on_build_start(BuildStart(job.target.url, engine.name, engine.dashboard))
    error: BaseException | None = None
    committed = False
    try:
        job = _look_first(replace(job, scratch=make_private(job.scratch)), engine, callback)
        plan, file = job.plan, save_job(job)
        engine = engine.needing(_needs(job, file))
        scattered = run_stage(
            engine,
            "scatter",
            scatter,
            [(file, i) for i in range(len(plan.blocks))],
            callback,
            size=(plan.n_obs, plan.n_bytes_read),
            measure=lambda _, r: (r.n_rows, r.n_bytes),
            describe=functools.partial(_block, plan),
        )
        check_inputs(job, engine)
        check_old_rows(job, scattered)
        duplicates = find_duplicates(job, file, engine, callback, scattered)
        tasks = gather_tasks(plan, scattered)
        left_out = None if duplicates is None else duplicates.datasets
        if left_out is not None:
            tasks = without(plan, tasks, left_out)
        n_obs = plan.n_obs - (0 if left_out is None else int(left_out.n_rows.sum()))
        gathered = run_stage(
            engine,
            "gather",
            gather,
            [(file, t) for t in tasks],
            callback,
            size=(n_obs, _gather_nbytes(plan, tasks[0].dtypes, _gathered_nnz(scattered, left_out), n_obs)),
            measure=lambda _, r: (r.n_rows, r.n_bytes),
            describe=lambda k: f"{DATASET_PREFIX}_{job.first_dataset + tasks[k].dataset}",
        )
        check_all_there(scattered, gathered, left_out)
        manifest = make_manifest(job, scattered, gathered, tasks, duplicates)
        written = {r.name: r.folder for r in gathered}
        run_stage(
            LocalEngine("synchronous", engine.budget, patient=False),  # who wrote a root may not write it again
            "commit",
            commit,
            [(job, manifest, written)],
            callback,
            size=(n_obs, 0),
            measure=lambda *_: (n_obs, 0),
            describe=lambda _: job.target.url,
        )
        committed = True
        if job.base is not None:
            forget_inputs_of(job.target, job.base)
        clean_up(job)
    except SelectionError as e:  # nothing is left: the same call will find the same
        error = e
        withdraw(job)
        raise
    except BaseException as e:
        error = e
        busy = None if committed or not isinstance(e, Exception) else _overtaken(job)
        if busy is None:
            _end(job)
            raise
        withdraw(job)
        error = busy
        raise busy from e
    else:
        return manifest
    finally:
        forget_job()
        callback.on_build_end(BuildEnd(error))


def _needs(job: Job, file: JobFile) -> Needs:
    """What workers must have: the folders of the collection and of the spill files, and memory for a task."""
    files = [SharedFile(file.scratch, file.name)]
    if job.claim is not None:
        files.append(SharedFile(job.target, job.claim.name, job.claim.nonce))
    scatter, gather = job.plan.peak_nbytes
    return Needs(files=tuple(files), peaks={"transpose": scatter, "scatter": scatter, "gather": gather})


def _end(job: Job) -> None:
    """Say that the build runs no more; where that cannot be said, its claim is left alone."""
    if job.claim is not None:
        try:
            end_claim(job.target, job.claim)
        except Exception as e:  # noqa: BLE001 - another error is on its way, and says more
            logger.warning("%s: %s", job.target.url, e)


def _look_first(job: Job, engine: Engine, callback: Callback) -> Job:
    """The job whose rows and parts are decided, by the stages that the plan needs for it."""
    if job.plan.transposed or job.plan.is_survey or job.plan.options.groupby:
        own_scratch(job)  # each of these stages has a folder in it
    if job.plan.transposed:
        job = put_by_rows(job, engine, callback)
    if job.plan.is_survey:
        job = measure(job, engine, callback)
    return group(job, engine, callback) if job.plan.options.groupby else job


def put_by_rows(job: Job, engine: Engine, callback: Callback) -> Job:
    """Put inputs that are stored by columns in the order of their rows, and make a job of them."""
    plan, first = job.plan, replace(job, scratch=job.scratch / "transpose")
    file = save_job(first)
    strips = plan.strips
    run_stage(
        engine.needing(_needs(job, file)),
        "transpose",
        transpose,
        [(file, k) for k in range(len(strips))],
        callback,
        size=(0, sum(s.n_bytes for s in strips)),
        measure=lambda _, r: (0, r.n_bytes),
        describe=lambda k: f"{plan.sources[strips[k].source].path}, {strips[k].matrix} {strips[k].number}",
    )
    return replace(job, transposed=first.scratch)


def measure(job: Job, engine: Engine, callback: Callback) -> Job:
    """Measure the cells of the inputs, and make a job of those that are kept."""
    plan, first = job.plan, replace(job, scratch=job.scratch / "measure")
    file, indices = save_job(first), measured_blocks(plan)
    engine = engine.needing(_needs(job, file))
    blocks = [plan.blocks[k] for k in indices]
    receipts = run_stage(
        engine,
        "measure",
        measure_rows,
        [(file, k) for k in indices],
        callback,
        size=(sum(b.n_rows for b in blocks), sum(b.n_bytes for b in blocks)),
        measure=lambda _, r: (r.n_rows, r.n_bytes),
        describe=lambda i: _block(plan, indices[i]),
    )
    return with_verdicts(job, first.scratch, indices, receipts)


def group(job: Job, engine: Engine, callback: Callback) -> Job:
    """Count the groups, and make a job of it whose parts follow them."""
    plan = job.plan
    first = replace(job, scratch=job.scratch / "group")
    file = save_job(first)
    engine = engine.needing(_needs(job, file))
    counted = run_stage(
        engine,
        "group",
        count_groups,
        [(file, i) for i in range(len(plan.blocks))],
        callback,
        size=(plan.n_obs, 0),
        measure=lambda i, _: (plan.blocks[i].n_rows, 0),
        describe=functools.partial(_block, plan),
    )
    return with_groups(job, counted)


def _block(plan: Plan, index: int) -> str:
    block = plan.blocks[index]
    return f"{plan.sources[block.source].path}, rows {block.start:,} to {block.stop:,}"


def _overtaken(job: Job) -> CollectionBusyError | None:
    """Return the error to raise if another build published meanwhile and removed what this one wrote; else None."""
    try:
        check_unchanged(job.target, job.base_version)
    except CollectionBusyError as busy:
        return busy
    except Exception as e:  # noqa: BLE001 - of a store that fails: the error that is on its way tells of it
        logger.warning("%s: %s", job.target.url, e)
    return None


def check_inputs(job: Job, engine: Engine) -> None:
    """Refuse inputs that were changed while they were read, where their tasks have not looked: see :func:`unchanged`.

    Raises
    ------
    SourceError
        With the name of one.
    """
    sources = job.plan.sources
    tasks = [
        (replace(ref, load_adata=None), sources[k].identity)
        for k, ref in enumerate(job.refs)
        if has_many_files(sources[k].identity)
    ]
    if tasks:
        engine.run("check", raise_if_changed, tasks, lambda *_: None, lambda i: tasks[i][0].label)


def check_old_rows(job: Job, scattered: Sequence[ScatterReceipt]) -> None:
    """Refuse to carry over rows of the collection that are not what its manifest says.

    Raises
    ------
    IntegrityError
        With the dataset's name.
    """
    if job.base is None or job.plan.extension is None or job.plan.extension.n_kept:
        return
    found = source_fingerprints(job.plan, scattered)
    for record, fingerprint in zip(job.base.datasets, found, strict=False):
        if record.fingerprint not in ("", fingerprint):
            _forget_dataset(job, record.name)
            msg = (
                f"{record.name}: its rows have fingerprint {fingerprint} and were written with {record.fingerprint}; "
                "verify() says which file is damaged"
            )
            raise IntegrityError(msg)


def _forget_dataset(job: Job, name: str) -> None:
    """Let a dataset's rows be read again by the next call, when its files have been restored."""
    for k, block in enumerate(job.plan.blocks):
        if job.plan.sources[block.source].path == name and job.plan.sources[block.source].is_dataset:
            forget_task(job.scratch, k)


def gather_tasks(plan: Plan, scattered: Sequence[ScatterReceipt]) -> list[GatherTask]:
    """The barrier: what all scatter tasks together say about dtypes."""
    dtypes = {}
    for m in plan.matrices:
        dtypes[m.name] = smallest_dtype(merged_range(scattered, m.name), np.dtype(m.source_dtype)).name
    return [GatherTask(k, dtypes) for k in range(plan.n_datasets)]


def check_all_there(
    scattered: Sequence[ScatterReceipt], gathered: Sequence[GatherReceipt], left_out: LeftOut | None
) -> None:
    """Refuse datasets that together do not hold the rows that were read, but for those left out.

    Raises
    ------
    IntegrityError
        If they do not: each holds what spill files said of it.
    """
    read = sum(int(r.fingerprint, 16) for r in scattered)
    read -= 0 if left_out is None else int(left_out.fingerprint.sum())
    written = sum(int(r.fingerprint, 16) for r in gathered)
    if (read - written) % 2**64:
        msg = (
            f"the rows written have fingerprint {written % 2**64:016x} and those read {read % 2**64:016x}; "
            "scratch files were damaged: remove the scratch folder and build again"
        )
        raise IntegrityError(msg)


def without(plan: Plan, tasks: Sequence[GatherTask], left_out: LeftOut) -> list[GatherTask]:
    """The tasks for the rows that stay; a dataset of which none do is not written."""
    left = [
        replace(
            t,
            n_left_out=int(left_out.n_rows[t.dataset]),
            left_out_nnz={name: int(n[t.dataset]) for name, n in left_out.nnz.items()},
            left_out_fingerprint=int(left_out.fingerprint[t.dataset]),
        )
        for t in tasks
    ]
    return [t for t, size in zip(left, plan.layout.sizes, strict=True) if t.n_left_out < size]


def _gathered_nnz(scattered: Sequence[ScatterReceipt], left_out: LeftOut | None) -> dict[str, int]:
    """Stored values of each sparse matrix that all gather tasks will write."""
    found = {name: sum(r.nnz[name] for r in scattered) for name in scattered[0].nnz}
    return found if left_out is None else {name: n - int(left_out.nnz[name].sum()) for name, n in found.items()}


def _gather_nbytes(plan: Plan, dtypes: Mapping[str, str], nnz: Mapping[str, int], n_obs: int) -> int:
    """Bytes that the gather tasks will report as written: the length of the progress bar."""
    total = 0
    for m in plan.matrices:
        item = np.dtype(dtypes[m.name]).itemsize
        if m.kind == "dense":
            total += n_obs * m.n_cols * item
        else:
            total += nnz[m.name] * (item + index_dtype(m.n_cols).itemsize) + 8 * n_obs
    return total
