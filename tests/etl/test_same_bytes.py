"""One seed and one input give the bytes that they gave before: the collections of ``golden.json``, file by file.

What libraries write may change with their release: files are compared where ``golden.json`` was written with the same
releases, and what zarr reads out of them (attributes, values, dtypes) with any. To record a change of the format on
purpose: ``python -m tests.etl.test_same_bytes``.
"""

import hashlib
import json
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import anndata as ad
import dask
import fsspec
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

from annbatch_dask import DatasetCollection
from annbatch_dask.storage.metadata import FILES, NODES, SEAL

GOLDEN = Path(__file__).with_name("golden.json")
WRITERS = ("anndata", "h5py", "numcodecs", "numpy", "pandas", "zarr")
"""Whose releases decide on the bytes of files."""
INPUTS = "memory://same-bytes"
"""The collection says where its rows came from: a URL that is the same on every machine."""


def table(n_rows, n_cols, salt, dtype, modulus=7):
    """Numbers by arithmetic alone: no generator's stream has to stay as it is."""
    i, j = np.ogrid[:n_rows, :n_cols]
    values = (i * 7919 + j * 104729 + salt * 31) % 1009
    return np.where(values % 5 == 0, values % modulus + 1, 0).astype(dtype)


def made(n_obs, first_gene, salt):
    """A file of everything: sparse and dense matrices, layers, obsm, obs of each kind, var, uns."""
    n_vars = 31
    X = sp.csr_matrix(table(n_obs, n_vars, salt, np.float32))
    rows = np.arange(n_obs)
    obs = pd.DataFrame(
        {
            "label": pd.Categorical.from_codes(rows % 3, [f"c{salt}", "b", "a"]),
            "score": (rows * 0.25).astype(np.float32),
            "depth": np.asarray(X.sum(1)).ravel().astype(np.int64),
            "word": pd.Series([f"w{r % 11}" for r in rows], dtype=object).to_numpy(),
            "maybe": pd.array([None if r % 4 == 0 else r % 2 == 0 for r in rows], dtype="boolean"),
        },
        index=pd.Index([f"f{salt}-{r}" for r in rows], dtype=object),
    )
    var = pd.DataFrame(
        {"kind": "gene"}, index=pd.Index([f"g{first_gene + g:03d}" for g in range(n_vars)], dtype=object)
    )
    adata = ad.AnnData(X=X, obs=obs, var=var, uns={"title": "made up"})
    adata.layers["counts"] = sp.csr_matrix(table(n_obs, n_vars, salt + 1, np.int32, modulus=300))
    adata.layers["dense"] = table(n_obs, n_vars, salt + 2, np.float32) / 4
    adata.obsm["pca"] = table(n_obs, 3, salt + 3, np.float64) / 3
    return adata


@contextmanager
def inputs():
    """URLs of three files."""
    fs = fsspec.filesystem("memory")
    with TemporaryDirectory() as folder:
        for name, args in {"a": (90, 0, 1), "b": (70, 12, 2), "c": (40, 20, 3)}.items():
            made(*args).write_h5ad(Path(folder, "file.h5ad"))
            fs.pipe_file(f"/same-bytes/{name}.h5ad", Path(folder, "file.h5ad").read_bytes())
    try:
        yield [f"{INPUTS}/{name}.h5ad" for name in "abc"]
    finally:
        fs.rm("/same-bytes", recursive=True)


OPTIONS = {"dataset_size": 80, "merge": "same"}


def open_layout(out, a, b, c):
    return DatasetCollection(out).add_adatas([a, b, c], seed=3, **OPTIONS)


def packed_layout(out, a, b, c):
    return DatasetCollection(out).add_adatas([a, b, c], seed=3, layout="packed", **OPTIONS)


def grouped(out, a, b, c):
    return DatasetCollection(out).add_adatas([a, b, c], seed=4, groupby="label", **OPTIONS)


def extended(out, a, b, c):
    first = DatasetCollection(out).add_adatas([a, b], seed=5, **OPTIONS)
    return first.add_adatas([c], seed=6, **OPTIONS)


def appended(out, a, b, c):
    first = DatasetCollection(out).add_adatas([a, b], seed=5, **OPTIONS)
    return first.add_adatas([c], seed=6, mode="append", **OPTIONS)


BUILDS = {f.__name__: f for f in (open_layout, packed_layout, grouped, extended, appended)}


def short(payload):
    return hashlib.sha256(payload).hexdigest()[:16]


def files_of(path):
    """Digest of each file of a collection."""
    found = sorted(p for p in Path(path).rglob("*") if p.is_file())
    return {p.relative_to(path).as_posix(): short(p.read_bytes()) for p in found}


def content_of(path):
    """Digest of what is in each group and array of a collection, however it is held."""
    root = zarr.open_group(path, mode="r", use_consolidated=False)
    return {"": told(root)} | {name: told(node) for name, node in sorted(root.members(max_depth=None))}


def told(node):
    said = [told_of(dict(node.attrs))]
    if isinstance(node, zarr.Array):
        values = np.asarray(node[...])
        said += [str(node.dtype), list(node.shape)]
        said += [values.astype(object).tolist() if values.dtype.kind in "OTU" else short(values.tobytes())]
    return short(json.dumps(said, sort_keys=True, default=str).encode())


def told_of(attributes):
    """Attributes without what is said of files and of metadata, in the manifest and in a dataset."""
    if isinstance(attributes, list):
        return [told_of(value) for value in attributes]
    if not isinstance(attributes, dict):
        return attributes
    sums = {"crc32c", "metadata", "n_bytes", "n_files", FILES, NODES, SEAL}
    return {key: told_of(value) for key, value in attributes.items() if key not in sums}


def built(name, folder):
    """Files and content of one build."""
    with inputs() as urls, dask.config.set(scheduler="synchronous"):
        path = BUILDS[name](str(Path(folder, "out.zarr")), *urls).path
    return {"files": files_of(path), "content": content_of(path)}


def releases():
    return {name: version(name) for name in WRITERS}


@pytest.mark.parametrize("name", BUILDS)
def test_seed_and_input_decide_the_bytes(name, tmp_path):
    golden = json.loads(GOLDEN.read_text())
    found, expected = built(name, tmp_path), golden["builds"][name]
    same_strings = golden["releases"]["pandas"].split(".")[0] == releases()["pandas"].split(".")[0]
    for name in expected["content"].keys() | found["content"].keys():
        if same_strings or "/var/_index" not in name:  # whose strings have a mask since pandas 3
            assert found["content"].get(name) == expected["content"].get(name), name
    if golden["releases"] == releases():
        assert found["files"] == expected["files"]


def record():
    builds = {}
    for name in BUILDS:
        with TemporaryDirectory() as folder:
            builds[name] = built(name, folder)
    GOLDEN.write_text(json.dumps({"releases": releases(), "builds": builds}, indent=1) + "\n")


if __name__ == "__main__":
    record()
