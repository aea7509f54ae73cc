"""Every element of the inputs is carried with its rows, or named: none is dropped silently."""

import json
import warnings
from functools import partial

import anndata as ad
import dask
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

from annbatch_dask import DatasetCollection, Loader
from annbatch_dask.errors import SchemaError
from tests.etl.everything import GENES, RAW, make, write
from tests.etl.inputs import dense_x


def build(path, paths, *, left_out=(), **options):
    """A build; with exactly these elements left out, which a warning names."""
    with dask.config.set(scheduler="synchronous"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        collection = DatasetCollection(path).add_adatas(paths, **{"seed": 0, "dataset_size": 25} | options)
    said = "".join(str(w.message) for w in caught if "left out" in str(w.message))
    assert {part.split(" (")[0] for part in said.removeprefix("left out: ").split("; ")[0].split(", ") if part} == set(
        left_out
    )
    assert collection.verify().ok
    return collection


def joined(inputs, names):
    """What ``anndata.concat`` makes of the inputs, in the order of the collection."""
    out = ad.concat(inputs, join="outer", fill_value=0)[names].copy()
    raw = ad.concat([a.raw.to_adata() for a in inputs], join="outer")[names].copy()
    return out, raw


def rows_of(collection):
    found = [ad.io.read_zarr(g) for g in collection]
    raw = ad.concat([a.raw.to_adata() for a in found]) if all(a.raw is not None for a in found) else None
    return ad.concat(found), raw


def dense(values):
    return values.toarray() if sp.issparse(values) else np.asarray(values)


PAIRWISE = {"obsp/knn"}
OF_SEVERAL = PAIRWISE | {"varm/load", "varp/near", "uns/note", "uns/deep", "uns/file"}


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
@pytest.mark.parametrize("how", ["h5ad", "zarr", pytest.param("memory", marks=pytest.mark.chaos)])
def test_everything_row_aligned_travels_with_its_rows(tmp_path, how):
    inputs = [make(0), make(1, n_obs=20)]
    paths = write(tmp_path, inputs, "zarr" if how == "zarr" else "h5ad")
    load = ad.read_h5ad if how == "memory" else None
    collection = build(tmp_path / "o.zarr", paths, load_adata=load, left_out=OF_SEVERAL)
    out, raw = rows_of(collection)
    want, want_raw = joined(inputs, out.obs_names)
    assert out.n_obs == 50
    assert out.var_names.tolist() == want.var_names.tolist()
    assert raw.var_names.tolist() == want_raw.var_names.tolist()
    np.testing.assert_array_equal(dense_x(out), dense_x(want))
    np.testing.assert_array_equal(dense_x(raw), dense_x(want_raw))
    np.testing.assert_array_equal(dense(out.layers["twice"]), dense(want.layers["twice"]))
    plain = ad.concat(inputs, join="outer")[out.obs_names].layers["plain"]
    np.testing.assert_array_equal(dense(out.layers["plain"]), dense(plain))  # NaN where a gene is absent
    for key in ("place", "few"):
        np.testing.assert_array_equal(dense(out.obsm[key]), dense(want.obsm[key]))
    pd.testing.assert_frame_equal(out.obsm["frame"], want.obsm["frame"])
    assert collection.verify(against=paths, load_adata=load).ok


def test_all_of_a_single_input_is_kept(tmp_path):
    one = make(0)
    collection = build(tmp_path / "o.zarr", write(tmp_path, [one]), left_out=PAIRWISE)
    for group in collection:
        out = ad.io.read_zarr(group)
        pd.testing.assert_frame_equal(out.var, one.var)
        pd.testing.assert_frame_equal(out.raw.var, one.raw.var)
        np.testing.assert_array_equal(out.varm["load"], one.varm["load"])
        np.testing.assert_array_equal(out.varp["near"], one.varp["near"])
        assert out.uns["note"] == "x"
        np.testing.assert_array_equal(out.uns["deep"]["k"], np.arange(3))


def test_gene_wise_elements_follow_their_genes_into_a_subset(tmp_path):
    one = make(0)
    collection = build(tmp_path / "o.zarr", write(tmp_path, [one]), left_out=PAIRWISE, var_subset=["c", "a"])
    out = ad.io.read_zarr(next(iter(collection)))
    want = one[:, ["a", "c"]]
    assert out.var_names.tolist() == ["a", "c"]
    np.testing.assert_array_equal(out.varm["load"], want.varm["load"])
    np.testing.assert_array_equal(out.varp["near"], want.varp["near"])


@pytest.mark.parametrize(
    "merge", ["unique", "first", *(pytest.param(how, marks=pytest.mark.chaos) for how in ("same", "only"))]
)
def test_merge_is_that_of_anndata(tmp_path, merge):
    inputs = [make(0), make(1, genes=GENES[0], raw=RAW[0])]
    want = ad.concat(inputs, join="outer", merge=merge, uns_merge=merge)
    kept = {f"{kind}/{key}" for kind in ("varm", "varp", "uns") for key in getattr(want, kind)}
    collection = build(tmp_path / "o.zarr", write(tmp_path, inputs), merge=merge, left_out=OF_SEVERAL - kept)
    out = ad.io.read_zarr(next(iter(collection)))
    pd.testing.assert_frame_equal(out.var, want.var, check_column_type=False)
    assert set(out.uns) == set(want.uns)
    assert set(out.varm) == set(want.varm)


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
@pytest.mark.parametrize(
    ("merge", "load_annotation_index"),
    [
        (None, True),
        ("same", False),
        *(pytest.param(how, True, marks=pytest.mark.chaos) for how in ("same", "unique", "first", "only")),
    ],
)
def test_inputs_that_are_lazy_throughout_give_what_files_do(tmp_path, merge, load_annotation_index):
    """``anndata.experimental.read_lazy`` as it is: var, obs and raw.var are Dataset2D, varm and uns dask arrays."""
    inputs = [make(0), make(1, genes=GENES[0], raw=RAW[0])]
    for a in inputs:
        a.obs["zeta"], a.obs["alpha"], a.var["symbol"] = 1.0, pd.Categorical(["x"] * a.n_obs), ["q", "r", "s"]
    paths = write(tmp_path, inputs, "zarr")
    load = partial(ad.experimental.read_lazy, load_annotation_index=load_annotation_index)
    kept = ad.concat(inputs, join="outer", merge=merge, uns_merge=merge)
    kept = {f"{kind}/{key}" for kind in ("varm", "varp", "uns") for key in getattr(kept, kind)}
    options = {"merge": merge, "left_out": OF_SEVERAL - kept, "dataset_size": 50}
    found = build(tmp_path / "lazy.zarr", paths, load_adata=load, **options)
    want = build(tmp_path / "files.zarr", paths, **options)
    one, two = (ad.io.read_zarr(next(iter(c))) for c in (found, want))
    assert one.obs.columns.tolist() == ["row", "zeta", "alpha", "src_path"]
    pd.testing.assert_frame_equal(one.obs, two.obs)
    pd.testing.assert_frame_equal(
        one.var, two.var, check_dtype=False
    )  # strings that anndata read lazily may be missing
    pd.testing.assert_frame_equal(one.raw.var, two.raw.var, check_dtype=False)
    assert one.uns.keys() == two.uns.keys()
    for key in two.varm:
        np.testing.assert_array_equal(one.varm[key], two.varm[key])
    assert {d.fingerprint for d in found.manifest.datasets} == {d.fingerprint for d in want.manifest.datasets}
    assert found.verify(against=paths, load_adata=load).ok


def test_elements_choose(tmp_path):
    paths = write(tmp_path, [make(0), make(1)])
    collection = build(tmp_path / "o.zarr", paths, elements=["layers/twice", "obsm/frame", "obs"])
    out = ad.io.read_zarr(next(iter(collection)))
    assert (set(out.layers) - {None}, set(out.obsm), out.raw) == ({"twice"}, {"frame"}, None)
    assert set(out.obs.columns) == {"row", "src_path"}
    assert collection.manifest.builds[0].elements == ("layers/twice", "obs", "obsm/frame")
    assert collection.verify(against=paths).ok


def test_elements_exclude(tmp_path):
    paths = write(tmp_path, [make(0), make(1)])
    excluded = ["-obsp", "-varm", "-varp", "-uns", "-raw", "-obsm/few", "-obs/row"]
    collection = build(tmp_path / "o.zarr", paths, elements=excluded)
    out = ad.io.read_zarr(next(iter(collection)))
    assert (set(out.layers) - {None}, set(out.obsm), out.raw) == ({"twice", "plain"}, {"place", "frame"}, None)
    assert set(out.obs.columns) == {"src_path"}
    assert collection.verify(against=paths).ok


@pytest.mark.parametrize(
    ("elements", "error", "words"),
    [
        (["layers/none"], SchemaError, "has no layers/none, which elements names"),
        (["obsp"], SchemaError, "obsp/knn, which elements names, is in 2 of 2 inputs .* obsp never can"),
        (["layers/only here"], SchemaError, "has no layers/only here"),
        (["-X"], ValueError, "elements names 'X'"),
        (["colour"], ValueError, "elements names 'colour'; give names such as X, raw, layers"),
        ("layers", TypeError, "elements is one string"),
    ],
)
def test_what_is_named_and_not_there_is_refused(tmp_path, elements, error, words):
    inputs = [make(0), make(1)]
    inputs[0].layers["only here"] = inputs[0].X
    paths = write(tmp_path, inputs)
    with pytest.raises(error, match=words):
        DatasetCollection(tmp_path / "o.zarr").plan_adatas(paths, seed=0, elements=elements)


def test_what_only_some_inputs_have_is_named(tmp_path):
    inputs = [make(0), make(1)]
    inputs[0].layers["only here"] = inputs[0].X
    inputs[1].obsm["one frame"] = inputs[1].obsm["frame"]
    paths = write(tmp_path, inputs)
    left_out = OF_SEVERAL | {"layers/only here", "obsm/one frame"}
    plan = DatasetCollection(tmp_path / "o.zarr").plan_adatas(paths, seed=0)
    assert plan.left_out["layers/only here"] == [str(paths[0])]
    assert "left out" in repr(plan)
    build(tmp_path / "o.zarr", paths, left_out=left_out)


@pytest.mark.filterwarnings("ignore:Support for Awkward Arrays", "ignore:Consolidated metadata")
@pytest.mark.parametrize("how", ["file", "memory"])
def test_what_cannot_be_carried_is_refused_by_name_unless_excluded(tmp_path, how):
    ak = pytest.importorskip("awkward")

    one = make(0)
    one.obsm["lists"] = ak.Array([[0] * (i % 3) for i in range(one.n_obs)])
    one.obsm["times"] = np.zeros((one.n_obs, 2), complex)
    one.obsm["waves"] = sp.csr_matrix(np.eye(one.n_obs, 2, dtype=complex))
    paths = write(tmp_path, [one])
    load = ad.read_h5ad if how == "memory" else None
    with pytest.raises(
        SchemaError,
        match=r"obsm/lists, obsm/times, obsm/waves cannot be carried.*\['-obsm/lists', '-obsm/times', '-obsm/waves'\]",
    ):
        DatasetCollection(tmp_path / "o.zarr").plan_adatas(paths, seed=0, load_adata=load)
    elements = ["-obsm/times", "-obsm/waves", "-obsm/lists", "-obsp"]
    collection = build(tmp_path / "o.zarr", paths, load_adata=load, elements=elements)
    assert "lists" not in ad.io.read_zarr(next(iter(collection))).obsm


def with_images(inputs, *, shape=(4, 3, 2)):
    """The inputs with an image a cell, whose values say which cell it is, and one of no pixels."""
    for a in inputs:
        numbers = np.arange(a.n_obs * np.prod(shape)) + 1000 * int(a.obs_names[0][0])
        a.obsm["image"] = numbers.reshape(a.n_obs, *shape).astype(np.uint16)
        a.obsm["nothing"] = np.zeros((a.n_obs, 0, 3), np.float32)
    return inputs


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
@pytest.mark.parametrize("how", ["h5ad", "zarr", pytest.param("memory", marks=pytest.mark.chaos), "lazy"])
def test_images_travel_with_their_cells(tmp_path, how):
    """Elements of obsm may have any number of dimensions: in builds, batches, views, and what checks them."""
    inputs = with_images([make(0), make(1, n_obs=20)])
    paths = write(tmp_path, inputs, "zarr" if how in ("zarr", "lazy") else "h5ad")
    load = {"memory": ad.read_h5ad, "lazy": images_alone}.get(how)
    left_out = set() if how == "lazy" else OF_SEVERAL
    collection = build(tmp_path / "o.zarr", paths[:1], load_adata=load, left_out=left_out & PAIRWISE)
    collection = build(tmp_path / "o.zarr", paths[1:], load_adata=load, left_out=left_out & PAIRWISE)
    assert collection.verify(against=paths, load_adata=load).ok
    out = ad.concat([ad.io.read_zarr(g) for g in collection])
    want = ad.concat(inputs, join="outer")[out.obs_names].obsm
    for key in ("image", "nothing"):
        np.testing.assert_array_equal(out.obsm[key], want[key])
    found = collection.to_lazy().obsm["image"][5:9]
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found.compute(), want["image"][5:9])
    loader = Loader(batch_size=8, layers=[], obsm=["image"], preload_to_gpu=False, return_index=True)
    for batch in loader.use_collection(collection):
        np.testing.assert_array_equal(batch["obsm"]["image"], want["image"][batch["index"]])


