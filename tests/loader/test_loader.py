"""What the loader yields, in every form, equals the rows that anndata reads; misuse is refused."""

from __future__ import annotations

import copy
import importlib.util
import math
import pickle
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from annbatch_dask.errors import MissingPackageError, SourceError
from annbatch_dask.loader import Loader
from annbatch_dask.loader.reading import load_all_aligned
from annbatch_dask.samplers import RandomSampler, SequentialSampler
from tests.loader.data import N_VAR, Collection, dense, frame, genes, matrix, quiet, write_collection, write_zarr
from tests.loader.loaders import SMALL, check_epoch, csr, make
from tests.samplers.tools import Minimal

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
needs_jax = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax is not installed")


def asking(requests, splits=None, **kwargs):
    """A loader that asks for exactly these rows."""
    request = {"requests": requests} if splits is None else {"requests": requests, "splits": splits}
    return Loader(
        batch_sampler=Minimal([request], 1000, shuffle=False), return_index=True, preload_to_gpu=False, **kwargs
    )


@pytest.mark.parametrize("kind", ["sparse", "dense"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_epochs(collection, dense_collection, kind, shuffle):
    stored = collection if kind == "sparse" else dense_collection
    loader = make(stored, shuffle=shuffle, seed=0)
    assert len(loader) == math.ceil(221 / 8) == len(list(loader))
    assert (loader.n_obs, loader.n_var) == (221, N_VAR)
    first, second = check_epoch(loader, stored), check_epoch(loader, stored)
    assert (first == second) is (not shuffle)
    assert (first == list(range(221))) is (not shuffle)


def test_types_and_dtypes(collection, dense_collection):
    (x,) = (batch["X"] for batch in asking([slice(0, 9)]).use_collection(collection))
    assert isinstance(x, sp.csr_matrix)
    assert (x.dtype, x.indices.dtype, x.indptr.dtype) == (np.float32, np.int32, np.int32)
    (x,) = (batch["X"] for batch in asking([slice(0, 9)]).use_collection(dense_collection))
    assert isinstance(x, np.ndarray)
    assert x.dtype == np.float32  # the sources', although uint16 is stored


@pytest.mark.parametrize("dtype", ["uint16", "float64", "int32", "float16"])
@pytest.mark.parametrize("as_dense", [False, True])
def test_dtype_overrides(collection, dtype, as_dense):
    if dtype == "float16" and not as_dense:
        pytest.skip("scipy has no sparse float16")
    casting = "unsafe" if dtype == "float16" else None  # the range of the uint16 stored is not recorded
    loader = asking([slice(100, 140)], dense=as_dense, dtype=dtype, casting=casting).use_collection(collection)
    (batch,) = loader
    assert batch["X"].dtype == dtype
    np.testing.assert_array_equal(dense(batch["X"]), collection.x[100:140].astype(dtype))


@pytest.mark.parametrize("as_dense", [False, True])
@settings(max_examples=12)
@given(asked=st.lists(st.integers(0, 220), min_size=1, max_size=40), seed=st.integers(0, 9))
def test_any_rows_in_any_order(collection, as_dense, asked, seed):
    asked = np.array(asked)
    split = np.random.default_rng(seed).integers(0, len(asked), 7)
    for rows in (asked, asked.astype(np.int32)):
        loader = asking(rows, [split, np.arange(len(asked))], dense=as_dense).use_collection(collection)
        mixed, whole = loader
        for batch, expected in ((mixed, asked[split]), (whole, asked)):
            assert batch["index"].tolist() == expected.tolist()
            np.testing.assert_array_equal(dense(batch["X"]), collection.x[expected])
            pd.testing.assert_frame_equal(batch["obs"], collection.obs.iloc[expected])


@pytest.mark.parametrize("where", [None, np.arange(221)])
def test_what_is_no_row_or_position_is_refused_and_a_step_is_kept(collection, where):
    def asked(requests, splits=None):
        (batch,) = asking(requests, splits, where=where).use_collection(collection)
        return batch["index"].tolist()

    assert asked([slice(0, 10, 2), slice(100, 102)]) == [0, 2, 4, 6, 8, 100, 101]
    assert asked([slice(0, 10, 2)], [np.array([4, 0])]) == [8, 0]
    assert asked(np.array([slice(7, 9), slice(100, 101)])) == [7, 8, 100]  # as annbatch's own samplers have them
    mask = np.arange(10) > 7
    for requests, splits, error, message in (
        ([slice(0, 10)], [mask], TypeError, r"a split must be a 1-D integer array.*flatnonzero.*got dtype bool"),
        ([slice(0, 10)], [np.array([1.9, 2.2])], TypeError, "a split must be a 1-D integer array.*float64"),
        ([slice(0, 10)], [np.zeros((2, 1), int)], TypeError, "got dtype int64, 2-D"),
        (mask, [np.arange(2)], TypeError, r"requests must be slices or a 1-D integer array.*flatnonzero.*bool"),
        ([slice(5, 0, -1)], [np.arange(2)], TypeError, r"a step of 1 or more.*slice\(5, 0, -1\)"),
        ([slice(5, None)], [np.arange(2)], TypeError, r"slices with a stop.*slice\(5, None, None\)"),
        ([slice(0, 4.5)], [np.arange(2)], TypeError, "float"),
        ([3, 4], [np.arange(2)], TypeError, "got 3"),
        (np.array([-1, 3]), [np.arange(2)], IndexError, "request for rows -1 to 3"),
        ([slice(219, 223)], [np.arange(2)], IndexError, "rows 219 to 222, the loader has rows 0 to 220"),
    ):
        with pytest.raises(error, match=message):
            asked(requests, splits)


def test_slices_across_datasets_in_request_order(collection):
    asked = [slice(200, 221), slice(120, 140), slice(5, 6), slice(125, 135)]
    rows = np.concatenate([np.arange(s.start, s.stop) for s in asked])
    (batch,) = asking(asked).use_collection(collection)
    assert batch["index"].tolist() == rows.tolist()
    np.testing.assert_array_equal(dense(batch["X"]), collection.x[rows])


def test_dense_equals_sparse(collection):
    one, two = (make(collection, shuffle=True, seed=5, dense=d) for d in (False, True))
    for sparse, full in zip(one, two, strict=True):
        assert isinstance(full["X"], np.ndarray)
        assert full["X"].dtype == np.float32
        np.testing.assert_array_equal(sparse["X"].toarray(), full["X"], strict=True)


def test_entries_named_twice_are_added_up():
    x = sp.csr_matrix((np.array([1, 2, 4.0]), np.array([1, 1, 0]), np.array([0, 3])), shape=(1, 3))
    (batch,) = Loader(batch_size=1, dense=True, preload_to_gpu=False).add_dataset(x)
    assert batch["X"].tolist() == [[4, 3, 0]]


def test_rng_forms(collection):
    by_int, by_generator, other = (
        [batch["index"].tolist() for batch in make(collection, shuffle=True, **given)]
        for given in ({"seed": 3}, {"rng": np.random.default_rng(3)}, {"seed": 4})
    )
    assert by_int == by_generator != other


def test_drop_last_and_index(collection):
    batches = list(make(collection, drop_last=True, shuffle=True))
    assert [batch["X"].shape for batch in batches] == [(8, N_VAR)] * 27
    assert next(iter(make(collection, return_index=False)))["index"] is None


def test_defaults_fit_the_batch_size():
    for batch_size in (1, 10, 12, 100, 1000, 4096):
        window = Loader(batch_size=batch_size, preload_to_gpu=False).batch_sampler
        assert isinstance(window, SequentialSampler)
    with pytest.raises(ValueError, match="must be divisible"):
        Loader(batch_size=4097, preload_to_gpu=False)
    with pytest.raises(ValueError, match="must be divisible"):
        Loader(batch_size=10, chunk_size=512, preload_nchunks=32, preload_to_gpu=False)


# --- sources


@pytest.mark.parametrize("convert", [sp.csr_matrix, sp.csr_array, np.ascontiguousarray, np.asfortranarray])
@pytest.mark.parametrize("as_dense", [False, True])
def test_data_in_memory(convert, as_dense):
    parts = [matrix(50), matrix(30, first=50, seed=1)]
    x = np.concatenate(parts)
    loader = Loader(batch_size=8, **SMALL, shuffle=True, dense=as_dense)
    loader.add_datasets([convert(part) for part in parts], obs=[frame(50), frame(30, first=50)], var=[genes()] * 2)
    check_epoch(loader, Collection(None, x, pd.concat([frame(50), frame(30, first=50)])))
    is_sparse = convert in (sp.csr_matrix, sp.csr_array)
    assert isinstance(next(iter(loader))["X"], np.ndarray if as_dense or not is_sparse else sp.csr_matrix)


@pytest.mark.parametrize("where", ["disk", "store in memory", "numpy"])
def test_images(tmp_path, where):
    images = np.random.default_rng(0).integers(0, 255, (30, 3, 4, 5)).astype(np.uint8)
    data = images
    if where != "numpy":
        store = tmp_path / "i.zarr" if where == "disk" else {}
        data = zarr.create_array(store, shape=images.shape, chunks=(4, 3, 4, 5), shards=(8, 3, 4, 5), dtype="uint8")
        data[...] = images
    loader = Loader(batch_size=8, **SMALL, shuffle=True).add_dataset(data)
    assert loader.n_var == 3
    seen = []
    for batch in loader:
        assert batch["obs"] is None
        np.testing.assert_array_equal(batch["X"], images[batch["index"]])
        seen += batch["index"].tolist()
    assert sorted(seen) == list(range(30))


def test_anndata_objects(tmp_path):
    adatas = [ad.AnnData(csr(n), obs=frame(n, first=f), var=genes()) for n, f in ((20, 0), (15, 20))]
    loader = Loader(batch_size=5, **SMALL).add_adatas(adatas)
    assert loader.dataset_type is sp.csr_matrix
    assert loader.n_obs == 35
    group = write_zarr(adatas[0], tmp_path / "a.zarr")
    loader = Loader(batch_size=5, **SMALL).add_adata(load_all_aligned(group))
    assert loader.dataset_type is ad.abc.CSRDataset
    check_epoch(loader, Collection(None, adatas[0].X.toarray(), adatas[0].obs))


def test_obs_without_columns_counts_as_none():
    loader = Loader(batch_size=5, **SMALL).add_adata(ad.AnnData(csr()))
    assert next(iter(loader))["obs"] is None


def test_what_is_left_out_is_named():
    adata = ad.AnnData(csr(), layers={"raw": csr()}, obsm={"pca": np.zeros((20, 2))})
    with pytest.warns(FutureWarning) as caught:
        Loader(batch_size=5, **SMALL).add_adatas([adata, adata])
    assert [str(w.message).split(". ")[0] for w in caught] == [
        "Batches do not carry layers/raw",
        "Batches do not carry obsm/pca",
    ]
    assert {w.filename for w in caught} == {__file__}
    Loader(batch_size=5, **SMALL, layers=[], obsm=[]).add_adata(adata)  # on purpose: no warning


def test_all_of_layers_and_obsm_is_carried_where_all_datasets_have_it():
    adata = ad.AnnData(csr(), layers={"raw": csr()}, obsm={"pca": np.arange(40.0).reshape(20, 2)})
    adata.obsm["frame"] = pd.DataFrame({"a": range(20)}, index=adata.obs_names)  # no array: never carried
    loader = Loader(batch_size=5, **SMALL, layers="all", obsm="all").add_adatas([adata, adata])
    batch = next(iter(loader))
    assert (list(batch["layers"]), list(batch["obsm"])) == (["raw"], ["pca"])
    np.testing.assert_array_equal(batch["obsm"]["pca"], adata.obsm["pca"][batch["index"]])
    np.testing.assert_array_equal(dense(batch["layers"]["raw"]), dense(batch["X"]))
    del adata.layers["raw"]
    with pytest.raises(ValueError, match=r"layers='all' .* \['raw'\], the new one \[\]"):
        loader.add_adata(adata)


def test_to_torch_is_an_older_name():
    pytest.importorskip("torch")
    with pytest.warns(FutureWarning, match="to='torch'") as caught:
        loader = Loader(batch_size=5, **SMALL, to_torch=True)
    assert caught[0].filename == __file__
    assert type(next(iter(loader.add_dataset(csr())))["X"]).__module__ == "torch"
    with pytest.warns(FutureWarning):
        assert sp.issparse(next(iter(Loader(batch_size=5, **SMALL, to_torch=False).add_dataset(csr())))["X"])
    with pytest.raises(ValueError, match="give to alone"):
        Loader(to="torch", to_torch=True)


def test_obs_of_different_datasets_is_united():
    first, second = frame(10), frame(10, first=10)
    second["kind"] = pd.Categorical(["c", "z"] * 5)
    second["row"] = second["row"].astype(np.float64)
    loader = Loader(batch_size=10, **SMALL).add_datasets([csr(10), csr(10)], obs=[first, second])
    batches = [batch["obs"] for batch in loader]
    for obs, original in zip(batches, (first, second), strict=True):
        assert obs["kind"].cat.categories.tolist() == ["a", "b", "c", "z"]
        assert obs["kind"].astype(str).tolist() == original["kind"].astype(str).tolist()
        assert obs["row"].dtype == np.float64
        assert obs.index.tolist() == original.index.tolist()


def test_mixed_dtypes_warn_and_are_promoted():
    loader = Loader(batch_size=40, **SMALL).add_dataset(csr(20))
    with pytest.warns(UserWarning, match="Adding dataset with dtype float64") as caught:
        loader.add_dataset(csr(20).astype(np.float64))
    assert caught[0].filename == __file__
    assert next(iter(loader))["X"].dtype == np.float64
    loader = asking(np.arange(20)).add_dataset(csr(20))
    with pytest.warns(UserWarning, match="Adding dataset with dtype"):
        loader.add_dataset(csr(20).astype(np.float64))
    assert next(iter(loader))["X"].dtype == np.float64  # though the window is of the first dataset only


def test_annbatch_layout(tmp_path):
    """float32 values, int32 pointers, no source-dtype, one chunk size for data, indices and indptr."""
    x, obs = csr(60), frame(60)
    root = zarr.open_group(tmp_path / "c.zarr", mode="w")
    root.attrs.update({"encoding-type": "annbatch-preshuffled", "encoding-version": "0.1.0"})
    group = root.create_group("dataset_0")
    parts = group.create_group("X")
    parts.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": list(x.shape)})
    for name in ("data", "indices", "indptr"):
        part = getattr(x, name)
        parts.create_array(name, data=part, chunks=(37,), shards=(74,))
    with quiet():
        ad.io.write_elem(group, "obs", obs)
        ad.io.write_elem(group, "var", genes())
        zarr.consolidate_metadata(root.store)
    stored = Collection(tmp_path / "c.zarr", x.toarray(), obs)
    check_epoch(make(stored, shuffle=True), stored)


# --- outputs


@needs_torch
@pytest.mark.parametrize("as_dense", [False, True])
def test_torch(collection, as_dense):
    import torch

    loader = make(collection, to="torch", shuffle=True, dense=as_dense)
    assert isinstance(loader, torch.utils.data.IterableDataset)
    batch = next(iter(loader))
    assert batch["X"].dtype == torch.float32
    assert batch["X"].layout == (torch.strided if as_dense else torch.sparse_csr)
    check_epoch(loader, collection)


@needs_jax
@pytest.mark.parametrize("as_dense", [False, True])
def test_jax(collection, as_dense):
    for batch in make(collection, to="jax", dense=as_dense):
        x = batch["X"] if as_dense else batch["X"].todense()
        np.testing.assert_array_equal(np.asarray(x), collection.x[batch["index"]])


@pytest.mark.parametrize(
    ("arguments", "name", "extra"),
    [
        ({"to": "torch"}, "torch", "torch"),
        ({"to": "jax"}, "jax", "jax"),
        ({"preload_to_gpu": True}, "cupy", "cupy-cuda13"),
    ],
)
def test_missing_packages(monkeypatch, arguments, name, extra):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "annbatch_dask.loader.output.find_spec", lambda package: None if package == name else find(package)
    )
    with pytest.raises(MissingPackageError, match=rf"Could not find {name}.* pip install 'annbatch-dask\[{extra}\]'"):
        Loader(**{"preload_to_gpu": False, **arguments})


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_ranks_of_a_package_that_is_not_installed(monkeypatch, name):
    for module in (name, f"{name}.distributed"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        MissingPackageError, match=rf"dist_info='{name}' needs .* pip install 'annbatch-dask\[{name}\]'"
    ):
        Loader(batch_size=4, dist_info=name)


# --- misuse


def new(**kwargs):
    return Loader(batch_size=5, **SMALL, **kwargs)


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda: Loader(batch_sampler=RandomSampler(5, 1, 5), chunk_size=5), ValueError, "Cannot specify chunk_size"),
        (lambda: Loader(batch_sampler=RandomSampler(5, 1, 5), seed=0, shuffle=False), ValueError, "shuffle, seed when"),
        (lambda: Loader(chunk_size=0), ValueError, "must be greater than 1"),
        (lambda: Loader(preload_nchunks=0), ValueError, "must be greater than 1"),
        (lambda: Loader(prefetch_bytes=0), ValueError, "prefetch_bytes is 0; it must be 1 byte or more"),
        (lambda: Loader(to="tensorflow"), ValueError, "to must be"),
        (lambda: Loader(shuffle=True, rng=True), TypeError, "rng must be a numpy.random.Generator"),
        (lambda: next(iter(new())), ValueError, "must be greater than 1"),
        (lambda: new().add_adatas([]), ValueError, "must be greater than 1"),
        (lambda: new().n_var, ValueError, "No datasets added yet"),
        (lambda: len(new()), ValueError, "No datasets added yet"),
        (lambda: new().dataset_type, IndexError, "No datasets"),
        (lambda: new().add_dataset([[1]]), TypeError, "Cannot add dataset of type"),
        (lambda: new().add_dataset(np.arange(5)), SourceError, r"of shape \(5,\) has no columns"),
        (lambda: new().add_dataset(zarr.array(np.arange(5))), SourceError, r"of shape \(5,\) has no columns"),
        (lambda: new().add_dataset(sp.csc_matrix((3, 3))), TypeError, "Cannot add dataset of type"),
        (lambda: new().add_adata(ad.AnnData(sp.csc_matrix((3, 3)))), TypeError, "X of type"),
        (lambda: new().add_dataset(csr()).add_dataset(matrix(5)), ValueError, "must be of the same type"),
        (lambda: new().add_dataset(csr()).add_dataset(csr()[:, :4]), ValueError, "same shape along the var axis"),
        (lambda: new().add_dataset(csr(), obs=[1]), TypeError, "obs must be a pandas DataFrame"),
        (lambda: new().add_dataset(csr(), var=[1]), TypeError, "var must be a pandas DataFrame"),
        (lambda: new().add_dataset(csr(), obs=frame(19)), ValueError, "obs has 19 rows, the dataset has 20"),
        (lambda: new().add_dataset(csr()).add_dataset(csr(), obs=frame(20)), ValueError, "without obs"),
        (lambda: new().add_dataset(csr(), obs=frame(20)).add_dataset(csr()), ValueError, "without obs"),
        (lambda: new().add_dataset(csr(), var=genes()).add_dataset(csr()), ValueError, "without var"),
        (lambda: new().add_dataset(csr()).add_dataset(csr(), var=genes()), ValueError, "with var"),
        (
            lambda: new().add_dataset(csr(), var=genes()).add_dataset(csr(), var=genes()[::-1]),
            ValueError,
            "All datasets must have identical var DataFrames",
        ),
        (lambda: list(asking([slice(15, 25)]).add_dataset(csr())), IndexError, "the loader has rows 0 to 19"),
        (lambda: list(asking(np.array([-1])).add_dataset(csr())), IndexError, "rows -1 to -1"),
        (lambda: list(asking(np.array([0.5])).add_dataset(csr())), TypeError, "1-D integer array"),
        (lambda: list(asking([slice(0, 5)], [np.array([5])]).add_dataset(csr())), IndexError, "the request has 5 rows"),
    ],
)
def test_misuse(act, error, message):
    with pytest.raises(error, match=message):
        act()


