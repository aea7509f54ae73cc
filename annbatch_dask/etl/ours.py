"""Ownership of folders: which ones a build or gc may remove, and which are still in use.

The one rule: a folder is removed only if a document inside says that this package wrote it for this collection. A
dataset's ``zarr.json``, the first of its files that is written and the last that is removed, names its plan and its
collection; a scratch folder's ``owner.json`` names the collection's path. What has no such document is a stranger's:
nothing is removed then, and nothing is built there. So is a file within a dataset that the dataset does not list.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from annbatch_dask.errors import CollectionBusyError, CollectionError
from annbatch_dask.etl.edits import is_of_system, recorded_datasets, refuse_edited
from annbatch_dask.etl.roots import KeptVersions, RootDocument, attributes_of, kept_versions
from annbatch_dask.formatting import first_few, plural
from annbatch_dask.manifest import DATASET_NAME, DATASET_PREFIX, MANIFEST_KEY
from annbatch_dask.storage.claims import CLAIM_NAME, Claim, find_claims
from annbatch_dask.storage.folder import UNFINISHED, Folder, absolute, sync_path
from annbatch_dask.storage.history import VERSIONS
from annbatch_dask.storage.lock import GENERATION_NAME, is_held, unlink_unheld
from annbatch_dask.storage.metadata import FILES, METADATA, group_document, is_metadata
from annbatch_dask.storage.scratch import OWNER

__all__ = [
    "ATTEMPT_NAME",
    "FolderContents",
    "added_files",
    "check_new",
    "contents_of",
    "dataset_attributes",
    "first_document",
    "is_blank",
    "is_dataset_of",
    "remove_dataset",
    "write_first_document",
]

logger = logging.getLogger(__name__)

ATTEMPT_NAME = re.compile(rf"\.attempt-[0-9a-f]{{8}}-({DATASET_PREFIX}_\d+)")
"""Folder of a dataset on a local disk until the build's commit, which gives it its name."""
_ELSEWHERE = "give another path, move the collection elsewhere, or remove it if these edits may be lost"
_APPEND = (
    "add with mode='append', which leaves them as they are, or build a new collection with these datasets as inputs"
)
_N_THREADS = 16


def dataset_attributes(plan: str, collection: str) -> dict[str, Any]:
    """Attributes that say who owns a dataset: the fingerprint of its plan and its collection's id."""
    return {MANIFEST_KEY: {"plan": plan, "collection": collection}}


def first_document(attributes: dict[str, Any]) -> bytes:
    """The first document of a dataset's folder."""
    return group_document(attributes, {})


def write_first_document(folder: Folder, attributes: dict[str, Any]) -> None:
    """Say in a dataset's folder whose it is, unless its document says so already.

    All attempts at a dataset of a store write the same files there. One that comes late, of a worker that was cut off,
    may end before it has written them, so it must not undo the document of an attempt that wrote the whole dataset.

    Raises
    ------
    CollectionBusyError
        If another build wrote there meanwhile.
    """
    version = None
    if folder.find(METADATA) is not None:
        version = folder.version(METADATA)  # before the content that is looked at, which may be a later one
        if _is_of(folder.find(METADATA), attributes):
            return
    try:
        folder.replace(METADATA, first_document(attributes), version=version)
    except CollectionBusyError:
        if not _is_of(folder.find(METADATA), attributes):
            raise


def _is_of(document: bytes | None, attributes: dict[str, Any]) -> bool:
    """True if a dataset's document has these :func:`dataset_attributes`."""
    return bool(attributes_of(document).get(MANIFEST_KEY) == attributes[MANIFEST_KEY])


def is_dataset_of(document: bytes | None, plans: Iterable[str], ids: Iterable[str]) -> bool:
    """True if a dataset's document says that it was written by one of these plans, or for one of these collections."""
    about = attributes_of(document).get(MANIFEST_KEY)
    if not isinstance(about, dict):  # a damaged one may still say so
        return document is not None and any(f'"{plan}"'.encode() in document for plan in plans)
    return about.get("plan") in set(plans) or bool(about.get("collection")) and about["collection"] in set(ids)


