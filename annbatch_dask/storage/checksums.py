"""Size and crc32c of files: what the manifest says of a dataset, and what ``verify`` compares."""

from __future__ import annotations

from collections.abc import Mapping

import google_crc32c
import numpy as np

from annbatch_dask.storage.folder import Folder

__all__ = ["FileSums", "checksum", "checksum_of", "checksums"]

FileSums = Mapping[str, tuple[int, str]]
"""Bytes and crc32c (8 hex digits) by path."""
_PIECE = 2**22
_N_AT_ONCE = 32


def checksum(folder: Folder, name: str) -> tuple[int, str]:
    """Bytes and crc32c of a file, read in pieces.

    Raises
    ------
    FileNotFoundError
        If it is not there.
    """
    file = folder.ranges(name)
    try:
        buffer = memoryview(np.empty(_PIECE, np.uint8))
        size, crc = 0, 0
        while n := file.read_into(size, buffer):
            crc = google_crc32c.extend(crc, bytes(buffer[:n]))
            size += n
            if n < _PIECE:
                break
        return size, f"{crc:08x}"
    finally:
        file.close()


def checksums(folder: Folder, sizes: Mapping[str, int]) -> dict[str, str]:
    """crc32c of files of known sizes; small ones of a store are asked for many at a time.

    Raises
    ------
    FileNotFoundError
        If one is not there.
    """
    found: dict[str, str] = {}
    small = [] if folder.is_local else [name for name, size in sizes.items() if size <= _PIECE]
    for start in range(0, len(small), _N_AT_ONCE):
        names = small[start : start + _N_AT_ONCE]
        payloads = folder.fs.cat_ranges([f"{folder.path}/{name}" for name in names], 0, None, on_error="raise")
        found |= {name: checksum_of(payload)[1] for name, payload in zip(names, payloads, strict=True)}
    return found | {name: checksum(folder, name)[1] for name in sizes if name not in found}


def checksum_of(payload: bytes) -> tuple[int, str]:
    """Bytes and crc32c of what a file holds."""
    return len(payload), f"{google_crc32c.value(payload):08x}"
