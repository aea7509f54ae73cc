"""The files of a dataset: what its own group document says of them, which the manifest vouches for."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from annbatch_dask.errors import IntegrityError
from annbatch_dask.manifest import MANIFEST_KEY, DatasetRecord
from annbatch_dask.storage.checksums import FileSums, checksum_of
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.metadata import FILES, METADATA, copied_nodes, listed_files

__all__ = ["Recorded", "recorded", "recorded_by_itself", "recorded_files"]


@dataclass(frozen=True)
class Recorded:
    """A dataset as it was written.

    Attributes
    ----------
    files
        Bytes and crc32c of each file; empty where no build recorded them.
    document
        Its group document.
    is_edited
        Whether somebody changed the attributes of the dataset itself since, or wrote all of it anew.
    """

    files: FileSums
    document: bytes = field(default=b"{}", repr=False)
    is_edited: bool = False

    @cached_property
    def nodes(self) -> dict[str, Any]:
        """Metadata of its groups and arrays, by their paths within it."""
        return {path.strip("/"): node for path, node in copied_nodes(self.document, "").items()}


def recorded_files(target: Folder, record: DatasetRecord, document: bytes | None = None) -> FileSums:
    """Bytes and crc32c of each file of a dataset as it was written; empty where the build did not record them.

    Parameters
    ----------
    document
        The dataset's group document, where it was read already.

    Raises
    ------
    IntegrityError
        If the group document that lists them is missing, or not as it was written.
    """
    was = recorded(target, record, document)
    if was.is_edited:
        msg = f"{record.name}/{METADATA}: was changed since the build"
        raise IntegrityError(msg)
    return was.files


def recorded(target: Folder, record: DatasetRecord, document: bytes | None = None) -> Recorded:
    """The same with the metadata, also where somebody edited the group document, whose list then has its checksum.

    Raises
    ------
    IntegrityError
        If the group document is missing or damaged.
    """
    if record.metadata is None:
        return Recorded(record.files)
    if document is None and (document := (target / record.name).find(METADATA)) is None:
        msg = f"{record.name}/{METADATA}: is missing"
        raise IntegrityError(msg)
    found = checksum_of(document)
    if found == record.metadata:
        listed: dict[str, Any] | None = json.loads(document)["attributes"][FILES]
    elif (attributes := _attributes(document)) is None or found[0] == record.metadata[0]:
        (size, crc), (wrote, written) = found, record.metadata
        msg = f"{record.name}/{METADATA}: has {size:,} bytes, crc32c {crc}, and was written with {wrote:,}, {written}"
        raise IntegrityError(msg)
    else:
        listed = listed_files(attributes) if MANIFEST_KEY in attributes else None
    if listed is None:
        return Recorded({}, is_edited=True)
    return _as_listed(listed, document, is_edited=found != record.metadata)


def recorded_by_itself(document: bytes | None) -> Recorded:
    """What a dataset's group document alone says; no files where it lists none, or its list is damaged."""
    attributes = None if document is None else _attributes(document)
    listed = None if attributes is None else listed_files(attributes)
    if document is None or listed is None:
        return Recorded({})
    return _as_listed(listed, document)


def _as_listed(listed: dict[str, Any], document: bytes, *, is_edited: bool = False) -> Recorded:
    """A dataset as the list in its document says, and that document as it is."""
    files = {name: (int(n), str(crc)) for name, (n, crc) in listed.items()} | {METADATA: checksum_of(document)}
    return Recorded(files, document, is_edited=is_edited)


def _attributes(document: bytes) -> dict[str, Any] | None:
    """Attributes of an AnnData's group document; None where it is none."""
    try:
        found = json.loads(document)["attributes"]
    except (ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) and found.get("encoding-type") == "anndata" else None
