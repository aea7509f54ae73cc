"""Datasets of a collection as ``.h5ad`` files."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import anndata as ad
import h5py

from annbatch_dask.errors import CollectionError
from annbatch_dask.manifest import DATASET_PREFIX, SOURCE_DTYPE
from annbatch_dask.storage.folder import UNFINISHED, Folder, sync_path
from annbatch_dask.storage.metadata import METADATA
from annbatch_dask.storage.root import H5adRoot, Root

if TYPE_CHECKING:
    import zarr
    from anndata import AnnData

__all__ = ["written_from"]

_DATASET_FILE = re.compile(rf"{DATASET_PREFIX}_\d+\.h5ad")
"""Names of the files."""

_WRITTEN_BY = "annbatch_dask"
"""Attribute of a file that a build wrote. anndata does not copy it, so a file that somebody wrote again is theirs."""


@contextlib.contextmanager
def written_from(root: H5adRoot, compressor: str | None) -> Iterator[Root]:
    """A hidden zarr collection that is to be built in the block; then its datasets are written as files, and it goes.

    Raises
    ------
    CollectionError
        Before the block, where files are there that are not to be replaced, or are somebody else's.
    """
    folder = root.target
    if not folder.is_local:
        msg = f"{folder.url} is no local folder, which h5ad files are written to; give a path, or build zarr"
        raise CollectionError(msg)
    old, hidden = root.files(), root.hidden()
    if old and not root.replaces and hidden.folder.version(METADATA) is None:
        msg = (
            f"{folder.url} holds {len(old):,} h5ad files, to which none can be added; give another folder, "
            "mode='w' to replace them, or build zarr"
        )
        raise CollectionError(msg)
    if foreign := [name for name in old if not _is_ours(folder, name)]:
        msg = (
            f"{folder.url} holds {min(foreign)}, one of {len(foreign):,} h5ad files that no build wrote, or that were "
            "written again since, and that would be removed; move them, or give another folder"
        )
        raise CollectionError(msg)
    yield hidden
    _write_datasets(hidden, folder, compressor, old)
    root.remove_hidden()
    root.replaces = False


def _is_ours(folder: Folder, name: str) -> bool:
    """True if a build wrote this file, or left it unfinished."""
    if UNFINISHED.fullmatch(name):
        return True
    if not _DATASET_FILE.fullmatch(name):
        return False
    try:
        with h5py.File(f"{folder.path}/{name}") as file:
            return bool(file.attrs.get(_WRITTEN_BY) == "dataset")
    except OSError:
        return False


def _write_datasets(groups: Iterable[zarr.Group], folder: Folder, compressor: str | None, stale: Iterable[str]) -> None:
    """Write each dataset as a file of its number, one in memory at a time; all appear at the end.

    ``stale``: names of files that are replaced, or removed once the others are there.
    """
    written = {}
    for number, group in enumerate(groups):
        name = f"{DATASET_PREFIX}_{number}.h5ad"
        unfinished = f"{folder.path}/.tmp-00000000-{name}"
        assert UNFINISHED.fullmatch(os.path.basename(unfinished))  # noqa: S101 - gc knows it
        adata = _as_given(group)
        with ad.settings.override(allow_write_nullable_strings=True):
            adata.write_h5ad(unfinished, compression=compressor)
        with h5py.File(unfinished, "r+") as file:
            file.attrs[_WRITTEN_BY] = "dataset"
        sync_path(unfinished)
        written[name] = unfinished
    for name, unfinished in written.items():
        os.replace(unfinished, f"{folder.path}/{name}")
    for name in set(stale) - written.keys():
        folder.unlink(name)
    sync_path(folder.path)


def _as_given(group: zarr.Group) -> AnnData:
    """A dataset in memory, its matrices in the dtypes that the inputs had."""
    found = ad.io.read_zarr(group)
    if found.X is not None:
        found.X = _cast(found.X, group["X"])
    for kind in ("layers", "obsm"):
        mapping = getattr(found, kind)
        for key in [k for k in mapping if k is not None]:  # anndata 0.13 lists X as layer None
            elem = group[f"{kind}/{key}"]
            if SOURCE_DTYPE in elem.attrs:  # a frame has none
                mapping[key] = _cast(mapping[key], elem)
    if found.raw is not None:
        raw = found.raw.to_adata()
        raw.X = _cast(raw.X, group["raw/X"])
        found.raw = raw
    return found


def _cast(values: Any, elem: Any) -> Any:
    return values.astype(str(elem.attrs.get(SOURCE_DTYPE, values.dtype)))
