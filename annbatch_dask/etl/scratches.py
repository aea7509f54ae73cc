"""Scratch folders of builds, wherever they are: found by what is in them, and removed."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, field

from annbatch_dask.errors import CollectionError
from annbatch_dask.etl.job import owner_of
from annbatch_dask.etl.ours import is_blank
from annbatch_dask.storage.claims import Work
from annbatch_dask.storage.folder import Folder, StorageOptions
from annbatch_dask.storage.scratch import OWNER

__all__ = ["Scratch", "default_scratch"]

logger = logging.getLogger(__name__)

_SCRATCH = ".scratch"


def default_scratch(target: Folder) -> Folder:
    """The folder beside the collection that its scratch folders are in, where none is given."""
    return Folder(target.url.rstrip("/") + _SCRATCH, target.options)


@dataclass(frozen=True)
class Scratch:
    """The scratch folders of a collection's builds.

    Attributes
    ----------
    target
        The collection's folder, by which its own know themselves.
    options
        Options of the store of scratch folders, as no claim holds any; none stands for the collection's own, where
        that is the same store.
    """

    target: Folder
    options: StorageOptions = field(default_factory=StorageOptions, repr=False)

    def _folder(self, url: str) -> Folder:
        if "://" not in url:
            return Folder(url)
        is_same = url.partition("://")[0] == self.target.url.partition("://")[0]
        return Folder(url, self.options or (self.target.options if is_same else StorageOptions()))

    def find(self, works: Iterable[Work], *roots: Folder) -> list[tuple[Folder, bool]]:
        """Folders of these works, and whatever of this collection's is in some folders.

        Returns
        -------
        Each, and whether the folder that it is in may go with it.

        Raises
        ------
        CollectionError
            If a folder cannot be opened.
        """
        beside = default_scratch(self.target).url
        claimed = {w.scratch: (self._folder(w.scratch), w.is_new or _parent(w.scratch) == beside) for w in works}
        found = [pair for pair in claimed.values() if self._is_ours(pair[0], is_claimed=True)]
        others = [f for root in roots for f in map(root.__truediv__, root.names()) if f.url not in claimed]
        return [*found, *((f, _parent(f.url) == beside) for f in others if self._is_ours(f, is_claimed=False))]

    def _is_ours(self, folder: Folder, *, is_claimed: bool) -> bool:
        try:
            owner = owner_of(folder)
            is_made = is_claimed and folder.is_local and os.path.isdir(folder.path)  # and nothing is in it yet
            return owner == self.target.url or (is_made and owner is None and is_blank(folder))
        except Exception as e:
            msg = (
                f"{folder.url}, the scratch folder of an interrupted build, cannot be opened "
                f"({type(e).__name__}: {e}); give its storage options to gc(scratch_options=...)"
            )
            raise CollectionError(msg) from e

    def remove(self, found: Iterable[tuple[Folder, bool]]) -> None:
        """Remove what :meth:`find` found."""
        parents = set()
        for folder, with_parent in found:
            folder.remove(last=OWNER)
            logger.info("removed %s", folder.url)
            if with_parent and folder.is_local:
                parents.add(os.path.dirname(folder.path))
        for path in parents:
            with contextlib.suppress(OSError):  # others use it too
                os.rmdir(path)


def _parent(url: str) -> str:
    return url.rpartition("/")[0]
