"""Writes a sharded zarr v3 array front to back, one chunk in memory at a time.

zarr's own writer needs a shard's uncompressed bytes at once, so a worker's peak would follow ``shard_size``. This one
encodes chunks in the codec pool and appends them to the shard's file; the result is the format of zarr's sharding codec
(chunks in order, then the index with its crc32c), which zarr, zarrs and annbatch read. Each chunk ends with its own
crc32c, zarr's codec of that name, so that a reader of a few chunks knows that they are what was written; every chunk is
written, so that it knows that none is missing. Chunks are always encoded outside the main thread: there c-blosc would
use its global threads, whose block order varies from run to run.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import google_crc32c
import numcodecs
import numpy as np
import zarr
from numpy.typing import NDArray

from annbatch_dask.errors import LayoutError
from annbatch_dask.manifest import ALL_WRITTEN
from annbatch_dask.storage.filesystems import name_errors
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.objects import is_s3
from annbatch_dask.storage.packed import PackedCodec
from annbatch_dask.storage.threads import MAX_THREADS, map_ordered
from annbatch_dask.storage.uploads import N_BUFFERS, Behind, PartedUpload

if TYPE_CHECKING:
    from zarr.abc.store import Store

__all__ = ["ShardWriter", "compressor_json"]

_WAITING_NBYTES = 2**23
"""Of chunks that are encoded at a time, about; one always is."""
_CODECS = {"blosc": numcodecs.Blosc, "zstd": numcodecs.Zstd, "gzip": numcodecs.GZip}
_SHUFFLES = {"noshuffle": 0, "shuffle": 1, "bitshuffle": 2}


def compressor_json(compressors: Any) -> str | None:
    """A zarr v3 codec, or a sequence of at most one, as the JSON the plan carries; None for no compression.

    Raises
    ------
    LayoutError
        For codecs the shard writer does not know.
    """
    codecs = list(compressors) if isinstance(compressors, list | tuple) else [compressors]
    codecs = [c for c in codecs if c is not None]
    if not codecs:
        return None
    if unknown := [c for c in codecs if not (hasattr(c, "to_dict") or isinstance(c, Mapping) and "name" in c)]:
        msg = f"zarr_compressor is {unknown[0]!r}; give a codec of zarr.codecs, such as BloscCodec(), or () for none"
        raise LayoutError(msg)
    metadata = [c.to_dict() if hasattr(c, "to_dict") else dict(c) for c in codecs]
    if len(codecs) > 1 or metadata[0]["name"] not in _CODECS:
        msg = f"zarr_compressor is {[m['name'] for m in metadata]}; give one of {sorted(_CODECS)}, or () for none"
        raise LayoutError(msg)
    return json.dumps(metadata[0], sort_keys=True, default=str)


def _zarr_codecs(compressor: str | None, dtype: np.dtype) -> list[dict[str, Any]]:
    checksum = {"name": "crc32c"}
    if compressor is None:
        return [checksum]
    metadata = json.loads(compressor)
    if metadata["name"] == "blosc":
        metadata["configuration"] = metadata["configuration"] | {"typesize": dtype.itemsize}
    return [metadata, checksum]


def _numcodec(compressor: str | None) -> numcodecs.abc.Codec | None:
    if compressor is None:
        return None
    metadata = json.loads(compressor)
    config = dict(metadata.get("configuration", {}))
    if metadata["name"] == "blosc":
        config = {
            "cname": config["cname"],
            "clevel": config["clevel"],
            "shuffle": _SHUFFLES[config["shuffle"]],
            "blocksize": config.get("blocksize", 0),
        }
    return _CODECS[metadata["name"]](**config)


class ShardWriter:
    """Appends rows to a new sharded array; a context manager that finishes the last shard.

    Parameters
    ----------
    folder
        Where the shards go; a local one must be there.
    store
        Where the array's metadata go.
    key
        Path of the array within both.
    shape
        Shape of the whole array: rows first.
    dtype
        Dtype of the stored values.
    chunk_rows, shard_rows
        Rows of a chunk and of a shard; the second a multiple of the first.
    compressor
        As :func:`compressor_json` gives it.
    attributes
        The array's attributes.
    packing
        Pack the values, of an integer dtype, by this codec, in the place of the compressor.

    Attributes
    ----------
    files
        Bytes and crc32c of each finished shard, by path within ``folder``.
    """

    def __init__(  # noqa: PLR0913 - an array's layout
        self,
        folder: Folder,
        store: Store,
        key: str,
        *,
        shape: tuple[int, ...],
        dtype: np.dtype,
        chunk_rows: int,
        shard_rows: int,
        compressor: str | None,
        attributes: dict[str, Any],
        packing: PackedCodec | None = None,
    ) -> None:
        rest = tuple(max(1, n) for n in shape[1:])
        self._array = zarr.create_array(
            store,
            name=key,
            shape=shape,
            dtype=dtype,
            chunks=(chunk_rows, *rest),
            shards=(shard_rows, *rest),
            serializer="auto" if packing is None else packing,
            compressors=_zarr_codecs(None if packing else compressor, dtype),
            fill_value=False if dtype.kind == "b" else 0,
            attributes=attributes | {ALL_WRITTEN: True},
        )
        self._folder, self._key = folder, key
        self._codec, self._packing = _numcodec(compressor), packing
        self._chunk_shape, self._shard_chunks = (chunk_rows, *rest), shard_rows // chunk_rows
        self._dtype, self._rows, self._n_dims = dtype, shape[0], len(shape)
        nbytes = chunk_rows * prod(rest) * dtype.itemsize
        self._in_flight = max(1, min(2 * MAX_THREADS, _WAITING_NBYTES // max(1, nbytes)))
        self._written = 0
        self.files: dict[str, tuple[int, str]] = {}
        self._pending = np.empty((0, *rest), dtype)
        self._shard: _Shard | None = None
        self._unpublished: list[_Shard] = []
        self._room = threading.Semaphore(N_BUFFERS)
        self._behind = None if folder.is_local or is_s3(folder.fs) else Behind()

    def __enter__(self) -> ShardWriter:
        """Nothing to do: the array's metadata are written at construction."""
        return self

    def append(self, rows: NDArray) -> None:
        """Append rows of the array's dtype; what does not fill a chunk waits for more."""
        size = self._chunk_shape[0]
        if rows.size == 0:  # nothing to store, but a matrix of no columns still has rows
            self._written += len(rows)
            return
        if len(self._pending):
            take = min(size - len(self._pending), len(rows))
            self._pending = np.concatenate([self._pending, rows[:take]])
            rows = rows[take:]
            if len(self._pending) < size:
                return
            self._write_chunks([self._pending])
        whole = len(rows) // size * size
        self._write_chunks(rows[a : a + size] for a in range(0, whole, size))
        self._pending = rows[whole:].copy()

    def __exit__(self, error: object, *_: object) -> None:
        """Write the last, padded chunk and the last shard's index; on an error, drop the unfinished shard."""
        if error is not None:
            self._abandon()
            return
        try:
            self._finish()
        except BaseException:
            self._abandon()
            raise

    def end(self) -> None:
        """Hand in what is left: nothing is appended any more. Who has several writers ends all before they exit."""
        if len(self._pending):
            padded, n_rows = np.zeros(self._chunk_shape, self._dtype), len(self._pending)
            padded[:n_rows], self._pending = self._pending, self._pending[:0]
            self._write_chunks([padded], n_rows=n_rows)
        self._finish_shard()

    def _finish(self) -> None:
        self.end()
        for shard in self._unpublished:
            shard.settle(waits=True)
        if self._behind is not None:
            self._behind.wait()
        if self._written != self._rows:
            msg = f"array {self._key} has {self._rows:,} rows and {self._written:,} were written"
            raise LayoutError(msg)

    def _write_chunks(self, chunks: Any, n_rows: int | None = None) -> None:
        with contextlib.closing(map_ordered(self._encode, chunks, in_flight=self._in_flight)) as results:
            for encoded in results:
                self._append(encoded, n_rows)

    def _append(self, encoded: bytes, n_rows: int | None) -> None:
        if self._shard is None:
            index = self._written // (self._shard_chunks * self._chunk_shape[0])
            name = "/".join([self._key, "c", str(index), *["0"] * (self._n_dims - 1)])
            self._shard = _Shard(self._folder, name, self._shard_chunks, self._behind, self._room)
            for shard in self._unpublished:
                shard.settle()
            self._unpublished = [shard for shard in self._unpublished if not shard.is_published] + [self._shard]
        self._shard.append(encoded)
        self._written += self._chunk_shape[0] if n_rows is None else n_rows
        if self._shard.is_full:
            self._finish_shard()

    def _encode(self, chunk: NDArray) -> bytes:
        chunk = np.ascontiguousarray(chunk)
        if self._packing is not None:
            packed = self._packing.encode_values(chunk)
            return packed.tobytes() + _crc_bytes(packed)
        encoded: bytes = chunk.tobytes() if self._codec is None else self._codec.encode(chunk)
        return encoded + _crc_bytes(encoded)

    def _finish_shard(self) -> None:
        if self._shard is not None:
            size, crc = self._shard.close()
            self.files[self._shard.name] = size, f"{crc:08x}"
            self._shard = None

    def _abandon(self) -> None:
        if self._behind is not None:
            self._behind.abandon()
        for shard in self._unpublished:
            shard.abandon()
        self._shard, self._unpublished = None, []


