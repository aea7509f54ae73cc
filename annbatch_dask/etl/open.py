"""Opens the place of a collection: an existing collection, nothing yet, or something else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import zarr

from annbatch_dask.errors import CollectionError
from annbatch_dask.etl.ours import check_new
from annbatch_dask.storage.folder import Folder, folder_at
from annbatch_dask.storage.history import open_version
from annbatch_dask.storage.paths import is_path
from annbatch_dask.storage.root import H5adRoot, Root, open_group
from annbatch_dask.warn import warn

if TYPE_CHECKING:
    import os

__all__ = ["open_root"]


def open_root(
    place: zarr.Group | str | os.PathLike[str],
    mode: str,
    storage_options: Mapping[str, Any] | None,
    *,
    is_collection_h5ad: bool,
    version: int | None = None,
) -> Root:
    """The collection at a path or URL, or in a zarr group, by the arguments of the class.

    Raises
    ------
    CollectionError
        If something else than a collection is there, or nothing where ``mode`` needs one, or no such version.
    """
    if version is not None and (is_collection_h5ad or mode not in ("r", "a")):
        what = "a folder of h5ad files has none" if is_collection_h5ad else f"mode={mode!r} is for what is there now"
        msg = f"version={version!r} is read only, and {what}; leave one of them out"
        raise ValueError(msg)
    if isinstance(place, zarr.Group):
        if is_collection_h5ad:
            msg = "Do not set `is_collection_h5ad` to True with a zarr group: give the folder's path"
            raise ValueError(msg)
        return Root(place) if version is None else _open_version(Root(place).folder, version)
    if not is_path(place):
        msg = f"a collection is a path or a zarr.Group, not {type(place).__name__}"
        raise TypeError(msg)
    folder = folder_at(place, storage_options)
    if is_collection_h5ad:
        warn("Loading h5ad is currently not supported: only obs can be read")
        return H5adRoot(folder, replaces=mode == "w")
    if not folder.url.rstrip("/").endswith(".zarr"):
        warn("It is customary that collections have the `.zarr` suffix")
    return _open(folder, mode) if version is None else _open_version(folder, version)


def _open_version(folder: Folder, version: int) -> Root:
    _open(folder, "r")  # which says so of what is no collection
    return Root(open_version(folder, version), folder, pinned=version)


def _open(folder: Folder, mode: str) -> Root:
    group = open_group(folder, mode)
    if group is None:
        check_new(folder)
        if mode in ("r", "r+"):
            msg = f"there is no collection at {folder.url}; check the path, or build one with add_adatas"
            raise _CollectionNotFoundError(msg)
    return Root(None if mode == "w" else group, folder, replaces=mode == "w")


class _CollectionNotFoundError(CollectionError, FileNotFoundError):
    """There is nothing at the path."""
