"""Status of a collection's builds: what runs, how far it is, what was interrupted, and how the last ones went.

It is made of what lies in the shared folder alone, so that any machine can tell: the lock's file, claims, what running
builds say of themselves, and logs. Nothing is written or locked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from annbatch_dask.etl.log import BuildLog, read_log
from annbatch_dask.etl.watch import BEAT_S, BuildProgress, StageProgress, find_progress
from annbatch_dask.formatting import format_bytes, format_count, plural
from annbatch_dask.manifest import Manifest
from annbatch_dask.storage.claims import Claim, find_claims
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.lock import holder_of

__all__ = ["BuildState", "BuildStatus", "CollectionStatus", "status_of"]

SILENT_S = 6 * BEAT_S
"""A build on another machine that has said nothing for so long counts as silent."""
_N_LAST = 3

BuildState = Literal["running", "silent", "interrupted"]


@dataclass(frozen=True)
class BuildStatus:
    """A build that has not succeeded yet.

    Attributes
    ----------
    state
        ``"running"``; ``"interrupted"``: the same call resumes it; ``"silent"``: it is on another machine, which
        cannot be asked, and has given no sign of life for a minute, or one of a time to come, by a clock that is wrong.
    pid, host
        Its process, as far as known.
    progress
        How far it has come; None where it said nothing: it is about to begin, or of an earlier release.
    """

    state: BuildState
    pid: int | None
    host: str | None
    progress: BuildProgress | None

    @property
    def silence(self) -> float | None:
        """Seconds since its last sign of life, by the clocks of both machines; None where there was none."""
        return None if self.progress is None else _seconds_since(self.progress.updated)


@dataclass(frozen=True)
class CollectionStatus:
    """Builds of a collection.

    Attributes
    ----------
    path
        Of the collection.
    n_obs
        Its rows now; None where there is no collection yet.
    holder
        Process that holds the collection's lock, in words; None where nobody does, or on an object store.
    builds
        Those that run or were interrupted, by their dataset numbers.
    last
        Logs of the last builds that succeeded, the last one first.

    Examples
    --------
    >>> found = collection.status()
    >>> found.state, found.builds, len(found.last)
    ('idle', (), 1)
    """

    path: str
    n_obs: int | None
    holder: str | None
    builds: tuple[BuildStatus, ...]
    last: tuple[BuildLog, ...]

    @property
    def state(self) -> Literal["running", "preparing", "silent", "interrupted", "idle", "none"]:
        """That of the first build that runs; else of one that is silent, or interrupted; else whether there is any.

        ``"preparing"``: a process holds the lock and plans, or resumes. ``"idle"``: no build runs, and none was
        interrupted. ``"none"``: nothing is there.
        """
        states = {b.state for b in self.builds}
        if "running" in states:
            return "running"
        if self.holder is not None and "silent" not in states:
            return "preparing"
        if states:
            return "silent" if "silent" in states else "interrupted"
        return "none" if self.n_obs is None else "idle"

    def __str__(self) -> str:
        """Say it in lines."""
        return "\n".join(_lines(self))

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values: sizes in bytes, times in seconds, nothing rounded."""
        return {
            "collection": self.path,
            "state": self.state,
            "n_obs": self.n_obs,
            "holder": self.holder,
            "builds": [_build_json(b) for b in self.builds],
            "last": [_log_json(log) for log in self.last],
        }


def status_of(target: Folder, path: str, manifest: Manifest | None, n_obs: int | None) -> CollectionStatus:
    """Look at a collection's folder, and beside it."""
    builds = tuple(_status_of(target, claim) for claim in find_claims(target))
    plans = [b.plan for b in reversed(manifest.builds)][:_N_LAST] if manifest is not None else []
    logs = tuple(log for plan in plans if (log := read_log(target, plan)) is not None)
    return CollectionStatus(path, n_obs, holder_of(target) if target.is_local else None, builds, logs)


def _status_of(target: Folder, claim: Claim) -> BuildStatus:
    progress = find_progress(target, claim)
    return BuildStatus(_state(claim, progress), claim.owner.get("pid"), claim.owner.get("host"), progress)


def _state(claim: Claim, progress: BuildProgress | None) -> BuildState:
    if claim.is_over or progress is not None and progress.error is not None:
        return "interrupted"
    if claim.is_here:
        return "running"
    # of a clock that is ahead nothing can be told, and of one that is behind no more than of a machine that is silent
    return "silent" if progress is None or abs(_seconds_since(progress.updated)) > SILENT_S else "running"


def _seconds_since(time: str) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds()


# --- in words ------------------------------------------------------------------------------------------------------