@dataclass(frozen=True)
class FolderContents:
    """Content of a collection's folder beside the root document.

    Attributes
    ----------
    version
        Version of the root document; None if there is none.
    root
        The root document.
    named
        Datasets of the collection as it is.
    versions
        Earlier versions, kept and not.
    datasets
        Our datasets that neither it nor a version that is kept names, and no reader holds.
    files
        Our files that are not finished, and root documents that were replaced and are not held.
    claims
        Claims of builds that run or were interrupted.
    inherited
        Datasets among ours that were an earlier collection's at this place.
    last
        Highest number that a dataset of the collection ever had; -1 where there was none.
    strangers
        All other names.
    locks_work
        False where it cannot be known whether readers hold what was replaced.
    """

    target: Folder
    version: str | None
    root: RootDocument
    named: frozenset[str]
    versions: KeptVersions
    datasets: tuple[str, ...]
    files: tuple[str, ...]
    claims: tuple[Claim, ...]
    inherited: tuple[str, ...]
    last: int
    strangers: tuple[str, ...]
    locks_work: bool

    def check(self) -> None:
        """Refuse a folder with something in it that is not ours.

        Raises
        ------
        CollectionError
            With the names.
        """
        if self.strangers:
            n = len(self.strangers)
            msg = (
                f"{self.target.url} holds {plural(n, 'thing')} that this package did not write for this collection: "
                f"{first_few(self.strangers)}; move {'them' if n > 1 else 'it'} elsewhere, or give another path"
            )
            raise CollectionError(msg)

    def check_named(self, *, replaces: bool) -> None:
        """Refuse to write datasets anew, or to replace them all, that somebody put files of their own into, or edited.

        Raises
        ------
        CollectionError
            With the files, or the edited elements.
        """
        remedy = _ELSEWHERE if replaces else _APPEND
        refuse_edited(self.target, recorded_datasets(self.target.find(METADATA)), remedy)
        with ThreadPoolExecutor(_N_THREADS) as pool:  # each lists a folder
            added = pool.map(lambda name: added_files(self.target, name), sorted(self.named))
            replace(self, strangers=tuple(name for names in added for name in names)).check()

    def check_idle(self) -> None:
        """Refuse to remove what a build on another machine may be writing.

        Raises
        ------
        CollectionBusyError
            With the process and its machine, as far as they are known.
        """
        for claim in () if self.target.is_local else self.claims:
            if not claim.is_over:
                owner = claim.owner
                who = f"process {owner['pid']} on {owner['host']}" if owner else "a build of an earlier release"
                msg = (
                    f"{self.target.url} may be being built by {who}, which cannot be asked; if it runs no more, "
                    "say so with abandoned=True (--abandoned)"
                )
                raise CollectionBusyError(msg)

    def leftovers(self, *, claims: Iterable[Claim] = (), kept: Iterable[str] = ()) -> list[str]:
        """Names of what may go with these claims: not what other claims are about, and not what is to be kept."""
        mine = {c.name for c in claims}
        others = {n for c in self.claims if c.name not in mine and not self.target.is_local for n in c.numbers}
        datasets = [n for n in self.datasets if _number(n) not in others]
        found = (*self.versions.dropped, *datasets, *self.versions.unfinished, *self.files)
        return [n for n in found if n not in set(kept)]

    def remove(self, names: Iterable[str]) -> list[str]:
        """Remove some of its leftovers, and return the names of what is gone: all but what a reader opens meanwhile.

        Of an earlier version the root document goes first: what has one is whole. That of the last one which was
        replaced goes last: it says whose datasets are.
        """
        names = list(names)
        held = self._remove_versions([n for n in names if n in self.versions.dropped])
        spared = {*held, *(d for n in held for d in self.versions.dropped[n].names)}
        names = [n for n in names if n not in spared]
        for name in names:
            if name in self.datasets:
                (self.target / name).remove(last=METADATA)
            elif name not in self.versions.dropped:
                self.target.unlink(name)
            logger.info("removed %s/%s", self.target.url, name)
        if self.target.is_local:
            with contextlib.suppress(OSError):  # it is not there, or others are in it
                os.rmdir(f"{self.target.path}/{VERSIONS}")
        return names

    def _remove_versions(self, names: list[str]) -> set[str]:
        """Remove root documents of versions; returns those that a reader holds by now."""
        if not self.target.is_local:
            self.target.remove_files(names)
            return set()
        held = {n for n in names if not unlink_unheld(f"{self.target.path}/{n}")}
        if names:
            sync_path(f"{self.target.path}/{VERSIONS}")  # before any of their datasets goes
        return held


def _number(name: str) -> int:
    return int(name.rsplit("_", 1)[1])


