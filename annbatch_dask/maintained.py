"""What keeps a collection well, once it is there: verify it, clean up after builds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

from annbatch_dask.engines.choose import choose_engine
from annbatch_dask.errors import CollectionError, StorageError
from annbatch_dask.etl.scratches import Scratch, default_scratch
from annbatch_dask.etl.sweep import sweep
from annbatch_dask.etl.verify import Verification, verify
from annbatch_dask.events import Callback, Callbacks
from annbatch_dask.progress import default_callbacks
from annbatch_dask.sizes import check_positive
from annbatch_dask.sources.references import references
from annbatch_dask.storage.folder import Folder, StorageOptions, absolute, folder_at
from annbatch_dask.storage.lock import exclusive
from annbatch_dask.stored import StoredCollection

if TYPE_CHECKING:
    import anndata as ad
    from distributed import Client

__all__ = ["MaintainedCollection"]


class MaintainedCollection(StoredCollection):
    """The part of a collection that looks after it: it adds no cell and removes none.

    :class:`annbatch_dask.DatasetCollection` adds what builds it.
    """

    def verify(
        self,
        against: Iterable[Any] | None = None,
        *,
        load_adata: Callable[[Any], ad.AnnData] | None = None,
        client: Client | None = None,
        storage_options: Mapping[str, Any] | None = None,
        callbacks: Iterable[Callback] | None = None,
        progress: bool | None = None,
    ) -> Verification:
        """Read everything and compare it with what was written, file by file and row by row.

        Parameters
        ----------
        against
            The inputs the collection was made of: prove that it is a permutation of their cells. They may have moved
            to another folder. None compares with the manifest alone.
        load_adata
            The function the build used, if it used one.
        client
            A client of the Dask cluster to use; None uses what dask is set to use, as :meth:`add_adatas` does, or else
            the threads of this process.
        storage_options
            fsspec's, for inputs that are URLs.
        callbacks, progress
            As for :meth:`add_adatas`.

        Returns
        -------
        The problems found, none where all is well; nothing is raised for them.

        Raises
        ------
        CollectionError
            If there is nothing to verify, or an input is none of the collection's.
        CollectionChangedError
            If others replaced or removed datasets since the collection was opened, so that these cannot be read.
        """
        manifest = self.manifest
        if self.is_empty or manifest is None:
            msg = f"{self.path} has no manifest to compare with: it is empty, or annbatch wrote it"
            raise CollectionError(msg)
        refs = () if against is None else references(against, load_adata, storage_options)
        callback = Callbacks([*default_callbacks(progress=progress), *(callbacks or ())])
        root, scanner = self._root, choose_engine(client, None).scanner
        with closing(root.lease()), root.explained():
            found = verify(root.target, manifest, refs, engine=scanner, callback=callback, document=root.document)
        if found.problems:
            root.check_as_opened()
        return found

    def gc(
        self,
        *,
        keep_last: int | None = None,
        dry_run: bool = False,
        abandoned: bool = False,
        scratch: str | os.PathLike[str] | None = None,
        scratch_options: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Remove what interrupted builds left in the collection's folder, and their scratch folders, wherever they are.

        A build that was interrupted cannot be resumed afterwards. Replaced datasets are removed too, unless a reader
        holds them. Files that are not known to belong to this collection are kept.

        Parameters
        ----------
        keep_last
            Remove versions too, and the datasets that only they have: all but this many of the last ones, the current
            one with them. None removes none that ``add_adatas(keep=...)`` keeps. What a reader holds stays.
        dry_run
            List what would be removed, and remove nothing.
        abandoned
            On an object store: also remove the leftovers of a build on another machine, which may still run.
        scratch
            A scratch folder to search, besides those recorded by builds.
        scratch_options
            Options of fsspec for scratch folders on a store.

        Returns
        -------
        Names of what was removed, or would be; scratch folders by path.

        Raises
        ------
        CollectionBusyError
            If a build runs, or may run.
        CollectionError
            If something else is in the folder, which is named; nothing is removed.
        StorageError
            If there is no folder ``scratch`` on this disk.
        """
        self._root.check_unpinned("clean up")
        check_positive("keep_last", keep_last)
        roots = [default_scratch(self._root.target)]
        if scratch is not None:
            roots.append(_there(absolute(folder_at(scratch, scratch_options))))
        with exclusive(self._root.target):
            self._root.refresh()
            known = Scratch(self._root.target, options=StorageOptions(scratch_options or {}))
            return sweep(self._root.target, known, *roots, keep_last=keep_last, dry_run=dry_run, abandoned=abandoned)


def _there(scratch: Folder) -> Folder:
    """Refuse a scratch folder that is none: a path that was mistyped has nothing to remove. A store has no folders."""
    if scratch.is_local and not os.path.isdir(scratch.path):
        what = "is a file" if os.path.exists(scratch.path) else "does not exist"
        msg = f"scratch={scratch.path!r} {what}, so there is no scratch folder to search; check the path"
        raise StorageError(msg)
    return scratch
