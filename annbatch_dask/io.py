"""annbatch's module of this name: collections, and AnnData objects written as sharded zarr groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import scipy.sparse as sp
import zarr

from annbatch_dask.collection import DatasetCollection
from annbatch_dask.etl.ours import link_name
from annbatch_dask.manifest import ANNBATCH_ENCODING as V1_ENCODING
from annbatch_dask.manifest import DATASET_PREFIX
from annbatch_dask.sizes import check_positive, parse_nbytes

if TYPE_CHECKING:
    import os

__all__ = ["DATASET_PREFIX", "V1_ENCODING", "DatasetCollection", "create_anndata_collection", "write_sharded"]

_COMPRESSORS = (zarr.codecs.BloscCodec(cname="lz4", clevel=3, shuffle="shuffle"),)
_ROW_ALIGNED = {"layers", "obsm", "obsp"}


def create_anndata_collection(
    adata_paths: Iterable[Any], output_path: str | os.PathLike[str], **options: Any
) -> DatasetCollection:
    """A new collection of these files: the name annbatch had for it before :class:`DatasetCollection`.

    In a local folder each dataset has a link ``dataset_<i>.zarr`` beside it, as it was called then. An extension
    removes the links of the datasets that it replaces.

    Parameters
    ----------
    adata_paths, options
        As for :meth:`DatasetCollection.add_adatas`.
    output_path
        Path of the collection, which must not exist yet.

    Raises
    ------
    FileExistsError
        If there is a collection already; ``DatasetCollection(path).add_adatas`` would extend it.

    Examples
    --------
    >>> create_anndata_collection(["a.h5ad", "b.h5ad"], "created.zarr", seed=0).n_obs
    500
    """
    collection = DatasetCollection(output_path)
    if not collection.is_empty:
        msg = f"{output_path} is a collection already; extend it with DatasetCollection(path).add_adatas"
        raise FileExistsError(msg)
    collection.add_adatas(adata_paths, **options)
    if "://" not in collection.path:
        for group in collection:
            Path(collection.path, link_name(group.basename)).symlink_to(group.basename)
    return collection


def write_sharded(  # noqa: PLR0913 - annbatch's arguments
    group: zarr.Group,
    adata: ad.AnnData,
    *,
    n_obs_per_chunk: int = 64,
    shard_size: int | str = "1GiB",
    compressors: Iterable[Any] = _COMPRESSORS,
    key: str | None = None,
) -> None:
    """Write one AnnData object so that runs of its rows are read quickly; nothing is shuffled.

    Sparse matrices and dense X, layers, obsm and obsp are sharded. Metadata are consolidated at the end.

    Parameters
    ----------
    group
        A zarr v3 group, opened without consolidated metadata.
    adata
        In memory or backed.
    n_obs_per_chunk
        Rows of a chunk; in a sparse matrix as many entries as that many rows have on average.
    shard_size
        Rows of a shard, or its uncompressed bytes as text.
    compressors
        zarr's codecs.
    key
        The child to write, and to replace. None replaces everything in the group's store; the group must be its root.

    Raises
    ------
    ValueError
        If a matrix has no rows, or ``n_obs_per_chunk`` is below 1.

    Examples
    --------
    >>> write_sharded(zarr.open_group("one.zarr", mode="w", use_consolidated=False), ad.read_h5ad("a.h5ad"))
    >>> ad.io.read_zarr("one.zarr").n_obs
    300
    """
    check_positive("n_obs_per_chunk", n_obs_per_chunk)
    codecs = tuple(compressors)

    def write(  # noqa: PLR0913 - anndata's callback
        writer: Callable[..., None],
        store: zarr.Group,
        name: str,
        element: Any,
        dataset_kwargs: Mapping[str, Any],
        *,
        iospec: Any,
    ) -> None:
        options = dict(dataset_kwargs)
        is_dense = iospec.encoding_type == "array" and (
            name == "X" or not _ROW_ALIGNED.isdisjoint(store.name.split("/"))
        )
        if is_dense or iospec.encoding_type in ("csr_matrix", "csc_matrix"):
            grid = _dense_grid if is_dense else _sparse_grid
            options |= grid(name, element, n_obs_per_chunk, shard_size) | {"compressors": codecs}
        writer(store, name, element, dataset_kwargs=options)

    # The last is anndata's own from 0.13 on; before, it warns where neither is said.
    with ad.settings.override(write_csr_csc_indices_with_min_possible_dtype=True, auto_shard_zarr_v3=True):
        ad.experimental.write_dispatched(group, key or "/", adata, callback=write)
    zarr.consolidate_metadata(group.store)


def _dense_grid(name: str, array: Any, chunk_rows: int, shard_size: int | str) -> dict[str, tuple[int, ...]]:
    n_bytes = int(np.prod(array.shape)) * array.dtype.itemsize
    n_rows, rest = _check_rows(name, array), array.shape[1:]
    chunk, shard = _lengths(chunk_rows, _shard_rows(n_bytes / n_rows, shard_size), n_rows)
    return {"chunks": (chunk, *rest), "shards": (shard, *rest)}


def _sparse_grid(name: str, matrix: Any, chunk_rows: int, shard_size: int | str) -> dict[str, tuple[int, ...]]:
    parts = matrix if sp.issparse(matrix) else matrix._to_backed()  # noqa: SLF001 - anndata has no other way to sizes
    n_bytes, nnz = (sum(part.nbytes for part in (parts.data, parts.indices, parts.indptr)), parts.data.shape[0])
    n_rows = _check_rows(name, matrix)
    per_row = nnz / n_rows
    shard_rows = _shard_rows(n_bytes / n_rows, shard_size)
    chunk, shard = _lengths(int(chunk_rows * per_row), int(shard_rows * per_row), max(nnz, 1))
    return {"chunks": (chunk,), "shards": (shard,)}


def _check_rows(name: str, element: Any) -> int:
    if not element.shape[0]:
        msg = f"Cannot write {name!r} with 0 observations: it has shape {element.shape}"
        raise ValueError(msg)
    return int(element.shape[0])


def _shard_rows(row_nbytes: float, shard_size: int | str) -> int:
    if isinstance(shard_size, Integral):
        return int(shard_size)
    return int(parse_nbytes("shard_size", shard_size) / max(row_nbytes, 1))


def _lengths(chunk: int, shard: int, whole: int) -> tuple[int, int]:
    """A chunk and a shard no longer than the whole; the shard is chunks, at least one."""
    chunk = min(max(chunk, 1), whole)
    return chunk, max(min(shard, whole) // chunk, 1) * chunk
