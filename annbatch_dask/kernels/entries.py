"""The entries of the rows of a batch, copied to where they go in one call for each thread."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from annbatch_dask.kernels.assemble import as_unsigned, goes_past_cache
from annbatch_dask.kernels.compiled import compiled
from annbatch_dask.kernels.prefetch import end_stream, put_past
from annbatch_dask.kernels.shared import pointer_at, take_part

__all__ = ["Copier", "Entries", "entry_copier"]

Array = NDArray[Any]
Ints = NDArray[np.int64]
Copier = Callable[[], None]
"""Copies parts of a batch, each the next one, until none is left."""


class Entries(NamedTuple):
    """Entries of the rows of one batch, which have one dtype in all blocks.

    Attributes
    ----------
    values, columns
        (n,) addresses of those of each row.
    pointers
        0, and where each row of the batch ends.
    short
        The pointers in 32 bits, of which higher ones are lost.
    """

    values: Ints
    columns: Ints
    pointers: Ints
    short: NDArray[np.int32]


def entry_copier(rows: Entries, like: tuple[Array, Array], dest: tuple[Array, Array], n_parts: int) -> Copier:
    """What any number of threads call at a time to copy the entries of the rows of a batch, casting.

    Parameters
    ----------
    rows
        Their values and columns have the dtypes of ``like``, and go to ``[pointers[i]:pointers[i + 1]]`` of ``dest``;
        there are kernels for all of these dtypes.
    like, dest
        Values and columns; 1-D, C-contiguous.
    n_parts
        How many parts the rows are cut into; a call takes those that are left.
    """
    (values, to_values), (columns, to_columns) = map(as_unsigned, like, dest)
    # Of each a number says that it goes past the cache, and nothing that it does not: so it is compiled for either.
    past = [0 if goes_past_cache(*pair) else None for pair in ((values, to_values), (columns, to_columns))]
    given = (rows.values, values, to_values, past[0], rows.columns, columns, to_columns, past[1])
    return partial(_copy_entries, *given, rows.pointers, n_parts, np.zeros(1, np.int64))


@compiled
def _copy_stretches(sources: Ints, like: Array, dest: Array, past: Any, pointers: Ints, first: int, end: int) -> None:  # noqa: PLR0913, PLR0917
    for i in range(first, end):
        start, stop = np.uint64(pointers[i]), np.uint64(pointers[i + np.uint64(1)])
        row = numba.carray(pointer_at(sources[i], like), (stop - start,))
        if past is None:
            to = dest[start:stop]
            for j in range(to.shape[0]):
                to[j] = row[j]
        else:
            put_past(row, np.uint64(0), stop - start, dest, start)


@compiled
def _copy_entries(  # noqa: PLR0913, PLR0917 - a kernel
    values: Ints,
    like_value: Array,
    to_values: Array,
    values_past: Any,
    columns: Ints,
    like_column: Array,
    to_columns: Array,
    columns_past: Any,
    pointers: Ints,
    n_parts: int,
    taken: Ints,
) -> None:
    is_there, first, end = take_part(values.shape[0], n_parts, taken, 0)
    while is_there:
        _copy_stretches(values, like_value, to_values, values_past, pointers, first, end)
        _copy_stretches(columns, like_column, to_columns, columns_past, pointers, first, end)
        is_there, first, end = take_part(values.shape[0], n_parts, taken, 0)
    if values_past is not None or columns_past is not None:
        end_stream()