def test_genes_are_the_same_whichever_dtype_holds_their_names():
    one, two = genes(), genes()
    two.index = two.index.astype("string")
    assert new().add_dataset(csr(), var=one).add_dataset(csr(), var=two).n_obs == 40


def test_a_refused_dataset_leaves_the_loader_as_it_was():
    loader = new().add_dataset(csr(), obs=frame(20))
    with pytest.raises(ValueError, match="without obs"):
        loader.add_dataset(csr())
    assert loader.n_obs == 20
    assert len(list(loader)) == 4


def test_request_without_requests():
    sampler = Minimal([{"requests": [slice(0, 5)]}, {"splits": [np.arange(3)]}], 5, shuffle=False)
    iterator = iter(Loader(batch_sampler=sampler, preload_to_gpu=False).add_dataset(csr()))
    assert next(iterator)["X"].shape[0] == 5  # what was asked for before the mistake arrives
    with pytest.raises(KeyError, match="has no 'requests'"):
        next(iterator)


def test_csr_in_hdf5(tmp_path):
    import h5py

    ad.AnnData(csr()).write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad") as file, pytest.raises(TypeError, match="Cannot add CSRDataset backed by h5ad"):
        new().add_dataset(ad.io.sparse_dataset(file["X"]))


def test_collections(collection):
    loader = make(collection)
    with pytest.raises(RuntimeError, match="You should not add multiple collections"):
        loader.use_collection(collection)
    empty = copy.copy(collection)
    empty.is_empty = True
    empty.path = "/data/c.zarr"
    with pytest.raises(ValueError, match="no collection at /data/c.zarr.*DatasetCollection is empty"):
        new().use_collection(empty)


