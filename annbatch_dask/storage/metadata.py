"""Consolidated zarr metadata: one document that holds those of a whole tree, so that opening it is one read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import google_crc32c

from annbatch_dask.storage.publish import Folder

__all__ = ["METADATA", "consolidate", "consolidated_below", "metadata_below", "nodes_checksum"]

METADATA = "zarr.json"


def is_metadata(name: str) -> bool:
    """Whether a file of a zarr tree is metadata."""
    return name == METADATA or name.endswith(f"/{METADATA}")


def metadata_below(folder: Folder, prefix: str = "") -> dict[str, Any]:
    """Metadata of every group and array below a folder, by relative path behind a prefix, sorted."""
    paths = {f"{folder.path.rstrip('/')}/{name}": name for name in folder.files() if is_metadata(name)}
    documents = folder.fs.cat(list(paths))
    nodes = {}
    for path, document in documents.items():
        node = json.loads(document)
        node.pop("consolidated_metadata", None)
        nodes[f"{prefix}/{paths[path].removesuffix(METADATA)}".strip("/")] = node
    return dict(sorted(nodes.items()))


def consolidate(folder: Folder, attributes: Mapping[str, Any], nodes: Mapping[str, Any]) -> None:
    """Write, atomically, a folder's group document with the metadata of what lies below it.

    The layout is that of ``zarr.consolidate_metadata``, which cannot write it together with the attributes in one step.
    """
    document = {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": dict(attributes),
        "consolidated_metadata": {
            "kind": "inline",
            "must_understand": False,
            "metadata": {path: node for path, node in nodes.items() if path},
        },
    }
    folder.write(METADATA, json.dumps(document, indent=2).encode())


def consolidated_below(folder: Folder) -> dict[str, Any]:
    """What a folder's group document says of the nodes below it, as :func:`consolidate` wrote it."""
    nodes: dict[str, Any] = json.loads(folder.read(METADATA)).get("consolidated_metadata", {}).get("metadata", {})
    return nodes


def nodes_checksum(nodes: Mapping[str, Any]) -> str:
    """crc32c (8 hex digits) of some nodes' metadata."""
    return f"{google_crc32c.value(json.dumps(nodes, sort_keys=True).encode()):08x}"
