"""A collection as it is on disk: its datasets, its manifest, and whether it is still what was opened."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from hashlib import blake2b
from typing import Any, Literal

import zarr
from zarr.errors import ContainsArrayError

from annbatch_dask.errors import AnnbatchDaskError, CollectionChangedError, CollectionError, IntegrityError
from annbatch_dask.manifest import (
    ANNBATCH_ENCODING,
    DATASET_NAME,
    MANIFEST_KEY,
    Manifest,
    dataset_names,
    dataset_number,
)
from annbatch_dask.storage.folder import Folder, absolute, anchored, folder_of
from annbatch_dask.storage.frames import n_rows
from annbatch_dask.storage.history import attributes_in, damaged_document, manifest_in, version_name
from annbatch_dask.storage.lock import Lease
from annbatch_dask.storage.metadata import METADATA, open_as_it_is, open_by_copy

__all__ = ["H5adRoot", "Root", "open_group"]

_N_THREADS = 16
_READERS = ("anndata", "h5py", "zarr")
_HIDDEN = ".shuffled.zarr"
"""In a folder of h5ad files, what they will be written from."""


class Root:
    """A zarr collection in a folder, or in a zarr group of any store.

    Parameters
    ----------
    group
        The collection's group; None where there is no collection yet.
    folder
        Where it is; None is the group's place.
    replaces
        Take what is there for empty: the next commit replaces it.
    pinned
        The version that was asked for, which is read only; None is the current one.
    """

    def __init__(
        self,
        group: zarr.Group | None,
        folder: Folder | None = None,
        *,
        replaces: bool = False,
        pinned: int | None = None,
    ) -> None:
        self.group = group
        self.replaces = replaces
        self.pinned = pinned
        self._parsed: tuple[zarr.Group, Manifest] | None = None
        self._shown = "" if folder is None else folder.url
        if folder is not None:
            self.folder = anchored(folder)

    @cached_property
    def folder(self) -> Folder:
        """The collection's folder; CollectionError where its store alone knows its files: one in memory, say."""
        assert self.group is not None  # set at construction, or the folder is
        return folder_of(self.group)

    @cached_property
    def has_folder(self) -> bool:
        """True if it is at a path or URL."""
        try:
            return bool(self.folder.url)
        except CollectionError:
            return False

    @property
    def target(self) -> Folder:
        """The collection's folder, by a path that other processes can open."""
        return absolute(self.folder)

    @property
    def path(self) -> str:
        """Path or URL of the collection."""
        return (self._shown or self.folder.url) if self.has_folder else str(self.group)

    @property
    def is_empty(self) -> bool:
        """True unless the collection's attributes are there and at least one dataset."""
        if self.group is None:
            return True
        return not (ANNBATCH_ENCODING.items() <= dict(self.group.attrs).items() and self.names())

    def names(self) -> list[str]:
        """Names of the datasets, in numeric order."""
        if self.group is None:
            return []
        if (manifest := self._manifest) is not None:
            return [d.name for d in manifest.datasets]
        return sorted(filter(DATASET_NAME.fullmatch, self._keys(self.group)), key=dataset_number)

    def _keys(self, group: zarr.Group) -> Iterable[str]:
        """Names in the root; zarr would warn of other files where the root does not say (annbatch wrote it)."""
        if not self.has_folder or group.metadata.consolidated_metadata is not None:
            return group.group_keys()
        return (name for name in self.folder.names() if DATASET_NAME.fullmatch(name) and name in group)

    def __iter__(self) -> Iterator[zarr.Group]:
        """The datasets as zarr groups, in numeric order."""
        if not self.is_empty:
            yield from map(self._dataset, self.names())

    def _dataset(self, name: str) -> zarr.Group:
        """A dataset as it is now. Its owner may edit it: anndata writes to groups without copies of metadata alone."""
        group = self.group
        assert group is not None  # there is a dataset
        if self._is_on_the_web:
            return self.as_written(name)
        try:
            return zarr.open_group(
                group.store,
                path=f"{group.path}/{name}".strip("/"),
                mode="r" if group.read_only else "r+",
                zarr_format=group.metadata.zarr_format,
                use_consolidated=False,
            )
        except FileNotFoundError as e:
            self.check_as_opened()
            msg = f"{self.path} cannot be read: {name} is missing; restore it, or build the collection anew"
            raise IntegrityError(msg) from e

    def as_written(self, name: str) -> zarr.Group:
        """A dataset with the metadata of all that is in it, as the build wrote them."""
        assert self.group is not None  # there is a dataset
        return open_by_copy(self.group[name])  # type: ignore[arg-type]

    @cached_property
    def _is_on_the_web(self) -> bool:
        """True if it is on a web server, which lists nothing and takes nothing."""
        return self.has_folder and "http" in self.folder.fs.protocol

    def readable(self) -> Iterator[zarr.Group]:
        """The datasets as they are now, to read them in few requests."""
        if not self.is_empty and self.has_folder and not self.folder.is_local:
            yield from (open_as_it_is(self.folder / name) for name in self.names())
        else:
            yield from self

    def open_all(self, edited: Collection[str] = ()) -> list[zarr.Group]:
        """The datasets as zarr groups, to read, many opened at a time: each may be a request to a store.

        Parameters
        ----------
        edited
            Datasets of ours that are not as they were written. All others of ours are opened by the copies that
            builds have made of their metadata.
        """
        if self.is_empty or self.group is None or not self.has_folder:
            return list(self)
        manifest = self.manifest
        written = {d.name for d in manifest.datasets if d.n_files} - set(edited) if manifest is not None else set()

        def open_one(name: str) -> zarr.Group:
            return self.as_written(name) if name in written else self._dataset(name)

        if self.folder.is_local:
            return list(map(open_one, self.names()))
        with ThreadPoolExecutor(_N_THREADS, thread_name_prefix="open") as pool:
            return list(pool.map(open_one, self.names()))

    @property
    def manifest(self) -> Manifest | None:
        """Manifest of the collection; None if it is empty or was written by annbatch."""
        return None if self.is_empty else self._manifest

    @property
    def _manifest(self) -> Manifest | None:
        """The manifest, parsed once for each group."""
        group = self.group
        if group is None or MANIFEST_KEY not in group.attrs:
            return None
        if self._parsed is None or self._parsed[0] is not group:
            self._parsed = group, Manifest.from_json(group.attrs[MANIFEST_KEY])  # type: ignore[arg-type]
        return self._parsed[1]

    @property
    def n_obs(self) -> int:
        """Cells in all datasets."""
        if (manifest := self.manifest) is not None:
            return manifest.n_obs
        return sum(n_rows(group["obs"]) for group in self.readable())

    @property
    def digest(self) -> str:
        """Differs where the cells, or their order, do."""
        if (manifest := self.manifest) is not None:
            return manifest.identity
        about = {"datasets": [str(group.name) for group in self], "n_obs": self.n_obs}
        return blake2b(json.dumps(about).encode(), digest_size=8).hexdigest()

    @property
    def other_attributes(self) -> dict[str, Any]:
        """The root's attributes that others have put there."""
        known = {*ANNBATCH_ENCODING, MANIFEST_KEY}
        return {} if self.group is None else {k: v for k, v in self.group.attrs.items() if k not in known}

    @contextlib.contextmanager
    def obs_elements(self) -> Iterator[Iterator[Any]]:
        """Obs of each dataset, as it is stored, one at a time."""
        yield (group["obs"] for group in self.readable())

    @property
    def document(self) -> str:
        """Name of the root document that is of what was opened: of a version that is kept, a copy's."""
        return self._kept_by(self.folder.find(METADATA)) or METADATA

    def check_unpinned(self, what: str) -> None:
        """Refuse to change a collection by one of its versions.

        Raises
        ------
        CollectionError
            With what was asked for.
        """
        if self.pinned is not None:
            msg = (
                f"{self.path} was opened at version {self.pinned}, which stays as it is: to {what}, open it without "
                f"version=; to go on from version {self.pinned}, build a new collection with its datasets as inputs"
            )
            raise CollectionError(msg)

    def refresh(self) -> None:
        """See what other processes published since this object was made."""
        if not self.replaces and (group := _root_group(self.target, "r+")) is not None:
            self.group = group

    # --- as it was opened

    def lease(self) -> Lease:
        """Keep the datasets from being removed by builds of other processes, until the lease is dropped.

        Raises
        ------
        CollectionChangedError
            If a dataset was replaced or removed since it was opened.
        """
        if not self.has_folder:
            return Lease(None)
        lease = Lease(self.folder)
        document = lease.document() or self.folder.find(METADATA)
        if self._replaced(document) and (kept := self._kept_by(document)):
            lease, document = Lease(self.folder, kept), None  # and now that it is held, is it there still?
        self.check_as_opened(document)
        return lease

    def check_as_opened(self, document: bytes | None = None) -> None:
        """Refuse to continue where a dataset was replaced since the collection was opened, and others may be as it was.

        A version that is kept is as it was.

        Raises
        ------
        CollectionChangedError
            If a dataset was replaced or removed since.
        """
        if self.group is None or not self.has_folder:
            return
        if document is None:
            document = self.folder.find(METADATA)
        if (gone := self._replaced(document)) and not self._kept_by(document):
            msg = (
                f"{self.path} was changed since it was opened: {len(gone):,} of its {len(self.names()):,} datasets, "
                f"{min(gone)} among them, were replaced or removed; open it again"
            )
            raise CollectionChangedError(msg)

    def _replaced(self, document: bytes | None) -> set[str]:
        """Names of the datasets that are not there any more as they were, by the root document of now."""
        assert self.group is not None  # it was opened
        if document is None:
            return set(self.names()) or {"it"}
        opened, values = self._manifest, attributes_in(document).get(MANIFEST_KEY)
        if opened is None:  # annbatch wrote it, perhaps without the names
            now = dataset_names(document)
            return set(self.names()) - now if now else set()
        if values == self.group.attrs[MANIFEST_KEY]:
            return set()
        there = {d.name: d for d in Manifest.from_json(values).datasets} if values else {}
        return {d.name for d in opened.datasets if there.get(d.name) != d}

    def _kept_by(self, document: bytes | None) -> str | None:
        """Name of the file that keeps what was opened as a version, by the root document of now; None if none does."""
        opened, now = self._manifest, manifest_in(document)
        if opened is None or now is None or opened.version not in now.kept:
            return None
        name = version_name(opened.version)
        return name if manifest_in(self.folder.find(name)) == opened else None

    @contextlib.contextmanager
    def as_opened(self) -> Iterator[None]:
        """Raise CollectionChangedError if the collection is replaced while the block reads it."""
        with self.explained():
            yield
        self.check_as_opened()

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Raise CollectionChangedError in place of an error of the block, if the collection was replaced by then.

        That is enough for a block that compares all it reads with what the manifest says. A file or an element that
        was not there otherwise, as in a collection that was copied in part or is being removed, is an IntegrityError.
        """
        try:
            yield
        except Exception as e:
            self.check_as_opened()
            if isinstance(e, AnnbatchDaskError) or not (isinstance(e, FileNotFoundError) or _is_of_reader(e)):
                raise
            what = getattr(e, "filename", None) or e.__cause__ or e
            msg = f"{self.path} cannot be read: {what} is missing; restore it (verify lists all), or build it anew"
            raise IntegrityError(msg) from e


def _is_of_reader(error: Exception) -> bool:
    """True of a KeyError with which a library says that an element is not there; one of ours is a mistake here."""
    traceback = error.__traceback__ if isinstance(error, KeyError) else None
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and traceback.tb_frame.f_globals.get("__name__", "").partition(".")[0] in _READERS


class H5adRoot(Root):
    """A folder of ``dataset_<i>.h5ad``, of which only obs is read. Builds write them from a zarr collection in it."""

    def __init__(self, folder: Folder, *, replaces: bool = False) -> None:
        super().__init__(None, folder, replaces=replaces)

    def files(self) -> list[str]:
        """Names of its h5ad files, numbers in them in numeric order."""
        names = [n for n in self.folder.names() if n.endswith(".h5ad")]
        return sorted(names, key=lambda n: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", n)])

    @property
    def is_empty(self) -> bool:
        """True if there is no file."""
        return not any(n.endswith(".h5ad") for n in self.folder.names())

    def __iter__(self) -> Iterator[zarr.Group]:
        msg = "Cannot iterate through a folder of h5ad files: shuffle them into a zarr collection"
        raise ValueError(msg)

    @contextlib.contextmanager
    def obs_elements(self) -> Iterator[Iterator[Any]]:
        """Obs of each file, as it is stored, one at a time."""
        with contextlib.ExitStack() as files:
            yield (self._open_obs(name, files) for name in self.files())

    def _open_obs(self, name: str, files: contextlib.ExitStack) -> Any:
        import h5py

        files.close()  # the one before
        return files.enter_context(h5py.File(f"{self.folder.path}/{name}"))["obs"]

    def hidden(self) -> Root:
        """The zarr collection of a build; what another build left is none of it."""
        return Root(None, absolute(self.folder) / _HIDDEN, replaces=True)

    def remove_hidden(self) -> None:
        """Remove the zarr collection, with its log."""
        for name in (n for n in self.target.names() if n.startswith(_HIDDEN)):
            (self.target / name).remove()


def _root_group(folder: Folder, mode: Literal["r", "r+"]) -> zarr.Group | None:
    """The group at a path; None where there is no document, or none any more."""
    if folder.version(METADATA) is None:
        return None
    try:
        return zarr.open_group(folder.zarr_store(), mode=mode, zarr_format=3)
    except ContainsArrayError as e:
        msg = f"{folder.url} exists and is not a collection but a zarr array; give another path"
        raise CollectionError(msg) from e
    except (ValueError, KeyError, TypeError, FileNotFoundError) as e:  # of no JSON, or of one that lacks what it needs
        if folder.version(METADATA) is None:
            return None
        raise damaged_document(f"{folder.url}/{METADATA}", e) from e


def open_group(folder: Folder, mode: str) -> zarr.Group | None:
    """The collection's group at a path; None where there is nothing yet.

    Raises
    ------
    CollectionError
        Where something else is there; a FileNotFoundError as well, where nothing is and ``mode`` needs something.
    IntegrityError
        Where its root document is damaged.
    """
    if mode not in ("r", "r+", "a", "w", "w-"):
        msg = f"mode is {mode!r}; it must be one of 'r', 'r+', 'a', 'w', 'w-'"
        raise ValueError(msg)
    group = _root_group(folder, "r" if mode == "r" else "r+")
    if group is None:
        if folder.fs.isfile(folder.path):
            msg = f"{folder.url} is a file, not a collection; give another path"
            raise CollectionError(msg)
        return None
    encoding = group.attrs.get("encoding-type")
    if encoding != ANNBATCH_ENCODING["encoding-type"] and (encoding or any(True for _ in group.keys())):
        msg = f"{folder.url} exists and is not a collection but {encoding or 'another zarr group'}; give another path"
        raise CollectionError(msg)
    if mode == "w-":
        msg = f"{folder.url} exists; give another path, or mode='w' to replace it"
        raise CollectionError(msg)
    return group
