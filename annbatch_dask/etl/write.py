"""A dataset's arrays as they are written: matrices in shards, obs and frames in obsm, and the documents at last."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annbatch_dask.etl.frames import make_frames
from annbatch_dask.etl.rows import PLACE, FixedArrays, RaggedArrays, array_name, decode_strings
from annbatch_dask.manifest import SOURCE_DTYPE
from annbatch_dask.plan.dtypes import index_dtype
from annbatch_dask.plan.options import Options
from annbatch_dask.plan.schema import ColumnSpec, MatrixSpec
from annbatch_dask.sources.columns import to_pandas
from annbatch_dask.storage.checksums import FileSums, checksum_of
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.metadata import METADATA, dataset_document, is_metadata, nodes_of, sealed
from annbatch_dask.storage.packed import PackedCodec, packs
from annbatch_dask.storage.shards import ShardWriter

if TYPE_CHECKING:
    import zarr

__all__ = ["ObsColumns", "matrix_writer", "packing_of", "publish_dataset"]


def matrix_writer(  # noqa: PLR0913, PLR0917 - a matrix
    spec: MatrixSpec,
    options: Options,
    shape: tuple[int, int],
    dtype: np.dtype,
    folder: Folder,
    group: zarr.Group,
) -> SparseWriter | DenseWriter:
    """A writer for a matrix's rows, whose parent groups are there when this returns.

    ``shape``: its rows, and its stored values where it is sparse; ``dtype``: of these.
    """
    for parent in spec.name.split("/")[:-1]:
        encoding = "raw" if parent == "raw" else "dict"
        group.require_group(parent).attrs.update({"encoding-type": encoding, "encoding-version": "0.1.0"})
    kind = SparseWriter if spec.kind == "csr" else DenseWriter
    return kind(spec, options, shape, dtype, folder, group)


class SparseWriter(contextlib.ExitStack):
    """Writes a CSR group: data, indices and indptr, each sharded, with chunks of about ``n_obs_per_chunk`` rows."""

    def __init__(  # noqa: PLR0913, PLR0917 - a matrix
        self,
        spec: MatrixSpec,
        options: Options,
        shape: tuple[int, int],
        dtype: np.dtype,
        folder: Folder,
        group: zarr.Group,
    ) -> None:
        super().__init__()
        n_obs, nnz = shape
        attributes = {
            "encoding-type": "csr_matrix",
            "encoding-version": "0.1.0",
            "shape": [n_obs, spec.n_cols],
            SOURCE_DTYPE: spec.source_dtype,
        }
        group.create_group(spec.name, attributes=attributes)
        chunk = max(1, min(round(options.n_obs_per_chunk * nnz / n_obs), nnz))
        arrays = {
            "data": (nnz, dtype),
            "indices": (nnz, index_dtype(spec.n_cols)),
            "indptr": (n_obs + 1, np.dtype(np.int64)),
        }
        row_nbytes = max(1, nnz) / n_obs * max(d.itemsize for _, d in arrays.values())
        self._name, self._at = spec.name, 0
        self._writers = {
            name: self.enter_context(
                ShardWriter(
                    folder,
                    group.store,
                    f"{spec.name}/{name}",
                    shape=(length,),
                    dtype=dtype,
                    chunk_rows=chunk,
                    shard_rows=_shard_rows(options, row_nbytes, chunk, length, scale=max(1, nnz) / n_obs),
                    compressor=options.compressor,
                    attributes={},
                    packing=packing_of(name, dtype) if options.layout == "packed" else None,
                )
            )
            for name, (length, dtype) in arrays.items()
        }
        self._writers["indptr"].append(np.zeros(1, np.int64))

    @property
    def files(self) -> FileSums:
        """Checksums of the shards."""
        return {name: sums for w in self._writers.values() for name, sums in w.files.items()}

    def append(self, fixed: FixedArrays, ragged: RaggedArrays) -> int:
        """Append rows; returns their bytes."""
        indices, offsets = ragged[array_name(self._name, "indices")]
        values, _ = ragged[array_name(self._name, "values")]
        self._writers["indices"].append(indices)
        self._writers["data"].append(values)
        self._writers["indptr"].append(offsets[1:] + self._at)
        self._at += int(offsets[-1])
        return int(indices.nbytes + values.nbytes + offsets.nbytes)

    def end(self) -> None:
        """Hand in what is left, and do not wait for it."""
        for writer in self._writers.values():
            writer.end()


def packing_of(array: str, dtype: np.dtype) -> PackedCodec | None:
    """Codec of one array of a sparse matrix; None if the array is small or holds no integers."""
    return None if array == "indptr" or not packs(dtype) else PackedCodec(differences=array == "indices")


class DenseWriter(contextlib.ExitStack):
    """Writes a dense array, sharded along its rows."""

    def __init__(  # noqa: PLR0913, PLR0917 - a matrix
        self,
        spec: MatrixSpec,
        options: Options,
        shape: tuple[int, int],
        dtype: np.dtype,
        folder: Folder,
        group: zarr.Group,
    ) -> None:
        super().__init__()
        n_obs, _ = shape
        chunk = min(options.n_obs_per_chunk, n_obs)
        self._name, self._spec = spec.name, spec
        self._writer = self.enter_context(
            ShardWriter(
                folder,
                group.store,
                spec.name,
                shape=spec.shape(n_obs),
                dtype=dtype,
                chunk_rows=chunk,
                shard_rows=_shard_rows(options, max(1, spec.n_cols) * dtype.itemsize, chunk, n_obs, scale=1),
                compressor=options.compressor,
                attributes={"encoding-type": "array", "encoding-version": "0.2.0", SOURCE_DTYPE: spec.source_dtype},
            )
        )

    @property
    def files(self) -> FileSums:
        """Checksums of the shards."""
        return self._writer.files

    def append(self, fixed: FixedArrays, ragged: RaggedArrays) -> int:
        """Append rows; returns their bytes."""
        values = fixed[array_name(self._name, "dense")]
        self._writer.append(values.reshape(self._spec.shape(len(values))))
        return int(values.nbytes)

    def end(self) -> None:
        """Hand in what is left, and do not wait for it."""
        self._writer.end()


def _shard_rows(options: Options, row_nbytes: float, chunk: int, length: int, *, scale: float) -> int:
    """Entries of a shard: the size asked for, rounded down to whole chunks, and no more than the array holds.

    ``scale`` is the number of array entries a cell, ``row_nbytes`` the bytes of a cell.
    """
    rows = options.shard_rows if options.shard_rows is not None else (options.shard_nbytes or 2**30) / row_nbytes
    chunks = int(rows * scale) // chunk
    return chunk * max(1, min(chunks, -(-length // chunk)))


class ObsColumns:
    """The dataset's obs, and the frames in its obsm, filled part by part; strings as the bytes they are."""

    def __init__(self, columns: Sequence[ColumnSpec], n_rows: int) -> None:
        self._columns, self._n_rows, self._at = columns, n_rows, 0
        self._arrays: dict[str, NDArray] = {}
        self._strings: dict[str, list[tuple[NDArray[np.int64], NDArray[np.uint8]]]] = {}

    def append(self, fixed: FixedArrays, ragged: RaggedArrays) -> None:
        """Append rows."""
        for c in self._columns:
            if c.kind == "string":
                data, offsets = ragged[array_name(c.path, "bytes")]
                self._strings.setdefault(c.path, []).append((offsets, data.copy()))
            else:
                self._put(array_name(c.path), fixed[array_name(c.path)])
            if c.nullable:
                self._put(array_name(c.path, "mask"), fixed[array_name(c.path, "mask")])
        self._at += len(fixed[PLACE])

    def _put(self, name: str, rows: NDArray) -> None:
        if name not in self._arrays:
            self._arrays[name] = np.empty(self._n_rows, rows.dtype)
        self._arrays[name][self._at : self._at + len(rows)] = rows

    def _pop(self, c: ColumnSpec) -> tuple[NDArray, NDArray[np.bool_] | None]:
        if c.path in self._strings:
            return np.zeros(self._n_rows, np.int8), None
        return self._arrays.pop(array_name(c.path)), self._arrays.pop(array_name(c.path, "mask"), None)

    def _pop_strings(self, c: ColumnSpec) -> NDArray[np.object_]:
        out, at, pieces = np.empty(self._n_rows, object), 0, self._strings.pop(c.path)
        pieces.reverse()
        while pieces:
            strings = decode_strings(*pieces.pop())
            out[at : at + len(strings)] = strings
            at += len(strings)
        return out

    def frames(self, index_name: str | None) -> dict[str, pd.DataFrame]:
        """obs, and those of obsm, with a place kept for each column of :meth:`strings`."""
        names, *columns = self._columns
        index = pd.Index(self._pop_strings(names), dtype=object, name=index_name)
        places = (
            replace(c, kind="numeric", dtype="int8", nullable=False) if c.kind == "string" else c for c in columns
        )
        return make_frames(index, places, self._pop)

    def strings(self) -> Iterator[tuple[str, Any]]:
        """Path and values of each column of strings: Python needs several times the bytes of one."""
        for c in self._columns:
            if c.path in self._strings:
                mask = self._arrays.pop(array_name(c.path, "mask"), None)
                yield c.path, to_pandas(c, self._pop_strings(c), mask)


def publish_dataset(
    folder: Folder, files: dict[str, bytes], shards: dict[str, tuple[int, str]]
) -> dict[str, tuple[int, str]]:
    """Write a dataset's small files, its root with the metadata and checksums of all at last; returns all checksums."""
    files = {name: sealed(content) if is_metadata(name) else content for name, content in files.items()}
    nodes = nodes_of({name: content for name, content in files.items() if is_metadata(name)})
    below = {name: content for name, content in files.items() if name != METADATA}
    sums = dict(sorted((shards | {name: checksum_of(content) for name, content in below.items()}).items()))
    root = dataset_document(nodes[""]["attributes"], nodes, sums)
    folder.write_all(below)
    folder.write(METADATA, root, durable=False, parents=False)  # all is synced together
    return sums | {METADATA: checksum_of(root)}
