"""What of a dataset is not as it was written: damage, or its owner's edits.

Whoever writes an element anew, as ``anndata.io.write_elem`` does, writes the documents of its groups and arrays anew,
without the seal that a build puts into each (:data:`annbatch_dask.storage.metadata.SEAL`). So an edit is what a
document says that is whole and not as it was written; the files below it are the owner's. A file that differs below a
document that is as it was written is damaged, as is a document that is cut short, or has its size and another content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from annbatch_dask.errors import CollectionError, IntegrityError
from annbatch_dask.etl.files import Recorded, recorded, recorded_by_itself
from annbatch_dask.formatting import first_few
from annbatch_dask.manifest import MANIFEST_KEY, DatasetRecord, Manifest
from annbatch_dask.storage.checksums import checksum_of, checksums
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.metadata import METADATA, SEAL, is_metadata
from annbatch_dask.storage.versions import list_files

__all__ = ["Look", "Problem", "is_of_system", "look_at_files", "look_at_listed", "recorded_datasets", "refuse_edited"]

State = Literal["intact", "damaged", "replaced", "changed", "added", "removed"]
_OWNED = ("replaced", "added", "changed")
"""States of a group or array whose files are not the build's any more."""
_WORDS = {
    "replaced": "was written anew by somebody since the build",
    "changed": "its attributes or shape were changed by somebody since the build",
    "added": "was added by somebody since the build",
    "removed": "was removed by somebody since the build",
}
_CONTAINERS = ("anndata", "dict", "raw")
"""What may lose a member and be whole."""
_NEEDED = ("X", "obs", "var")
_SYSTEM = re.compile(r"\.nfs[0-9a-f]+|\.DS_Store|\._.+")
"""What NFS keeps of a removed file that is open, and a Mac of a folder that somebody looked at, or copied."""
_N_THREADS = 16
_N_ROTTEN = 8


@dataclass(frozen=True)
class Problem:
    """Something that is not as it was written: ``where`` is a path within the collection, or a source's path.

    ``is_edit``: somebody meant it to be so, see :mod:`annbatch_dask.etl.edits`. ``is_not_given``: a source that is none
    of the inputs to compare with.
    """

    where: str
    what: str
    is_edit: bool = False
    is_not_given: bool = False

    def __str__(self) -> str:
        """One line."""
        return f"{self.where}: {self.what}"


@dataclass(frozen=True)
class Look:
    """What was found in a dataset."""

    damage: tuple[Problem, ...] = ()
    edits: tuple[Problem, ...] = ()

    @property
    def problems(self) -> list[Problem]:
        """All of them."""
        return [*self.damage, *self.edits]

    def edited(self, name: str) -> frozenset[str]:
        """Elements of the dataset that were edited; "" stands for all of it."""
        return frozenset(p.where.removeprefix(name).strip("/") for p in self.edits)


def look_at_files(target: Folder, record: DatasetRecord, reads: Callable[[str], bool]) -> Look:
    """Compare a dataset's files with its record: the sizes of all, and checksums of those that ``reads`` names."""
    folder = target / record.name
    try:
        was = recorded(target, record)
    except IntegrityError as e:
        where, _, what = str(e).partition(": ")
        return Look(damage=(Problem(where, what),))
    if not was.files:  # annbatch wrote it, or somebody all of it anew
        return Look(edits=(Problem(record.name, _WORDS["replaced"], is_edit=True),) if was.is_edited else ())
    return _look(folder, record.name, was, reads)


def look_at_listed(folder: Folder) -> Look:
    """Compare the sizes of a dataset's files with the list in its own document; where that has none, find nothing."""
    was = recorded_by_itself(folder.find(METADATA))
    return _look(folder, "", was, lambda _: False) if was.files else Look()


def _look(folder: Folder, name: str, was: Recorded, reads: Callable[[str], bool]) -> Look:
    listing = list_files(folder)
    listed = folder.sizes() if listing is None else listing.sizes
    listed = listed or folder.sizes_of(was.files)  # a web server need not list what it has
    sizes = {name: size for name, size in listed.items() if not is_of_system(name)}
    alike = {n for n, (size, _) in was.files.items() if sizes.get(n) == size}
    found = checksums(folder, {n: sizes[n] for n in alike if reads(n) and n != METADATA})
    differing = {n for n in alike if found.get(n, was.files[n][1]) != was.files[n][1]}
    strange = (differing | sizes.keys() | was.files.keys()) - (alike - differing)
    if not was.is_edited and not strange:
        return Look()
    return _Sorting(folder, name, was, sizes, found).sort(strange)


def refuse_edited(target: Folder, records: Sequence[DatasetRecord], remedy: str) -> None:
    """Refuse to write datasets anew that somebody edited: what is written anew is what builds have written.

    Raises
    ------
    CollectionError
        With the edited elements.
    """
    with ThreadPoolExecutor(_N_THREADS) as pool:
        looks = list(pool.map(lambda record: look_at_files(target, record, is_metadata), records))
    if edits := [p for look in looks for p in look.edits]:
        shown = first_few(map(str, edits), 3, "; ")
        msg = f"{target.url} was edited, which writing its datasets anew would lose: {shown}; {remedy}"
        raise CollectionError(msg)


