"""Consolidated zarr metadata: one document that holds those of a whole tree, so that opening it is one read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from annbatch_dask.storage.publish import Folder

__all__ = ["METADATA", "consolidate", "metadata_below"]

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
