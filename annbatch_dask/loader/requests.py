"""Maps load requests to rows of datasets, and back to rows of a load window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.kernels.row_runs import deal_request, lie_within
from annbatch_dask.kernels.shared import address_of
from annbatch_dask.loader.blocks import BatchRows, Loaded
from annbatch_dask.order.planned import expand, rows_or_runs
from annbatch_dask.storage.threads import unlocked_property
from annbatch_dask.types import LoadRequest

if TYPE_CHECKING:
    import pandas as pd

    from annbatch_dask.loader.gpu.slab import Slab

__all__ = ["Assignment", "Ints", "Resolved", "Window", "cut_frame", "resolve_rows"]

Ints = NDArray[np.int64]
_MAX_FRAMES = 64  # each takes a few kilobytes


@dataclass(frozen=True)
class Window:
    """Rows that were loaded together, in request order.

    Attributes
    ----------
    rows
        Their global positions.
    splits
        One array of positions in this window per batch.
    matrices
        What was loaded of each matrix.
    obs
        The rows of ``obs`` of all batches, one behind the other, or None.
    frames
        Those of each batch; none where there are so many that they are made one by one.
    codes
        The codes of each label column, of the same rows.
    nbytes
        Memory reserved for the blocks.
    slab
        Where all blocks are, if they are to be copied at once.
    batches
        The rows of each batch, by block; none where batches are made on a device.
    """

    rows: Ints
    splits: list[Ints]
    matrices: list[Loaded]
    obs: pd.DataFrame | None
    codes: dict[str, Ints]
    nbytes: int
    slab: Slab | None = None
    batches: Sequence[BatchRows] = ()
    frames: Sequence[pd.DataFrame] = ()

    def obs_of(self, batch: int) -> pd.DataFrame | None:
        """The rows of ``obs`` of one batch."""
        if self.obs is None or self.frames:
            return self.frames[batch] if self.frames else None
        return self.obs.iloc[self.dealt(batch)]

    def dealt(self, batch: int) -> slice:
        """Position of a batch among all batches."""
        return slice(self._ends[batch], self._ends[batch + 1])

    @unlocked_property
    def _ends(self) -> list[int]:
        """0, and where each batch ends among all; there may be as many as rows."""
        return [0, *accumulate(map(len, self.splits))]

    def without_blocks(self) -> Window:
        """All but the bytes that were loaded."""
        return replace(self, matrices=[replace(loaded, blocks=[]) for loaded in self.matrices], slab=None)


@dataclass(frozen=True)
class Assignment:
    """The part of a request that one dataset holds: where in the request, and which of its rows."""

    dataset: int
    places: Ints
    rows: Ints


def resolve_rows(request: LoadRequest, n_obs: int) -> Ints:
    """The global rows of a request, in its order; KeyError without ``requests``, IndexError out of range."""
    rows = expand(request["requests"])
    if not lie_within(rows, n_obs):
        raise _beyond(rows, n_obs)
    return rows


def _beyond(rows: Ints, n_obs: int) -> IndexError:
    return IndexError(f"request for rows {rows.min()} to {rows.max()}, the loader has rows 0 to {n_obs - 1}")


@dataclass(frozen=True)
class Resolved:
    """A load request, looked up.

    Attributes
    ----------
    rows
        Its global rows, in its order.
    splits, dealt
        The batches as int64, and all of them one behind the other.
    taken
        ``rows[dealt]``.
    assignments
        The part of each dataset that holds any of the rows.
    places
        Of each row the number of its part, and which of the rows there it is.
    """

    rows: Ints
    splits: list[Ints]
    dealt: Ints
    taken: Ints
    assignments: list[Assignment]
    places: tuple[Ints, Ints]

    @classmethod
    def of(cls, request: LoadRequest, bounds: Ints) -> Resolved:
        """Look it up in datasets of which ``d`` has rows ``bounds[d]:bounds[d + 1]``, 0 is the first.

        KeyError if it lacks a part, TypeError for what is no row number, IndexError for one that is not there.
        """
        given, runs = rows_or_runs(request["requests"])
        splits = [_checked(np.asarray(split)).astype(np.int64, copy=False) for split in request["splits"]]
        dealt = _joined(splits)
        rows, (firsts, places, local, number, position), taken, are_within = deal_request(given, runs, bounds, dealt)
        if firsts[0] < 0:
            raise _beyond(rows, int(bounds[-1]))
        if not are_within:
            at = next(split for split in splits if not lie_within(split, len(rows)))
            msg = f"split with positions {at.min()} to {at.max()}, the request has {len(rows)} rows"
            raise IndexError(msg)
        pairs = enumerate(pairwise(firsts.tolist()))
        parts = [Assignment(d, places[first:stop], local[first:stop]) for d, (first, stop) in pairs if first < stop]
        return cls(rows, splits, dealt, taken, parts, (number, position))


def _checked(split: NDArray[Any]) -> NDArray[Any]:
    if split.ndim != 1 or (split.dtype.kind not in "iu" and len(split)):
        msg = (
            "a split must be a 1-D integer array of positions (of a mask: np.flatnonzero(mask)), got dtype "
            f"{split.dtype}, {split.ndim}-D"
        )
        raise TypeError(msg)
    return split


def _joined(splits: list[Ints]) -> Ints:
    """All of them one behind the other; not copied where they are pieces of one array that was cut up."""
    if not splits:
        return np.zeros(0, np.int64)
    whole: Any = splits[0].base
    if type(whole) is not np.ndarray or whole.dtype != np.int64 or whole.ndim != 1 or not whole.flags.c_contiguous:
        return np.concatenate(splits)
    end = first = address_of(whole)
    for split in splits:
        if split.base is not whole or not split.flags.c_contiguous or address_of(split) != end:
            return np.concatenate(splits)
        end += split.nbytes
    dealt: Ints = whole[: (end - first) // whole.itemsize]
    return dealt


def cut_frame(frame: pd.DataFrame, splits: Sequence[Ints]) -> list[pd.DataFrame]:
    """The rows of each batch, at once: pandas takes several times as long for one now and then; none of many."""
    if len(splits) > _MAX_FRAMES:
        return []
    ends = [0, *accumulate(map(len, splits))]
    return [frame.iloc[start:stop] for start, stop in pairwise(ends)]
