"""Helpers that code written for annbatch imports from here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from annbatch_dask.loader.output import Framework, deliver_as
from annbatch_dask.loader.reading import load_all_aligned
from annbatch_dask.order.planned import cut
from annbatch_dask.sizes import check_positive

__all__ = ["CSRContainer", "check_lt_1", "convert", "load_all_aligned", "split_given_size"]


@dataclass
class CSRContainer:
    """The parts of a CSR matrix.

    Attributes
    ----------
    elems
        ``data``, ``indices`` and ``indptr``.
    shape, dtype
        Shape and dtype of the matrix.

    Examples
    --------
    >>> x = sp.random(4, 3, format="csr")
    >>> utils.CSRContainer((x.data, x.indices, x.indptr), x.shape, x.dtype).shape
    (4, 3)
    """

    elems: tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
    shape: tuple[int, int]
    dtype: np.dtype[Any]


def split_given_size(a: NDArray[Any], size: int, *, copy: bool = False) -> list[NDArray[Any]]:
    """An array in pieces of ``size``, the last one maybe shorter; at least one. Views, unless ``copy``.

    Examples
    --------
    >>> [len(piece) for piece in utils.split_given_size(np.arange(10), 4)]
    [4, 4, 2]
    """
    pieces = cut(np.asarray(a), size) or [np.asarray(a)]
    return [piece.copy() if copy else piece for piece in pieces]


def check_lt_1(vals: Sequence[float], obs: Sequence[str]) -> None:
    """ValueError with the label, from ``obs``, of the first value less than 1.

    Examples
    --------
    >>> utils.check_lt_1([8, 1], ["chunk size", "preload"])
    """
    for value, label in zip(vals, obs, strict=True):
        check_positive(label, value)


def convert(input: Any, preload_to_gpu: bool, to: Framework) -> Any:  # noqa: A002, FBT001 - annbatch's arguments
    """A ``scipy.sparse.csr_matrix`` or array as a torch tensor or jax array; TypeError for anything else.

    Parameters
    ----------
    input
        A batch's ``X``. A torch tensor on the CPU shares its memory.
    preload_to_gpu
        Whether a torch tensor goes to the current CUDA device.
    to
        ``"torch"`` or ``"jax"``.

    Examples
    --------
    >>> utils.convert(np.eye(2), preload_to_gpu=False, to="torch").shape
    torch.Size([2, 2])
    """
    return deliver_as(input, to, on_gpu=preload_to_gpu)
