"""The loader as annbatch had it before its ``Loader``: tuples instead of dictionaries, one label a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annbatch_dask.loader.loader import Loader

if TYPE_CHECKING:
    import anndata as ad

__all__ = ["ZarrSparseDataset"]

_LABEL = "label"
Labels = NDArray[Any]


class ZarrSparseDataset(Loader):
    """A Loader that yields ``(X, labels)``, or ``(X, labels, index)``, as annbatch's first releases did.

    New code uses :class:`annbatch_dask.Loader`.

    Parameters
    ----------
    chunk_size, preload_nchunks, shuffle, return_index, batch_size, preload_to_gpu, drop_last
        The Loader's, with the defaults of then.
    to_torch
        Whether ``X`` is a torch tensor; by default where torch is installed.

    Examples
    --------
    >>> dataset = ZarrSparseDataset(batch_size=64, chunk_size=16, preload_nchunks=8)
    >>> dataset.use_collection(collection).n_obs
    500
    """

    def __init__(  # noqa: PLR0913 - annbatch's interface
        self,
        *,
        chunk_size: int = 512,
        preload_nchunks: int = 32,
        shuffle: bool = True,
        return_index: bool = False,
        batch_size: int = 1,
        preload_to_gpu: bool = find_spec("cupy") is not None,
        drop_last: bool = False,
        to_torch: bool = find_spec("torch") is not None,
    ) -> None:
        super().__init__(
            chunk_size=chunk_size,
            preload_nchunks=preload_nchunks,
            shuffle=shuffle,
            return_index=return_index,
            batch_size=batch_size,
            preload_to_gpu=preload_to_gpu,
            drop_last=drop_last,
            to="torch" if to_torch else None,
        )

    def __len__(self) -> int:
        """Rows, not batches."""
        return self.n_obs

    def add_anndatas(
        self,
        adatas: Sequence[ad.AnnData],
        layer_keys: Sequence[str | None] | str | None = None,
        obs_keys: Sequence[str | None] | str | None = None,
    ) -> Self:
        """Add several, X or a layer of each.

        Parameters
        ----------
        adatas
            Any number.
        layer_keys
            The layer of all, or one for each; None is X.
        obs_keys
            The column of labels of all, or one for each; None is no labels. Different columns that all of them have
            are several labels a row: batches then carry them as a frame.
        """
        several = _columns_of_all(obs_keys, adatas)
        layers = _one_each(layer_keys, len(adatas))
        labels = [several] * len(adatas) if several else _one_each(obs_keys, len(adatas))
        with self._all_or_nothing():
            for adata, layer_key, obs_key in zip(adatas, layers, labels, strict=True):
                self.add_anndata(adata, layer_key, obs_key)
        return self

    def add_anndata(
        self, adata: ad.AnnData, layer_key: str | None = None, obs_key: str | Sequence[str] | None = None
    ) -> Self:
        """Add ``X`` or a layer, and a column of ``obs`` as labels, or several."""
        matrix = adata.X if layer_key is None else adata.layers[layer_key]
        if obs_key is None or isinstance(obs_key, str):
            return self.add_dataset(matrix, None if obs_key is None else adata.obs[obs_key].to_numpy())
        return super().add_dataset(matrix, adata.obs[list(obs_key)])

    def add_datasets(self, datasets: Sequence[Any], obs: Sequence[Labels] | None = None) -> Self:  # type: ignore[override]
        """Add several, each with its (n,) labels."""
        all_labels = [None] * len(datasets) if obs is None else obs
        with self._all_or_nothing():
            for dataset, labels in zip(datasets, all_labels, strict=True):
                self.add_dataset(dataset, labels)
        return self

    def add_dataset(self, dataset: Any, obs: Labels | None = None) -> Self:  # type: ignore[override]
        """Add a dataset, with (n,) labels."""
        return super().add_dataset(dataset, None if obs is None else pd.DataFrame({_LABEL: np.asarray(obs)}))

    def __iter__(self) -> Iterator[tuple[Any, ...]]:  # type: ignore[override]
        """One pass."""
        for batch in super().__iter__():
            obs = batch["obs"]
            labels = obs[_LABEL].to_numpy() if obs is not None and obs.columns.tolist() == [_LABEL] else obs
            yield (batch["X"], labels) if batch["index"] is None else (batch["X"], labels, batch["index"])


def _columns_of_all(keys: Sequence[str | None] | str | None, adatas: Sequence[ad.AnnData]) -> list[str]:
    """Several columns that each of them has; empty where the keys mean something else."""
    names = [] if keys is None or isinstance(keys, str) else [key for key in keys if key is not None]
    different = len(names) > 1 and len(set(names)) == len(names) == len(keys or ())
    return names if different and all(adata.obs.columns.isin(names).sum() == len(names) for adata in adatas) else []


def _one_each(keys: Sequence[str | None] | str | None, n: int) -> list[str | None]:
    """One key for each."""
    if keys is not None and not isinstance(keys, str) and len(keys) != n:
        msg = f"{list(keys)} are {len(keys)} keys for {n} AnnData; give one for all, one for each, or columns all have"
        raise ValueError(msg)
    return [keys] * n if keys is None or isinstance(keys, str) else list(keys)