def narrower_after(n_whole):
    """A ``load_adata`` that finds fewer genes in what follows."""
    loaded = []

    def load(group):
        loaded.append(load_all_aligned(group))
        return loaded[-1] if len(loaded) <= n_whole else loaded[-1][:, :2].copy()

    return load


WIDE, NARROW = csr(20), csr(20)[:, :2]
ADDED = {
    "use_collection": lambda loader, c, bad: loader.use_collection(c, load_adata=narrower_after(1 if bad else 9)),
    "add_adatas": lambda loader, c, bad: loader.add_adatas([ad.AnnData(WIDE), ad.AnnData(NARROW if bad else WIDE)]),
    "add_datasets": lambda loader, c, bad: loader.add_datasets([WIDE, NARROW if bad else WIDE]),
    "obs that lack one": lambda loader, c, bad: loader.add_datasets([WIDE] * 2, obs=[frame(20)] * (1 if bad else 2)),
}


@pytest.mark.parametrize("how", ADDED)
def test_a_call_that_fails_adds_nothing(collection, how):
    loader, add = new(), ADDED[how]
    with pytest.raises((ValueError, TypeError)):
        add(loader, collection, True)
    assert loader.n_obs == 0
    add(loader, collection, False)
    rows = np.concatenate([batch["index"] for batch in loader])
    assert len(rows) == (len(collection.obs) if how == "use_collection" else 40)


