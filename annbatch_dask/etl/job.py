"""The job that all tasks of a build share. It is a file in the scratch folder, so tasks and graphs stay small.

It is a pickle, which may run code, and hold credentials: of signed URLs, of stores, of what ``load_adata`` knows. So it
is there encrypted and authenticated, under a key of its own that goes through the scheduler with each task.
"""

from __future__ import annotations

import ctypes
import json
import pickle
import secrets
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import cloudpickle
import numpy as np

from annbatch_dask.errors import IntegrityError, SourceError
from annbatch_dask.etl.metrics import read_metrics, with_metrics
from annbatch_dask.formatting import format_bytes
from annbatch_dask.manifest import Manifest
from annbatch_dask.plan.layout import Block
from annbatch_dask.plan.plan import WORK_DIGITS, Plan
from annbatch_dask.plan.schema import SourceSchema
from annbatch_dask.sources.chosen import choose_rows
from annbatch_dask.sources.open import PickedSource, Source, SourceRef, WholeSource, open_source
from annbatch_dask.sources.transposed import TransposedSource
from annbatch_dask.storage.claims import Claim
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.private import check_private
from annbatch_dask.storage.scratch import OWNER
from annbatch_dask.storage.transient import seen_before
from annbatch_dask.warn import warn

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = [
    "KEPT_NBYTES",
    "GatherTask",
    "Job",
    "JobFile",
    "forget_inputs",
    "forget_job",
    "load_job",
    "own_scratch",
    "owner_of",
    "save_job",
    "say_what_is_lost",
    "trim_memory",
]