def images_alone(path):
    """The images of a store as a dask array that is cut through every axis."""
    group = zarr.open_group(path, mode="r")
    images = {key: da.from_zarr(group[f"obsm/{key}"]) for key in ("image", "nothing")}
    images["image"] = images["image"].rechunk((7, 2, 1, 2))
    obs = ad.io.read_elem(group["obs"])
    return ad.AnnData(X=ad.io.sparse_dataset(group["X"]), obs=obs, var=ad.io.read_elem(group["var"]), obsm=images)


def test_images_of_different_sizes_are_refused(tmp_path):
    inputs = [*with_images([make(0)]), *with_images([make(1)], shape=(3, 4, 2))]
    with pytest.raises(
        SchemaError, match=r"obsm/image has rows of shape \(4, 3, 2\) in .* and rows of shape \(3, 4, 2\)"
    ):
        DatasetCollection(tmp_path / "o.zarr").plan_adatas(write(tmp_path, inputs), seed=0)


# --- which matrix is X ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["file", pytest.param("memory", marks=pytest.mark.chaos)])
def test_raw_becomes_x(tmp_path, how):
    inputs = [make(0), make(1)]
    paths = write(tmp_path, inputs)
    load = ad.read_h5ad if how == "memory" else None
    collection = build(tmp_path / "o.zarr", paths, load_adata=load, counts="raw/X", left_out=OF_SEVERAL)
    out, raw = rows_of(collection)
    want = ad.concat([a.raw.to_adata() for a in inputs], join="outer")[out.obs_names]
    assert raw is None
    assert out.var_names.tolist() == want.var_names.tolist()
    np.testing.assert_array_equal(dense_x(out), dense_x(want))
    twice = joined(inputs, out.obs_names)[0]  # a layer keeps its values on its own genes
    np.testing.assert_array_equal(dense(out[:, twice.var_names].layers["twice"]), dense(twice.layers["twice"]))
    assert {s.counts for s in collection.manifest.sources} == {"raw/X"}
    assert collection.manifest.matrices["X"].dtype == "uint8"
    assert collection.verify(against=paths, load_adata=load).ok


