"""What every task of a build shares. It lies in the scratch folder, so tasks are a few bytes and graphs stay small."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING

import cloudpickle

from annbatch_dask.manifest import Manifest
from annbatch_dask.plan.build import Plan
from annbatch_dask.storage.publish import Folder
from annbatch_dask.storage.sources import Source, SourceRef, open_source

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Job", "load_job", "save_job", "trim_memory"]

_FILE = "job.pkl"


@dataclass(frozen=True)
class Job:
    """A plan with the places it works on.

    Attributes
    ----------
    refs
        The inputs, one for each source of the plan.
    scratch
        Folder of spill files and receipts, for this plan alone.
    target
        Folder of the collection.
    annotations
        What the collection says of genes and of itself: an AnnData of no cells; None where only the gene names are.
    base
        Manifest of the collection as it is, where the build extends one.
    """

    plan: Plan
    refs: tuple[SourceRef, ...]
    scratch: Folder
    target: Folder
    annotations: AnnData | None = None
    base: Manifest | None = None

    @contextmanager
    def open_source(self, index: int) -> Iterator[Source]:
        """Open an input. What ``load_adata`` returned is kept for the next block of the same input in this thread."""
        ref = self.refs[index]
        if ref.load_adata is None:
            with open_source(ref) as source:
                yield source
            return
        key = (self.plan.work_key, index)
        if getattr(_kept, "key", None) != key:
            _kept.__dict__.clear()
            with ExitStack() as files:
                _kept.source, _kept.key = files.enter_context(open_source(ref)), key
                files.pop_all()  # what a user's function opened stays open with what it returned
        yield _kept.source


_kept = threading.local()


def save_job(job: Job) -> None:
    """Write the job where its tasks find it."""
    job.scratch.write(_FILE, cloudpickle.dumps(job))


def work_folder(plan: Plan, target: Folder) -> str:
    """Name of a build's own scratch folder: builds of one plan into two collections do not meet."""
    return f"{plan.work_key}-{blake2b(target.url.encode(), digest_size=4).hexdigest()}"


def load_job(scratch: Folder) -> Job:
    """The job of a scratch folder; kept for the next task of the same call."""
    written = os.stat(f"{scratch.path}/{_FILE}").st_mtime_ns if scratch.is_local else 0
    return _load(scratch.url, tuple(sorted(scratch.options.items())), written)


@lru_cache(maxsize=1)
def _load(url: str, options: tuple[tuple[str, object], ...], _: int) -> Job:
    job: Job = cloudpickle.loads(Folder(url, dict(options)).read(_FILE))
    return job


def trim_memory() -> None:
    """Give freed memory back to the system, where that is glibc's to do.

    Thousands of inflated pieces leave gaps in the arenas of their threads, which glibc would keep: 190 MiB a worker, on
    top of what the next stage needs.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
