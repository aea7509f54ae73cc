"""What a worker must have for the tasks of a build: the client's packages, the folders that all share, enough memory.

Workers that are there when a build begins are asked, and one that lacks something is an error before any work. One that
joins later finds out at its first task, which goes to another worker.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from distributed import Client, get_worker

from annbatch_dask.formatting import format_bytes, plural
from annbatch_dask.plan.memory import Budget
from annbatch_dask.storage import transient
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.transient import PAUSES_S

__all__ = [
    "NFS_PAUSES_S",
    "SILENT_S",
    "Needs",
    "SharedFile",
    "answers",
    "installed",
    "lacking_in_task",
    "workers_lacking",
]

logger = logging.getLogger(__name__)

_PACKAGE = __name__.partition(".")[0]
_OTHERS = ("anndata", "numcodecs", "zarr")
"""Packages that decide on the bytes of a collection, too."""
NFS_PAUSES_S = PAUSES_S[:6]
"""For so long, together a minute, a client of NFS may believe that a file is not there."""
SILENT_S = 20.0
"""For a worker to answer at all; tasks that hold Python's lock delay it."""
_ANSWER_S = 60.0
"""For a worker to look at the folders: those of a file server that hangs never answer."""


def installed() -> dict[str, str]:
    """Versions of the packages that write a collection, as they are in this process."""
    found = {_PACKAGE: str(importlib.import_module(_PACKAGE).__version__)}
    for name in _OTHERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


@dataclass(frozen=True)
class SharedFile:
    """A file that the client wrote, for all workers to see.

    Attributes
    ----------
    content
        A part of it, by which it is told from one of the same name in a folder of the worker's own.
    """

    folder: Folder
    name: str
    content: str = ""

    def is_seen(self) -> bool:
        """True if this process sees the client's file."""
        if not self.content:
            return self.folder.version(self.name) is not None
        return self.content.encode() in (self.folder.find(self.name) or b"")


@dataclass(frozen=True)
class Needs:
    """What a worker must have.

    Attributes
    ----------
    versions
        Packages of the client, see :func:`installed`.
    files
        Files that it must see.
    peaks
        Bytes that a task needs, by stage.
    """

    versions: Mapping[str, str] = field(default_factory=installed)
    files: tuple[SharedFile, ...] = ()
    peaks: Mapping[str, int] = field(default_factory=dict)
    token: str = field(default_factory=lambda: uuid4().hex)

    def other_versions(self) -> str:
        """How the packages of this process differ, in words; empty where they do not."""
        here = installed()
        other = [name for name, version in self.versions.items() if here.get(name, "none") != version]
        has, wants = (
            " and ".join(f"{name} {found.get(name, 'none')}" for name in other) for found in (here, self.versions)
        )
        return other and f"has {has}, and the build's process has {wants}: install the same" or ""

    def unseen(self) -> str:
        """Which folder this process does not see, in words; empty where it sees all."""
        for file in self.files:
            try:
                if file.is_seen():
                    continue
                why = ""
            except Exception as e:  # noqa: BLE001 - file systems and stores have errors of their own
                why = f" ({type(e).__name__}: {e})"
            return (
                f"does not see {file.folder.url}, where the build's process has just written {file.name}{why}: give an "
                "output and scratch= that all machines have under the same path, or as a URL"
            )
        return ""

    def too_small(self, stage: str, worker: Any) -> str:
        """How a worker is too small for a stage, in words; empty where it is not, or has no limit."""
        limit, n_threads, peak = worker.memory_manager.memory_limit, worker.state.nthreads, self.peaks.get(stage, 0)
        has = Budget(limit or 0, n_threads)
        if not limit or has.task_nbytes >= peak:
            return ""
        needs = Budget(0, n_threads).worker_nbytes_for(peak)
        return (
            f"has {format_bytes(limit)} for {plural(n_threads, 'thread')}, and a {stage} task needs "
            f"{format_bytes(peak)}: start workers with {format_bytes(needs)} or more for as many threads"
        )


_fit = ""
"""Token of the needs that this process was last found to fulfil, but for memory."""


def lacking_in_task(needs: Needs, stage: str) -> tuple[str, str] | None:
    """Address of this task's worker, and what it lacks; None where it lacks nothing. Waits for files to appear."""
    global _fit  # noqa: PLW0603 - one process works on one build
    worker = get_worker()
    found = needs.other_versions() if _fit != needs.token else ""
    found = found or needs.too_small(stage, worker)
    if not found and _fit != needs.token:
        for pause in NFS_PAUSES_S:
            if not (found := needs.unseen()):
                break
            transient.sleep(pause)
        else:
            found = needs.unseen()
    if found:
        return str(worker.address), found
    _fit = needs.token
    return None


def workers_lacking(client: Client, needs: Needs) -> dict[str, str]:
    """What workers lack of packages and folders, by their addresses; those that leave meanwhile lack nothing."""
    found = answers(client, _lacking, needs, seconds=SILENT_S + (_ANSWER_S if needs.files else 0))
    lacks = {}
    for address, lack in found.items():
        if isinstance(lack, Exception) and not isinstance(lack, OSError):  # what is sent is read by modules of ours
            why = f"{type(lack).__name__}: {lack}"
            lacks[address] = f"has another {_PACKAGE}, or none ({why}): install {_words(needs.versions)}"
        elif lack and not isinstance(lack, OSError):  # else it is gone
            lacks[address] = lack
    return lacks


def answers(
    client: Client, function: Callable[..., Any], *args: Any, workers: Sequence[str] | None = None, seconds: float
) -> dict[str, Any]:
    """What a function returns, or the error it raises, on each worker, by their addresses.

    Of a worker that does not answer, as one that is frozen, it is a TimeoutError: until Dask takes it for dead, after
    some minutes, it would be waited for.
    """

    async def ask(address: str) -> Any:
        asking = client.run(function, *args, workers=[address], on_error="return")
        try:
            return (await asyncio.wait_for(asking, seconds))[address]
        except TimeoutError as e:
            logger.warning(
                "worker %s does not answer within %.0f s: its tasks wait until it is closed", address, seconds
            )
            return e

    async def ask_all() -> dict[str, Any]:
        asked = (await client.scheduler.identity(n_workers=-1))["workers"] if workers is None else workers
        return dict(zip(asked, await asyncio.gather(*map(ask, asked)), strict=True))

    found: dict[str, Any] = client.sync(ask_all)
    return found


def _words(versions: Mapping[str, str]) -> str:
    return " and ".join(f"{name} {version}" for name, version in versions.items())


async def _lacking(needs: Needs) -> str:
    """What this worker lacks, found out beside its event loop, which has to go on."""
    looking = asyncio.to_thread(lambda: needs.other_versions() or needs.unseen())
    try:
        return await asyncio.wait_for(looking, _ANSWER_S)
    except TimeoutError:
        return f"got no answer from {', '.join(f.folder.url for f in needs.files)} within {_ANSWER_S:.0f} s"
