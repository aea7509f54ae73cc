"""Maps load requests to rows of datasets, and back to rows of a load window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.kernels.row_runs import deal_rows, lie_within
from annbatch_dask.kernels.shared import address_of
from annbatch_dask.loader.blocks import BatchRows, Loaded
from annbatch_dask.order.planned import expand
from annbatch_dask.types import LoadRequest

if TYPE_CHECKING:
    import pandas as pd

    from annbatch_dask.loader.gpu.slab import Slab

__all__ = ["Assignment", "Ints", "Window", "assign", "cut_frame", "resolve_rows", "resolve_splits"]

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
        start = sum(map(len, self.splits[:batch]))
        return slice(start, start + len(self.splits[batch]))

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


def resolve_splits(request: LoadRequest, n_rows: int) -> tuple[list[Ints], Ints]:
    """The batches of a request as int64, and all of them one behind the other.

    IndexError where one names a row the request does not have.
    """
    given = [np.asarray(split) for split in request["splits"]]
    for split in given:
        if split.ndim != 1 or (split.dtype.kind not in "iu" and len(split)):
            msg = (
                "a split must be a 1-D integer array of positions (of a mask: np.flatnonzero(mask)), got dtype "
                f"{split.dtype}, {split.ndim}-D"
            )
            raise TypeError(msg)
    splits = [split.astype(np.int64, copy=False) for split in given]
    dealt = _joined(splits)
    if lie_within(dealt, n_rows):  # at once: there may be many small ones
        return splits, dealt
    for split in splits:
        if len(split) and (split.min() < 0 or split.max() >= n_rows):
            msg = f"split with positions {split.min()} to {split.max()}, the request has {n_rows} rows"
            raise IndexError(msg)
    return splits, dealt


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


def assign(rows: Ints, bounds: Ints) -> tuple[list[Assignment], tuple[Ints, Ints]]:
    """Deal rows out to the datasets that hold them; dataset ``d`` has rows ``bounds[d]:bounds[d + 1]``, 0 is the first.

    Beside the parts, returns of each row the number of its part, and which of the rows there it is. IndexError if no
    dataset has one.
    """
    firsts, places, local, number, position = deal_rows(rows, bounds)
    if firsts[0] < 0:
        raise _beyond(rows, int(bounds[-1]))
    pairs = enumerate(pairwise(firsts.tolist()))
    parts = [Assignment(d, places[first:stop], local[first:stop]) for d, (first, stop) in pairs if first < stop]
    return parts, (number, position)
