"""What a running build says of itself, for who looks from another process or machine: a file beside the collection.

It lies in the folder of logs, is written again every few seconds, a sign of life, and goes when the build succeeds. Of
a build that was interrupted it stays, as its claim does, until the next one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from time import perf_counter
from typing import Any

from annbatch_dask.etl.log import log_folder
from annbatch_dask.events import BuildEnd, BuildStart, Callback, StageEnd, StageStart, TaskEnd, TaskRetry
from annbatch_dask.storage.claims import Claim
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.secrets import shown, without_secrets

__all__ = ["BuildProgress", "SlowestTask", "StageProgress", "Watch", "find_progress", "forget_progress"]

logger = logging.getLogger(__name__)

BEAT_S = 10.0
"""Between two signs of life."""


@dataclass(frozen=True)
class StageProgress:
    """A stage, as far as it has come.

    Attributes
    ----------
    name
        ``"transpose"``, ``"measure"``, ``"group"``, ``"scatter"``, ``"find"``, ``"collect"``, ``"compare"``,
        ``"gather"`` or ``"commit"``.
    n_tasks, n_done, n_reused, n_retries
        Tasks; how many are done; how many of these an earlier, interrupted run had done; and how often one was handed
        out again, because it failed or its worker died.
    n_obs, n_obs_done, n_obs_reused
        Rows of all tasks, of those done, and of those that an earlier run had done.
    n_bytes, n_bytes_done
        Uncompressed bytes that the tasks read or write; 0 where unknown.
    seconds
        Since its start, or that it took.
    is_over
        Whether it has ended.
    activities
        Seconds of its tasks by what they spent them on, over all workers.
    """

    name: str
    n_tasks: int
    n_done: int = 0
    n_reused: int = 0
    n_retries: int = 0
    n_obs: int = 0
    n_obs_done: int = 0
    n_obs_reused: int = 0
    n_bytes: int = 0
    n_bytes_done: int = 0
    seconds: float = 0.0
    is_over: bool = False
    activities: dict[str, float] = field(default_factory=dict)

    @property
    def obs_per_second(self) -> float | None:
        """Rows a second, without those of an earlier run; None before the first."""
        done = self.n_obs_done - self.n_obs_reused
        return done / self.seconds if done and self.seconds else None

    @property
    def seconds_left(self) -> float | None:
        """Seconds until its end at this rate; None where there is none yet."""
        if self.is_over or (rate := self.obs_per_second) is None:
            return 0.0 if self.is_over else None
        return (self.n_obs - self.n_obs_done) / rate


@dataclass(frozen=True)
class SlowestTask:
    """The task that took longest, by seconds for a row, and what it worked on."""

    stage: str
    what: str
    n_obs: int
    seconds: float

    @property
    def _pace(self) -> float:
        return self.seconds / max(1, self.n_obs)

    def or_slower(self, other: SlowestTask | None) -> SlowestTask:
        """The slower one, of two of a stage; else this one."""
        return self if other is None or other.stage != self.stage or other._pace <= self._pace else other


@dataclass(frozen=True)
class BuildProgress:
    """A build, as far as it has come.

    Attributes
    ----------
    nonce
        That of its claim.
    plan
        Fingerprint of its plan.
    started, updated
        When, ISO 8601 in UTC, by the clock of its machine.
    engine
        What runs it, in words.
    dashboard
        Address of Dask's dashboard.
    stages
        Those that have begun, in their order.
    slowest
        The slowest task of the last stage.
    error
        Why it ended, in words; None while it runs.
    n_workers
        Workers that were there at the last sign of life; None where that is not known, or there are none in principle.
    no_worker_since
        Since when it has waited for a worker; None where there is one.
    """

    nonce: str
    plan: str
    started: str
    updated: str
    engine: str
    dashboard: str | None = None
    stages: tuple[StageProgress, ...] = ()
    slowest: SlowestTask | None = None
    error: str | None = None
    n_workers: int | None = None
    no_worker_since: str | None = None

    @classmethod
    def parse(cls, document: bytes) -> BuildProgress | None:
        """Parse a file's content; None where it is none of this release's."""
        try:
            values = json.loads(document)
            slowest = values["slowest"] and SlowestTask(**values["slowest"])
            stages = tuple(StageProgress(**s) for s in values["stages"])
            return cls(**values | {"stages": stages, "slowest": slowest})
        except (TypeError, ValueError, KeyError):
            return None


def _name(first: int) -> str:
    return f"running-{first}.json"


def find_progress(target: Folder, claim: Claim) -> BuildProgress | None:
    """What the build of a claim has said last; None where it has said nothing."""
    document = log_folder(target).find(_name(claim.first))
    found = None if document is None else BuildProgress.parse(document)
    return found if found is not None and found.nonce == claim.nonce else None


def forget_progress(target: Folder, claim: Claim) -> None:
    """Remove what the build of a claim has said, which without the claim means nothing: an error is a warning."""
    folder = log_folder(target)
    try:
        folder.unlink(_name(claim.first))
    except Exception as e:  # noqa: BLE001 - stores have errors of their own
        logger.warning("%s/%s could not be removed: %s", folder.url, _name(claim.first), e)
    if folder.is_local:
        with contextlib.suppress(OSError):  # logs of other builds are in it
            os.rmdir(folder.path)


class Watch(Callback):
    """Listens to a build, and writes how far it has come: at both ends of each stage, and every few seconds."""

    def __init__(
        self, target: Folder, claim: Claim, plan: str, count_workers: Callable[[], int | None] = lambda: None
    ) -> None:
        self._target, self._claim, self._plan, self._count_workers = target, claim, plan, count_workers
        self._now: BuildProgress | None = None
        self._stage_start = 0.0
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._beat: threading.Thread | None = None
        self._can_write = True

    def on_build_start(self, event: BuildStart) -> None:
        """Note who builds."""
        dashboard = None if event.dashboard is None else shown(event.dashboard)
        started = _now()
        self._now = BuildProgress(self._claim.nonce, self._plan, started, started, event.engine, dashboard)

    def on_stage_start(self, event: StageStart) -> None:
        """Say so."""
        self._stage_start = perf_counter()
        stage = StageProgress(event.stage, event.n_tasks, n_obs=event.n_rows, n_bytes=event.n_bytes)
        self._set(lambda now: replace(now, stages=(*now.stages, stage), slowest=None))
        self._write()
        if self._beat is None:  # from here on the end of the build is sure to be told
            self._beat = threading.Thread(target=self._go_on, name="annbatch-dask-watch", daemon=True)
            self._beat.start()

    def on_task_end(self, event: TaskEnd) -> None:
        """Count."""
        task = SlowestTask(event.stage, event.what, event.n_rows, event.seconds)
        with self._lock:
            now = self._now
            if now is None or not now.stages:
                return
            last = now.stages[-1]
            seconds = dict(last.activities)
            for name, s in event.activities.items():
                seconds[name] = seconds.get(name, 0.0) + s
            last = replace(
                last,
                n_done=last.n_done + 1,
                n_reused=last.n_reused + event.reused,
                n_obs_done=last.n_obs_done + event.n_rows,
                n_obs_reused=last.n_obs_reused + event.n_rows * event.reused,
                n_bytes_done=last.n_bytes_done + event.n_bytes,
                activities=seconds,
            )
            slowest = now.slowest if event.reused else task.or_slower(now.slowest)
            self._now = replace(now, stages=(*now.stages[:-1], last), slowest=slowest)

    def on_task_retry(self, event: TaskRetry) -> None:
        """Count."""
        self._set_stage(lambda last: replace(last, n_retries=last.n_retries + 1))

    def on_stage_end(self, event: StageEnd) -> None:
        """Say so."""
        self._set_stage(lambda last: replace(last, seconds=event.seconds, is_over=True))
        self._write()

    def on_build_end(self, event: BuildEnd) -> None:
        """Take it back where the build succeeded; else say what ended it."""
        self._is_over.set()
        if self._beat is not None:
            self._beat.join()
        if event.error is None:
            forget_progress(self._target, self._claim)
            return
        error = " ".join(without_secrets(str(event.error)).split())
        error = f"{type(event.error).__name__}: {error}" if error else type(event.error).__name__
        self._set(lambda now: replace(now, error=error))
        self._write()

    def _set(self, change: Any) -> None:
        with self._lock:
            if self._now is not None:
                self._now = change(self._now)

    def _set_stage(self, change: Any) -> None:
        self._set(lambda now: replace(now, stages=(*now.stages[:-1], change(now.stages[-1]))) if now.stages else now)

    def _go_on(self) -> None:
        while not self._is_over.wait(BEAT_S):
            n = self._count_workers()
            self._set(
                lambda now, n=n: replace(
                    now, n_workers=n, no_worker_since=None if n != 0 else now.no_worker_since or _now()
                )
            )
            self._write()

    def _write(self) -> None:
        seconds = perf_counter() - self._stage_start
        self._set_stage(lambda last: last if last.is_over else replace(last, seconds=seconds))
        self._set(lambda now: replace(now, updated=_now()))
        if (now := self._now) is None:
            return
        payload = json.dumps(asdict(now), indent=1).encode()
        try:
            log_folder(self._target).write(_name(self._claim.first), payload, durable=False)
        except Exception as e:  # noqa: BLE001 - stores have errors of their own
            if self._can_write:  # the build goes on; that is said once
                logger.warning("%s: how far the build is cannot be written for others: %s", self._target.url, e)
            self._can_write = False


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