@pytest.mark.parametrize("is_sparse", [False, True])
def test_other_byte_orders(is_sparse):
    x = matrix(20)
    made = csr(20)
    swapped = sp.csr_matrix((made.data.astype(">f4"), made.indices, made.indptr), shape=made.shape)
    for options in ({}, {"dtype": "float16", "dense": True}, {"dense": True}):
        loader = Loader(batch_size=20, preload_to_gpu=False, **options)
        (batch,) = loader.add_dataset(swapped if is_sparse else x.astype(">f4"))
        assert batch["X"].dtype.isnative
        np.testing.assert_array_equal(dense(batch["X"]), x)


def test_its_repr_says_what_it_has(collection):
    assert repr(new()) == "<Loader without data: use_collection or add_adatas adds some>"
    cells = f"{len(collection.obs):,} cells"
    some = repr(make(collection, where="row > 3", shuffle=True, seed=0))
    assert some.startswith(f"<Loader of {cells}, of which where= chooses x ")
    assert " columns, RandomSampler of batches of " in some
    assert repr(make(collection, shuffle=False)).startswith(f"<Loader of {cells} x ")


def test_own_load_adata(collection):
    def load(group):
        adata = load_all_aligned(group)
        adata.obs = adata.obs[["row"]]
        return adata

    loader = new().use_collection(collection, load_adata=load)
    assert all(list(batch["obs"]) == ["row"] for batch in loader)


