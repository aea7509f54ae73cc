"""Names and signatures that code written for annbatch uses: changing the import is all it takes."""

from __future__ import annotations

import inspect
import subprocess
import sys

import anndata as ad
import dask
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

import annbatch_dask
from annbatch_dask import Loader, io, types, utils
from tests.loader.data import quiet

ARGUMENTS = {
    "batch_sampler": None,
    "chunk_size": None,
    "preload_nchunks": None,
    "shuffle": None,
    "return_index": False,
    "batch_size": None,
    "drop_last": None,
    "to": None,
    "rng": None,
}


def test_arguments_of_the_loader():
    found = inspect.signature(Loader.__init__).parameters
    assert {name: found[name].default for name in ARGUMENTS} == ARGUMENTS
    assert "preload_to_gpu" in found
    assert all(p.kind is p.KEYWORD_ONLY for name, p in found.items() if name != "self")


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("use_collection", ["collection", "load_adata"]),
        ("add_adatas", ["adatas"]),
        ("add_adata", ["adata"]),
        ("add_datasets", ["datasets", "obs", "var"]),
        ("add_dataset", ["dataset", "obs", "var"]),
    ],
)
def test_arguments_of_methods(method, arguments):
    assert list(inspect.signature(getattr(Loader, method)).parameters)[1:] == arguments


def test_keywords_in_a_dictionary():
    arguments = {"dataset": np.zeros((4, 3)), "obs": None, "var": None}
    assert Loader(batch_size=2, preload_to_gpu=False).add_dataset(**arguments).n_obs == 4


def test_aliases_of_types():
    assert zarr.Array in types.BackingArray_T.__value__.__args__
    assert sp.csr_array in types.InputInMemoryArray_T.__value__.__args__
    assert np.ndarray in types.OutputInMemoryArray_T.__value__.__args__
    with pytest.raises(AttributeError, match="has no attribute 'Array_T'"):
        _ = types.Array_T


def test_the_package_and_its_types_are_imported_without_zarr():
    code = "import sys, annbatch_dask.types; assert not {'zarr', 'anndata', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)


def test_pieces_of_a_size():
    whole = np.arange(7)
    views, copies = utils.split_given_size(whole, 3), utils.split_given_size(whole, 3, copy=True)
    assert [v.tolist() for v in views] == [c.tolist() for c in copies] == [[0, 1, 2], [3, 4, 5], [6]]
    assert views[0].base is whole
    assert copies[0].base is None
    of_nothing, of_a_list = utils.split_given_size(whole[:0], 3), utils.split_given_size([4, 5], 1)
    assert [piece.tolist() for piece in (*of_nothing, *of_a_list)] == [[], [4], [5]]


def test_what_scvi_tools_reaches_for():
    loader = Loader(batch_size=2, preload_to_gpu=False).add_dataset(np.zeros((4, 3)))
    assert loader._obs is None
    assert loader._batch_sampler is loader.batch_sampler


def test_every_public_name_is_there():
    for name in annbatch_dask.__all__:
        assert getattr(annbatch_dask, name) is not None


# --- annbatch.utils


def test_values_below_1_are_refused_by_their_label():
    utils.check_lt_1([1, 2], ["chunks", "rows"])
    with pytest.raises(ValueError, match="rows must be greater than 1, got 0"):
        utils.check_lt_1([1, 0, -1], ["chunks", "rows", "others"])


def test_the_parts_of_a_csr_matrix():
    x = sp.csr_matrix(np.eye(2, 3))
    parts = utils.CSRContainer((x.data, x.indices, x.indptr), x.shape, x.dtype)
    assert (sp.csr_matrix(parts.elems, parts.shape) != x).nnz == 0


@pytest.mark.parametrize("make", [np.asarray, sp.csr_matrix, sp.csr_array])
def test_matrices_become_tensors(make):
    torch = pytest.importorskip("torch")
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    made = utils.convert(make(x), False, "torch")
    assert torch.equal(made if make is np.asarray else made.to_dense(), torch.from_numpy(x))
    with pytest.raises(TypeError, match="Cannot convert <class 'scipy.sparse._csc.csc_matrix'> to torch"):
        utils.convert(sp.csc_matrix(x), False, "torch")


# --- annbatch.io


def test_constants_of_the_format():
    assert io.V1_ENCODING == {"encoding-type": "annbatch-preshuffled", "encoding-version": "0.1.0"}
    assert io.DATASET_PREFIX == "dataset"
    assert io.DatasetCollection is annbatch_dask.DatasetCollection


def test_arguments_of_writing():
    found = inspect.signature(annbatch_dask.write_sharded).parameters
    assert list(found) == ["group", "adata", "n_obs_per_chunk", "shard_size", "compressors", "key"]
    assert (found["n_obs_per_chunk"].default, found["shard_size"].default, found["key"].default) == (64, "1GiB", None)


@pytest.fixture
def adata():
    x = sp.random(50, 8, density=0.5, format="csr", dtype=np.float32, random_state=np.random.default_rng(0))
    obs = pd.DataFrame({"kind": pd.Categorical(["a", "b"] * 25)}, index=[f"c{i}" for i in range(50)])
    var = pd.DataFrame(index=[f"g{i}" for i in range(8)])
    return ad.AnnData(x, obs, var, obsm={"pca": np.ones((50, 3))}, layers={"dense": x.toarray()})


