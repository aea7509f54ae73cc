"""The dictionaries that pass between samplers, the loader and its user."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

import numpy as np
import pandas as pd
from numpy.typing import NDArray

__all__ = ["LoadRequest", "LoaderOutput"]


class LoadRequest(TypedDict):
    """Rows to load together, and how they are cut into batches.

    Attributes
    ----------
    requests
        Global rows: half-open slices, or one array of row numbers. Any order, across datasets, repeats
        allowed; the rows arrive in the order they are asked for.
    splits
        One integer array per batch. Its values are positions in the order of ``requests``: ``j`` is the
        ``j``-th row asked for. Left out, the sampler's ``batch_size`` and ``shuffle`` decide.
    """

    requests: list[slice] | NDArray[np.integer[Any]]
    splits: NotRequired[list[NDArray[np.integer[Any]]]]


class LoaderOutput(TypedDict):
    """One batch.

    Attributes
    ----------
    X
        The rows: ``scipy.sparse.csr_matrix`` or ``numpy.ndarray``, or what ``to=`` asked for.
    obs
        The same rows of ``obs`` in the same order, or None.
    var
        The ``var`` all datasets share, or None.
    index
        The rows' global positions, or None without ``return_index``.
    layers, obsm
        The same rows of what was asked for beside ``X``, by name; absent if nothing was.
    obs_codes
        (n,) int64 codes of each column that was asked for, by name; absent if none was.
    """

    X: Any
    obs: pd.DataFrame | None
    var: pd.DataFrame | None
    index: NDArray[np.int64] | None
    layers: NotRequired[dict[str, Any]]
    obsm: NotRequired[dict[str, Any]]
    obs_codes: NotRequired[dict[str, Any]]
