"""What batches carry beside X, chosen genes, dtypes and transforms: always what anndata and scanpy give."""

from __future__ import annotations

import importlib.util
import pickle

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

from annbatch_dask.errors import SchemaError
from annbatch_dask.loader import Loader
from annbatch_dask.loader.backing import ZarrCsrSource
from annbatch_dask.loader.batch import Form
from annbatch_dask.loader.blocks import PickedBlock
from annbatch_dask.loader.reading import load_all_aligned
from annbatch_dask.transforms import NormalizeLog1p
from tests.loader.aligned import CHOSEN, EVERYTHING, PLAIN, SIZES, SMALL
from tests.loader.data import N_VAR, dense, genes, matrix, quiet, write_csr

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")


@pytest.fixture(scope="module")
def everything(adatas):
    """All rows of all datasets, by where they stand."""
    whole = {"X": np.concatenate([a.X.toarray() for a in adatas])}
    for kind in ("layers", "obsm"):
        for name in getattr(adatas[0], kind):
            if name is not None:
                whole[kind, name] = np.concatenate([dense(getattr(a, kind)[name]) for a in adatas])
    return whole


def same(found, expected):
    found = dense(found)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("as_dense", [False, True])
def test_everything_row_aligned_travels(adatas, stored, everything, where, as_dense):
    loader = Loader(**SMALL, **EVERYTHING, shuffle=True, dense=as_dense)
    loader = loader.add_adatas(adatas) if where == "memory" else loader.use_collection(stored)
    seen = []
    for batch in loader:
        assert list(batch) == ["X", "obs", "var", "index", "layers", "obsm"]
        same(batch["X"], everything["X"][batch["index"]])
        for kind, names in EVERYTHING.items():
            assert list(batch[kind]) == names
            for name in names:
                same(batch[kind][name], everything[kind, name][batch["index"]])
                is_sparse = name in ("counts", "protein") and not as_dense
                assert isinstance(batch[kind][name], sp.csr_matrix if is_sparse else np.ndarray)
        seen += batch["index"].tolist()
    assert sorted(seen) == list(range(sum(SIZES)))


def test_load_all_aligned_attaches_what_it_can_leave_on_disk(stored):
    first = load_all_aligned(next(iter(stored)))
    assert sorted(k for k in first.layers if k is not None) == ["counts", "scaled"]
    assert sorted(first.obsm) == ["image", "pca", "protein"]
    assert not len(first.var.columns)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_chosen_columns_of_obs(adatas, stored, where):
    loader = Loader(**SMALL, **PLAIN, obs_columns=["donor", "row"])
    loader = loader.add_adatas(adatas) if where == "memory" else loader.use_collection(stored)
    obs = pd.concat([batch["obs"] for batch in loader])
    pd.testing.assert_frame_equal(obs, pd.concat([a.obs[["donor", "row"]] for a in adatas]))
    bare = Loader(**SMALL, **PLAIN, obs_columns=[]).add_adatas(adatas)
    assert next(iter(bare))["obs"].columns.tolist() == []


@pytest.mark.filterwarnings("ignore:obs_codes of 'donor' are ranks")
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_codes_mean_the_same_in_every_dataset(adatas, stored, where):
    loader = Loader(**SMALL, **PLAIN, shuffle=True, obs_columns=["row"], obs_codes=["kind", "donor"])
    loader = loader.add_adatas(adatas) if where == "memory" else loader.use_collection(stored)
    meaning = loader.obs_categories
    assert meaning["kind"].tolist() == ["b", "a", "z", "c", "d"]
    assert meaning["donor"].tolist() == ["d0", "d1", "d2", "d3"]
    obs = pd.concat([a.obs for a in adatas])
    n_missing = 0
    for batch in loader:
        assert batch["obs"].columns.tolist() == ["row"]
        for name, codes in batch["obs_codes"].items():
            assert codes.dtype == np.int64
            expected = obs[name].iloc[batch["index"]].astype(object)
            found = [None if c < 0 else meaning[name][c] for c in codes]
            assert found == expected.where(expected.notna(), None).tolist()
            n_missing += (codes < 0).sum()
    assert n_missing == 4


