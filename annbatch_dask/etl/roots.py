"""Root documents in a collection's folder: what they name must stay, that of the collection and those of versions."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from annbatch_dask.errors import IntegrityError
from annbatch_dask.etl.edits import is_of_system
from annbatch_dask.manifest import ANNBATCH_ENCODING, MANIFEST_KEY, dataset_names
from annbatch_dask.storage.folder import UNFINISHED, Folder
from annbatch_dask.storage.history import VERSIONS, attributes_in, number_in
from annbatch_dask.storage.lock import is_held

__all__ = ["KeptVersions", "RootDocument", "attributes_of", "kept_versions"]


def attributes_of(document: bytes | None) -> dict[str, Any]:
    """Attributes of a group's document; none where it is damaged or missing."""
    try:
        found = attributes_in(document)
    except IntegrityError:
        return {}
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class RootDocument:
    """Content of a root document.

    Attributes
    ----------
    names
        Names of its datasets.
    plans, ids
        By which its datasets know themselves.
    inherited
        Datasets that an earlier collection at this place had, whose documents need not say so.
    last
        Highest number that a dataset ever had.
    number
        Number of this version of the collection.
    keep, kept
        How many versions its build was told to keep, and the numbers of the earlier ones.
    """

    names: frozenset[str] = frozenset()
    plans: frozenset[str] = frozenset()
    ids: frozenset[str] = frozenset()
    inherited: frozenset[str] = frozenset()
    last: int = -1
    number: int = 0
    keep: int = 1
    kept: tuple[int, ...] = ()
    has_manifest: bool = False
    is_collection: bool = False

    @classmethod
    def of(cls, document: bytes | None) -> RootDocument:
        """Read a file; that of another kind says nothing."""
        attributes = attributes_of(document)
        if document is None or ANNBATCH_ENCODING["encoding-type"] != attributes.get("encoding-type"):
            return cls()
        manifest = attributes.get(MANIFEST_KEY) or {}
        return cls(
            names=frozenset(dataset_names(document)),
            plans=frozenset(b["plan"] for b in manifest.get("builds", ())),
            ids=frozenset(filter(None, [manifest.get("id")])),
            inherited=frozenset(manifest.get("inherited", ())),
            last=manifest.get("last_dataset", -1),
            number=manifest.get("earlier", 0) + len(manifest.get("builds", ())),
            keep=manifest.get("keep", 1),
            kept=tuple(manifest.get("kept", ())),
            has_manifest=bool(manifest),
            is_collection=True,
        )


@dataclass(frozen=True)
class KeptVersions:
    """Root documents of earlier versions in a collection's folder, by their names in it.

    Attributes
    ----------
    kept
        Those that are kept, and those that readers hold.
    dropped
        Those that are kept no more, or that interrupted builds left.
    unfinished
        Names of those that were not written to their end.
    strangers
        All other names in the folder of versions.
    locks_work
        False where it cannot be known whether readers hold any.
    """

    kept: Mapping[str, RootDocument] = field(default_factory=dict)
    dropped: Mapping[str, RootDocument] = field(default_factory=dict)
    unfinished: tuple[str, ...] = ()
    strangers: tuple[str, ...] = ()
    locks_work: bool = True

    @property
    def documents(self) -> tuple[RootDocument, ...]:
        """All of them."""
        return (*self.kept.values(), *self.dropped.values())

    @property
    def datasets(self) -> frozenset[str]:
        """Datasets that must stay for them."""
        return frozenset().union(*(document.names for document in self.kept.values()))


def kept_versions(target: Folder, names: Iterable[str], root: RootDocument, keep_last: int | None) -> KeptVersions:
    """Tell apart what is in the folder of versions.

    Parameters
    ----------
    names
        Names in the collection's folder.
    root
        The root document, which says which versions are kept.
    keep_last
        Of these only so many, the current one with them; None is all.
    """
    if VERSIONS not in names:
        return KeptVersions()
    folder = target / VERSIONS
    if not root.has_manifest or target.is_local and not os.path.isdir(folder.path):
        return KeptVersions(strangers=(VERSIONS,))
    wanted = set(root.kept if keep_last is None else root.kept[max(len(root.kept) - keep_last + 1, 0) :])
    kept: dict[str, RootDocument] = {}
    dropped: dict[str, RootDocument] = {}
    unfinished, strangers, held = [], [], []
    for file in filter(lambda n: not is_of_system(n), folder.names()):
        name, number = f"{VERSIONS}/{file}", number_in(file)
        document = RootDocument() if number is None else RootDocument.of(folder.find(file))
        if document.has_manifest and document.number == number:
            held.append(number not in wanted and target.is_local and is_held(f"{folder.path}/{file}"))
            (kept if number in wanted or held[-1] else dropped)[name] = document
        elif (match := UNFINISHED.fullmatch(file)) and number_in(match["name"]) is not None:
            unfinished.append(name)
        else:
            strangers.append(name)
    return KeptVersions(kept, dropped, tuple(unfinished), tuple(strangers), None not in held)
