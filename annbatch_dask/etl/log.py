"""The log of a build, in a folder beside the collection: what differs between two runs of one build, such as seconds.

The collection itself holds nothing of the kind, so that equal builds write equal bytes.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from time import perf_counter
from typing import Any

from annbatch_dask.errors import AnnbatchDaskError
from annbatch_dask.events import BuildEnd, BuildStart, Callback, StageEnd, StageStart, TaskEnd
from annbatch_dask.plan.plan import Plan
from annbatch_dask.storage.folder import Folder

__all__ = ["BuildLog", "Recorder", "StageLog", "limit_of", "log_folder", "read_log"]

logger = logging.getLogger(__name__)

_SUFFIX = ".log"


@dataclass(frozen=True)
class StageLog:
    """A stage as it went.

    Attributes
    ----------
    name
        ``"transpose"``, ``"measure"``, ``"group"``, ``"scatter"``, ``"find"``, ``"collect"``, ``"compare"``,
        ``"gather"`` or ``"commit"``.
    n_tasks, n_reused
        Tasks, and how many of them an earlier, interrupted run had done.
    n_obs, n_bytes
        Rows, and uncompressed bytes, that its tasks read or wrote.
    seconds
        Wall time.
    spent
        Seconds of all its tasks together, by activity.
    """

    name: str
    n_tasks: int
    n_reused: int
    n_obs: int
    n_bytes: int
    seconds: float
    spent: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class BuildLog:
    """A build as it went, and what its plan had said.

    Attributes
    ----------
    plan
        Fingerprint of the plan.
    started
        When, ISO 8601 in UTC.
    engine
        What ran it, in words.
    seconds
        From the engine's start to the commit.
    planned_tasks, planned_bytes
        Tasks by stage, and uncompressed bytes to read.
    peak_nbytes, task_nbytes
        What a scatter and a gather task need at most by the plan, and what each could have.
    stages
        In their order.
    limit
        What the tasks spent most of their seconds on: ``"inflate"`` (to read the inputs), ``"spill"`` (to write spill
        files, or wait for what is read of them), ``"write"`` (with the encoding); empty where none was run.
    """

    plan: str
    started: str
    engine: str
    seconds: float
    planned_tasks: dict[str, int]
    planned_bytes: int
    peak_nbytes: tuple[int, int]
    task_nbytes: int
    stages: tuple[StageLog, ...]
    limit: str = ""

    @property
    def n_bytes_read(self) -> int:
        """Uncompressed bytes that scatter tasks read."""
        return sum(s.n_bytes for s in self.stages if s.name == "scatter")


def read_log(target: Folder, fingerprint: str) -> BuildLog | None:
    """The log of a collection's build, by its plan's fingerprint; None where there is none."""
    found = log_folder(target).find(_name(fingerprint))
    if found is None:
        return None
    values = json.loads(found)
    stages = tuple(StageLog(**stage) for stage in values["stages"])
    return BuildLog(**values | {"stages": stages, "peak_nbytes": tuple(values["peak_nbytes"])})


def log_folder(target: Folder) -> Folder:
    """The folder of a collection's logs, beside it."""
    return Folder(target.url.rstrip("/") + _SUFFIX, target.options)


def _name(fingerprint: str) -> str:
    return f"{fingerprint}.json"


_LIMITS = {
    "inflate": ("read", "inflate"),
    "spill": ("spill", "wait"),
    "write": ("encode", "write"),
}
"""Activities of tasks."""


def limit_of(stages: Sequence[StageLog]) -> str:
    """What most of the tasks' seconds were spent on, see :class:`BuildLog`."""
    spent = {limit: sum(s.spent.get(a, 0.0) for s in stages for a in names) for limit, names in _LIMITS.items()}
    return max(spent, key=lambda limit: spent[limit]) if any(spent.values()) else ""


class Recorder(Callback):
    """Listens to a build, and writes its log when it has succeeded."""

    def __init__(self, target: Folder, plan: Plan) -> None:
        self._target, self._plan = target, plan
        self._stages: list[StageLog] = []
        self._sums: Counter[str] = Counter()
        self._spent: Counter[str] = Counter()

    def on_build_start(self, event: BuildStart) -> None:
        """Look at the clock."""
        self._engine, self._started, self._start = event.engine, datetime.now(UTC), perf_counter()

    def on_stage_start(self, event: StageStart) -> None:
        """Begin to count."""
        self._sums.clear()
        self._spent.clear()

    def on_task_end(self, event: TaskEnd) -> None:
        """Count."""
        self._sums.update(n_tasks=1, n_reused=event.reused, n_obs=event.n_rows, n_bytes=event.n_bytes)
        self._spent.update(event.activities)

    def on_stage_end(self, event: StageEnd) -> None:
        """Keep the sums."""
        sums: dict[str, Any] = {k: self._sums[k] for k in ("n_tasks", "n_reused", "n_obs", "n_bytes")}
        self._stages.append(StageLog(event.stage, **sums, seconds=event.seconds, spent=dict(self._spent)))

    def on_build_end(self, event: BuildEnd) -> None:
        """Write. The collection is published by now: a log that cannot be written is a warning, not an error."""
        if event.error is not None:
            return
        plan = self._plan
        log = BuildLog(
            plan=plan.fingerprint,
            started=self._started.isoformat(timespec="seconds"),
            engine=self._engine,
            seconds=perf_counter() - self._start,
            planned_tasks={"scatter": len(plan.blocks), "gather": plan.n_datasets},
            planned_bytes=plan.n_bytes_read,
            peak_nbytes=plan.peak_nbytes,
            task_nbytes=plan.budget.task_nbytes,
            stages=tuple(self._stages),
            limit=limit_of(self._stages),
        )
        try:
            log_folder(self._target).write(_name(log.plan), json.dumps(asdict(log), indent=1).encode(), durable=False)
        except (OSError, AnnbatchDaskError) as e:
            logger.warning("%s was built, but its log could not be written: %s", self._target.url, e)