@pytest.mark.parametrize("key", [None, "part"])
def test_what_is_written_in_shards_is_read_as_it_was(tmp_path, adata, key):
    with quiet():
        group = zarr.open_group(tmp_path / "x.zarr", mode="w", zarr_format=3)
        annbatch_dask.write_sharded(group, adata, n_obs_per_chunk=8, shard_size=20, key=key)
        found = ad.io.read_zarr(tmp_path / "x.zarr" / (key or ""))
    np.testing.assert_array_equal(found.X.toarray(), adata.X.toarray())
    np.testing.assert_array_equal(found.layers["dense"], adata.layers["dense"])
    np.testing.assert_array_equal(found.obsm["pca"], adata.obsm["pca"])
    assert found.obs["kind"].tolist() == adata.obs["kind"].tolist()
    assert found.obs_names.tolist() == adata.obs_names.tolist()
    assert found.var_names.tolist() == adata.var_names.tolist()
    written = zarr.open_group(tmp_path / "x.zarr" / (key or ""), mode="r", use_consolidated=False)
    for name in ("obsm/pca", "layers/dense"):
        assert (written[name].chunks[0], written[name].shards[0]) == (8, 16)
    n = int(8 * adata.X.nnz / 50)
    assert [written[f"X/{part}"].chunks for part in ("data", "indices", "indptr")] == [(n,)] * 3
    assert written["X/data"].shards == (20 * adata.X.nnz // 50 // n * n,)
    assert written["X/indices"].dtype == np.uint8


def test_a_shard_is_no_larger_than_asked_for(tmp_path, adata):
    with quiet():
        group = zarr.open_group(tmp_path / "x.zarr", mode="w", zarr_format=3)
        annbatch_dask.write_sharded(group, adata, n_obs_per_chunk=1, shard_size="1KB")
    for name in ("X/data", "obsm/pca", "layers/dense"):
        array = zarr.open_array(tmp_path / "x.zarr" / name, mode="r")
        assert np.prod(array.shards) * array.dtype.itemsize <= 1024


def test_nothing_is_no_matrix_to_write(tmp_path, adata):
    group = zarr.open_group(tmp_path / "x.zarr", mode="w", zarr_format=3)
    with quiet(), pytest.raises(ValueError, match="0 observations"):
        annbatch_dask.write_sharded(group, adata[:0])


# --- names of annbatch's first releases


def test_a_collection_by_its_older_name(tmp_path, h5ad_pair):
    path = tmp_path / "o.zarr"
    with dask.config.set(scheduler="synchronous"):
        collection = annbatch_dask.create_anndata_collection(h5ad_pair, path, seed=0)
    assert collection.n_obs == 500
    with pytest.raises(FileExistsError, match="is a collection already; extend it"):
        annbatch_dask.create_anndata_collection(h5ad_pair, path)


def test_arguments_of_a_build_that_have_no_effect_here(tmp_path, h5ad_pair):
    collection = annbatch_dask.DatasetCollection(tmp_path / "o.zarr")
    with (
        dask.config.set(scheduler="synchronous"),
        pytest.warns(UserWarning, match="h5ad_compressor of annbatch's") as caught,
    ):
        collection.add_adatas(h5ad_pair, seed=0, shuffle_chunk_size=100, h5ad_compressor="lzf")
    assert len(caught) == 1  # rows are mixed no less than in blocks of any size: nothing to warn of
    assert collection.n_obs == 500


@pytest.mark.filterwarnings("ignore:Consolidated metadata is")  # zarr's own, of every store
def test_write_sharded_warns_of_nothing(tmp_path, adata):
    """anndata before 0.13 announces its own changes where its settings are not made; warnings are errors here."""
    group = zarr.open_group(tmp_path / "w.zarr", mode="w", zarr_format=3, use_consolidated=False)
    annbatch_dask.write_sharded(group, adata)


def test_the_older_loader_yields_tuples(adata):
    options = {"chunk_size": 10, "preload_nchunks": 2, "batch_size": 5, "preload_to_gpu": False, "to_torch": False}
    plain = annbatch_dask.ZarrSparseDataset(shuffle=False, **options).add_anndatas([adata, adata], obs_keys="kind")
    assert len(plain) == 100
    rows, labels = zip(*plain, strict=True)
    np.testing.assert_array_equal(sp.vstack(rows).toarray(), sp.vstack([adata.X, adata.X]).toarray())
    assert np.concatenate(labels).tolist() == ["a", "b"] * 50
    indexed = annbatch_dask.ZarrSparseDataset(return_index=True, **options)
    indexed.add_anndata(adata, layer_key="dense", obs_key="kind")
    for x, label, index in indexed:
        np.testing.assert_array_equal(x, adata.layers["dense"][index])
        assert label.tolist() == adata.obs["kind"].iloc[index].tolist()
    bare = annbatch_dask.ZarrSparseDataset(**options).add_datasets([adata.X], None)
    assert {labels for _, labels in bare} == {None}
