"""Entries whose column is wanted, found and moved where they were just decoded, while the cache holds them."""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np

from annbatch_dask.kernels.assemble import sum_dtype, total
from annbatch_dask.kernels.compiled import compiled, compiled_for_c

__all__ = ["OUTSIDE", "add_up", "adder", "find_wanted", "finder", "take", "taker"]

OUTSIDE = -1
"""What :func:`find_wanted` returns where an entry names a column that does not exist."""

_U = np.uint64  # an index of this type is not looked at for a sign


@compiled
def find_wanted(columns, is_wanted, first, kept):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Find the entries whose column is wanted.

    Parameters
    ----------
    columns
        1-D, of an unsigned dtype: a negative one, seen so, is a large one.
    is_wanted
        (n_columns,) uint8, 0 or 1.
    first
        What is added to the places that are found.
    kept
        uint32, with room for all entries: takes the places.

    Returns
    -------
    n_kept
        How many there are, or ``OUTSIDE``.
    """
    highest = columns.dtype.type(0)
    for k in range(columns.shape[0]):
        highest = max(highest, columns[k])
    if _U(highest) >= _U(is_wanted.shape[0]) and columns.shape[0]:
        return OUTSIDE
    n_kept = _U(0)
    for k in range(_U(columns.shape[0])):  # without a branch: nobody can predict the few that are wanted
        kept[n_kept] = np.uint32(k + _U(first))
        n_kept += _U(is_wanted[_U(columns[k])])
    return np.int64(n_kept)


@compiled
def take(source, places, out):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """``out = source[places]``."""
    for k in range(_U(places.shape[0])):
        out[k] = source[_U(places[k])]


@compiled
def add_up(values, at, bounds, row, room, totals):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201, PLR0913, PLR0917
    """Add values to the totals of their rows, as :func:`annbatch_dask.kernels.assemble.total` does.

    Parameters
    ----------
    values
        1-D, of which the first is the ``at``-th of those of all rows.
    bounds
        Where the values of each row begin among those of all rows, and end.
    row
        A row that begins no later than the first value.
    room
        One element of :func:`annbatch_dask.kernels.assemble.sum_dtype`.
    totals
        float64, of all rows.
    """
    k, n = 0, values.shape[0]
    while k < n:
        while bounds[row + 1] <= at + k:
            row += 1
        stop = min(n, bounds[row + 1] - at)
        totals[row] = total(values[k:stop], totals[row], room)
        k = stop
    return 0


def _find_at(columns, n, is_wanted, n_columns, first, kept):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, PLR0913, PLR0917
    return find_wanted(
        numba.carray(columns, (n,)), numba.carray(is_wanted, (n_columns,)), first, numba.carray(kept, (n,))
    )


def _take_at(source, n_source, places, n, out):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    take(numba.carray(source, (n_source,)), numba.carray(places, (n,)), numba.carray(out, (n,)))
    return 0


@cache
def finder(itemsize: int) -> Any:
    """:func:`find_wanted` for columns of so many bytes, to be called as C does at its ``address``.

    It takes the address of the columns, how many they are, the address of ``is_wanted``, how many these are, ``first``
    and the address of ``kept``, all as integers of 64 bits, and returns one.
    """
    number, byte, place = numba.int64, numba.types.CPointer(numba.uint8), numba.types.CPointer(numba.uint32)
    return compiled_for_c(number(_pointer(itemsize), number, byte, number, number, place), _find_at)


@cache
def taker(itemsize: int) -> Any:
    """:func:`take` for values of so many bytes, called in the same way.

    It takes the address of the source, how many are there, the address of ``places``, how many they are and the address
    of ``out``, and returns 0.
    """
    number, place = numba.int64, numba.types.CPointer(numba.uint32)
    return compiled_for_c(number(_pointer(itemsize), number, place, number, _pointer(itemsize)), _take_at)


def _add_whole_at(values, n, at, bounds, row, totals, n_rows):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, PLR0913, PLR0917
    rows = numba.carray(bounds, (n_rows + 1,)), numba.carray(totals, (n_rows,))
    return add_up(numba.carray(values, (n,)), at, rows[0], row, np.empty(1, np.int64), rows[1])


def _add_at(values, n, at, bounds, row, totals, n_rows):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, PLR0913, PLR0917
    rows = numba.carray(bounds, (n_rows + 1,)), numba.carray(totals, (n_rows,))
    return add_up(numba.carray(values, (n,)), at, rows[0], row, np.empty(1, np.float64), rows[1])


@cache
def adder(dtype: np.dtype[Any]) -> Any:
    """:func:`add_up` for values of a dtype, called in the same way.

    It takes the address of the values, how many they are, ``at``, the address of ``bounds``, ``row``, the address of
    ``totals`` and the number of rows, and returns 0.
    """
    number, pointer = numba.int64, numba.types.CPointer
    values, totals = pointer(numba.from_dtype(dtype)), pointer(numba.float64)
    signature = number(values, number, number, pointer(number), number, totals, number)
    return compiled_for_c(signature, _add_whole_at if sum_dtype(dtype) is np.int64 else _add_at)


def _pointer(itemsize: int) -> Any:
    return numba.types.CPointer(getattr(numba, f"uint{8 * itemsize}"))