@needs_torch
def test_torch_gets_tensors_of_everything(adatas, everything):
    import torch

    loader = Loader(**SMALL, to="torch", layers=["counts"], obsm=["pca"], obs_codes=["kind"]).add_adatas(adatas)
    for batch in loader:
        assert batch["X"].layout == batch["layers"]["counts"].layout == torch.sparse_csr
        same(batch["layers"]["counts"], everything["layers", "counts"][batch["index"]])
        same(batch["obsm"]["pca"], everything["obsm", "pca"][batch["index"]])
        assert batch["obs_codes"]["kind"].dtype == torch.int64


# --- chosen genes, dtypes, transforms


FORMS = [
    ("csr", np.uint16, False),
    ("csr", np.float64, True),
    ("dense", np.float32, False),
    ("dense", np.float32, True),
]


def sources(kind, x):
    """The rows in two datasets, as what the loader takes."""
    make = sp.csr_matrix if kind == "csr" else np.ascontiguousarray
    return [make(x[:20]), make(x[20:])]


@pytest.mark.parametrize(
    "names", [CHOSEN, sorted(CHOSEN, key=lambda g: int(g[1:])), [], [f"g{i}" for i in range(N_VAR)][::-1]]
)
@pytest.mark.parametrize(("kind", "dtype", "as_dense"), FORMS)
def test_chosen_genes_in_the_given_order(kind, dtype, as_dense, names):
    x = matrix(33).astype(dtype)
    x[5] = 0
    loader = Loader(**SMALL, shuffle=True, var_names=names, dense=as_dense)
    loader.add_datasets(sources(kind, x), var=[genes()] * 2)
    picked = [int(g[1:]) for g in names]
    assert loader.n_var == len(names)
    for batch in loader:
        same(batch["X"], x[batch["index"]][:, picked])
        assert batch["var"].index.tolist() == loader.var.index.tolist() == names
        if not isinstance(batch["X"], np.ndarray):
            assert batch["X"].has_canonical_format  # columns ascend, as torch expects


def test_layers_follow_chosen_genes_and_obsm_does_not(adatas, everything):
    picked = [int(g[1:]) for g in CHOSEN]
    for as_dense in (False, True):
        loader = Loader(**SMALL, **EVERYTHING, var_names=CHOSEN, dense=as_dense).add_adatas(adatas)
        for batch in loader:
            for name in EVERYTHING["layers"]:
                same(batch["layers"][name], everything["layers", name][batch["index"]][:, picked])
            for name in EVERYTHING["obsm"]:
                same(batch["obsm"][name], everything["obsm", name][batch["index"]])


def test_stored_integers(collection, dense_collection):
    for data in (collection, dense_collection):
        for as_dense in (False, True):
            loader = Loader(**SMALL, dtype="stored", dense=as_dense).use_collection(data)
            for batch in loader:
                same(batch["X"], data.x[batch["index"]].astype(np.uint16))


@pytest.mark.parametrize("names", [None, CHOSEN])
@pytest.mark.parametrize("kind", ["csr", "dense"])
@pytest.mark.parametrize("stored_as", ["uint16", "float32", "float64"])
def test_float16(kind, stored_as, names):
    x = (matrix(33) * 300 / (7 if stored_as != "uint16" else 1)).astype(stored_as)  # rounds, and overflows
    loader = Loader(**SMALL, shuffle=True, dense=True, dtype="float16", casting="unsafe", var_names=names)
    loader.add_datasets(sources(kind, x), var=[genes()] * 2)
    picked = slice(None) if names is None else [int(g[1:]) for g in names]
    for batch in loader:
        with np.errstate(over="ignore"):
            same(batch["X"], x[batch["index"]][:, picked].astype(np.float16))


WIDE = sp.csr_matrix(np.array([[0, 300, 70_000], [0, 0, 1]], np.float32))
TWICE = sp.csr_matrix((np.array([200, 100], np.uint16), np.array([1, 1]), np.array([0, 2])), shape=(1, 3))