def recorded_datasets(document: bytes | None) -> tuple[DatasetRecord, ...]:
    """List the datasets that a root document records; none where it is damaged, or annbatch wrote it."""
    try:
        return Manifest.from_json(json.loads(document or b"")["attributes"][MANIFEST_KEY]).datasets
    except (TypeError, ValueError, KeyError, CollectionError):
        return ()


def is_of_system(file: str) -> bool:
    """True of a file that a system put there for itself."""
    return _SYSTEM.fullmatch(file.rpartition("/")[2]) is not None


@dataclass(frozen=True)
class _Sorting:
    """Files of a dataset that are not as they were written, sorted into damage and edits."""

    folder: Folder
    name: str
    was: Recorded
    sizes: Mapping[str, int]
    crcs: Mapping[str, str]
    states: dict[str, State] = field(default_factory=dict)

    def sort(self, strange: Iterable[str]) -> Look:
        damage, edits = [], {"": "changed"} if self.was.is_edited else {}
        for file in [n for n in self.was.files if n in set(strange)] + sorted(set(strange) - self.was.files.keys()):
            if (node := self._edited(file)) is None:
                damage.append(Problem(f"{self.name}/{file}".lstrip("/"), self._what(file)))
            else:
                edits[node] = self._state(node)
        where = {_element(node): _WORDS[state] for node, state in sorted(edits.items(), reverse=True)}
        whole = {e for e in where if edits.get(e) in ("replaced", "added", "removed")}
        shown = (e for e in sorted(where) if not any(e.startswith(f"{w}/") for w in whole))
        return Look(
            tuple(damage),
            tuple(Problem(f"{self.name}/{e}".strip("/"), where[e], is_edit=True) for e in shown),
        )

    @cached_property
    def _nodes(self) -> frozenset[str]:
        """Groups and arrays that are there, or were."""
        return frozenset(_node_of(n) for n in (*self.sizes, *self.was.files) if is_metadata(n))

    def _edited(self, file: str) -> str | None:
        """The group or array whose edit explains a file; None where nothing does."""
        node = _node_of(file)
        while node not in self._nodes:
            node = node.rpartition("/")[0]
        if node and self._state(node) in _OWNED:
            return node
        return self._removed(node) if file not in self.sizes else None

    def _removed(self, node: str) -> str | None:
        """The group or array with which a node that is gone went."""
        if self._state(node) != "removed":
            return None
        above = node.rpartition("/")[0]
        if above and self._state(above) == "removed":
            return self._removed(above)
        if self._state(above) in _OWNED and above:
            return above
        kind = self.was.nodes.get(above, {}).get("attributes", {}).get("encoding-type") if above else "anndata"
        n_gone = sum(n.startswith(f"{node}/") for n in self.was.files)
        return node if n_gone > 1 and kind in _CONTAINERS and node not in _NEEDED else None  # one file may get lost

    def _state(self, node: str) -> State:
        if node not in self.states:
            self.states[node] = self._find_state(node)
        return self.states[node]

    def _find_state(self, node: str) -> State:
        name = f"{node}/{METADATA}".lstrip("/")
        if not node:
            return "changed" if self.was.is_edited else "intact"
        if name not in self.sizes:
            return "damaged" if any(n.startswith(f"{node}/") for n in self.sizes) else "removed"
        content = self.folder.read(name)
        if name in self.was.files and checksum_of(content) == self.was.files[name]:
            return "intact"
        if (found := _parsed(content)) is None:
            return "damaged"
        if name not in self.was.files:
            return "added"
        was, has_size = self.was.nodes.get(node, {}), len(content) == self.was.files[name][0]
        was_sealed = SEAL in was.get("attributes", {})
        if was_sealed and SEAL not in found.get("attributes", {}) and not _is_nearly(content, was):
            return "replaced"
        return "damaged" if has_size else "changed"

    def _what(self, file: str) -> str:
        if file not in self.was.files:
            return "was not written by the build; remove it"
        size, crc = self.was.files[file]
        if file not in self.sizes:
            return "is missing"
        if self.sizes[file] != size:
            return f"has {self.sizes[file]:,} bytes and was written with {size:,}"
        return f"has crc32c {self.crcs[file]} and was written with {crc}"


def _node_of(file: str) -> str:
    return file.rpartition("/")[0]


def _parsed(content: bytes) -> dict[str, Any] | None:
    """A group's or array's document; None where it is none."""
    try:
        found = json.loads(content)
    except ValueError:
        return None
    is_node = isinstance(found, dict) and found.get("node_type") in ("group", "array")
    return found if is_node and isinstance(found.get("attributes", {}), dict) else None


def _is_nearly(content: bytes, was: dict[str, Any]) -> bool:
    """Tell a document of which a few bytes rotted from one that was written anew, which lacks the seal."""
    whole = json.dumps(was, indent=2).encode()
    return len(whole) == len(content) and sum(a != b for a, b in zip(whole, content, strict=True)) <= _N_ROTTEN


def _element(node: str) -> str:
    """The element of an AnnData that a group or array is part of."""
    parts = node.split("/")
    return parts[0] if parts[0] == "X" else "/".join(parts[:2])
