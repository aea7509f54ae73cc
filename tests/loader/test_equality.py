"""Whatever the codec, the chunks, the dtypes, the request: every form of a batch is what anndata reads."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from annbatch_dask.loader import Loader
from annbatch_dask.loader import backing as sources_module
from annbatch_dask.loader.reading import load_all_aligned
from tests.loader.data import dense, quiet, write_array, write_csr
from tests.samplers.tools import Minimal

N_VAR = 11
GENES = [f"g{i}" for i in range(N_VAR)]
CHOSEN = [8, 0, 10, 3]


# A codec, the entries in a chunk, the chunks in a shard (None: no shards), the dtypes of values and columns.
LAYOUTS = [
    ("blosc-lz4", 40, 4, "uint16", "uint16"),
    ("blosc-zstd", 7, 4, "float32", "int32"),
    ("zstd", 33, None, "float32", "uint16"),
    ("gzip", 16, 1, "uint16", "int32"),
    ("none", 9, 4, "float32", "int32"),
    ("crc", 20, 2, "uint16", "uint16"),
    ("crc-alone", 25, None, "float32", "int32"),
]
SIZES = (23, 1, 40, 2)


def draw_rows(seed: int, n_obs: int) -> np.ndarray:
    """Counts with empty rows among them."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 300, (n_obs, N_VAR)) * (rng.random((n_obs, N_VAR)) < rng.random())
    x[rng.random(n_obs) < 0.3] = 0
    return x


def write_dense(parent, name, x, layout):
    array = write_array(parent, name, x.astype(layout[3]), (layout[1], max(1, layout[1] % 13)), layout)
    array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})


def write(path, *, kind, layout):
    """A dataset per size, with a layer of the other kind."""
    root = zarr.open_group(path, mode="w")
    for k, n_obs in enumerate(SIZES):
        group = root.create_group(f"d{k}")
        group.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        layers = group.create_group("layers")
        layers.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
        make, other = (write_csr, write_dense) if kind == "csr" else (write_dense, write_csr)
        with quiet():
            make(group, "X", draw_rows(k, n_obs), layout)
            other(layers, "other", draw_rows(50 + k, n_obs), layout)
            ad.io.write_elem(group, "obs", pd.DataFrame(index=[f"c{k}_{i}" for i in range(n_obs)]))
            ad.io.write_elem(group, "var", pd.DataFrame(index=GENES))
    return root


def read_by_anndata(root):
    """All rows of X and of the layer."""
    with quiet():
        adatas = [ad.io.read_zarr(root[name]) for name in sorted(root.keys(), key=lambda name: int(name[1:]))]
    return [np.concatenate([dense(get(a)) for a in adatas]) for get in (lambda a: a.X, lambda a: a.layers["other"])]


FORMS = {
    "as it is": {},
    "dense": {"dense": True},
    "chosen": {"var_names": [GENES[i] for i in CHOSEN]},
    "dense and chosen": {"dense": True, "var_names": [GENES[i] for i in CHOSEN]},
    "float16": {"dense": True, "dtype": "float16", "casting": "unsafe"},
    "float32": {"dtype": "float32"},
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(layout, marks=pytest.mark.chaos if k % 2 else ()) for k, layout in enumerate(LAYOUTS)],
    ids=[layout[0] for layout in LAYOUTS],  # tests/chunks/test_reader.py reads all codecs
)
def layout(request):
    return request.param


@pytest.fixture(scope="module", params=["csr", "dense"])
def stored(request, layout, tmp_path_factory):
    """Datasets on disk as AnnData objects, and all their rows as anndata reads them."""
    root = write(tmp_path_factory.mktemp("equality") / "a.zarr", kind=request.param, layout=layout)
    return [load_all_aligned(root[f"d{k}"]) for k in range(len(SIZES))], read_by_anndata(root)


@settings(max_examples=6)  # of each of 14
@given(form=st.sampled_from(sorted(FORMS)), fast=st.booleans(), seed=st.integers(0, 10**6))
def test_every_form_equals_what_anndata_reads(stored, form, fast, seed):
    adatas, (x, layer) = stored
    rng = np.random.default_rng(seed)
    asked = rng.integers(0, sum(SIZES), rng.integers(1, 50))
    splits = [rng.permutation(len(asked)), rng.integers(0, len(asked), 5)]
    sampler = Minimal([{"requests": asked, "splits": splits}], 1000, shuffle=False)
    loader = Loader(batch_sampler=sampler, preload_to_gpu=False, layers=["other"], obsm=[], **FORMS[form])
    loader.add_adatas(adatas)
    if not fast:
        through_zarr(loader)
    for batch, split in zip(loader, splits, strict=True):
        rows = asked[split]
        picked = CHOSEN if "var_names" in FORMS[form] else slice(None)
        same(batch["X"], x[rows][:, picked].astype(FORMS[form].get("dtype", x.dtype)))
        same(batch["layers"]["other"], layer[rows][:, picked])


def through_zarr(loader):
    """Turn the direct reader off."""
    for source in (*loader._sources, *(s for parts in loader._beside.values() for s in parts)):
        for name, reader in vars(source).items():
            if isinstance(reader, sources_module.RangeReader):
                setattr(source, name, sources_module.RangeReader(reader.array, fast=False))


def same(found, expected):
    found = dense(found)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
