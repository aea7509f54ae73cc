"""Copies of zarr metadata: one document that holds those of a whole tree, so that opening it is one read.

The root of a collection has one in zarr's own form, consolidated metadata: whoever opens the root reads it alone. zarr
takes that copy for the truth, and anndata writes nothing to a group that was opened with one. So a dataset, which its
owner may edit, has none in that form. It keeps its copy in an attribute, beside the list of its files that tells
whether the copy still says what is there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import google_crc32c
import zarr

from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.versions import list_files

__all__ = [
    "FILES",
    "METADATA",
    "NODES",
    "SEAL",
    "copied_nodes",
    "dataset_document",
    "group_document",
    "is_metadata",
    "listed_files",
    "metadata_below",
    "nodes_below",
    "nodes_checksum",
    "nodes_of",
    "open_as_it_is",
    "open_by_copy",
    "sealed",
]

METADATA = "zarr.json"
FILES = "annbatch_dask_files"
"""Attribute of a dataset's group: bytes and crc32c of its other files. Copies of its metadata go without."""
NODES = "annbatch_dask_nodes"
"""Attribute of a dataset's group: the metadata of what lies below it, with a checksum of them and of :data:`FILES`."""
SEAL = "annbatch_dask_written"
"""Attribute of every group and array in a dataset: what somebody writes in its place goes without, even where all else
is the same."""


def is_metadata(name: str) -> bool:
    """True if a file of a zarr tree is metadata."""
    return name == METADATA or name.endswith(f"/{METADATA}")


def metadata_below(folder: Folder, prefix: str = "") -> dict[str, Any]:
    """Metadata of every group and array below a folder, by relative path behind a prefix, sorted."""
    return _read_nodes(folder, folder.files(), prefix)


def _read_nodes(folder: Folder, names: Iterable[str], prefix: str = "") -> dict[str, Any]:
    paths = {f"{folder.path.rstrip('/')}/{name}": name for name in names if is_metadata(name)}
    documents = folder.fs.cat_ranges(list(paths), 0, None, on_error="raise") if paths else []
    return nodes_of(dict(zip(paths.values(), documents, strict=True)), prefix)


def copied_nodes(document: bytes, prefix: str) -> dict[str, Any]:
    """The same from a dataset's own document alone; empty where that does not hold it."""
    root = json.loads(document)
    below = _copied(root)
    return {prefix: _node(root)} | {f"{prefix}/{path}": node for path, node in below.items()} if below else {}


def _copied(root: dict[str, Any]) -> dict[str, Any]:
    """Nodes below a group by their paths, as its document has them; earlier releases consolidated datasets."""
    ours = root.get("attributes", {}).get(NODES)
    found: dict[str, Any] = ours["nodes"] if ours else (root.get("consolidated_metadata") or {}).get("metadata", {})
    return found


def open_by_copy(group: zarr.Group) -> zarr.Group:
    """A dataset's group that takes its members from the copy of their metadata: to read it as it was written."""
    ours: Any = group.attrs.get(NODES)
    return group if ours is None else _with_members(group, ours["nodes"])  # earlier releases consolidated datasets


def open_as_it_is(folder: Folder) -> zarr.Group:
    """A dataset's group, to read it as it is now, in few requests.

    Its copy of the metadata is used where all files have the sizes that it lists: a document that was written since has
    no seal, or other attributes, and so another size. A web server, which lists nothing, has no owner who edits there.
    """
    store = folder.zarr_store(read_only=True)
    if folder.is_local:
        return zarr.open_group(store, mode="r", zarr_format=3, use_consolidated=False)
    group, listing = zarr.open_group(store, mode="r", zarr_format=3), list_files(folder)
    listed: Any = group.attrs.get(FILES) or {}
    sizes = {name: size for name, (size, _) in listed.items()}
    if listing is None or sizes == {name: size for name, size in listing.sizes.items() if name != METADATA}:
        return open_by_copy(group)
    below = _read_nodes(folder, listing.sizes)
    return _with_members(group, {path: node for path, node in below.items() if path})


def _with_members(group: zarr.Group, nodes: Mapping[str, Any]) -> zarr.Group:
    """A group that was opened, with the metadata of what lies below it."""
    attributes = _node({"attributes": group.attrs.asdict()})["attributes"]
    return zarr.Group(zarr.AsyncGroup.from_dict(group.store_path, json.loads(group_document(attributes, nodes))))


def _node(document: dict[str, Any]) -> dict[str, Any]:
    """A group's or array's own metadata."""
    document.pop("consolidated_metadata", None)
    for name in (FILES, NODES):
        document.get("attributes", {}).pop(name, None)
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


def dataset_document(attributes: Mapping[str, Any], nodes: Mapping[str, Any], files: Mapping[str, Any]) -> bytes:
    """A dataset's group document: the metadata of what lies below it, and bytes and crc32c of all its other files."""
    below = {path: node for path, node in nodes.items() if path}
    listed = {name: list(found) for name, found in files.items()}
    copy = {"crc32c": nodes_checksum({"files": listed, "nodes": below}), "nodes": below}
    return group_document({**attributes, FILES: listed, NODES: copy}, None)


def listed_files(attributes: Mapping[str, Any]) -> dict[str, Any] | None:
    """The list of a dataset's files in its attributes, if that and the copy of metadata are as they were written."""
    listed, copy = attributes.get(FILES), attributes.get(NODES)
    if not isinstance(listed, dict) or not isinstance(copy, dict):
        return None
    return listed if copy.get("crc32c") == nodes_checksum({"files": listed, "nodes": copy.get("nodes")}) else None


def sealed(document: bytes) -> bytes:
    """A group's or array's document with the seal, in zarr's own form."""
    node = json.loads(document)
    node["attributes"] = node.get("attributes", {}) | {SEAL: True}
    return json.dumps(node, indent=2).encode()


def nodes_below(folder: Folder, document: str = METADATA) -> dict[str, Any]:
    """What a root's document says of the nodes below it, by their paths; ``document`` is its name."""
    below = (json.loads(folder.read(document)).get("consolidated_metadata") or {}).get("metadata", {})
    return {path: _node(node) for path, node in below.items()}


def nodes_checksum(nodes: Mapping[str, Any]) -> str:
    """crc32c (8 hex digits) of some nodes' metadata."""
    return f"{google_crc32c.value(json.dumps(nodes, sort_keys=True).encode()):08x}"
