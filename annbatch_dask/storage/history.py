"""Earlier versions of a collection: root documents that commits have replaced, kept beside their datasets.

A build that keeps the version it replaces copies the root document to ``versions/<number>.json``, and then commits. The
new root document lists the numbers that are kept: the one write that commits decides on these too. A copy that it does
not list is a leftover. What goes, goes in this order: the copy, then the datasets that nothing else names.
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from numbers import Integral
from typing import Any

import zarr
from zarr.storage import StorePath

from annbatch_dask.errors import CollectionError, IntegrityError, VersionNotFoundError
from annbatch_dask.manifest import MANIFEST_KEY, Manifest
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.lock import check_unchanged
from annbatch_dask.storage.metadata import METADATA

__all__ = [
    "VERSIONS",
    "attributes_in",
    "damaged_document",
    "find_versions",
    "manifest_in",
    "number_in",
    "open_version",
    "save_version",
    "version_name",
]

VERSIONS = "versions"
"""Folder of the copies."""
_FILE = re.compile(r"([1-9]\d*)\.json")
_N_THREADS = 16


def version_name(number: int) -> str:
    """Name of a version's copy, within the collection's folder."""
    return f"{VERSIONS}/{number}.json"


def number_in(name: str) -> int | None:
    """Number of the version of a file within the folder of copies; None where it is another file."""
    match = _FILE.fullmatch(name)
    return None if match is None else int(match[1])


def attributes_in(document: bytes | None) -> dict[str, Any]:
    """The attributes in a root document; none where there is no document.

    Raises
    ------
    IntegrityError
        If it is no document.
    """
    try:
        found: dict[str, Any] = json.loads(b"{}" if document is None else document).get("attributes", {})
    except (ValueError, AttributeError) as e:
        raise damaged_document(f"the collection's {METADATA}", e) from e
    return found


def damaged_document(name: str, error: Exception) -> IntegrityError:
    """The error of a root document that cannot be read."""
    return IntegrityError(f"{name} is damaged or was copied in part ({error}); copy it again, or restore it")


def manifest_in(document: bytes | None) -> Manifest | None:
    """The manifest in a root document; None where there is no document, or annbatch wrote it."""
    values = attributes_in(document).get(MANIFEST_KEY)
    return None if values is None else Manifest.from_json(values)


def save_version(target: Folder, number: int, root_version: str | None) -> None:
    """Copy the root document, which a commit is about to replace.

    Raises
    ------
    CollectionBusyError
        If another build published something since the root document had this version.
    """
    name, document = version_name(number), target.read(METADATA)
    check_unchanged(target, root_version)
    if target.find(name) != document:  # which an interrupted build has left
        target.replace(name, document, version=target.version(name))


def find_versions(folder: Folder, current: Manifest) -> dict[int, Manifest]:
    """Manifests of the versions that can be opened, by number, the current one last."""
    if not current.kept:
        return {current.version: current}
    with ThreadPoolExecutor(_N_THREADS, thread_name_prefix="versions") as pool:
        found = list(pool.map(manifest_in, pool.map(folder.find, map(version_name, current.kept))))
    there = {number: m for number, m in zip(current.kept, found, strict=True) if m is not None}
    return there | {current.version: current}


def open_version(folder: Folder, number: int) -> zarr.Group:
    """The group of a collection as it was at a commit, to read.

    Raises
    ------
    CollectionError
        If no collection with versions is there.
    VersionNotFoundError
        If it has no such version, or does not keep it.
    """
    document = folder.find(METADATA)
    current = manifest_in(document)
    if document is None or current is None:
        what = "has no versions: annbatch wrote it" if document is not None else "is not there; check the path"
        msg = f"{folder.url} {what}"
        raise CollectionError(msg)
    if not isinstance(number, Integral):
        raise _not_found(folder, number, current)
    if number != current.version:
        document = folder.find(version_name(number)) if number in current.kept else None
    if document is None:
        raise _not_found(folder, number, current)
    store = StorePath(folder.zarr_store(read_only=True))
    return zarr.Group(zarr.AsyncGroup.from_dict(store, json.loads(document)))


def _not_found(folder: Folder, number: int, current: Manifest) -> VersionNotFoundError:
    """Make the error for a version that cannot be opened, which lists those that can."""
    is_gone = isinstance(number, Integral) and 1 <= number < current.version
    what = f"does not keep version {number} any more" if is_gone else f"has no version {number!r}"
    there = ", ".join(map(str, find_versions(folder, current)))
    msg = f"{folder.url} {what}: it is at version {current.version}, and can be opened at {there}"
    return VersionNotFoundError(msg)
