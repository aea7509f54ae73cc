"""The files of a dataset: what its own group document says of them, which the manifest vouches for."""

from __future__ import annotations

import json
from typing import Any

from annbatch_dask.errors import IntegrityError
from annbatch_dask.manifest import DatasetRecord
from annbatch_dask.storage.checksums import FileSums, checksum_of
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.metadata import FILES, METADATA

__all__ = ["recorded_files"]


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
    if record.metadata is None:
        return record.files
    if document is None and (document := (target / record.name).find(METADATA)) is None:
        msg = f"{record.name}/{METADATA}: is missing"
        raise IntegrityError(msg)
    if (found := checksum_of(document)) != record.metadata:
        (size, crc), (wrote, written) = found, record.metadata
        msg = f"{record.name}/{METADATA}: has {size:,} bytes, crc32c {crc}, and was written with {wrote:,}, {written}"
        raise IntegrityError(msg)
    listed: dict[str, Any] = json.loads(document)["attributes"][FILES]
    return {name: (int(n), str(crc)) for name, (n, crc) in listed.items()} | {METADATA: found}
