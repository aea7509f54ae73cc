"""Start a build: take the collection's lock, see that nothing has changed, claim names, make the job, run it."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from annbatch_dask.engines.base import Engine, EngineChoice
from annbatch_dask.errors import (
    CollectionBusyError,
    CollectionChangedError,
    CollectionError,
    SchedulerError,
    SourceError,
)
from annbatch_dask.etl.build import build
from annbatch_dask.etl.job import Job, say_what_is_lost, work_folder
from annbatch_dask.etl.log import Recorder
from annbatch_dask.etl.ours import FolderContents, contents_of
from annbatch_dask.etl.prepare import Prepared, is_done_already, prepare, resolve, warn_of_duplicates
from annbatch_dask.etl.request import Request
from annbatch_dask.etl.scratches import Scratch
from annbatch_dask.etl.sweep import sweep_idle
from annbatch_dask.etl.watch import Watch
from annbatch_dask.events import Callback, Callbacks
from annbatch_dask.manifest import DATASET_NAME, dataset_number
from annbatch_dask.sources.identity import raise_if_changed
from annbatch_dask.sources.open import SourceRef
from annbatch_dask.storage.claims import Work, claim_numbers
from annbatch_dask.storage.conditions import check_takes_files
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.lock import check_unchanged, exclusive
from annbatch_dask.storage.root import Root
from annbatch_dask.storage.secrets import no_text
from annbatch_dask.warn import warn

__all__ = ["Means", "plan_and_run", "run_prepared"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Means:
    """Means of a build, which leave no trace in its result.

    Attributes
    ----------
    room
        The engine.
    callback
        Listens to its events.
    scratch
        Where scratch folders are.
    report
        Path or URL for Dask's performance report; None makes none.
    """

    room: EngineChoice
    callback: Callback
    scratch: Folder
    report: str | None = None


def plan_and_run(root: Root, request: Request, means: Means) -> None:
    """Do what is asked for, unless it is done."""
    with _locked(root, means) as found:
        extension, options = resolve(root, request)
        if is_done_already(root, request, options, means.room):
            _nothing_to_do(root, means)
            _say_what_is_kept(root, request.keep)
            return
        _check_seen(root, request.refs, means)
        _kept(root, found, request.keep)  # which may refuse
        warn_of_duplicates(root, request.refs, request.on_duplicate_source)
        if extension is None or extension.mode != "append":
            found.check_named(replaces=extension is None)
        with means.room.ahead():
            _run(root, prepare(root, request, means.room), means, found)


def run_prepared(root: Root, prepared: Prepared, means: Means) -> None:
    """Run what was planned before, unless that is done.

    Raises
    ------
    CollectionChangedError
        If the collection was changed since it was planned.
    SourceError
        If an input was.
    MemoryBudgetError
        If a task does not fit these workers.
    """
    plan = prepared.plan
    with _locked(root, means) as found:
        if found.version != prepared.version:
            if _is_published(root, prepared):
                _nothing_to_do(root, means)
                return
            msg = f"{root.path} was changed since this was planned; plan again"
            raise CollectionChangedError(msg)
        if prepared.is_done:
            _nothing_to_do(root, means)
            return
        _check_seen(root, prepared.refs, means)
        for name, peak in zip(("scatter", "gather"), plan.peak_nbytes, strict=True):
            means.room.budget.check(f"a {name} task of the plan", peak, "plan again for these workers")
        if plan.extension is None or plan.extension.mode != "append":
            found.check_named(replaces=plan.extension is None)
        with means.room.ahead():
            _check_inputs(prepared, means.room)
            _run(root, prepared, means, found)


@contextlib.contextmanager
def _locked(root: Root, means: Means) -> Iterator[FolderContents]:
    """Hold the collection's lock, and see what is in its folder."""
    if unnamed := no_text(root.target.url):
        raise CollectionError(unnamed)
    if not means.scratch.is_local:
        check_takes_files(means.scratch.fs, means.scratch.url)
    with exclusive(root.target):
        found = contents_of(root.target)
        found.check()
        root.refresh()
        yield found


def _check_seen(root: Root, refs: Iterable[SourceRef], means: Means) -> None:
    """Refuse what is in this process's memory where tasks run in others: they would look for it for minutes."""
    if not means.room.is_apart:
        return
    places = {root.target.url: root.target.url, means.scratch.url: means.scratch.url}
    places |= {str(ref.item): ref.label for ref in refs if isinstance(ref.item, str)}
    if unseen := [shown for place, shown in places.items() if "memory://" in place]:
        msg = (
            f"{unseen[0]} is in the memory of this process, which the worker processes of a build do not see: build "
            "in this process, with dask.config.set(scheduler='threads'), or give paths on a disk"
        )
        raise SchedulerError(msg)