def _lines(status: CollectionStatus) -> Iterator[str]:
    n_obs = status.n_obs
    holds = "nothing is there yet" if n_obs is None else f"{n_obs:,} cells"
    yield f"{status.path}: {status.state}, {holds}" if status.state != "none" else f"{status.path}: {holds}"
    if status.holder is not None:
        yield f"  locked by {status.holder}" + (", which plans" if status.state == "preparing" else "")
    for build in status.builds:
        yield from _build_lines(build)
    for log in status.last:
        stages = ", ".join(f"{s.name} {s.seconds:.1f} s" for s in log.stages)
        limit = f", most of it to {log.limit}" if log.limit else ""
        yield f"  built {log.started} in {log.seconds:.1f} s ({stages}){limit}, on {log.engine}"


def _build_lines(build: BuildStatus) -> Iterator[str]:
    who = "a build" if build.pid is None else f"process {build.pid} on {build.host}"
    progress = build.progress
    remedy = {
        "running": "",
        "interrupted": ": call again to resume",
        "silent": ": that machine cannot be asked; if the build runs no more, call again to resume",
    }[build.state]
    why = f" ({progress.error})" if progress is not None and progress.error is not None else ""
    yield f"  {build.state}: {who}{why}{remedy}"
    if progress is None:
        yield "    it has not said how far it is"
        return
    yield f"    started {progress.started}, last sign of life {progress.updated}, on {progress.engine}"
    if build.state == "silent" and build.silence is not None:
        yield f"    {_silence(build.silence)}"
    if build.state == "running" and progress.no_worker_since is not None:
        yield f"    no worker has been there since {progress.no_worker_since}, and the build waits for one"
    elif build.state == "running" and progress.n_workers is not None:
        yield f"    {plural(progress.n_workers, 'worker')}"
    if progress.dashboard is not None and build.state == "running":
        yield f"    dashboard {progress.dashboard}"
    for stage in progress.stages:
        yield f"    {_stage_line(stage)}"
    if progress.slowest is not None and progress.slowest.seconds:
        slow = progress.slowest
        yield f"    slowest: {slow.what}: {slow.seconds:.1f} s for {plural(slow.n_obs, 'cell')}"


def _silence(seconds: float) -> str:
    if seconds < 0:
        return f"that is {-seconds:,.0f} s from now: the clocks of its machine and of this one differ; set them"
    return f"that was {seconds:,.0f} s ago, by this machine's clock; if clocks differ by that, it may run: set them"


def _stage_line(stage: StageProgress) -> str:
    parts = [f"{stage.name}: {stage.n_done:,} of {plural(stage.n_tasks, 'task')}"]
    if stage.n_obs:
        parts.append(f"{stage.n_obs_done:,} of {stage.n_obs:,} cells")
    if stage.n_bytes:
        parts.append(f"{format_bytes(stage.n_bytes_done)} of {format_bytes(stage.n_bytes)}")
    if stage.n_reused:
        parts.append(f"{stage.n_reused:,} done before")
    if stage.n_retries:
        parts.append(f"{stage.n_retries:,} tried again")
    if (rate := stage.obs_per_second) is not None:
        parts.append(f"{format_count(rate)} cells/s")
    parts.append(f"{stage.seconds:.1f} s")
    if not stage.is_over and stage.seconds_left is not None:
        parts.append(f"{stage.seconds_left:.0f} s left")
    if (spent := sum(stage.activities.values())) > 0:
        most = sorted(stage.activities.items(), key=lambda item: -item[1])
        parts.append("time in " + ", ".join(f"{name} {100 * s / spent:.0f} %" for name, s in most[:4]))
    return ", ".join(parts)


# --- in JSON -------------------------------------------------------------------------------------------------------


def _build_json(build: BuildStatus) -> dict[str, Any]:
    progress = build.progress
    values: dict[str, Any] = {"state": build.state, "pid": build.pid, "host": build.host}
    if progress is None:
        return values | {"stages": []}
    slow = progress.slowest
    return values | {
        "plan": progress.plan,
        "started": progress.started,
        "updated": progress.updated,
        "engine": progress.engine,
        "dashboard": progress.dashboard,
        "error": progress.error,
        "n_workers": progress.n_workers,
        "no_worker_since": progress.no_worker_since,
        "stages": [
            vars(s) | {"obs_per_second": s.obs_per_second, "seconds_left": s.seconds_left} for s in progress.stages
        ],
        "slowest": None if slow is None else vars(slow),
    }


def _log_json(log: BuildLog) -> dict[str, Any]:
    return vars(log) | {"peak_nbytes": list(log.peak_nbytes), "stages": [vars(s) for s in log.stages]}