def contents_of(target: Folder, keep_last: int | None = None) -> FolderContents:
    """Tell apart what is in a collection's folder. ``keep_last``: see :func:`annbatch_dask.etl.roots.kept_versions`."""
    version, names = target.version(METADATA), target.names()
    root = RootDocument.of(target.find(METADATA))
    claims = find_claims(target, names)
    replaced = {n: target.find(n) for n in names if target.is_local and GENERATION_NAME.fullmatch(n)}
    generations = {n: RootDocument.of(document) for n, document in replaced.items()}
    held = {
        n: is_held(f"{target.path}/{n}")
        for n, found in generations.items()
        if found.is_collection or _is_plain_group(replaced[n])
    }
    versions = kept_versions(target, names, root, keep_last)
    roots = [root, *generations.values(), *versions.documents]
    plans = {p for r in roots for p in r.plans} | {w.plan for c in claims for w in c.works}
    ids = {i for r in roots for i in r.ids}
    known = {n for r in roots for n in r.names | r.inherited}
    kept = versions.datasets.union(root.names, *(generations[n].names or root.inherited for n, h in held.items() if h))
    datasets, files, strangers, named = [], [], [*versions.strangers], set(root.names)
    for name in names:
        if name in (METADATA, VERSIONS) or is_of_system(name) or name in held and held[name] or name in kept:
            continue
        if DATASET_NAME.fullmatch(name) or ATTEMPT_NAME.fullmatch(name):
            document = (target / name).find(METADATA)
            if is_dataset_of(document, plans, ids) or (name in known and _is_adata(document)):
                added = added_files(target, name, document)
                strangers += added
                datasets += [] if added else [name]
            elif document is None and (root.is_collection or claims) and is_blank(target / name):
                datasets.append(name)  # its writer died before it said whose it is, or who removed it after
            elif root.is_collection and not root.has_manifest and not root.names and _is_adata(document):
                named.add(name)  # of a collection of annbatch's, whose root names none
            else:
                strangers.append(name)
        elif link := _linked(target, name):
            files += [] if link in kept else [name]
        elif name in held or (match := UNFINISHED.fullmatch(name)) and _is_our_file(match["name"]):
            files.append(name)
        elif name in {c.name for c in claims} or (CLAIM_NAME.fullmatch(name) and target.find(name) is None):
            continue  # a store's listing may name a claim that was given up
        else:
            strangers.append(name)
    return FolderContents(
        target=target,
        version=version,
        root=root,
        named=frozenset(named),
        versions=versions,
        datasets=tuple(datasets),
        files=tuple(files),
        claims=tuple(claims),
        inherited=tuple(sorted(root.inherited.intersection(names))),
        last=max([root.last, *(_number(n) for n in named if DATASET_NAME.fullmatch(n))]),
        strangers=(*strangers, *sorted(n for n in root.names if not DATASET_NAME.fullmatch(n))),
        locks_work=target.is_local and None not in held.values() and versions.locks_work,
    )


def check_new(folder: Folder) -> None:
    """Refuse a place without a collection where something else is than what builds of one have left.

    Raises
    ------
    CollectionError
        With the first names.
    """
    if strangers := contents_of(absolute(folder)).strangers:
        msg = f"{folder.url} exists and is not a collection: it holds {list(strangers[:3])}; give another path"
        raise CollectionError(msg)


def _is_plain_group(document: bytes | None) -> bool:
    """True if a root document is that of an empty group, which ``zarr.open(path, mode="w")`` makes."""
    try:
        return json.loads(document or b"{}").get("node_type") == "group" and not attributes_of(document)
    except (ValueError, AttributeError):
        return False


def link_name(dataset: str) -> str:
    """A second name of a dataset: what annbatch's first releases called it."""
    return f"{dataset}.zarr"


def _linked(target: Folder, name: str) -> str:
    """The dataset that a name of this kind links to; empty where it is something else."""
    dataset = name.removesuffix(".zarr")
    path = Path(target.path, name)
    is_link = target.is_local and name == link_name(dataset) and DATASET_NAME.fullmatch(dataset) and path.is_symlink()
    return dataset if is_link and str(path.readlink()) == dataset else ""


def added_files(target: Folder, name: str, document: bytes | None = None) -> list[str]:
    """Files in a finished dataset that are not those it lists as its own, by path within the collection.

    Of those with a listed name it is groups and arrays whose document has another size: somebody wrote them anew.
    """
    folder = target / name
    listed = attributes_of(folder.find(METADATA) if document is None else document).get(FILES)
    if not isinstance(listed, dict):  # unfinished, or of an earlier release
        return []
    sizes = folder.sizes()
    edited = {n for n in sizes.keys() & listed.keys() if is_metadata(n) and sizes[n] != listed[n][0]}
    found = (sizes.keys() - listed.keys() - {METADATA}) | edited
    return [f"{name}/{file}" for file in sorted(found) if not is_of_system(file)]


def is_blank(folder: Folder) -> bool:
    """True if the file is empty or the beginning of our own document."""
    return all(n == f"{METADATA}~" or (m := UNFINISHED.fullmatch(n)) and m["name"] == OWNER for n in folder.names())


def _is_adata(document: bytes | None) -> bool:
    return attributes_of(document).get("encoding-type") == "anndata"


def _is_our_file(name: str) -> bool:
    return name == METADATA or CLAIM_NAME.fullmatch(name) is not None


def remove_dataset(target: Folder, name: str, plans: Iterable[str], ids: Iterable[str] = ()) -> None:
    """Remove a dataset if its document says that it is of one of these plans or collections.

    Raises
    ------
    CollectionError
        If there is a folder of that name and it is somebody else's.
    """
    folder = target / name
    if is_dataset_of(folder.find(METADATA), plans, ids):
        folder.remove(last=METADATA)
    elif folder.names():
        msg = f"{folder.url} appeared while the collection was built, and is not this build's; move it elsewhere"
        raise CollectionError(msg)
