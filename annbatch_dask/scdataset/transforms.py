"""Ready-made hooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp

from annbatch_dask.errors import MissingPackageError
from annbatch_dask.scdataset.multiindexable import MultiIndexable

__all__ = ["adata_to_mindex", "bionemo_to_tensor", "hf_tahoe_to_tensor"]


def adata_to_mindex(batch: Any, columns: Sequence[str] | None = None) -> MultiIndexable:
    """Dense ``X`` and columns of ``obs`` of an AnnData, or of a view of an AnnCollection; a ``fetch_transform``.

    Parameters
    ----------
    batch
        In memory, backed or lazy; anything with ``X`` and ``obs[column]`` does.
    columns
        Of ``obs``; they come out as arrays.

    Examples
    --------
    >>> scdataset.adata_to_mindex(ad.read_h5ad("a.h5ad")[:3], columns=["cell_type"])["cell_type"].tolist()
    ['B', 'B', 'B']
    """
    # Not AnnCollection's to_adata(), which anndata 0.13 broke.
    read = batch.to_memory() if getattr(batch, "isbacked", False) else batch
    return MultiIndexable({"X": _dense(read.X)} | {name: _column(read.obs[name]) for name in columns or ()})


def _column(column: Any) -> Any:
    """Convert a column to an array."""
    return np.asarray(getattr(column, "values", column))


def _dense(X: Any) -> Any:
    """A matrix in memory, of one on disk, one that dask computes, or a sparse one."""
    for read in ("to_memory", "compute"):
        if hasattr(X, read):
            X = getattr(X, read)()
    return X.toarray() if sp.issparse(X) else np.asarray(X)


def hf_tahoe_to_tensor(batch: Any, num_genes: int = 62713) -> Any:
    """Dense float32 (rows, num_genes) tensor of a HuggingFace batch with ``genes`` and ``expressions``.

    A ``batch_callback``'s or ``fetch_transform``'s work. A gene that comes twice in a cell has its last value.

    Parameters
    ----------
    batch
        A dictionary of lists, or a list of dictionaries.
    num_genes
        Width of the tensor.

    Raises
    ------
    ValueError
        If the batch is empty or of another kind.

    Examples
    --------
    >>> batch = {"genes": [[1, 4, 7]], "expressions": [[-2.0, 3.0, 5.0]]}
    >>> scdataset.hf_tahoe_to_tensor(batch, num_genes=8).tolist()
    [[0.0, -2.0, 0.0, 0.0, 3.0, 0.0, 0.0, 5.0]]
    """
    torch = _load_torch("hf_tahoe_to_tensor")
    if isinstance(batch, dict) and {"genes", "expressions"} <= set(batch):
        cells = list(zip(batch["genes"], batch["expressions"], strict=True))
    elif isinstance(batch, list) and all(isinstance(cell, dict) for cell in batch):
        cells = [(cell["genes"], cell["expressions"]) for cell in batch]
    else:
        msg = f"expected a dictionary of lists with genes and expressions, or a list of such cells, got {type(batch)}"
        raise ValueError(msg)
    if not cells:
        msg = "the batch is empty"
        raise ValueError(msg)
    dense = np.zeros((len(cells), num_genes), np.float32)
    for row, (genes, values) in zip(dense, cells, strict=True):
        row[np.asarray(genes, np.int64)] = np.asarray(values, np.float32)
    return torch.from_numpy(dense)


def bionemo_to_tensor(data_collection: Any, idx: Any) -> Any:
    """Dense (rows, genes) tensor of a BioNeMo single-cell memmap dataset; a ``fetch_callback``.

    Parameters
    ----------
    data_collection
        A ``bionemo.scdl`` dataset.
    idx
        An integer, slice, list, array or tensor; TypeError otherwise.

    Examples
    --------
    >>> dataset = SingleCellMemMapDataset("memmap/")  # doctest: +SKIP
    >>> take = scdataset.bionemo_to_tensor
    >>> batches = scdataset.scDataset(dataset, scdataset.Streaming(), 64, fetch_callback=take)  # doctest: +SKIP
    """
    torch = _load_torch("bionemo_to_tensor")
    try:
        from bionemo.scdl.util.torch_dataloader_utils import collate_sparse_matrix_batch
    except ImportError as error:
        msg = "bionemo_to_tensor needs bionemo-scdl; install it with `pip install bionemo-scdl`"
        raise MissingPackageError(msg) from error
    if isinstance(idx, int | np.integer):
        rows = [int(idx)]
    elif isinstance(idx, slice):
        rows = list(range(*idx.indices(len(data_collection))))
    elif isinstance(idx, list | np.ndarray | torch.Tensor):
        rows = [int(i) for i in idx]
    else:
        msg = f"idx must be an integer, a slice, a list, an array or a tensor, got {type(idx).__name__}"
        raise TypeError(msg)
    return collate_sparse_matrix_batch([data_collection[i] for i in rows]).to_dense()


def _load_torch(name: str) -> Any:
    try:
        import torch
    except ImportError as error:
        msg = f"{name} makes tensors of torch, which cannot be imported ({error}): pip install 'annbatch-dask[torch]'"
        raise MissingPackageError(msg) from error
    return torch