def test_the_counts_are_chosen_file_by_file(tmp_path):
    """One file has its counts in X, the other in a layer."""
    normal, plain = make(0), make(1)
    normal.layers["counts"] = sp.csr_matrix(np.round(np.expm1(normal.X.toarray())))
    plain.X = sp.csr_matrix(np.round(np.expm1(plain.X.toarray())))
    paths = write(tmp_path, [normal, plain])
    target = DatasetCollection(tmp_path / "o.zarr")
    with pytest.raises(SchemaError, match=r"X of .*1\.h5ad holds whole numbers and X of .*0\.h5ad does not"):
        target.plan_adatas(paths, seed=0)
    assert "fractions" in repr(target.plan_adatas(paths, seed=0, allow_mixed_counts=True))
    for counts in (
        {str(paths[0]): "layers/counts"},
        {"*0.h5ad": "layers/counts", "*": "X"},
        {"*": "no", **dict.fromkeys(paths, "X"), paths[0]: "layers/counts"},
    ):
        plan = target.plan_adatas(paths, seed=0, counts=counts)
        assert "X from   layers/counts in 1 source: whole numbers; X in 1 source: whole numbers" in repr(plan)
    collection = build(target.path, paths, counts={paths[0]: "layers/counts"}, left_out=OF_SEVERAL)
    out, _ = rows_of(collection)
    for a in (normal, plain):
        a.X = a.layers["counts"] if "counts" in a.layers else a.X
    np.testing.assert_array_equal(dense_x(out), dense_x(joined([normal, plain], out.obs_names)[0]))
    assert collection.verify(against=paths).ok


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ("layers/none", "has no layers/none, which counts names"),
        ({"other.h5ad": "X"}, "counts names other.h5ad, which is none"),
        ({"*.h5": "X"}, r"counts names \*.h5, which is none of the 1 inputs; give paths, or patterns of them"),
    ],
)
def test_counts_that_are_not_there_are_refused(tmp_path, counts, words):
    paths = write(tmp_path, [make(0)])
    with pytest.raises(ValueError, match=words):
        DatasetCollection(tmp_path / "o.zarr").plan_adatas(paths, seed=0, counts=counts)