@pytest.mark.parametrize("as_dense", [False, True])
@pytest.mark.parametrize(
    ("x", "dtype", "message"),
    [
        (WIDE, "uint8", "lie between 0 and 70000: it holds whole numbers from 0 to 255; ask for a wider dtype"),
        (WIDE, "int8", "whole numbers from -128 to 127"),
        (WIDE.toarray(), "uint16", "whole numbers from 0 to 65535"),
        (WIDE.astype(np.int64), "uint16", "whole numbers from 0 to 65535"),
        (WIDE.toarray()[:, ::-1], "bool", "whole numbers from 0 to 1"),
        (WIDE.toarray(), "float16", "numbers from -65504 to 65504"),
        (WIDE / 7, "int64", "lie between 0 and 10000, not all of them whole"),
        (sp.csr_matrix(np.array([[np.nan, 2.0]])), "int64", "between 0 and 2, not all of them whole"),
        (np.array([[0.0, 1e39]]), "float32", r"between 0 and 1e[+]39: it holds numbers from -3.40282e[+]38"),
        (np.array([[-1, 2]], np.int8), "uint64", "lie between -1 and 2"),
        (TWICE, "uint8", "lie between 0 and 300"),
    ],
)
def test_a_dtype_that_does_not_hold_the_values_is_refused_up_front(x, dtype, message, as_dense):
    if dtype == "float16" and not as_dense:
        return
    with pytest.raises(SchemaError, match=f"dtype='{dtype}' may not hold the values of X, which .*{message}"):
        new(dense=as_dense, dtype=dtype).add_dataset(x)
    with np.errstate(all="ignore"):
        (batch,) = new(dense=as_dense, dtype=dtype, casting="unsafe").add_dataset(x)
    assert batch["X"].dtype == dtype


@pytest.mark.parametrize(
    ("x", "dtype"),
    [
        (WIDE, "uint32"),
        (WIDE, "int32"),
        (WIDE, "float64"),
        (WIDE.astype(np.float64), "float32"),
        (WIDE.astype(np.int64), "float32"),
        (WIDE / 2000, "float16"),
        (np.array([[0, 1, 1]]), "bool"),
        (np.array([[np.nan, np.inf, -np.inf]]), "float32"),
    ],
)
def test_a_dtype_that_holds_the_values_is_delivered(x, dtype):
    (batch,) = new(dense=True, dtype=dtype).add_dataset(x)
    same(batch["X"], dense(x).astype(dtype))


def test_the_dtype_does_not_depend_on_the_window():
    a, b = np.ones((20, 3), np.float32), np.full((20, 3), 0.1)
    with pytest.warns(UserWarning, match="batches get a dtype that holds both"):
        loader = new().add_datasets([a, b])  # a window of each
    assert {batch["X"].dtype for batch in loader} == {np.dtype(np.float64)}
    adatas = [ad.AnnData(a, layers={"n": sp.csr_matrix(a.astype(k))}) for k in (np.int32, np.float64)]
    loader = new(layers=["n"]).add_adatas(adatas)
    assert {batch["layers"]["n"].dtype for batch in loader} == {np.dtype(np.float64)}


@needs_torch
@pytest.mark.parametrize("as_dense", [False, True])
@pytest.mark.parametrize("named", ["torch", "text"])
def test_bfloat16_rounds_as_torch_does(as_dense, named):
    import torch

    x = np.random.default_rng(0).standard_normal((33, N_VAR)).astype(np.float32) * 1e3
    x[3, 3:6] = np.nan, np.inf, -np.inf
    dtype = torch.bfloat16 if named == "torch" else "bfloat16"
    loader = Loader(**SMALL, to="torch", dense=as_dense, dtype=dtype).add_datasets(sources("csr", x))
    for batch in loader:
        found = batch["X"] if as_dense else batch["X"].to_dense()
        assert found.dtype == torch.bfloat16
        expected = torch.from_numpy(x[batch["index"]]).to(torch.bfloat16)
        assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("names", [None, ["a", "c"]])
def test_entries_named_twice_are_added_up_in_every_form(dtype, names):
    x = sp.csr_matrix((np.array([1, 2, 4, 8.0]), np.array([1, 1, 0, 2]), np.array([0, 3, 4])), shape=(2, 3))
    var = pd.DataFrame(index=["c", "a", "b"])
    loader = Loader(batch_size=2, dense=True, preload_to_gpu=False, dtype=dtype, var_names=names)
    (batch,) = loader.add_dataset(x, var=var)
    whole = np.array([[4, 3, 0], [0, 0, 8]], dtype)
    same(batch["X"], whole if names is None else whole[:, [1, 0]])


CYCLE = ["g7", "g0", "g22", "g3", "g14"]  # no permutation that undoes itself, in the order of the data or of names