def _crc_bytes(payload: bytes | NDArray[np.uint8]) -> bytes:
    crc: int = google_crc32c.value(payload)
    return crc.to_bytes(4, "little")


class _Shard:
    """One shard file being written: chunks, then (offset, length) of each as little-endian uint64, then crc32c."""

    def __init__(
        self, folder: Folder, name: str, n_chunks: int, behind: Behind | None, room: threading.Semaphore
    ) -> None:
        self._context = folder.create(name, parents=False, room=room)
        self._file: Any = self._context.__enter__()
        self._index = np.full((n_chunks, 2), 2**64 - 1, "<u8")
        self._path = f"{folder.url}/{name}"
        self._behind, self._has_ended, self.is_published = behind, False, False
        self.name, self._n, self._at, self._crc = name, 0, 0, 0

    @property
    def is_full(self) -> bool:
        return self._n == len(self._index)

    def append(self, encoded: bytes) -> None:
        self._write(encoded)
        self._index[self._n] = self._at - len(encoded), len(encoded)
        self._n += 1

    def _write(self, payload: bytes) -> None:
        if self._behind is None:
            self._write_now(payload)
        else:
            self._behind.call(self._write_now, payload, nbytes=len(payload))
        self._crc = google_crc32c.extend(self._crc, payload)
        self._at += len(payload)

    def _write_now(self, payload: bytes) -> None:
        with name_errors(self._path):
            self._file.write(payload)

    def close(self) -> tuple[int, int]:
        """Finish; returns the file's bytes and its crc32c. Of a store's it is published behind all that was written."""
        index = self._index.tobytes()
        self._write(index + _crc_bytes(index))
        if self._behind is not None:
            self._behind.call(self._publish)
        elif isinstance(self._file, PartedUpload):
            self._file.end()
        else:
            self._publish()
        return self._at, self._crc

    def settle(self, *, waits: bool = False) -> None:
        """Of an upload that was ended: say that it is published, or raise its error, once it is known."""
        if isinstance(self._file, PartedUpload) and not self._has_ended and (waits or self._file.end().done()):
            self._publish()

    def _publish(self) -> None:
        self._has_ended = True
        self._context.__exit__(None, None, None)
        self.is_published = True

    def abandon(self) -> None:
        """Leave nothing of it, unless its end was begun."""
        if self._has_ended:
            return
        error = RuntimeError("abandoned")
        with contextlib.suppress(RuntimeError):
            self._context.__exit__(RuntimeError, error, None)
