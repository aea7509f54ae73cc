"""Folders that only their user may read or write: scratch folders, which hold all data of a build.

Their names can be foreseen, and what stands above them may be open to a group or to all, as ``/tmp`` is.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import tempfile
from dataclasses import replace

from annbatch_dask.errors import ForeignScratchError
from annbatch_dask.storage.filesystems import explain_refusals
from annbatch_dask.storage.folder import Folder

__all__ = ["check_private", "make_private"]

logger = logging.getLogger(__name__)


def make_private(folder: Folder) -> Folder:
    """A folder for this user alone, as all files are that are written by way of what is returned.

    It and the one above it are made where they do not exist. On an object store the bucket's rights decide.

    Raises
    ------
    ForeignScratchError
        If it is there, and another user's.
    StorageError
        If it cannot be made.
    """
    if not folder.is_local:
        return folder
    above = os.path.dirname(folder.path)
    with explain_refusals(folder.path, ", a scratch folder,"):
        os.makedirs(os.path.dirname(above), exist_ok=True)
        for path in (above, folder.path):
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, 0o700)
    check_private(folder)
    os.chmod(folder.path, 0o700)  # what an earlier release made
    if (mode := stat.S_IMODE(os.stat(folder.path).st_mode)) & 0o022:
        logger.warning("%s stays open to others (mode %o): its file system keeps no rights", folder.url, mode)
    return replace(folder, is_private=True)


def check_private(folder: Folder) -> None:
    """ForeignScratchError for a local folder that is a link, or another user's."""
    if not folder.is_local:
        return
    found = os.lstat(folder.path)
    if not stat.S_ISDIR(found.st_mode):
        msg = f"{folder.url} is no folder but a link or a file, which another user may have put there; remove it"
        raise ForeignScratchError(msg)
    if found.st_uid != os.geteuid() and found.st_uid != _owner_of_new_files(folder):
        msg = (
            f"{folder.url} belongs to user {found.st_uid}, and this process runs as {os.geteuid()}: its owner could "
            "change what is in it; give scratch= a folder of your own, and run workers as the same user"
        )
        raise ForeignScratchError(msg)


def _owner_of_new_files(folder: Folder) -> int | None:
    """Owner of files that this process creates there: file systems that map users may report another user."""
    try:
        with tempfile.TemporaryFile(dir=folder.path) as f:
            return os.fstat(f.fileno()).st_uid
    except OSError:
        return None