@pytest.fixture(scope="module")
def packed(adatas, tmp_path_factory):
    """Rows on disk whose chosen entries are picked while they are decoded."""
    made, path = adatas[0].copy(), tmp_path_factory.mktemp("packed")
    write_csr(zarr.open_group(path / "x", mode="w"), "X", made.X, ("crc", 40, 4, "uint16", "uint16"))
    made.X = ad.io.sparse_dataset(zarr.open_group(path / "x", mode="r")["X"])
    return made


@pytest.mark.parametrize("names", [CYCLE, sorted(CYCLE), ["g5"], CYCLE[::-1]], ids=["cycle", "sorted", "one", "back"])
@pytest.mark.parametrize(
    "form",
    [
        {},
        {"dense": True},
        {"dense": True, "dtype": "float16", "casting": "unsafe"},
        {"transform": NormalizeLog1p(50)},
        {"dense": True, "transform": NormalizeLog1p(50)},
        {"dense": True, "dtype": "float16", "transform": NormalizeLog1p(50)},
    ],
)
def test_entries_that_are_left_out_early_are_missed_by_nobody(packed, monkeypatch, names, form):
    def read():
        loader = Loader(**SMALL, **PLAIN, shuffle=True, seed=0, var_names=names, **form).add_adata(packed)
        return [(dense(batch["X"]), batch["index"]) for batch in loader]

    picked = []
    opened = ZarrCsrSource.open_wanted

    def open_wanted(self, *args, **options):
        block, tasks = opened(self, *args, **options)
        picked.append(isinstance(block, PickedBlock))
        return block, tasks

    monkeypatch.setattr(ZarrCsrSource, "open_wanted", open_wanted)
    early = read()
    assert all(picked)
    n_picked = len(picked)
    assert n_picked
    monkeypatch.setattr(Form, "wanted", None)
    late = read()
    assert len(picked) == n_picked
    for (x, index), (expected, its_index) in zip(early, late, strict=True):
        np.testing.assert_array_equal(x, expected)
        np.testing.assert_array_equal(index, its_index)
        assert x.dtype == expected.dtype


def by_scanpy(x, target_sum):
    """What scanpy makes of dense rows; for CSR it gives the same, after seconds of compiling."""
    import scanpy

    adata = ad.AnnData(x.copy())
    with quiet():  # some cells have no counts
        scanpy.pp.normalize_total(adata, target_sum=target_sum)
    scanpy.pp.log1p(adata)
    return dense(adata.X)


@pytest.mark.parametrize("names", [None, CHOSEN])
@pytest.mark.parametrize(("kind", "dtype", "as_dense"), FORMS)
@pytest.mark.parametrize("target_sum", [1e4, 50])
def test_normalised_as_scanpy_does(kind, dtype, as_dense, names, target_sum):
    x = matrix(33).astype(dtype)
    x[4] = 0
    x[7, 2] = 60_000
    if dtype != np.uint16:
        x[9] += 0.3
    expected = by_scanpy(x, target_sum)
    if names:
        expected = expected[:, [int(g[1:]) for g in names]]
    loader = Loader(**SMALL, shuffle=True, dense=as_dense, var_names=names, transform=NormalizeLog1p(target_sum))
    loader.add_datasets(sources(kind, x), var=[genes()] * 2)
    for batch in loader:
        assert batch["X"].dtype == (np.float64 if dtype == np.float64 else np.float32)
        np.testing.assert_allclose(dense(batch["X"]), expected[batch["index"]], rtol=1e-6)


def test_normalised_in_half_precision():
    x = matrix(33)
    loader = Loader(**SMALL, dense=True, dtype="float16", transform=NormalizeLog1p()).add_datasets(sources("csr", x))
    for batch in loader:
        assert batch["X"].dtype == np.float16
        np.testing.assert_allclose(batch["X"], by_scanpy(x, 1e4)[batch["index"]], rtol=1e-3)


def first_rows(batch):
    return batch["index"], batch["X"][:1]


def add_name(batch):
    return batch | {"name": f"batch of {len(batch['index'])}", "var": None}


