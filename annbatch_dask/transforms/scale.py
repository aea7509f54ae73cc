"""Scale: each gene to mean 0 and variance 1, by statistics of a collection."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from annbatch_dask.flags import check_flag

__all__ = ["Scale"]

_PREFIXES = {"log": "log_", "counts": ""}


@dataclass(frozen=True, eq=False)
class Scale:
    """Subtract each gene's mean from X, and divide by its standard deviation, over all cells of a collection.

    The result is that of ``scanpy.pp.scale(adata, zero_center=..., max_value=...)`` on all cells at once, and the same
    whatever a batch holds. It follows :class:`NormalizeLog1p`, with its ``target_sum`` of 10,000; a gene of no variance
    is divided by 1.

    Parameters
    ----------
    stats
        What :meth:`annbatch_dask.DatasetCollection.gene_stats` returns, of all cells: genes are found by their names.
    values
        What X holds when this is called: ``"log"`` (default), after ``NormalizeLog1p(1e4)``; or ``"counts"``, as it is
        stored.
    max_value
        Cut what is higher than this, and with ``zero_center`` what is lower than its negative. None cuts nothing.
    zero_center
        False subtracts nothing, so that sparse X stays sparse.

    Examples
    --------
    >>> from annbatch_dask.transforms import NormalizeLog1p, Scale
    >>> steps = [NormalizeLog1p(1e4), Scale(collection.gene_stats(), max_value=10)]
    >>> loader = Loader(batch_size=64, chunk_size=16, preload_nchunks=8, dense=True, transform=steps)
    >>> batch = next(iter(loader.use_collection(collection)))
    >>> float(abs(batch["X"]).max()) <= 10
    True
    """

    stats: pd.DataFrame = field(repr=False)
    values: Literal["log", "counts"] = "log"
    max_value: float | None = None
    zero_center: bool = True
    _last: tuple[pd.Index | None, tuple[NDArray[np.float64], NDArray[np.float64]]] | None = field(
        default=None, init=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.values not in _PREFIXES:
            msg = f"values is {self.values!r}; give 'log' or 'counts'"
            raise ValueError(msg)
        if self.max_value is not None and (not isinstance(self.max_value, Real) or isinstance(self.max_value, bool)):
            msg = f"max_value is {self.max_value!r}; it must be a number, or None"
            raise TypeError(msg)
        if self.max_value is not None and not self.max_value > 0:
            msg = f"max_value is {self.max_value}; it must be greater than 0"
            raise ValueError(msg)
        object.__setattr__(self, "zero_center", check_flag("zero_center", self.zero_center))
        if not isinstance(self.stats, pd.DataFrame):
            msg = f"stats must be a DataFrame, collection.gene_stats(), got {type(self.stats)}"
            raise TypeError(msg)
        names = self._names
        if isinstance(self.stats.index, pd.MultiIndex) or not set(names) <= set(self.stats.columns):
            msg = "stats are not those of genes over all cells; give collection.gene_stats()"
            raise ValueError(msg)
        found = self.stats[names]
        if not np.isfinite(found.to_numpy()).all():
            n = int((~np.isfinite(found.to_numpy())).any(axis=1).sum())
            msg = f"{n:,} of {len(found):,} genes have no finite mean and variance of {self.values}; leave them out"
            raise ValueError(msg)
        object.__setattr__(self, "stats", found)  # the two columns that are needed travel to workers

    @property
    def _names(self) -> list[str]:
        return [f"{_PREFIXES[self.values]}{name}" for name in ("mean", "variance")]

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Scale X of a batch, in the place of what it was."""
        x, var = batch["X"], batch.get("var")
        mean, std = self._of(None if var is None else var.index, int(x.shape[1]))
        batch["X"] = self._dense(x, mean, std) if not _is_sparse(x) else self._sparse(x, std)
        return batch

    def _of(self, genes: pd.Index | None, n_vars: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and deviation of each gene of a batch."""
        if genes is None:
            if len(self.stats) != n_vars:
                msg = f"batches have {n_vars:,} genes without names, and stats {len(self.stats):,}; add var to the data"
                raise ValueError(msg)
            genes = self.stats.index
        last = self._last  # read once: another loader's thread may replace it
        if last is None or last[0] is not genes:  # batches share one index
            last = genes, self._find(genes)
            object.__setattr__(self, "_last", last)
        return last[1]

    def _find(self, genes: pd.Index) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        at = self.stats.index.get_indexer(genes)
        if (at < 0).any():
            missing = genes[at < 0]
            msg = f"{len(missing):,} of {len(genes):,} genes are not in stats: {missing[0]!r}; give those of this data"
            raise ValueError(msg)
        mean, std = (self.stats[name].to_numpy(np.float64)[at] for name in self._names)
        np.sqrt(std, out=std)
        std[std == 0] = 1
        return mean, std

    def _dense(self, x: Any, mean: NDArray[np.float64], std: NDArray[np.float64]) -> Any:
        like = _like(x)
        x = _as_float(x)
        if self.zero_center:
            x = x - like(mean, x)
        x = x / like(std, x)
        if self.max_value is None:
            return x
        return x.clip(-self.max_value if self.zero_center else None, self.max_value)

    def _sparse(self, x: Any, std: NDArray[np.float64]) -> Any:
        if self.zero_center:
            msg = "zero_center makes sparse X dense; give dense=True to the Loader, or zero_center=False"
            raise TypeError(msg)
        if not sp.issparse(x):
            msg = f"sparse X of {type(x).__module__} is not scaled; give dense=True to the Loader"
            raise TypeError(msg)
        data = _as_float(x.data)
        data = data / std.astype(data.dtype)[x.indices]
        if self.max_value is not None:
            data = np.minimum(data, data.dtype.type(self.max_value))
        return sp.csr_matrix((data, x.indices, x.indptr), shape=x.shape)


def _is_sparse(x: Any) -> bool:
    layout = getattr(x, "layout", None)
    return bool(sp.issparse(x) or hasattr(x, "indptr") or (layout is not None and "sparse" in str(layout)))


def _as_float(x: Any) -> Any:
    """Floats as they are; whole numbers as float32."""
    name = str(x.dtype).removeprefix("torch.")
    if "float" in name:
        return x
    return x.float() if str(x.dtype).startswith("torch.") else x.astype(np.float32)


def _like(x: Any) -> Any:
    """A function that makes an array of numpy one of the kind, dtype and place of another."""
    if str(x.dtype).startswith("torch."):
        import torch

        return lambda values, other: torch.as_tensor(values, dtype=other.dtype, device=other.device)
    module = type(x).__module__.partition(".")[0]
    if module == "cupy":
        import cupy

        return lambda values, other: cupy.asarray(values, other.dtype)
    return lambda values, other: values.astype(other.dtype)
