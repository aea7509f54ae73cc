"""What a task spends its time on: seconds by activity, such as reading or encoding, as its own thread sees them.

Work that other threads do at the same time counts where the task's thread waits for it. Engines measure, and what runs
in a task says what it does; outside of one nothing is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from time import perf_counter
from typing import TypeVar

__all__ = ["activity", "during", "measured"]

T = TypeVar("T")

_spent: ContextVar[dict[str, float] | None] = ContextVar("annbatch_dask_spent", default=None)


@contextlib.contextmanager
def activity(name: str) -> Iterator[None]:
    """Count the block's wall seconds under a name, without those of activities inside it."""
    spent = _spent.get()
    if spent is None:
        yield
        return
    before, start = sum(spent.values()), perf_counter()
    try:
        yield
    finally:
        inside = sum(spent.values()) - before
        spent[name] = spent.get(name, 0.0) + max(0.0, perf_counter() - start - inside)


def during(name: str, items: Iterator[T]) -> Iterator[T]:
    """Iterate, and count the seconds that each next item takes."""
    done = object()
    while True:
        with activity(name):
            item = next(items, done)
        if item is done:
            return
        yield item  # type: ignore[misc]


@contextlib.contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Seconds by activity of the block, which are whole when it ends."""
    spent: dict[str, float] = {}
    token = _spent.set(spent)
    try:
        yield spent
    finally:
        _spent.reset(token)
