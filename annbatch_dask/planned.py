"""RunnablePlan: what a user holds of a build that is decided and not begun."""

from __future__ import annotations

from dataclasses import dataclass, fields

from annbatch_dask.plan import summary as words
from annbatch_dask.plan.plan import Plan

__all__ = ["RunnablePlan"]


@dataclass(frozen=True, repr=False)
class RunnablePlan(Plan):
    """A plan of a collection's build. Its repr says tasks, bytes and peak memory."""

    @classmethod
    def of(cls, plan: Plan) -> RunnablePlan:
        """From a plan that knows nothing of where it will be run."""
        return cls(**{f.name: getattr(plan, f.name) for f in fields(plan)})

    @property
    def title(self) -> str:
        """What comes of what, in one line."""
        return words.title(self)

    def figures(self) -> list[tuple[str, str]]:
        """What the plan says, each with a name: tasks, bytes, peak memory and the like."""
        return words.figures(self)

    def summary(self) -> str:
        """The plan in words: tasks, bytes and peak memory."""
        return words.summary(self)

    __repr__ = summary

    def _repr_html_(self) -> str:
        """The plan for a notebook, with the genes that inputs share."""
        return words.as_html(self)
