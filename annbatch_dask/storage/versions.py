"""Versions of files: noted when data are opened, compared when they are read, so that what is read is what was opened.

A version is a tuple that tells one content of a file from another, and ends with its bytes. On a disk it is the time of
its last change; a file that was put back as it was, with its time, is the same. In an object store it is what the store
calls it, an entity tag mostly.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from annbatch_dask.errors import CollectionChangedError
from annbatch_dask.storage.filesystems import version_of
from annbatch_dask.storage.folder import Folder

__all__ = ["Listing", "Version", "changed", "list_all", "list_files", "version_on_disk"]

_N_THREADS = 16

Version = tuple[Any, ...]


@dataclass(frozen=True)
class Listing:
    """The files below a folder as they were when it was listed.

    Attributes
    ----------
    url
        URL of the folder.
    versions
        By path within the folder.
    """

    url: str
    versions: Mapping[str, Version]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {name: version[-1] for name, version in self.versions.items()}

    def below(self, url: str) -> dict[str, Version | None] | None:
        """Those below a folder inside, by path within that; None for a folder that is not."""
        inside, root = f"{url.rstrip('/')}/", f"{self.url.rstrip('/')}/"
        if not inside.startswith(root):
            return None
        prefix = inside.removeprefix(root)
        return {name.removeprefix(prefix): v for name, v in self.versions.items() if name.startswith(prefix)}

    def check(self, now: Listing) -> None:
        """Refuse what was changed since.

        Raises
        ------
        CollectionChangedError
            With the name of a file that is another one now.
        """
        old, new = self.versions, now.versions
        if old != new:
            name = min(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
            raise changed(f"{self.url}/{name}", old.get(name), new.get(name))


def list_files(folder: Folder) -> Listing | None:
    """All files below a folder; None where a store lists nothing, as web servers do."""
    if folder.is_local:
        return Listing(folder.url, dict(_walk(folder.path, "")))
    fs, root = folder.fs, folder.path.rstrip("/")
    if "http" in fs.protocol:
        return None
    fs.invalidate_cache(root)
    try:
        found = fs.find(root, detail=True)
    except PermissionError:
        found = {}
    if not found:
        return None
    names = {path[path.rindex(root) + len(root) :].lstrip("/"): info for path, info in found.items()}
    return Listing(folder.url, {name: (version_of(info), int(info["size"])) for name, info in names.items()})


def list_all(folders: Sequence[Folder]) -> list[Listing | None]:
    """List many folders concurrently: each waits for a disk or a store."""
    if not folders:
        return []
    with ThreadPoolExecutor(min(_N_THREADS, len(folders)), thread_name_prefix="list") as pool:
        return list(pool.map(list_files, folders))


def _walk(path: str, prefix: str) -> Iterator[tuple[str, Version]]:
    try:
        entries = os.scandir(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    with entries:
        for entry in entries:
            if entry.is_dir():
                yield from _walk(entry.path, f"{prefix}{entry.name}/")
            else:
                try:
                    yield f"{prefix}{entry.name}", version_on_disk(entry.stat())
                except FileNotFoundError:  # meanwhile
                    continue


def version_on_disk(found: os.stat_result) -> Version:
    """Version of a local file. Its inode is not used: some network file systems report another one each time."""
    return (found.st_mtime_ns, found.st_size)


def changed(name: str, opened: Version | None, found: Version | None) -> CollectionChangedError:
    """Make the error for a file that is not the one that was opened."""
    if found is None:
        what = "was removed since it was opened"
    elif opened is None:
        what = f"was written since its folder was opened, with {found[-1]:,} bytes"
    else:
        what = f"was replaced since it was opened (version {_shown(opened)} then, {_shown(found)} now)"
    return CollectionChangedError(f"{name} {what}; open the collection again, or restore the file and its time")


def _shown(version: Version) -> str:
    tag, nbytes = version
    return f"{tag} of {nbytes:,} bytes"
