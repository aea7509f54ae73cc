"""What is done to a batch: fused into the pass that picks its rows, or by functions of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from annbatch_dask.transforms import BinnedExpression, NormalizeLog1p, RankTokens, Scale

__all__ = ["Fused", "Transform", "split_transform"]

Fused = NormalizeLog1p | RankTokens | BinnedExpression
"""Transforms that are part of the pass that picks the rows."""
Transform = Fused | Callable[[Any], Any]


def split_transform(
    transform: Transform | Sequence[Transform] | None,
) -> tuple[Fused | None, Callable[[Any], Any] | None]:
    """Split a transform into the fused part and the functions called with the batch."""
    steps: list[Any] = [] if transform is None else list(transform) if isinstance(transform, Sequence) else [transform]
    for step in steps:
        if isinstance(step, type) and issubclass(step, (Fused, Scale)):
            msg = f"transform is the class {step.__name__}; give one of it, {step.__name__}(...)"
            raise TypeError(msg)
    fused = steps.pop(0) if steps and isinstance(steps[0], Fused) else None
    functions: list[Callable[[Any], Any]] = []
    for step in steps:
        if isinstance(step, Fused):
            msg = f"{type(step).__name__} is done while the batch is put together: give it once, and first"
            raise TypeError(msg)
        if not callable(step):
            msg = f"transform must be callable, got {type(step).__name__}"
            raise TypeError(msg)
        functions.append(step)
    return fused, _Chain(tuple(functions)) if functions else None


@dataclass(frozen=True)
class _Chain:
    """Functions one after the other; pickles where they do."""

    functions: tuple[Callable[[Any], Any], ...]

    def __call__(self, batch: Any) -> Any:
        for function in self.functions:
            batch = function(batch)
            if batch is None:
                name = getattr(function, "__qualname__", repr(function))
                msg = f"transform {name} returned None; return the batch, also where it was changed in place"
                raise TypeError(msg)
        return batch
