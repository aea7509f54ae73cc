"""Helpers that code written for annbatch imports from here."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from annbatch_dask.loader.reading import load_all_aligned
from annbatch_dask.order.planned import cut

__all__ = ["load_all_aligned", "split_given_size"]


def split_given_size(a: NDArray[Any], size: int, *, copy: bool = False) -> list[NDArray[Any]]:
    """An array in pieces of ``size``, the last one maybe shorter; views, unless ``copy``."""
    return [piece.copy() if copy else piece for piece in cut(a, size)]
