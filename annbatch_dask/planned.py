"""RunnablePlan: what a user holds of a build that is decided and not begun."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from annbatch_dask.events import Callback
from annbatch_dask.plan import summary as words
from annbatch_dask.plan.plan import Plan

if TYPE_CHECKING:
    import os

    from distributed import Client

__all__ = ["RunnablePlan"]

_DONE = (("done", "the last build was this very call: to run this does nothing; another seed adds the cells again"),)

C = TypeVar("C")
"""Type of the collection."""


@dataclass(frozen=True, repr=False)
class RunnablePlan(Plan, Generic[C]):
    """A plan of :meth:`annbatch_dask.DatasetCollection.plan_adatas`: look at it, then run it.

    Its repr says tasks, bytes and peak memory. All attributes of :class:`annbatch_dask.plan.plan.Plan`, which opens
    nothing and is the same for the same inputs and options, are its own.

    Examples
    --------
    >>> plan = DatasetCollection("planned.zarr").plan_adatas(["a.h5ad", "b.h5ad"], dataset_size=300)
    >>> plan.n_datasets
    2
    >>> plan.run()
    DatasetCollection('planned.zarr', 2 datasets, 500 cells x 40 genes)
    """

    _run: Callable[[Plan, Mapping[str, Any]], C] = field(kw_only=True, compare=False)
    is_done: bool = field(default=False, kw_only=True, compare=False)
    """The last build of the collection was this very call: :meth:`run` does nothing."""

    @classmethod
    def of(cls, plan: Plan, run: Callable[[Plan, Mapping[str, Any]], C], *, is_done: bool = False) -> RunnablePlan[C]:
        """A plan, and what builds it from the arguments of its method."""
        return cls(**_values(plan), _run=run, is_done=is_done)

    def run(
        self,
        *,
        client: Client | None = None,
        scratch: str | os.PathLike[str] | None = None,
        scratch_options: Mapping[str, Any] | None = None,
        callbacks: Iterable[Callback] | None = None,
        progress: bool | None = None,
        performance_report: str | os.PathLike[str] | None = None,
    ) -> C:
        """Build the collection as planned, without another scan. Where that is done already, it does nothing.

        Parameters
        ----------
        client
            A client of the Dask cluster to use, whose workers must have the memory that the plan needs. None uses what
            the plan was made for.
        scratch, scratch_options, callbacks, progress, performance_report
            As for :meth:`annbatch_dask.DatasetCollection.add_adatas`.

        Returns
        -------
        The collection.

        Raises
        ------
        CollectionChangedError
            If the collection was changed since it was planned.
        SourceError
            If an input was changed since it was planned, or is while it is read.
        MemoryBudgetError
            If a task does not fit the client's workers.
        """
        return self._run(
            Plan(**_values(self)),
            {
                "client": client,
                "scratch": scratch,
                "scratch_options": scratch_options,
                "callbacks": callbacks,
                "progress": progress,
                "performance_report": performance_report,
            },
        )

    @property
    def _notes(self) -> tuple[tuple[str, str], ...]:
        return _DONE if self.is_done else ()

    @property
    def title(self) -> str:
        """Title of the plan: inputs and outputs in one line."""
        title = words.title(self)
        return f"Done already; anew it would be: {title}" if self.is_done else title

    def figures(self) -> list[tuple[str, str]]:
        """Named figures of the plan: tasks, bytes, peak memory and others."""
        return words.figures(self, self._notes)

    def summary(self) -> str:
        """The plan in words: tasks, bytes and peak memory."""
        return words.summary(self, self._notes, self.title)

    __repr__ = summary

    def _repr_html_(self) -> str:
        """The plan for a notebook, with the genes that inputs share."""
        return words.as_html(self, self._notes, self.title)


def _values(plan: Plan) -> dict[str, Any]:
    """What makes up a plan, without what was derived of it."""
    return {f.name: getattr(plan, f.name) for f in fields(Plan)}
