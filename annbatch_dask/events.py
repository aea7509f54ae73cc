"""Events of a running build. The library emits them; progress bars and logs listen.

A listener subclasses :class:`Callback` and overrides what it wants to hear. All methods are called
in the process that runs the build, never on a worker, and one at a time.

Examples
--------
>>> class Stages(events.Callback):
...     def on_stage_end(self, event):
...         print(event.stage)
>>> with dask.config.set(scheduler="threads"):
...     built = DatasetCollection("listened.zarr").add_adatas(["a.h5ad"], seed=0, callbacks=[Stages()])
scatter
gather
commit
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["BuildEnd", "BuildStart", "Callback", "Callbacks", "StageEnd", "StageStart", "TaskEnd", "TaskRetry"]


@dataclass(frozen=True)
class BuildStart:
    """The build begins to use its engine.

    Attributes
    ----------
    target
        Where the collection will be.
    engine
        In words: the cluster's address, or the name of the Dask scheduler.
    dashboard
        Address of Dask's dashboard, or None.
    """

    target: str
    engine: str
    dashboard: str | None


@dataclass(frozen=True)
class StageStart:
    """A stage (``scan``, ``scatter``, ``gather`` or ``commit``) begins.

    ``n_rows`` and ``n_bytes`` are what all its tasks together will report; 0 where unknown.
    """

    stage: str
    n_tasks: int
    n_rows: int
    n_bytes: int


@dataclass(frozen=True)
class TaskEnd:
    """One task of a stage is done.

    ``reused`` is True where an earlier, interrupted build had already done it. ``what`` says what it worked on,
    ``seconds`` how long, where it ran, and ``activities`` on what it spent them.
    """

    stage: str
    task: int
    n_rows: int
    n_bytes: int
    reused: bool = False
    what: str = ""
    seconds: float = 0.0
    activities: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskRetry:
    """A task failed, or its worker died, and it is handed out again; ``reason`` says why in words."""

    stage: str
    task: int
    what: str
    reason: str


@dataclass(frozen=True)
class StageEnd:
    """A stage is done, after ``seconds`` seconds."""

    stage: str
    seconds: float


@dataclass(frozen=True)
class BuildEnd:
    """The build is over; ``error`` is None where it succeeded."""

    error: BaseException | None


class Callback:
    """A listener that ignores everything; subclass it."""

    def on_build_start(self, event: BuildStart) -> None:
        """The engine is up."""

    def on_stage_start(self, event: StageStart) -> None:
        """A stage begins."""

    def on_task_end(self, event: TaskEnd) -> None:
        """A task is done."""

    def on_task_retry(self, event: TaskRetry) -> None:
        """A task is tried again."""

    def on_stage_end(self, event: StageEnd) -> None:
        """A stage is done."""

    def on_build_end(self, event: BuildEnd) -> None:
        """The build succeeded or failed; always called once after ``on_build_start``."""


class Callbacks(Callback):
    """Passes every event on to several listeners, in order."""

    def __init__(self, listeners: Iterable[Callback]) -> None:
        self.listeners: Sequence[Callback] = tuple(listeners)

    def on_build_start(self, event: BuildStart) -> None:
        """Pass on."""
        for listener in self.listeners:
            listener.on_build_start(event)

    def on_stage_start(self, event: StageStart) -> None:
        """Pass on."""
        for listener in self.listeners:
            listener.on_stage_start(event)

    def on_task_end(self, event: TaskEnd) -> None:
        """Pass on."""
        for listener in self.listeners:
            listener.on_task_end(event)

    def on_task_retry(self, event: TaskRetry) -> None:
        """Pass on."""
        for listener in self.listeners:
            listener.on_task_retry(event)

    def on_stage_end(self, event: StageEnd) -> None:
        """Pass on."""
        for listener in self.listeners:
            listener.on_stage_end(event)

    def on_build_end(self, event: BuildEnd) -> None:
        """Pass on."""
        for listener in self.listeners:
            listener.on_build_end(event)