KEPT_NBYTES = 2**27
"""Of freed memory, that a worker keeps from one task to the next of the same stage."""
_PREFIX = "job-"
_NONCE = bytes(12)
"""A key encrypts one file, once."""


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
    first_dataset
        Number of the first dataset to write.
    base
        Manifest of the collection as it is, where the build extends one.
    base_version
        Version of its root document; None if there is none yet.
    request
        Identity of the call, see :meth:`annbatch_dask.plan.options.Options.request`.
    claim
        What the build says of itself in the collection's folder.
    replaced
        Names of the datasets that can be opened before the commit.
    inherited
        See :class:`annbatch_dask.manifest.Manifest`.
    version, keep, kept
        Number of the version that the build makes; how many it keeps, and the numbers of the earlier ones.
    attributes
        Attributes of the root document that others wrote; they are kept.
    measured
        Where it stands what was measured of the cells that are kept.
    transposed
        Where the inputs are by rows that are stored by columns, as far as the plan says so.
    """

    plan: Plan
    refs: tuple[SourceRef, ...]
    scratch: Folder
    target: Folder
    annotations: AnnData | None = None
    first_dataset: int = 0
    base: Manifest | None = None
    base_version: str | None = None
    request: str = ""
    claim: Claim | None = None
    replaced: tuple[str, ...] = ()
    inherited: tuple[str, ...] = ()
    version: int = 1
    keep: int = 1
    kept: tuple[int, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    measured: Folder | None = None
    transposed: Folder | None = None

    @property
    def collection_id(self) -> str:
        """Id of the collection after the build: that of its base, or a new one."""
        return (self.base.id if self.base is not None else "") or self.plan.fingerprint[:16]

    @contextmanager
    def open_block(self, block: Block) -> Iterator[Source]:
        """Open the input of a block: the rows that take part, with what was measured of the block's.

        One that is read whole is kept for the next block of the same input in this thread. That is what ``load_adata``
        returned, and a file of an old format. :func:`forget_inputs` lets go of it.
        """
        ref, schema, qc = self.refs[block.source], self.plan.sources[block.source], self.plan.options.qc
        with ExitStack() as files:
            with seen_before(ref.label):  # by the scan
                source = choose_rows(self._by_rows(block.source, self.open_whole(block.source, files)), schema.kept)
            if qc is not None and qc.annotate and not (schema.is_dataset or self.plan.is_survey):
                found = None if self.measured is None else read_metrics(self.measured, block.measured, qc)
                source = with_metrics(source, qc, schema, block, found)
            yield source

    def _by_rows(self, index: int, source: WholeSource) -> PickedSource:
        found = next((t for t in self.plan.transposed if t.source == index), None)
        if found is None or self.transposed is None:
            return source
        numbers: dict[str, list[int]] = {}
        for k, strip in enumerate(self.plan.strips):
            if strip.source == index:
                numbers.setdefault(strip.matrix, []).append(k)
        strips = {name: range(some[0], some[-1] + 1) for name, some in numbers.items()}
        return TransposedSource(source, found, self.transposed, strips)

    def open_whole(self, index: int, files: ExitStack) -> WholeSource:
        """Open an input, as it is, until ``files`` are closed; one that is read whole is kept longer."""
        ref = self.refs[index]
        if ref.load_adata is None and not self.plan.sources[index].resident_nbytes:
            return files.enter_context(open_source(ref))
        key, thread = (self.plan.work_key, index), threading.get_ident()
        kept = _kept.get(thread)
        if kept is None or kept[0] != key:
            kept = None  # before the next one takes its memory
            _kept.pop(thread, None)
            with ExitStack() as loaded:
                source = loaded.enter_context(open_source(ref))
                _check_rows(source, ref, self.plan.sources[index])
                kept = _kept[thread] = key, source
                loaded.pop_all()  # what a user's function opened stays open with what it returned
        return kept[1]


_kept: dict[int, tuple[tuple[str, int], WholeSource]] = {}
"""The input that was read whole last, by thread."""


def forget_inputs() -> None:
    """Let go of inputs in all threads of this process, which may be whole atlases, and of what reading them left."""
    _kept.clear()
    trim_memory()


@dataclass(frozen=True)
class JobFile:
    """Location and key of the job file, passed to each task."""

    scratch: Folder
    key: bytes = field(default_factory=partial(secrets.token_bytes, 32), repr=False)
    name: str = field(default_factory=lambda: f"{_PREFIX}{uuid4().hex}")


def _check_rows(source: WholeSource, ref: SourceRef, schema: SourceSchema) -> None:
    """Refuse what has other rows than the plan was made of: ``load_adata`` may return something else each time."""
    n_rows = schema.n_obs if schema.kept is None else schema.kept.n_rows
    if source.n_obs != n_rows:
        msg = (
            f"{ref.label} had {n_rows:,} cells when it was looked at first, and has {source.n_obs:,} now; load_adata "
            "must return the same each time it is called"
        )
        raise SourceError(msg)


def own_scratch(job: Job) -> None:
    """Say in a scratch folder whose it is, by which it may be removed: before anything else is in it."""
    job.scratch.write(OWNER, json.dumps({"annbatch_dask": "scratch", "collection": job.target.url}).encode())


def save_job(job: Job) -> JobFile:
    """Write the job where its tasks find it."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # not needed where nothing is built

    file = JobFile(job.scratch)
    own_scratch(job)
    sealed = AESGCM(file.key).encrypt(_NONCE, cloudpickle.dumps(replace(job, plan=_for_tasks(job.plan))), None)
    job.scratch.write(file.name, sealed, durable=False)  # who comes after a power cut has another key, and file
    if job.scratch.is_local:  # of calls before this one: two at a time are possible on object stores alone
        old = [name for name in job.scratch.names() if name.startswith(_PREFIX) and name != file.name]
        job.scratch.remove_files(old)
    return file


def _for_tasks(plan: Plan) -> Plan:
    """The plan without what was only needed to make it: counts of stored values, most of its bytes, and names."""
    none = np.zeros(0, np.int64)
    slim = replace(
        plan,
        options=replace(plan.options, naming=replace(plan.options.naming, mapping={})),
        sources=tuple(
            replace(s, cuts=None, matrices=tuple(replace(m, nnz=none, heaviest=none) for m in s.matrices))
            for s in plan.sources
        ),
    )
    vars(slim).update(fingerprint=plan.fingerprint, work_key=plan.work_key)  # which it has too, and tasks ask for
    return slim


def owner_of(scratch: Folder) -> str | None:
    """Path or URL of the collection that a scratch folder is for; None where it is no build's scratch folder."""
    try:
        found = json.loads(scratch.find(OWNER) or b"{}")
        return str(found["collection"]) if found.get("annbatch_dask") == "scratch" else None
    except (ValueError, AttributeError, KeyError):
        return None