def test_a_function_changes_what_is_yielded(adatas):
    loader = Loader(**SMALL, **PLAIN, transform=[NormalizeLog1p(), add_name]).add_adatas(adatas)
    batches = list(pickle.loads(pickle.dumps(loader)))
    assert {batch["name"] for batch in batches} == {"batch of 4", "batch of 3"}
    np.testing.assert_allclose(np.expm1(dense(batches[0]["X"])).sum(1), 1e4, rtol=1e-5)
    loader = Loader(**SMALL, **PLAIN, transform=first_rows).add_adatas(adatas)
    assert all(isinstance(pair, tuple) for pair in loader)


def test_a_function_that_fails_is_heard_of_in_its_turn(adatas):
    def fail_late(batch):
        if 8 in batch["index"]:
            message = "row 8 is not to my taste"
            raise LookupError(message)
        return batch

    iterator = iter(Loader(**SMALL, **PLAIN, transform=fail_late).add_adatas(adatas))
    assert [next(iterator)["index"][0] for _ in range(2)] == [0, 4]
    with pytest.raises(LookupError, match="row 8"):
        next(iterator)


# --- misuse


def new(**kwargs):
    return Loader(**{**SMALL, **PLAIN, **kwargs})


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda a: new(layers=["raw"]).add_adata(a), ValueError, r"layers\['raw'\] is asked for.*counts, scaled"),
        (lambda a: new(obsm=["umap"]).add_adata(a), ValueError, "of obsm: image, pca, protein"),
        (lambda a: new(layers=["raw"]).add_dataset(a.X), ValueError, "use add_adata"),
        (lambda a: new(layers="counts"), TypeError, "give a list of names"),
        (lambda a: new(var_names=["g1", "g1"]), ValueError, "names 'g1' 2 times"),
        (lambda a: new(var_names=["g1", "gx"]).add_adata(a), ValueError, "1 of the names .* 23 of var: 'gx'"),
        (lambda a: new(var_names=["g1"]).add_dataset(a.X), ValueError, "have no var"),
        (lambda a: new(obs_columns=["age"]).add_adata(a), ValueError, "of obs: 'age'"),
        (lambda a: new(obs_codes=["age"]).add_adata(a), ValueError, "of obs: 'age'"),
        (lambda a: new(obs_codes=["age"]).add_dataset(a.X), ValueError, "has no obs"),
        (lambda a: new(dtype="bfloat16"), ValueError, "needs to='torch'"),
        (lambda a: new(dtype="uint8", casting="safe"), ValueError, "casting must be None or 'unsafe', got 'safe'"),
        (lambda a: new(dtype="float16").add_adata(a), ValueError, "scipy has no sparse float16"),
        (lambda a: new(transform=NormalizeLog1p(), dtype="int32"), ValueError, "makes floats"),
        (lambda a: new(transform=NormalizeLog1p(), dtype="stored"), ValueError, "makes floats"),
        (lambda a: new(transform=[print, NormalizeLog1p()]), TypeError, "give it once, and first"),
        (lambda a: new(transform="log"), TypeError, "must be callable"),
        (lambda a: NormalizeLog1p(0), ValueError, "must be greater than 0"),
        (lambda a: new(transform=NormalizeLog1p()).add_dataset(np.zeros((3, 2, 2))), ValueError, "shape .3, 2, 2."),
    ],
)
def test_misuse(adatas, act, error, message):
    with pytest.raises(error, match=message):
        act(adatas[0])


@pytest.mark.parametrize("asked", [{"obs_columns": ["typ"]}, {"obs_columns": [], "obs_codes": ["typ"]}])
def test_a_column_that_is_not_there_is_refused_with_those_that_are(collection, asked):
    with pytest.raises(ValueError, match="not among the 3 of obs: 'typ'; it has 'row', "):
        new(**asked).use_collection(collection)


def test_matrices_beside_x_must_be_alike(adatas):
    other = adatas[1].copy()
    other.obsm["pca"] = np.zeros((1, 4))
    loader = new(obsm=["pca"]).add_adata(adatas[0])
    with pytest.raises(ValueError, match=r"obsm\['pca'\] must be alike .* shape \(3,\), and .* shape \(4,\)"):
        loader.add_adata(other)
    assert loader.n_obs == SIZES[0]
    frames = adatas[1].copy()
    frames.obsm["pca"] = pd.DataFrame({"a": [1]}, index=frames.obs_names)
    with pytest.raises(TypeError, match=r"Cannot add obsm\['pca'\] of type"):
        loader.add_adata(frames)
