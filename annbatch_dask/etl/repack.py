"""repack: the same cells in the same order, in the other layout, as a collection at another place."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any, get_args

import google_crc32c
import numpy as np
import zarr
from zarr.core.buffer import default_buffer_prototype

from annbatch_dask.chunks.reader import RangeReader
from annbatch_dask.errors import CollectionError, IntegrityError, LayoutError
from annbatch_dask.etl.commit import record_of, write_root
from annbatch_dask.etl.edits import refuse_edited
from annbatch_dask.etl.files import recorded_files
from annbatch_dask.etl.genes import copy_gene_maps
from annbatch_dask.etl.inputs import known_inputs
from annbatch_dask.etl.ours import dataset_attributes, is_dataset_of, write_first_document
from annbatch_dask.etl.request import MatrixLayout
from annbatch_dask.etl.roots import attributes_of
from annbatch_dask.etl.verify import check_dataset
from annbatch_dask.etl.write import packing_of, publish_dataset
from annbatch_dask.manifest import MANIFEST_KEY, Manifest
from annbatch_dask.storage.checksums import FileSums, checksum_of
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.lock import exclusive
from annbatch_dask.storage.metadata import FILES, METADATA, group_document, is_metadata, nodes_of
from annbatch_dask.storage.root import Root, open_group
from annbatch_dask.storage.shards import ShardWriter

__all__ = ["repack"]

logger = logging.getLogger(__name__)

_PIECE_NBYTES = 2**24
_PARTS = ("data", "indices")

Sums = dict[str, tuple[int, str]]


def repack(root: Root, target: Folder, layout: str) -> None:
    """Write a collection again in the other layout; what an interrupted call has written is kept.

    Each dataset is read back, and its rows have the fingerprint they had, before the collection is there. The original
    is held meanwhile: one that builds replace is written as it was opened.

    Parameters
    ----------
    target
        Where nothing is yet, but perhaps what such a call left, or wrote to the end.

    Raises
    ------
    LayoutError
        If there is no such layout.
    CollectionError
        If the collection is empty or has that layout, if annbatch wrote some of it, or if something else is there.
    IntegrityError
        If what was read or written is not what the manifest says.
    """
    if layout not in get_args(MatrixLayout):
        msg = f"layout is {layout!r}; give 'open' or 'packed'"
        raise LayoutError(msg)
    manifest = root.manifest
    if manifest is None or manifest.layout == layout:
        why = "has no manifest" if manifest is None else f"has layout {layout!r} already"
        msg = f"{root.path} {why}; there is nothing to repack"
        raise CollectionError(msg)
    with closing(root.lease()), root.explained(), exclusive(target):
        if _is_done(target, manifest, layout):
            logger.info("%s is %s at %s already", root.path, layout, target.url)
        else:
            _repack(root.target, manifest, target, layout, root.other_attributes)


def _is_done(target: Folder, manifest: Manifest, layout: str) -> bool:
    """True if an earlier call has published the same cells, in the same order, in this layout."""
    if target.version(METADATA) is None:
        return False
    there = Root(open_group(target, "r"), target).manifest
    return there is not None and (there.identity, there.layout) == (manifest.identity, layout)


def _repack(source: Folder, manifest: Manifest, target: Folder, layout: str, attributes: dict[str, Any]) -> None:
    if any(d.metadata is None for d in manifest.datasets):
        msg = f"{source.url} has datasets without checksums, of annbatch or of an earlier release; build it anew"
        raise CollectionError(msg)
    refuse_edited(source, manifest.datasets, "build a new collection with these datasets as inputs, in that layout")
    _check_target(target, manifest)
    records, inputs = [], known_inputs(source, manifest)  # which a build that replaces the original forgets
    for record in manifest.datasets:
        files = recorded_files(source, record)
        about = _about((source / record.name).read(METADATA), record.fingerprint, layout)
        written = _finished(target / record.name, about)
        if written is None:
            written = _write(source / record.name, target / record.name, files, about, manifest)
        now = record_of(record.name, written, n_obs=record.n_obs, nnz=record.nnz, fingerprint=record.fingerprint)
        if problems := check_dataset(target, now, manifest.n_vars).problems:
            (target / record.name).remove(last=METADATA)
            msg = f"{target.url}/{problems[0]}; it was removed: check the disk, and call again"
            raise IntegrityError(msg)
        logger.info("%s is %s, %d bytes", now.name, layout, now.n_bytes)
        records.append(now)
    last = replace(manifest.builds[-1], mode="repack", sources=(), genes={}, request="", layout=layout)
    last = replace(last, naming=None, duplicates=None)
    repacked = replace(manifest, datasets=tuple(records), builds=(*manifest.builds, last), keep=1, kept=())
    copy_gene_maps(source, target, manifest)
    write_root(target, repacked, inputs, attributes, version=None)


def _check_target(target: Folder, manifest: Manifest) -> None:
    """Refuse a place where something else is than what a repack of this collection left there.

    Datasets that it does not have any more are removed: of a repack that was interrupted before a build replaced them.
    """
    names, stale, there = {d.name for d in manifest.datasets}, [], target.names()
    if METADATA in there:
        msg = f"{target.url} holds a collection already, which is no repack of this one as it is now; give another path"
        raise CollectionError(msg)
    for name in there:
        document = (target / name).find(METADATA)
        is_ours = is_dataset_of(document, (), [manifest.id])
        if is_ours and name not in names and "repacked" in attributes_of(document)[MANIFEST_KEY]:
            stale.append(name)
        elif not is_ours or name not in names:
            msg = f"{target.url} exists, and {name} in it is not of a repack of this collection; give another path"
            raise CollectionError(msg)
    for name in stale:
        logger.info("%s/%s is of an earlier state of the collection, and is removed", target.url, name)
        (target / name).remove(last=METADATA)


def _about(document: bytes, fingerprint: str, layout: str) -> dict[str, Any]:
    """Attributes of a copied dataset: those of the original, and the rows and layout of the copy."""
    whose = json.loads(document)["attributes"][MANIFEST_KEY]
    about = dataset_attributes(whose["plan"], whose["collection"])
    about[MANIFEST_KEY]["repacked"] = [fingerprint, layout]
    return about


def _finished(folder: Folder, about: dict[str, Any]) -> Sums | None:
    """The files of a dataset that is there, whole, and says this of itself; else it is removed."""
    document = folder.find(METADATA)
    if document is None:
        return None
    found = json.loads(document)["attributes"]
    if FILES not in found or found[MANIFEST_KEY] != about[MANIFEST_KEY]:
        folder.remove(last=METADATA)
        return None
    return {name: (size, crc) for name, (size, crc) in found[FILES].items()} | {METADATA: checksum_of(document)}


def _write(source: Folder, folder: Folder, files: FileSums, about: dict[str, Any], manifest: Manifest) -> Sums:
    """Write a dataset: matrices packed or not, all else as it is."""
    write_first_document(folder, about)
    small = {name: _checked(source, name, files) for name in files if is_metadata(name)}
    small[METADATA] = group_document(nodes_of({METADATA: small[METADATA]})[""]["attributes"] | about, None)
    store, sums, left = zarr.storage.MemoryStore(), Sums(), dict(files)
    for key in (f"{name}/{part}" for name, m in manifest.matrices.items() if m.kind == "csr" for part in _PARTS):
        array: Any = zarr.open_array(source.zarr_store(read_only=True), path=key, mode="r")
        packing = packing_of(key.rpartition("/")[2], array.dtype)
        if packing is None:
            continue
        writer = ShardWriter(
            folder,
            store,
            key,
            shape=array.shape,
            dtype=array.dtype,
            chunk_rows=array.chunks[0],
            shard_rows=(array.shards or array.chunks)[0],
            compressor=_compressor_beside(small, key),
            attributes={},
            packing=packing if about[MANIFEST_KEY]["repacked"][1] == "packed" else None,
        )
        _copy_rows(array, writer)
        sums |= writer.files
        small[f"{key}/{METADATA}"] = _document(store, key)
        left = {name: found for name, found in left.items() if not name.startswith(f"{key}/c/")}
    for name in sorted(left.keys() - small.keys()):
        sums[name] = _copy(source, folder, name, files)
    written = publish_dataset(folder, small, sums)
    folder.sync()
    return written


def _copy_rows(array: Any, writer: ShardWriter) -> None:
    reader, chunk = RangeReader(array), array.chunks[0]
    step = max(1, _PIECE_NBYTES // (chunk * array.dtype.itemsize)) * chunk
    try:
        with writer:
            for start in range(0, array.shape[0], step):
                stop = min(start + step, array.shape[0])
                rows = np.empty(stop - start, reader.dtype)
                reader.read(np.array([[start, stop]]), rows)
                writer.append(rows)
    finally:
        reader.close()


def _document(store: zarr.storage.MemoryStore, key: str) -> bytes:
    """Metadata of a new array."""
    found: Any = zarr.open_array(store, path=key, mode="r").metadata
    content: bytes = found.to_buffer_dict(default_buffer_prototype())[METADATA].to_bytes()
    return content


def _compressor_beside(documents: Mapping[str, bytes], key: str) -> str | None:
    """The compressor that the build of an array was given: the row pointers beside it have it in both layouts."""
    described = json.loads(documents[f"{key.rpartition('/')[0]}/indptr/{METADATA}"])
    codecs = described["codecs"][0]["configuration"]["codecs"]
    found = [codec for codec in codecs if codec["name"] not in ("bytes", "crc32c")]
    return json.dumps(found[0], sort_keys=True) if found else None


def _checked(source: Folder, name: str, files: FileSums) -> bytes:
    content = source.read(name)
    _compare(source, name, files, checksum_of(content))
    return content


def _copy(source: Folder, folder: Folder, name: str, files: FileSums) -> tuple[int, str]:
    """Copy a file, piece by piece."""
    file, size, crc = source.ranges(name), 0, 0
    buffer = memoryview(np.empty(_PIECE_NBYTES, np.uint8))
    try:
        with folder.create(name, durable=False) as out:
            while n := file.read_into(size, buffer):
                out.write(buffer[:n])
                crc, size = google_crc32c.extend(crc, bytes(buffer[:n])), size + n
    finally:
        file.close()
    _compare(source, name, files, (size, f"{crc:08x}"))
    return size, f"{crc:08x}"


def _compare(source: Folder, name: str, files: FileSums, found: tuple[int, str]) -> None:
    if found != tuple(files[name]):
        (size, crc), (wrote, written) = found, files[name]
        here = f"{source.url}/{name}"
        msg = f"{here} has {size:,} bytes, crc32c {crc}, and was written with {wrote:,}, {written}; restore it"
        raise IntegrityError(msg)