def work_folder(plan: Plan, target: Folder, request: str) -> str:
    """Name of a build's own scratch folder: builds of one plan into two collections do not meet.

    Nor do calls that ask for other things, such as another ``merge``, of which a plan's scatter tasks know nothing.
    """
    return f"{plan.work_key}-{blake2b(f'{target.url}/{request}'.encode(), digest_size=4).hexdigest()}"


def say_what_is_lost(scratch: Folder, work: str) -> None:
    """Warn of the same work, cut in other pieces: it was begun on workers of another memory, and is done again."""
    end = work.rpartition("-")[2]
    for name in scratch.names():
        if name != work and name.startswith(work[:WORK_DIGITS]) and name.endswith(f"-{end}"):
            size = format_bytes(sum((scratch / name).sizes().values()))
            msg = (
                f"{scratch.url}/{name} holds {size} of this build, begun with workers of another memory, for which "
                "rows were cut into other pieces: it cannot be taken up and the work is done anew; to go on with it, "
                "stop, and start workers (or give memory_limit) as before; else remove it"
            )
            warn(msg)


_last: tuple[JobFile, Job] | None = None


def load_job(file: JobFile) -> Job:
    """The job of a task; kept for the next task of the same call.

    Raises
    ------
    IntegrityError
        If the file is not what the build wrote; it is not unpickled then.
    ForeignScratchError
        If the folder is another user's.
    """
    global _last  # noqa: PLW0603 - one process works on one build
    last = _last
    if last is None or last[0] != file:
        last = _last = file, _read(file)
    return last[1]


def forget_job() -> None:
    """Let go of the job whose tasks ran last in this process, and of what it keeps open: groups in zip files, say."""
    global _last  # noqa: PLW0603 - see load_job
    _last = None


def _read(file: JobFile) -> Job:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    with seen_before(f"{file.scratch.url}/{file.name}"):  # by who wrote it
        check_private(file.scratch)
        sealed = file.scratch.read(file.name)
    try:
        job: Job = pickle.loads(AESGCM(file.key).decrypt(_NONCE, sealed, None))  # noqa: S301 - written by this build
    except InvalidTag:
        msg = (
            f"{file.scratch.url}/{file.name} ({len(sealed):,} bytes) is not what this build wrote: it is damaged, or "
            "somebody else can write there; call again, with a scratch folder that only you can write to"
        )
        raise IntegrityError(msg) from None
    return job


def trim_memory(*, keep_nbytes: int = 0) -> None:
    """Give freed memory back to the system, where that is glibc's to do.

    Thousands of inflated pieces leave gaps in the arenas of their threads, which glibc would keep: 100 MiB a worker, on
    top of what the next stage needs. A task that is like the one before fills them again, and pages that it had to
    get anew would be a twelfth of its time: up to ``keep_nbytes`` of them stay.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        return
    if not keep_nbytes or _freed_nbytes(libc) > keep_nbytes:
        libc.malloc_trim(0)


class _MallocInfo(ctypes.Structure):
    """What glibc's mallinfo2(3) returns."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    )


def _freed_nbytes(libc: Any) -> float:
    """Bytes that were freed and are kept; infinitely many where glibc is too old to say (before 2.33)."""
    if not hasattr(libc, "mallinfo2"):
        return float("inf")
    libc.mallinfo2.restype = _MallocInfo
    return float(libc.mallinfo2().fordblks)


@dataclass(frozen=True)
class GatherTask:
    """Task that writes one dataset, with the results of scatter that it needs.

    Attributes
    ----------
    dataset
        Number of the dataset within this build.
    dtypes
        Stored dtype of each matrix, the same in all datasets.
    n_left_out
        Rows of the plan's that are left out.
    left_out_nnz, left_out_fingerprint
        Their stored values of each sparse matrix, and their fingerprint.
    """

    dataset: int
    dtypes: Mapping[str, str]
    n_left_out: int = 0
    left_out_nnz: Mapping[str, int] = field(default_factory=dict)
    left_out_fingerprint: int = 0
