"""Whether a collection can be read: zarr gives zeros for files that are missing, and what is short."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import zarr

from annbatch_dask.errors import CollectionError, IntegrityError
from annbatch_dask.etl.edits import Look, Problem, look_at_files, look_at_listed
from annbatch_dask.manifest import DatasetRecord, Manifest
from annbatch_dask.sources.matrices import n_rows_of
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.frames import n_rows
from annbatch_dask.storage.metadata import METADATA, metadata_below, nodes_below, nodes_checksum

__all__ = ["check_dataset_there", "check_readable", "check_there"]

_N_THREADS = 16


def check_readable(
    target: Folder, manifest: Manifest, reads: Callable[[str], bool] | None = None, document: str = METADATA
) -> dict[str, frozenset[str]]:
    """Refuse a collection of which a file is missing or short, or of which damage would go unnoticed by a loader.

    That is all but the shards of matrices, each chunk of which is checked when it is read.

    Parameters
    ----------
    target, manifest
        The collection.
    reads
        Which files, by path within a dataset, are read for their checksums; None for all but shards. Of the others
        the sizes are looked at.
    document
        Name of the collection's root document.

    Returns
    -------
    Elements that somebody edited since the build, by dataset: of those datasets no copy of metadata is true.

    Raises
    ------
    IntegrityError
        With the first of such files.
    CollectionError
        If a dataset was edited, and has another number of rows.
    """
    edited = {}
    for record, look in _looks(target, manifest.datasets, reads or (lambda name: not manifest.is_shard(name))):
        if look.damage:
            raise _unreadable(target, look.damage[0])
        if look.edits:
            edited[record.name] = look.edited(record.name)
            _check_count(target, record)
    _check_copies(target, manifest, edited, document)
    return edited


def _check_copies(target: Folder, manifest: Manifest, edited: Collection[str], document: str) -> None:
    """Refuse metadata beside the manifest that are neither the build's nor, of what was edited, zarr's of now."""
    names = {d.name for d in manifest.datasets}  # others may have been added since
    nodes = {path: node for path, node in nodes_below(target, document).items() if path.split("/")[0] in names}
    if not manifest.metadata or not nodes or manifest.metadata == (found := nodes_checksum(nodes)):
        return
    now = {path: node for name in names if edited for path, node in metadata_below(target / name, name).items()}
    if not edited or any(now.get(p) != node for p, node in nodes.items() if p.split("/")[0] not in edited):
        raise _unreadable(target, Problem(document, f"its metadata have crc32c {found} and had {manifest.metadata}"))


def _check_count(target: Folder, record: DatasetRecord) -> None:
    group = zarr.open_group((target / record.name).zarr_store(read_only=True), mode="r", use_consolidated=False)
    for name, found in (("obs", n_rows(group["obs"])), ("X", n_rows_of(group["X"]))):
        if found != record.n_obs:
            msg = (
                f"{target.url}/{record.name} was edited: its {name} has {found:,} rows, and had {record.n_obs:,} when "
                "it was built; an edit keeps rows and their order: write as many, or build a new collection of it"
            )
            raise CollectionError(msg)


def _unreadable(target: Folder, problem: Problem) -> IntegrityError:
    remedy = "verify() names all that is damaged; restore it, or write the whole element anew if that was an edit"
    return IntegrityError(f"{target.url} cannot be read: {problem}; {remedy}")


def check_there(target: Folder, records: Sequence[DatasetRecord], element: str = "") -> None:
    """Refuse datasets of which a file is missing or short, of all elements or of one. No content is read.

    Raises
    ------
    IntegrityError
        With the first of such files.
    """
    for record, look in _looks(target, records, lambda _: False):
        parts = (f"{record.name}/{element}".rstrip("/") + "/", f"{record.name}/{METADATA}")
        if damage := [p for p in look.damage if p.where.startswith(parts)]:
            raise _unreadable(target, damage[0])


def check_dataset_there(folder: Folder) -> None:
    """Do the same with a dataset that is an input, by the list of files in its own document.

    Raises
    ------
    IntegrityError
        With the first of such files.
    """
    if damage := look_at_listed(folder).damage:
        raise _unreadable(folder, damage[0])


def _looks(
    target: Folder, records: Sequence[DatasetRecord], reads: Callable[[str], bool]
) -> Iterator[tuple[DatasetRecord, Look]]:
    """What is found in each dataset: many are looked at concurrently."""
    pool = ThreadPoolExecutor(_N_THREADS, thread_name_prefix="check")
    try:
        yield from zip(records, pool.map(lambda record: look_at_files(target, record, reads), records), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)