def _nothing_to_do(root: Root, means: Means) -> None:
    logger.info("%s holds these inputs already: nothing to do", root.path)
    sweep_idle(root.target, Scratch(root.target, means.scratch.options))


def _say_what_is_kept(root: Root, asked: int | None) -> None:
    """Warn where a call that had nothing to do asked for another number of versions, which only a build notes."""
    if root.manifest is not None and asked not in (None, root.manifest.keep):
        warn(
            f"{root.path} holds these inputs already, so keep={asked} is not noted: it keeps {root.manifest.keep}; "
            "give keep with the next build"
        )


def _is_published(root: Root, prepared: Prepared) -> bool:
    """True if the last build of the collection was this one."""
    last = None if root.manifest is None else next(reversed(root.manifest.builds), None)
    return last is not None and (last.plan, last.request) == (prepared.plan.fingerprint, prepared.request)


def _check_inputs(prepared: Prepared, room: EngineChoice) -> None:
    """Refuse inputs that are not what they were when they were scanned."""
    tasks = [
        (ref, s.identity) for ref, s in zip(prepared.refs, prepared.plan.sources, strict=True) if not ref.is_dataset
    ]
    try:
        room.scanner.run("check", raise_if_changed, tasks, lambda *_: None, lambda i: tasks[i][0].label)
    except SourceError as e:
        e.add_note("it was planned with what was there before: plan again")
        raise


def _run(root: Root, prepared: Prepared, means: Means, found: FolderContents) -> None:
    prepared.warn()
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(means.room.start(max(len(prepared.plan.blocks), prepared.plan.n_datasets)))
        if means.report is not None:
            stack.enter_context(engine.reported(means.report))
        job = _make_job(root, prepared, means.scratch, found)
        try:
            check_unchanged(job.target, found.version)  # now that what another build publishes has other names
            build(job, engine, Callbacks([*_records(job, engine), means.callback]))
        except CollectionBusyError:
            root.replaces = False
            root.refresh()
            if not _is_published(root, prepared):
                raise
            logger.info("%s: another run of this build was faster", root.path)
    root.replaces = False
    root.refresh()


def _records(job: Job, engine: Engine) -> list[Callback]:
    """What keeps account of a build; before the listeners of others, which may look at it, or raise."""
    recorder = Recorder(job.target, job.plan)
    if job.claim is None:
        return [recorder]
    return [recorder, Watch(job.target, job.claim, job.plan.fingerprint, engine.count_workers)]


def _make_job(root: Root, prepared: Prepared, scratch: Folder, found: FolderContents) -> Job:
    """The build's parts, with names of datasets that are claimed for it."""
    plan, target = prepared.plan, root.target
    folder = scratch / work_folder(plan, target, prepared.request)
    say_what_is_lost(scratch, folder.url.rpartition("/")[2])
    work = Work(plan.fingerprint, folder.url, is_new=scratch.is_local and not os.path.exists(scratch.path))
    first, inherited = max(plan.first_dataset, found.last + 1), _inherited(root, found)
    keep, kept = _kept(root, found, prepared.keep)
    claim = claim_numbers(target, plan.work_key, first, plan.n_datasets, work)
    return Job(
        plan,
        prepared.refs,
        folder,
        target,
        prepared.annotations,
        claim.first,
        prepared.base,
        found.version,
        prepared.request,
        claim=claim,
        replaced=tuple(sorted(found.named | found.versions.datasets)),
        inherited=inherited,
        version=found.root.number + 1,
        keep=keep,
        kept=kept,
        attributes=root.other_attributes,
    )


def _inherited(root: Root, found: FolderContents) -> tuple[str, ...]:
    """Datasets that do not say that they are of the collection after the build, and may be removed."""
    if root.manifest is not None:
        return found.inherited
    ours = (n for n in found.datasets if DATASET_NAME.fullmatch(n) and dataset_number(n) <= found.last)
    return tuple(sorted({*found.named, *found.versions.datasets, *found.inherited, *ours}, key=dataset_number))


def _kept(root: Root, found: FolderContents, asked: int | None) -> tuple[int, tuple[int, ...]]:
    """How many versions stay, and the numbers of the earlier ones among them.

    Raises
    ------
    CollectionError
        If the version that is to stay is annbatch's, which has no manifest.
    """
    keep, now = asked or found.root.keep, found.root
    if keep > 1 and now.is_collection and not now.has_manifest:
        msg = f"{root.path} was written by annbatch, and keep={keep} cannot keep that as a version; copy it, or give 1"
        raise CollectionError(msg)
    numbers = (*now.kept, now.number) if now.has_manifest else ()
    return keep, numbers[max(len(numbers) - keep + 1, 0) :]
