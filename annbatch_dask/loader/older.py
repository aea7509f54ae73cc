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
        """Add several; the keys are one for all or one for each, None for X and for no labels."""
        layers, labels = (_one_each(keys, len(adatas)) for keys in (layer_keys, obs_keys))
        for adata, layer_key, obs_key in zip(adatas, layers, labels, strict=True):
            self.add_anndata(adata, layer_key, obs_key)
        return self

    def add_anndata(self, adata: ad.AnnData, layer_key: str | None = None, obs_key: str | None = None) -> Self:
        """Add ``X`` or a layer, and a column of ``obs`` as labels."""
        matrix = adata.X if layer_key is None else adata.layers[layer_key]
        return self.add_dataset(matrix, None if obs_key is None else adata.obs[obs_key].to_numpy())

    def add_datasets(self, datasets: Sequence[Any], obs: Sequence[Labels] | None = None) -> Self:  # type: ignore[override]
        """Add several, each with its (n,) labels."""
        all_labels = [None] * len(datasets) if obs is None else obs
        for dataset, labels in zip(datasets, all_labels, strict=True):
            self.add_dataset(dataset, labels)
        return self

    def add_dataset(self, dataset: Any, obs: Labels | None = None) -> Self:  # type: ignore[override]
        """Add a dataset, with (n,) labels."""
        return super().add_dataset(dataset, None if obs is None else pd.DataFrame({_LABEL: np.asarray(obs)}))

    def __iter__(self) -> Iterator[tuple[Any, ...]]:  # type: ignore[override]
        """One pass."""
        for batch in super().__iter__():
            labels = None if batch["obs"] is None else batch["obs"][_LABEL].to_numpy()
            yield (batch["X"], labels) if batch["index"] is None else (batch["X"], labels, batch["index"])


def _one_each(keys: Sequence[str | None] | str | None, n: int) -> list[str | None]:
    return [keys] * n if keys is None or isinstance(keys, str) else list(keys)
