"""Arrays of references to Python's objects, of which no object is looked at: without the GIL."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from annbatch_dask.kernels.compiled import compiled
from annbatch_dask.kernels.prefetch import prefetch_at
from annbatch_dask.kernels.shared import address_of, pointer_at

__all__ = ["take_references"]

Objects = NDArray[np.object_]
Ints = NDArray[np.int64]
_BYTES = np.zeros(1, np.uint8)


def take_references(objects: Objects, rows: Ints, order: Ints) -> Objects:
    """Return ``objects[rows[order]]``, in a third of numpy's time where ``order`` has each of the rows once.

    Parameters
    ----------
    objects
        1-D, C-contiguous, of objects that lie in memory in about this order.
    rows
        (n,) best in runs: to count a reference, each object is written to.
    order
        Which of the rows come, in any number.
    """
    if len(order) != len(rows) or not objects.flags.c_contiguous:
        return objects.take(rows[order])
    _prefetch(address_of(objects), len(objects), rows, _BYTES)
    taken = objects.take(rows)
    return taken if _reorder(address_of(taken), order) else taken.take(order)


@compiled
def _prefetch(address: int, n_objects: int, rows: Ints, some: Any) -> None:
    """Ask for the cache lines where references to some objects are counted."""
    objects = numba.carray(pointer_at(address, rows), (n_objects,))
    for i in range(np.uint64(len(rows))):
        if 0 <= rows[i] < n_objects:
            prefetch_at(numba.carray(pointer_at(objects[np.uint64(rows[i])], some), (1,)), 0)


@compiled
def _reorder(address: int, order: Ints) -> bool:
    """Put references into another order, in place; False, and nothing is done, unless each is there once.

    So none is counted anew.
    """
    n = len(order)
    is_there, before = np.zeros(n, np.bool_), np.empty(n, np.int64)
    for i in range(n):
        if order[i] < 0 or order[i] >= n or is_there[order[i]]:
            return False
        is_there[order[i]] = True
    references = numba.carray(pointer_at(address, order), (n,))
    before[:] = references
    for i in range(np.uint64(n)):
        references[i] = before[np.uint64(order[i])]
    return True
