"""Consolidated zarr metadata: one document that holds those of a whole tree, so that opening it is one read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import google_crc32c

from annbatch_dask.storage.folder import Folder

__all__ = [
    "FILES",
    "METADATA",
    "consolidated",
    "consolidated_below",
    "group_document",
    "is_metadata",
    "metadata_below",
    "nodes_checksum",
    "nodes_of",
]

METADATA = "zarr.json"
FILES = "annbatch_dask_files"
"""Attribute of a dataset's group: bytes and crc32c of its other files. Copies of its metadata go without."""


def is_metadata(name: str) -> bool:
    """True if a file of a zarr tree is metadata."""
    return name == METADATA or name.endswith(f"/{METADATA}")


def metadata_below(folder: Folder, prefix: str = "") -> dict[str, Any]:
    """Metadata of every group and array below a folder, by relative path behind a prefix, sorted."""
    paths = {f"{folder.path.rstrip('/')}/{name}": name for name in folder.files() if is_metadata(name)}
    documents = folder.fs.cat_ranges(list(paths), 0, None, on_error="raise") if paths else []
    return nodes_of(dict(zip(paths.values(), documents, strict=True)), prefix)


def consolidated(document: bytes, prefix: str) -> dict[str, Any]:
    """Like `metadata_below`, read from the folder's consolidated document; empty if it has none."""
    root, below = _group(document)
    return {prefix: root} | {f"{prefix}/{path}": node for path, node in below.items()} if below else {}


def _group(document: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """A folder's group document, and the nodes below by their paths, as that has them."""
    root = json.loads(document)
    below = (root.get("consolidated_metadata") or {}).get("metadata", {})
    return _node(root), below


def _node(document: dict[str, Any]) -> dict[str, Any]:
    """A group's or array's own metadata."""
    document.pop("consolidated_metadata", None)
    document.get("attributes", {}).pop(FILES, None)
    return document


def nodes_of(documents: Mapping[str, bytes], prefix: str = "") -> dict[str, Any]:
    """Metadata by the path of its group or array behind a prefix, sorted, from files by their names."""
    nodes = {}
    for name, document in documents.items():
        nodes[f"{prefix}/{name.removesuffix(METADATA)}".strip("/")] = _node(json.loads(document))
    return dict(sorted(nodes.items()))


def group_document(attributes: Mapping[str, Any], nodes: Mapping[str, Any] | None) -> bytes:
    """A group's metadata file, with those of what is below it, or without where None.

    The layout is that of ``zarr.consolidate_metadata``, which cannot write it together with the attributes in one step.
    """
    document = {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}
    if nodes is not None:
        below = {path: node for path, node in nodes.items() if path}
        document["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": below}
    return json.dumps(document, indent=2).encode()


def consolidated_below(folder: Folder) -> dict[str, Any]:
    """Metadata of the nodes below a folder, from its group document as :func:`group_document` made it."""
    return _group(folder.read(METADATA))[1]


def nodes_checksum(nodes: Mapping[str, Any]) -> str:
    """crc32c (8 hex digits) of some nodes' metadata."""
    return f"{google_crc32c.value(json.dumps(nodes, sort_keys=True).encode()):08x}"
