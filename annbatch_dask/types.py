"""The dictionaries that pass between samplers, the loader and its user.

Examples
--------
>>> request = types.LoadRequest(requests=[slice(0, 4), slice(8, 12)], splits=[np.array([0, 5]), np.array([7, 2])])
>>> sorted(request)
['requests', 'splits']
"""

from __future__ import annotations

from functools import cache
from typing import Any, NotRequired, TypedDict

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from typing_extensions import TypeAliasType

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
        The rows: ``scipy.sparse.csr_matrix`` or ``numpy.ndarray``, or what ``to=`` asked for; a dictionary of such
        arrays where a transform makes tokens of them.
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
    obs_tables
        (n, n_columns) rows of each table that was given, by the column it belongs to; absent if none was.
    """

    X: Any
    obs: pd.DataFrame | None
    var: pd.DataFrame | None
    index: NDArray[np.int64] | None
    layers: NotRequired[dict[str, Any]]
    obsm: NotRequired[dict[str, Any]]
    obs_codes: NotRequired[dict[str, Any]]
    obs_tables: NotRequired[dict[str, Any]]


@cache
def _aliases() -> dict[str, TypeAliasType]:
    """Names annbatch has for what goes into a Loader and comes out of it; on demand, as zarr's import is slow."""
    import scipy.sparse as sp
    import zarr
    from anndata.abc import CSRDataset

    in_memory = sp.csr_matrix | sp.csr_array | np.ndarray
    values = {
        "BackingArray_T": zarr.Array | CSRDataset | in_memory,
        "InputInMemoryArray_T": in_memory,
        "OutputInMemoryArray_T": sp.csr_matrix | np.ndarray,
    }
    return {name: TypeAliasType(name, value) for name, value in values.items()}


def __getattr__(name: str) -> Any:
    if name in ("BackingArray_T", "InputInMemoryArray_T", "OutputInMemoryArray_T"):
        return _aliases()[name]
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
