"""The scratch folder of a build: whose it is, whether it is still there, and receipts of tasks that are finished."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

from annbatch_dask.errors import IntegrityError
from annbatch_dask.storage.checksums import checksum_of
from annbatch_dask.storage.folder import Folder

__all__ = [
    "OWNER",
    "ScratchGoneError",
    "check_scratch",
    "find_receipt",
    "forget_receipt",
    "scratch_gone",
    "still_there",
    "write_receipt",
]

logger = logging.getLogger(__name__)

OWNER = "owner.json"
"""File of a scratch folder that says whose it is: the first that is written, and the last that is removed."""


class ScratchGoneError(IntegrityError):
    """The scratch folder of a build is gone, and with it the build."""


def find_receipt(folder: Folder, task: str) -> dict[str, Any] | None:
    """Return the receipt of a finished task, or None if it is not finished or its receipt is damaged."""
    name = f"{task}.json"
    if (found := folder.find(name)) is None:
        return None
    crc, _, payload = found.partition(b"\n")
    if crc != _crc_line(payload):
        logger.warning("%s/%s is damaged: the task is run again", folder.url, name)
        return None
    receipt: dict[str, Any] = json.loads(payload)
    return receipt


def write_receipt(folder: Folder, task: str, receipt: Mapping[str, Any]) -> None:
    """Say that a task is finished.

    Scratch files are not synced: after a power cut they may be gone or damaged, which costs their work again (each part
    of one has a checksum), while syncing them would cost every build the disk's full write time.
    """
    payload = json.dumps(receipt).encode()
    with still_there(folder):
        folder.write(f"{task}.json", _crc_line(payload) + b"\n" + payload, durable=False, parents=False)


@contextlib.contextmanager
def still_there(folder: Folder) -> Iterator[None]:
    """Write into a scratch folder as long as its build has it, and not into one that is gone.

    Raises
    ------
    ScratchGoneError
        If it is: the build has ended, or somebody removed it.
    """
    if not folder.is_local and folder.size(OWNER) is None:
        raise scratch_gone(folder)
    try:
        yield
    except FileNotFoundError as e:
        if folder.is_local and not os.path.isdir(folder.path):
            raise scratch_gone(folder) from e
        raise


def check_scratch(folder: Folder) -> None:
    """Refuse to continue with a build whose scratch folder is gone.

    Raises
    ------
    ScratchGoneError
        If the folder no longer says whose it is.
    """
    if folder.size(OWNER) is None:
        raise scratch_gone(folder)


def scratch_gone(folder: Folder) -> ScratchGoneError:
    """Make the error for a scratch folder that is gone."""
    msg = f"the scratch folder {folder.url} is gone: its build has ended, or it was removed; call again to go on"
    return ScratchGoneError(msg)


def _crc_line(payload: bytes) -> bytes:
    return checksum_of(payload)[1].encode()


def forget_receipt(folder: Folder, task: str) -> None:
    """Make a task count as not finished."""
    folder.unlink(f"{task}.json")