def test_unreadable_x(tmp_path):
    group = write_zarr(ad.AnnData(sp.csc_matrix(matrix(5))), tmp_path / "a.zarr")
    with pytest.raises(TypeError, match="Unrecognized encoding type csc_matrix"):
        load_all_aligned(group)


def test_damaged_pointers(tmp_path):
    stored = write_collection(tmp_path / "c.zarr", sizes=(20,))
    pointers = zarr.open_group(stored.path, mode="r+")["dataset_0/X/indptr"]
    pointers[3] = 10**9
    with pytest.raises(ValueError, match="indptr does not describe 20 rows"):
        list(make(stored))


def test_damaged_columns(tmp_path):
    stored = write_collection(tmp_path / "c.zarr", sizes=(20,))
    columns = zarr.open_group(stored.path, mode="r+")["dataset_0/X/indices"]
    columns[7] = 1000
    with pytest.raises(RuntimeError, match="1 entries name a column beyond the 23"):
        list(make(stored, dense=True))


# --- copies


def test_shallow_copies_are_independent(collection):
    loader = make(collection, return_index=True)
    iterator = iter(loader)
    next(iterator)
    other = copy.copy(loader)
    other._batch_sampler = SequentialSampler(10, 1, 10, mask=slice(0, 20))
    other.add_dataset(ad.io.sparse_dataset(zarr.open_group(collection.path)["dataset_0/X"]), *_obs_var(collection))
    assert (loader.n_obs, other.n_obs) == (221, 351)
    assert (len(loader._obs), len(other._obs)) == (3, 4)
    assert [batch["index"].tolist() for batch in other] == [list(range(10)), list(range(10, 20))]
    with pytest.raises(RuntimeError, match="while the loader is being iterated"):
        loader.add_dataset(csr())
    iterator.close()
    check_epoch(loader, collection)


def _obs_var(collection):
    return collection.obs.iloc[:130], genes()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda loader: pickle.loads(pickle.dumps(loader))])
def test_deep_copies(collection, clone):
    loader = make(collection, shuffle=True, seed=1)
    next(iter(loader))
    expected = [batch["index"].tolist() for batch in clone(loader)]
    assert expected == [batch["index"].tolist() for batch in clone(loader)]
    assert expected == [batch["index"].tolist() for batch in loader]
    check_epoch(clone(loader), collection)


def test_generic():
    assert Loader[np.ndarray, np.ndarray] is not None
