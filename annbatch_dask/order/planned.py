"""Load requests that are known by the sizes of their batches, and made only when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from operator import index
from typing import Any

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.kernels.row_runs import lay_out
from annbatch_dask.types import LoadRequest

__all__ = ["Planned", "as_runs", "copy_request", "cut", "expand", "plan_request", "rows_or_runs", "skip"]

Ints = NDArray[np.int64]
AnyInts = NDArray[np.integer[Any]]
Requests = list[slice] | AnyInts
_MIN_RUN = 4


@dataclass(frozen=True)
class Planned:
    """A load request to be made.

    Attributes
    ----------
    sizes
        Rows of each of its batches.
    make
        Makes the request.
    """

    sizes: tuple[int, ...]
    make: Callable[[], LoadRequest]

    def pick(self, batches: Sequence[int]) -> Planned:
        """Restrict a request to some of its batches and the rows they need."""
        if list(batches) == list(range(len(self.sizes))):
            return self
        return Planned(tuple(self.sizes[b] for b in batches), partial(_pick, self.make, list(batches)))

    def map_splits(self, sizes: tuple[int, ...], select: Callable[[AnyInts], AnyInts]) -> Planned:
        """Restrict each batch to the positions that ``select`` takes, ``sizes`` of them."""
        return Planned(sizes, partial(_map_splits, self.make, select))

    def fill(self, batch: int, size: int, donor: Planned) -> Planned:
        """One of its batches filled up to ``size`` with rows of ``donor``, from its first one on."""
        return Planned((size,), partial(_fill, self.make, batch, size, donor.make))


def plan_request(request: LoadRequest) -> Planned:
    """A request that exists already, as it is now."""
    kept = copy_request(request)
    return Planned(tuple(len(split) for split in kept["splits"]), lambda: kept)


def copy_request(request: LoadRequest) -> LoadRequest:
    """A request of somebody's own sampler, which may shuffle the same arrays for its next one before this is read."""
    return {"requests": copy(request["requests"]), "splits": [np.array(split) for split in request["splits"]]}


def expand(requests: Requests) -> Ints:
    """The rows of a request, one by one, in its order; TypeError where it has no slices or whole numbers."""
    rows, runs = rows_or_runs(requests)
    if len(runs):
        rows = lay_out(runs)
    return rows


def rows_or_runs(requests: Requests) -> tuple[Ints, Ints]:
    """The rows of a request, one by one, or the (n, 3) runs they come in, see ``lay_out``; the other is empty."""
    if isinstance(requests, np.ndarray) and requests.dtype != object:  # annbatch's own are arrays of slices
        if requests.ndim != 1 or (requests.dtype.kind not in "iu" and len(requests)):
            msg = (
                "requests must be slices or a 1-D integer array (of a mask: np.flatnonzero(mask)), got dtype "
                f"{requests.dtype}, {requests.ndim}-D"
            )
            raise TypeError(msg)
        return requests.astype(np.int64), np.empty((0, 3), np.int64)
    runs = np.array([_run_of(part) for part in requests], np.int64)
    return np.empty(0, np.int64), runs.reshape(-1, 3)


def _run_of(part: slice) -> tuple[int, int, int]:
    if type(part) is slice and type(part.start) is type(part.stop) is int and part.step is None:
        return part.start, part.stop, 1
    if not isinstance(part, slice) or part.stop is None or (part.step is not None and part.step < 1):
        msg = f"requests must be slices with a stop and a step of 1 or more, or an array of row numbers, got {part!r}"
        raise TypeError(msg)
    return index(part.start or 0), index(part.stop), index(part.step or 1)


def as_runs(rows: Ints) -> Requests:
    """Rows as slices, in their order, where there are four rows or more to each on average; else as they are."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    if (len(breaks) + 1) * _MIN_RUN > len(rows):
        return rows
    firsts, lasts = rows[np.append(0, breaks)], rows[np.append(breaks - 1, len(rows) - 1)]
    return [slice(first, last + 1) for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True)]


def cut(order: NDArray[Any], size: int) -> list[NDArray[Any]]:
    """``order`` in pieces of ``size``, the last one maybe shorter."""
    return [order[start : start + size] for start in range(0, len(order), size)]


def skip(stream: Iterable[Planned], n_batches: int) -> Iterator[Planned]:
    """The stream without its first batches; none of the skipped requests is made."""
    for item in stream:
        n = len(item.sizes)
        if n_batches >= n:
            n_batches -= n
            continue
        yield item.pick(range(n_batches, n))
        n_batches = 0


def _only(rows: Ints, splits: list[AnyInts]) -> LoadRequest:
    """A request for the rows that the splits name, and no others."""
    needed, places = np.unique(np.concatenate(splits), return_inverse=True)
    bounds = np.cumsum([len(split) for split in splits])[:-1]
    return {"requests": as_runs(rows[needed]), "splits": np.split(places, bounds)}


def _pick(make: Callable[[], LoadRequest], batches: list[int]) -> LoadRequest:
    request = make()
    return _only(expand(request["requests"]), [request["splits"][b] for b in batches])


def _map_splits(make: Callable[[], LoadRequest], select: Callable[[AnyInts], AnyInts]) -> LoadRequest:
    request = make()
    return _only(expand(request["requests"]), [select(split) for split in request["splits"]])


def _fill(make: Callable[[], LoadRequest], batch: int, size: int, make_donor: Callable[[], LoadRequest]) -> LoadRequest:
    request, donor = make(), make_donor()
    rows = expand(request["requests"])[request["splits"][batch]]
    more = expand(donor["requests"])[np.concatenate(donor["splits"])]
    return {"requests": np.concatenate([rows, np.resize(more, size - len(rows))]), "splits": [np.arange(size)]}
