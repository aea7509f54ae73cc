"""The versions of a collection: what each commit added, and which can still be opened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from annbatch_dask.etl.log import read_log
from annbatch_dask.formatting import plural
from annbatch_dask.manifest import BuildRecord, Manifest
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.history import find_versions

__all__ = ["CollectionVersion", "versions_of"]


@dataclass(frozen=True)
class CollectionVersion:
    """A version: the collection as a commit left it.

    Attributes
    ----------
    number
        Its number, for ``DatasetCollection(path, version=number)``.
    mode, seed, sources
        Its build: ``"create"``, ``"extend"``, ``"append"``, ``"reshuffle"`` or ``"repack"``; the seed; the inputs it
        added.
    n_obs, n_datasets
        Cells and datasets of the collection; None where it is not kept.
    built
        When the build began, ISO 8601 in UTC, by its log; None where that is not there.
    is_kept
        Whether it can be opened.
    is_current
        Whether it is the collection of now.

    Examples
    --------
    >>> [(v.number, v.mode, v.seed, v.is_kept) for v in collection.versions]
    [(1, 'create', 0, True)]
    """

    number: int
    mode: str
    seed: int
    sources: tuple[str, ...]
    n_obs: int | None
    n_datasets: int | None
    built: str | None
    is_kept: bool
    is_current: bool

    def __str__(self) -> str:
        """One line."""
        size = "not kept"
        if self.n_obs is not None and self.n_datasets is not None:
            size = f"{plural(self.n_obs, 'cell')} in {plural(self.n_datasets, 'dataset')}"
        parts = [size, f"{self.mode} of {plural(len(self.sources), 'source')}, seed {self.seed}"]
        parts += [f"built {self.built}"] if self.built is not None else []
        parts += ["current"] if self.is_current else []
        return f"version {self.number}: {', '.join(parts)}"

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values."""
        return asdict(self) | {"sources": list(self.sources)}


def versions_of(folder: Folder | None, current: Manifest) -> list[CollectionVersion]:
    """List the versions that the current one follows, and what is kept of others before those, in their order.

    ``folder``: the collection's; None for one that is at no path.
    """
    there = {current.version: current} if folder is None else find_versions(folder, current)
    builds = dict(pair for manifest in there.values() for pair in _builds_of(manifest))
    return [_version(folder, number, builds[number], there, current) for number in sorted(builds)]


def _builds_of(manifest: Manifest) -> Iterator[tuple[int, BuildRecord]]:
    yield from enumerate(manifest.builds, start=manifest.earlier + 1)


def _version(
    folder: Folder | None, number: int, build: BuildRecord, there: Mapping[int, Manifest], current: Manifest
) -> CollectionVersion:
    manifest = there.get(number)
    log = None if folder is None else read_log(folder, build.plan)
    return CollectionVersion(
        number=number,
        mode=build.mode,
        seed=build.seed,
        sources=build.sources,
        n_obs=None if manifest is None else manifest.n_obs,
        n_datasets=None if manifest is None else len(manifest.datasets),
        built=None if log is None else log.started,
        is_kept=manifest is not None,
        is_current=number == current.version,
    )
