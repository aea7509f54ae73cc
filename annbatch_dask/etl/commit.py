"""commit: one atomic write of the root's metadata turns finished datasets into a collection."""

from __future__ import annotations

from typing import Any

from annbatch_dask.manifest import ANNBATCH_ENCODING, MANIFEST_KEY, Manifest
from annbatch_dask.storage.metadata import consolidate, metadata_below
from annbatch_dask.storage.publish import Folder

__all__ = ["commit"]


def commit(target: Folder, manifest: Manifest) -> None:
    """Publish a collection: its datasets lie there, and nobody sees them before this returns.

    The root's ``zarr.json`` holds the attributes annbatch looks for, the manifest, and the metadata of all datasets.
    """
    nodes: dict[str, Any] = {}
    for record in manifest.datasets:
        below = metadata_below(target / record.name)
        nodes |= {f"{record.name}/{path}".rstrip("/"): node for path, node in below.items()}
    consolidate(target, ANNBATCH_ENCODING | {MANIFEST_KEY: manifest.to_json()}, nodes)
