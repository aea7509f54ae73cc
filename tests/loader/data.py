"""Small collections on disk, written with anndata and zarr alone, in which every row knows its own number.

Column 0 of X and ``obs["row"]`` hold the global row number (plus one in X, so that it is stored).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec

N_VAR = 23


@contextmanager
def quiet() -> Iterator[None]:
    """While writing: anndata and zarr announce changes of defaults, which do not matter to what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def write_zarr(adata: ad.AnnData, path: Path) -> zarr.Group:
    with quiet():
        adata.write_zarr(path)
    return zarr.open_group(path, mode="r")


def matrix(n_obs: int, *, first: int = 0, seed: int = 0) -> np.ndarray:
    """Counts, a third of them zero and some rows all zero but for their number."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 250, (n_obs, N_VAR)) * (rng.random((n_obs, N_VAR)) < 0.3)
    x[rng.random(n_obs) < 0.1] = 0
    x[:, 0] = np.arange(first, first + n_obs) + 1
    return x.astype(np.float32)


def frame(n_obs: int, *, first: int = 0) -> pd.DataFrame:
    """obs with the row number, a categorical and text."""
    rows = np.arange(first, first + n_obs)
    return pd.DataFrame(
        {
            "row": rows,
            "kind": pd.Categorical.from_codes(rows % 3, ["a", "b", "c"]),
            "text": [f"t{r}" for r in rows],
        },
        index=[f"cell_{r}" for r in rows],
    )


def genes() -> pd.DataFrame:
    return pd.DataFrame(index=[f"g{i}" for i in range(N_VAR)])


def write_dataset(
    group: zarr.Group, x: np.ndarray, obs: pd.DataFrame, *, values: str = "uint16", dense: bool = False
) -> None:
    """An AnnData group whose X is sharded, values in a small dtype and the source's dtype recorded."""
    with quiet():
        ad.io.write_elem(group, "obs", obs)
        ad.io.write_elem(group, "var", genes())
    group.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    codec = BloscCodec(cname="lz4", clevel=3, shuffle="shuffle")
    if dense:
        array = group.create_array(
            "X", shape=x.shape, dtype=values, chunks=(4, N_VAR), shards=(16, N_VAR), compressors=codec
        )
        array[...] = x.astype(values)
        array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0", "source-dtype": "float32"})
        return
    csr = sp.csr_matrix(x)
    parts = group.create_group("X")
    parts.attrs.update(
        {
            "encoding-type": "csr_matrix",
            "encoding-version": "0.1.0",
            "shape": list(csr.shape),
            "source-dtype": "float32",
        }
    )
    for name, part in (("data", csr.data.astype(values)), ("indices", csr.indices.astype(np.uint16))):
        array = parts.create_array(
            name, shape=part.shape, dtype=part.dtype, chunks=(40,), shards=(160,), compressors=codec
        )
        array[...] = part
    pointers = parts.create_array("indptr", shape=csr.indptr.shape, dtype=np.int64, chunks=(64,), shards=(128,))
    pointers[...] = csr.indptr.astype(np.int64)


@dataclass
class Collection:
    """What the loader needs of a collection, and all its rows for comparison."""

    path: Path
    x: np.ndarray
    obs: pd.DataFrame

    is_empty = False

    def __iter__(self):
        group = zarr.open_group(self.path, mode="r")
        return (group[name] for name in sorted(group.keys()))


def write_collection(path: Path, sizes=(130, 1, 90), *, dense: bool = False) -> Collection:
    """Datasets of these sizes; rows are numbered through."""
    root = zarr.open_group(path, mode="w")
    parts, frames, first = [], [], 0
    for k, n_obs in enumerate(sizes):
        parts.append(matrix(n_obs, first=first, seed=k))
        frames.append(frame(n_obs, first=first))
        write_dataset(root.create_group(f"dataset_{k}"), parts[-1], frames[-1], dense=dense)
        first += n_obs
    with quiet():
        zarr.consolidate_metadata(root.store)
    return Collection(path, np.concatenate(parts), pd.concat(frames))


def dense(x) -> np.ndarray:
    """X of a batch, whatever its type, as a dense array."""
    if hasattr(x, "toarray"):
        return x.toarray()
    if hasattr(x, "to_dense"):
        x = x.to_dense()
    return np.asarray(x)


CODECS = {
    "blosc-lz4": [BloscCodec(cname="lz4", shuffle="shuffle")],
    "blosc-zstd": [BloscCodec(cname="zstd", shuffle="bitshuffle")],
    "zstd": [ZstdCodec(level=1)],
    "gzip": [GzipCodec(level=1)],
    "none": None,
    "crc": [BloscCodec(cname="lz4"), Crc32cCodec()],
    "crc-alone": [Crc32cCodec()],
}


def write_array(group, name, values, chunks, layout):
    """An array in a layout: a codec, entries of a chunk, chunks of a shard, dtypes of values and columns."""
    shards = None if layout[2] is None else (chunks[0] * layout[2], *chunks[1:])
    array = group.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=chunks,
        shards=shards,
        compressors=CODECS[layout[0]],
    )
    array[...] = values
    return array


def write_csr(parent, name, x, layout):
    """Rows as a CSR group in such a layout."""
    csr = sp.csr_matrix(x)
    group = parent.create_group(name)
    group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": list(x.shape)})
    parts = {"data": csr.data.astype(layout[3]), "indices": csr.indices.astype(layout[4])}
    for part, values in (parts | {"indptr": csr.indptr.astype(np.int64)}).items():
        write_array(group, part, values, (layout[1],), layout)
