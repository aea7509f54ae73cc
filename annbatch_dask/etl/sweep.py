"""Removes leftovers of builds from a collection's folder and scratch folders: after a build, and by gc."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from annbatch_dask.errors import CollectionError
from annbatch_dask.etl.job import Job
from annbatch_dask.etl.ours import contents_of, remove_dataset
from annbatch_dask.etl.scratches import Scratch
from annbatch_dask.etl.watch import forget_progress
from annbatch_dask.manifest import dataset_number
from annbatch_dask.storage.claims import Claim, release_claim
from annbatch_dask.storage.folder import Folder

__all__ = ["clean_up", "leftovers", "sweep", "sweep_idle", "withdraw"]

logger = logging.getLogger(__name__)


def withdraw(job: Job) -> None:
    """Remove the files of a build that was refused.

    Its numbers are its own, as long as its claim is there. What the root document names stays nevertheless.
    """
    claim, target = job.claim, job.target
    found = contents_of(target)
    if claim is None or claim not in found.claims:
        return
    for name in found.datasets:
        if dataset_number(name) in claim.numbers:
            remove_dataset(target, name, [job.plan.fingerprint])
    others = {w.scratch for c in found.claims if c != claim for w in c.works}
    scratch = scratch_of(job)
    scratch.remove(scratch.find(w for w in claim.works if w.scratch not in others))
    _release(target, [claim])


def sweep(
    target: Folder,
    scratch: Scratch,
    *roots: Folder,
    keep_last: int | None = None,
    dry_run: bool = False,
    abandoned: bool = False,
) -> list[str]:
    """Remove all leftovers: what builds left in the collection's folder, and their scratch folders.

    Parameters
    ----------
    keep_last
        Remove versions too, but for so many of the last ones; None keeps those that the last build was told to keep.
    roots
        Folders in which scratch folders may be that no claim tells of.
    dry_run
        Remove nothing.
    abandoned
        Also where it cannot be known that a build is over.

    Returns
    -------
    Names of what was, or would be, removed; scratch folders by path.

    Raises
    ------
    CollectionError
        If something in the folder is not ours; then nothing is removed.
    CollectionBusyError
        If a build may run.
    """
    found = contents_of(target, keep_last)
    found.check()
    if not abandoned:
        found.check_idle()
    names = found.leftovers(claims=found.claims)
    folders = scratch.find((w for c in found.claims for w in c.works), *roots)
    if not dry_run:
        names = found.remove(names)
        scratch.remove(folders)
        _release(target, found.claims)
    return [*sorted([*names, *(c.name for c in found.claims)]), *sorted(f.url for f, _ in folders)]


def sweep_idle(target: Folder, scratch: Scratch) -> None:
    """Remove all leftovers, where no build may run."""
    if target.is_local or all(c.is_over for c in contents_of(target).claims):
        sweep(target, scratch)


def leftovers(target: Folder) -> list[str]:
    """Names of our files in a collection's folder that no reader needs; running builds may need them."""
    found = contents_of(target)
    return sorted({*found.leftovers(claims=found.claims), *found.datasets, *(c.name for c in found.claims)})


def clean_up(job: Job) -> None:
    """Remove what this build, and others before it that are over, have left, right after a commit.

    Where readers hold no lease (on an object store, or on a disk without locks), datasets that were just replaced stay
    until the next build, as does the copy of a root document that another build makes before it commits. A build's
    claim is the last to go: after a crash, later builds find the leftovers by it.
    """
    target, scratch = job.target, scratch_of(job)
    found = contents_of(target)
    claims = [c for c in found.claims if target.is_local or c.is_over or c == job.claim]
    kept = () if found.locks_work else job.replaced
    if not target.is_local:
        kept = (*kept, *(n for n, v in found.versions.dropped.items() if v.number >= found.root.number))
    found.remove(found.leftovers(claims=claims, kept=kept))
    _remove_claims(target, scratch, claims)


def _remove_claims(target: Folder, scratch: Scratch, claims: Iterable[Claim]) -> None:
    """Remove the scratch folders of builds that are over, and then their claims."""
    done, folders = [], []
    for claim in claims:
        try:
            folders += scratch.find(claim.works)
        except CollectionError as e:
            logger.warning("%s", e)  # its claim stays, and with it the place
        else:
            done.append(claim)
    scratch.remove(folders)
    _release(target, done)


def _release(target: Folder, claims: Iterable[Claim]) -> None:
    for claim in claims:
        forget_progress(target, claim)
        release_claim(target, claim)


def scratch_of(job: Job) -> Scratch:
    """The scratch folders of a collection's builds, with what this build knows of how to open them."""
    return Scratch(job.target, job.scratch.options)