def test_new_inputs_of_another_scale_are_refused(tmp_path):
    paths = write(tmp_path, [make(0), make(1)])
    build(tmp_path / "o.zarr", paths[:1], counts="raw/X", left_out=PAIRWISE | {"varm/load", "varp/near"})
    with pytest.raises(SchemaError, match="holds whole numbers"), dask.config.set(scheduler="synchronous"):
        DatasetCollection(tmp_path / "o.zarr").add_adatas(paths[1:], seed=1)


# --- extending -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "genes"),
    [
        *(pytest.param(mode, "collection", marks=pytest.mark.chaos) for mode in ("extend", "append")),
        ("reshuffle", "union"),
    ],
)
def test_an_extension_carries_everything(tmp_path, mode, genes):
    inputs = [make(0), make(1, n_obs=20)]
    paths = write(tmp_path, inputs)
    build(tmp_path / "o.zarr", paths[:1], left_out=PAIRWISE)
    left_out = PAIRWISE if genes == "collection" else OF_SEVERAL
    collection = build(tmp_path / "o.zarr", paths[1:], mode=mode, genes=genes, left_out=left_out)
    out, raw = rows_of(collection)
    want, want_raw = joined(inputs, out.obs_names)
    for found, expected in ((out, want), (raw, want_raw)):
        np.testing.assert_array_equal(dense_x(found), dense_x(expected[:, found.var_names]))
    assert set(out.var_names) == (set(want.var_names) if genes == "union" else set(GENES[0]))
    np.testing.assert_array_equal(out.obsm["place"], want.obsm["place"])
    pd.testing.assert_frame_equal(out.obsm["frame"], want.obsm["frame"])
    assert collection.verify(against=paths).ok


def test_nothing_of_it_depends_on_the_run(tmp_path):
    paths = write(tmp_path, [make(0), make(1)])
    one, two = (build(tmp_path / f"{k}.zarr", paths, left_out=OF_SEVERAL) for k in "ab")
    a, b = (json.dumps(c.manifest.to_json(), sort_keys=True) for c in (one, two))
    assert a == b
