"""Sizes to start from, by the memory a row takes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import psutil
import scipy.sparse as sp
from numpy.typing import NDArray

from annbatch_dask.scdataset.multiindexable import MultiIndexable
from annbatch_dask.scdataset.scdataset import take_rows
from annbatch_dask.scdataset.strategy import count_rows
from annbatch_dask.storage.machine import memory_nbytes, n_cpus

logger = logging.getLogger(__name__)

__all__ = ["estimate_sample_size", "suggest_parameters"]

_MAX_FETCH_FACTOR = 256


def estimate_sample_size(  # noqa: PLR0913, PLR0917 - scDataset's interface
    data_collection: Any,
    n_samples: int = 16,
    fetch_callback: Callable[..., Any] | None = None,
    fetch_transform: Callable[..., Any] | None = None,
    batch_callback: Callable[..., Any] | None = None,
    batch_transform: Callable[..., Any] | None = None,
) -> int:
    """Mean size of a row in bytes, after the hooks.

    Parameters
    ----------
    data_collection
        What rows are taken from.
    n_samples
        Rows to look at, from the first one on.
    fetch_callback, fetch_transform, batch_callback, batch_transform
        As for :class:`annbatch_dask.scdataset.scDataset`.

    Examples
    --------
    >>> scdataset.estimate_sample_size(np.zeros((1000, 50), np.float32)) >= 200
    True
    """
    n = min(n_samples, count_rows(data_collection))
    sizes = []
    for row in range(n):
        sample = (fetch_callback or _take_row)(data_collection, np.array([row]))
        sample = sample if fetch_transform is None else fetch_transform(sample)
        sample = sample if batch_callback is None else batch_callback(sample, np.array([0]))
        sample = sample if batch_transform is None else batch_transform(sample)
        sizes.append(_nbytes(sample, set()))
    return int(np.mean(sizes)) if sizes else 0


def suggest_parameters(  # noqa: PLR0913, PLR0917 - scDataset's interface
    data_collection: Any,
    batch_size: int,
    target_ram_fraction: float = 0.20,
    max_workers: int = 16,
    min_workers: int = 1,
    verbose: bool = True,  # noqa: FBT001, FBT002
    fetch_callback: Callable[..., Any] | None = None,
    fetch_transform: Callable[..., Any] | None = None,
    batch_callback: Callable[..., Any] | None = None,
    batch_transform: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """Numbers of workers and of batches per fetch that fit the memory and cores of this process.

    Parameters
    ----------
    data_collection, batch_size
        What will be read, and how many rows at a time.
    target_ram_fraction
        Share of the free memory to use.
    max_workers, min_workers
        Bounds.
    verbose
        Log what was found.
    fetch_callback, fetch_transform, batch_callback, batch_transform
        As for :class:`annbatch_dask.scdataset.scDataset`.

    Returns
    -------
    ``num_workers``, ``fetch_factor``, ``prefetch_factor``, ``block_size_conservative``, ``block_size_balanced``,
    ``block_size_aggressive``, ``estimated_memory_per_fetch_mb``, ``estimated_total_memory_mb`` and ``system_info``.

    Examples
    --------
    >>> found = scdataset.suggest_parameters(np.zeros((1000, 50), np.float32), batch_size=64, verbose=False)
    >>> found["num_workers"] >= 1
    True
    """
    hooks = (fetch_callback, fetch_transform, batch_callback, batch_transform)
    row_nbytes = max(estimate_sample_size(data_collection, 16, *hooks), 1)
    memory = psutil.virtual_memory()
    total, n_cores = memory_nbytes(), n_cpus()
    available = min(memory.available, total)
    n_workers = min(max(n_cores // 2, min_workers), max_workers)
    # Twice: a fetch, and the batches made of it.
    fitting = int(target_ram_fraction * available / (2 * batch_size * n_workers * row_nbytes))
    fetch_factor = min(max(fitting, 1), _MAX_FETCH_FACTOR)
    fetch_mb = fetch_factor * batch_size * row_nbytes / 1e6
    found = {
        "num_workers": n_workers,
        "fetch_factor": fetch_factor,
        "prefetch_factor": fetch_factor + 1,
        "block_size_conservative": max(fetch_factor // 2, 1),
        "block_size_balanced": fetch_factor,
        "block_size_aggressive": 2 * fetch_factor,
        "estimated_memory_per_fetch_mb": fetch_mb,
        "estimated_total_memory_mb": 2 * fetch_mb * n_workers,
        "system_info": {
            "available_ram_gb": available / 1e9,
            "total_ram_gb": total / 1e9,
            "cpu_count": n_cores,
            "estimated_sample_size_bytes": row_nbytes,
        },
    }
    if verbose:
        logger.info("suggested parameters: %s", found)
    return found


def _take_row(data: Any, rows: NDArray[np.integer[Any]]) -> Any:
    """One row; by its number where a collection, as many a torch Dataset, takes no arrays."""
    try:
        return take_rows(data, rows)
    except (TypeError, ValueError, IndexError):
        return data[int(rows[0])]


def _nbytes(value: Any, seen: set[int]) -> int:
    """Bytes of a value with all that hangs on it, each object once."""
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if sp.issparse(value):
        return sum(getattr(value, part).nbytes for part in ("data", "indices", "indptr") if hasattr(value, part))
    if isinstance(value, pd.DataFrame | pd.Series):
        return int(np.sum(value.memory_usage(deep=True)))
    if hasattr(value, "obs") and hasattr(value, "X"):  # AnnData: of the row alone, not of all genes' annotations
        # An AnnCollection's know their keys only. anndata 0.13 lists X among the layers, as None.
        kinds = [kind for name in ("layers", "obsm") if (kind := getattr(value, name, None)) is not None]
        aligned = [kind[name] for kind in kinds for name in list(kind.keys()) if name is not None]
        obs = value.obs if isinstance(value.obs, pd.DataFrame) else getattr(value.obs, "df", value.obs)
        return sum(_nbytes(part, seen) for part in (value.X, obs, *aligned) if part is not None)
    if isinstance(value, MultiIndexable):
        return sum(_nbytes(part, seen) for part in value)
    if hasattr(value, "nbytes"):
        return int(value.nbytes)
    if isinstance(value, Mapping):
        return sum(_nbytes(part, seen) for pair in value.items() for part in pair)
    if isinstance(value, list | tuple):
        return sum(_nbytes(part, seen) for part in value)
    return sys.getsizeof(value)
