"""Values are in the collection exactly as in the inputs, or the inputs are refused."""

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

from annbatch_dask import DatasetCollection
from annbatch_dask.errors import SchemaError
from annbatch_dask.testing import make_adata
from tests.etl.inputs import dense_x

pytestmark = pytest.mark.usefixtures("in_this_process")

GENES = [f"g{i}" for i in range(12)]
HUGE = 2**60 + 1  # no float64


def small(n=6, seed=0, **obs):
    a = make_adata(n, GENES, seed=seed)
    a.obs = a.obs.assign(**obs)
    return a


def write(adata, path):
    adata.write_h5ad(path)
    return path


def build(path, paths, **options):
    return DatasetCollection(path).add_adatas(paths, **{"seed": 0} | options)


def contents(collection):
    return ad.concat([ad.io.read_zarr(g) for g in collection], join="outer")


def replaced(path, **arrays):
    """Put other arrays in the place of some of X's."""
    with h5py.File(path, "r+") as f:
        for name, change in arrays.items():
            values = change(f["X"][name][:])
            del f["X"][name]
            f["X"].create_dataset(name, data=values)
    return path


def with_first(value, dtype=np.int64):
    def change(values):
        values = values.astype(dtype)
        values[0] = value
        return values

    return change


# --- indices and pointers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [2**32 + 1, -1, -(2**32) + 1, len(GENES)])
def test_column_indices_beyond_the_matrix_are_refused(tmp_path, index):
    path = replaced(write(small(), tmp_path / "a.h5ad"), indices=with_first(index))
    with pytest.raises(SchemaError, match="column indices run from .* in a matrix of 12 columns"):
        build(tmp_path / "o.zarr", [path])


def test_column_indices_in_memory_are_refused_too(tmp_path):
    def load(path):
        a = ad.read_h5ad(path)
        a.X.indices = with_first(2**32 + 1)(a.X.indices)
        return a

    path = write(small(), tmp_path / "a.h5ad")
    with pytest.raises(SchemaError, match="column indices run from"):
        build(tmp_path / "o.zarr", [path], load_adata=load)


@pytest.mark.parametrize("dtype", ["float32", "int64", "float16", "bool"])
@pytest.mark.parametrize("kind", ["csr", "csc"])
def test_entries_of_one_gene_are_added_up(tmp_path, kind, dtype):
    """A matrix may name a gene several times in a row, and means the sum, of which logarithms and squares are taken."""
    one = sp.random(40, 12, density=0.5, format=kind, random_state=0, dtype="float32")
    one.data = np.arange(1, one.nnz + 1, dtype="float32") % 9 + 1
    ends = np.append(0, np.cumsum(2 * np.diff(one.indptr)))
    twice = np.concatenate([np.tile(np.arange(a, b), 2) for a, b in zip(one.indptr, one.indptr[1:], strict=False)])
    a = small(40)
    a.X = one
    path = write(a, tmp_path / "a.h5ad")
    values = one.data.astype(dtype)[twice]
    replaced(path, data=lambda _: values, indices=lambda _: one.indices[twice], indptr=lambda _: ends)
    c = build(tmp_path / "o.zarr", [path], shuffle=False, stats=True)
    want = one.toarray() * 2 if dtype != "bool" else (one.toarray() != 0).astype(np.float32)
    [group] = c
    found = ad.io.read_elem(group["X"])
    assert found.has_canonical_format
    np.testing.assert_array_equal(found.toarray(), want)
    np.testing.assert_array_equal(c.gene_stats()["n_nonzero"], (want != 0).sum(0))
    np.testing.assert_allclose(c.gene_stats()["sum_of_squares"], (want**2).sum(0))
    assert c.verify(against=[path]).ok


def test_entries_of_one_gene_that_do_not_fit_are_refused(tmp_path):
    a = small(2)
    a.X = sp.csr_matrix((np.array([200, 200], "uint8"), [3, 5], [0, 2, 2]), shape=a.shape)
    path = replaced(write(a, tmp_path / "a.h5ad"), indices=lambda _: np.array([3, 3], np.int32))
    with pytest.raises(SchemaError, match="name a gene several times, whose values add up to 400, in X, and uint8"):
        build(tmp_path / "o.zarr", [path])


@pytest.mark.parametrize("index", [6, -1, 2**32 + 1])
def test_row_indices_beyond_a_column_compressed_matrix_are_refused(tmp_path, index):
    a = small()
    a.X = a.X.tocsc()
    path = replaced(write(a, tmp_path / "a.h5ad"), indices=with_first(index))
    with pytest.raises(SchemaError, match="row indices run from .* in a matrix of 6 rows"):
        build(tmp_path / "o.zarr", [path])


def backwards(indptr):
    indptr = indptr.copy()
    indptr[2] = indptr[1] - 1
    return indptr


@pytest.mark.parametrize(
    "arrays",
    [{"indptr": backwards}, {"data": lambda v: v[:-2]}, {"indices": lambda v: v[:-2]}],
    ids=["backwards", "values cut", "indices cut"],
)
@pytest.mark.parametrize("kind", ["csr", "csc"])
def test_pointers_beyond_what_is_stored_are_refused(tmp_path, arrays, kind):
    a = small()
    a.X = a.X.asformat(kind)
    path = replaced(write(a, tmp_path / "a.h5ad"), **arrays)
    with pytest.raises(SchemaError, match="indptr runs from"):
        build(tmp_path / "o.zarr", [path])


@pytest.mark.parametrize("code", [2, 1, -2])
def test_codes_of_no_category_are_refused(tmp_path, code):
    """One beyond the last stood for a missing value, and -2 for another category."""
    path = write(small(kind=pd.Categorical(["a"] * 6)), tmp_path / "a.h5ad")
    with h5py.File(path, "r+") as f:
        f["obs/kind/codes"][0] = code
    with pytest.raises(SchemaError, match="codes of obs/kind run from .* and it has 1 categories"):
        build(tmp_path / "o.zarr", [path])


# --- byte order ----------------------------------------------------------------------------------------------------


def swap(values):
    return values.astype(values.dtype.newbyteorder(">"))


@pytest.mark.parametrize("kind", ["csr", "csc", "dense"])
@pytest.mark.parametrize("how", ["h5ad", "zarr", "memory"])
def test_big_endian_inputs(tmp_path, kind, how):
    a = small(20, number=np.arange(20) + 300)
    a.X = a.X.toarray() if kind == "dense" else a.X.asformat(kind)
    path = write(a, tmp_path / "a.h5ad")
    options = {"load_adata": in_memory} if how == "memory" else {}
    if how != "memory":  # anndata does not read what scipy has no name for
        swap_file(path, kind)
    if how == "zarr":
        path = to_zarr(path, tmp_path / "a.zarr")
    check_endian(tmp_path, path, a, options)


def check_endian(tmp_path, path, a, options):
    collection = build(tmp_path / "o.zarr", [path], **options)
    got = contents(collection)[a.obs_names]
    np.testing.assert_array_equal(dense_x(got), dense_x(a))
    assert got.obs["number"].tolist() == a.obs["number"].tolist()
    assert got.obs["cell_type"].tolist() == a.obs["cell_type"].tolist()
    assert collection.verify(against=[path], **options).ok


def swap_file(path, kind):
    with h5py.File(path, "r+") as f:
        swap_arrays(f["X"] if kind != "dense" else f, None if kind != "dense" else ["X"])
        swap_arrays(f["obs"], ["number"])
        swap_arrays(f["obs/cell_type"], ["codes"])


def in_memory(path):
    a = ad.read_h5ad(path)
    if sp.issparse(a.X):
        a.X.data = swap(a.X.data)
    else:
        a.X = swap(a.X)
    return a


def swap_arrays(group, names):
    for name in names or list(group):
        values, attrs = group[name][...], dict(group[name].attrs)
        del group[name]
        group.create_dataset(name, data=swap(values)).attrs.update(attrs)


def to_zarr(h5ad, path):
    """The same arrays, byte order and all, in a zarr v2 store."""
    target = zarr.open_group(path, mode="w", zarr_format=2)
    with h5py.File(h5ad) as f:

        def copy(name, node):
            attrs = {k: v.tolist() if isinstance(v, np.ndarray | np.generic) else v for k, v in node.attrs.items()}
            if isinstance(node, h5py.Group):
                target.require_group(name).attrs.update(attrs)
            elif node.dtype.kind == "O":
                parent, _, leaf = name.rpartition("/")  # anndata 0.13 takes no paths
                ad.io.write_elem(target[parent] if parent else target, leaf, node.asstr()[...].astype(object))
            else:
                array = target.create_array(name, data=node[...]) if node.shape else None
                if array is not None:
                    array.attrs.update(attrs)

        target.attrs.update(dict(f.attrs))
        f.visititems(copy)
    return path


# --- groupby -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        np.array([2**63 + 5, 1, 2**63, 7, 2**64 - 1, 3], np.uint64),
        pd.array([HUGE, HUGE - 1, None, HUGE + 2, HUGE + 1, -HUGE], dtype="Int64"),
        np.array([np.inf, np.nan, 1.0, np.nan, np.inf, -np.inf]),
    ],
    ids=["uint64", "nullable", "infinite"],
)
def test_groups_of_large_numbers_are_sorted(tmp_path, values):
    path = write(small(h=values), tmp_path / "a.h5ad")
    got = build(tmp_path / "o.zarr", [path], groupby="h").obs()["h"]
    want = got.sort_values(kind="stable")
    pd.testing.assert_series_equal(got, want)


def test_more_combinations_of_groups_than_an_integer_holds(tmp_path):
    n = 3000
    rng = np.random.default_rng(0)
    names = [f"k{j}" for j in range(6)]
    path = write(small(n, **{name: rng.random(n) for name in names}), tmp_path / "a.h5ad")
    got = build(tmp_path / "o.zarr", [path], groupby=names).obs()
    assert got["k0"].is_monotonic_increasing


# --- fingerprints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csr", "dense"])
def test_verify_sees_one_more_than_a_float_can_say(tmp_path, kind):
    a = small(number=np.arange(6) + HUGE, group=pd.Categorical(np.arange(6) + HUGE))
    a.X = (a.X.toarray() if kind == "dense" else a.X).astype(np.int64)
    path = write(a, tmp_path / "a.h5ad")
    collection = build(tmp_path / "o.zarr", [path])
    assert collection.obs()["number"].sort_values().tolist() == [HUGE + k for k in range(6)]
    assert collection.verify(against=[path]).ok

    def change(what):
        other = a.copy()
        what(other)
        return collection.verify(against=[write(other, tmp_path / "b" / "a.h5ad")]).ok

    (tmp_path / "b").mkdir()

    def more(b):
        b.obs["number"] += np.arange(6) == 0

    def other_group(b):
        b.obs["group"] = pd.Categorical(np.append(HUGE + 6, np.arange(1, 6) + HUGE))

    assert not change(more)
    assert not change(other_group)
    (a.X.data if kind == "csr" else a.X[0])[0] = HUGE
    collection = build(tmp_path / "p.zarr", [write(a, path)])

    def next_value(b):
        (b.X.data if kind == "csr" else b.X[0])[0] += 1

    assert collection.verify(against=[path]).ok
    assert not change(next_value)


# --- integers that meet floats -------------------------------------------------------------------------------------


def pair(tmp_path, one, two):
    """Two files, of which each function changes one."""
    paths = []
    for k, change in enumerate((one, two)):
        a = small(seed=k)
        change(a)
        paths.append(write(a, tmp_path / f"{k}.h5ad"))
    return paths


def column(values):
    def change(a):
        a.obs["id"] = values

    return change


SIX = np.arange(6)
ROUNDED = [
    (SIX + HUGE, SIX / 2),
    (pd.array([HUGE, None, 1, 2, 3, 4], dtype="Int64"), np.float32(SIX)),
    (pd.Categorical(SIX + HUGE), SIX / 2),
    (pd.Categorical(SIX + HUGE), pd.Categorical(SIX / 2)),
    (SIX - 1, np.uint64(SIX) + np.uint64(2**63)),
]


@pytest.mark.parametrize(("one", "two"), ROUNDED, ids=["plain", "nullable", "codes", "categories", "signs"])
def test_integers_that_would_be_rounded_are_refused_by_the_plan(tmp_path, one, two):
    paths = pair(tmp_path, column(one), column(two))
    for do in (DatasetCollection(tmp_path / "o.zarr").plan_adatas, DatasetCollection(tmp_path / "o.zarr").add_adatas):
        with pytest.raises(
            SchemaError, match=r"obs column 'id' holds whole numbers from .* no dtype holds both exactly"
        ):
            do(paths, seed=0)
    assert not (tmp_path / "o.zarr.scratch").exists()


@pytest.mark.parametrize(
    ("one", "two", "want"),
    [
        (SIX + 2**53 - 5, SIX / 2, "float64"),
        (SIX, np.uint64(SIX) + np.uint64(2**63), "uint64"),
        (-SIX - HUGE, np.uint64(SIX), "int64"),
        (pd.array([HUGE, None, 1, 2, 3, 4], dtype="Int64"), np.uint64(SIX) + np.uint64(2**63 - 7), "UInt64"),
    ],
    ids=["floats", "uint64", "int64", "nullable"],
)
def test_a_dtype_that_holds_both_is_taken(tmp_path, one, two, want):
    paths = pair(tmp_path, column(one), column(two))
    collection = build(tmp_path / "o.zarr", paths)
    got = collection.obs()
    assert str(got["id"].dtype) == want
    for path, values in zip(paths, (one, two), strict=True):
        found = got.loc[got["src_path"] == str(path), "id"]
        assert sorted(map(str, found)) == sorted(map(str, pd.Series(values).astype(got["id"].dtype)))
    assert collection.verify(against=paths).ok


def x_of(dtype, first, kind="csr"):
    def change(a):
        a.X = a.X.astype(dtype)
        a.X.data[0] = first
        a.X = a.X.toarray() if kind == "dense" else a.X

    return change


@pytest.mark.parametrize("kind", ["csr", "dense"])
@pytest.mark.parametrize(
    ("one", "two"),
    [(("int64", HUGE), ("float32", 0.5)), (("int64", -1), ("uint64", 2**63 + 1))],
    ids=["floats", "signs"],
)
def test_values_of_x_that_would_be_rounded_are_refused_by_the_plan(tmp_path, one, two, kind):
    paths = pair(tmp_path, x_of(*one, kind), x_of(*two, kind))
    for do in (DatasetCollection(tmp_path / "o.zarr").plan_adatas, DatasetCollection(tmp_path / "o.zarr").add_adatas):
        with pytest.raises(SchemaError, match="X holds whole numbers from .* no dtype holds both exactly"):
            do(paths, seed=0, allow_mixed_counts=True)


def test_values_of_x_in_a_dtype_that_holds_both(tmp_path):
    paths = pair(tmp_path, x_of("int64", 5), x_of("uint64", 2**63 + 1))
    collection = build(tmp_path / "o.zarr", paths)
    assert collection.manifest.matrices["X"].source_dtype == "uint64"
    assert contents(collection).X.max() == 2**63 + 1
    assert collection.verify(against=paths).ok


def test_genes_that_are_missing_do_not_round_a_dense_matrix(tmp_path):
    def other_genes(a):
        x_of("int64", 7, "dense")(a)
        a.var_names = [f"h{i}" for i in range(12)]

    paths = pair(tmp_path, x_of("int64", HUGE, "dense"), other_genes)
    with pytest.raises(SchemaError, match="X holds whole numbers"):
        build(tmp_path / "o.zarr", paths)


def test_a_collection_is_not_rounded_by_what_extends_it(tmp_path):
    paths = pair(tmp_path, column(SIX + HUGE), column(SIX / 2))
    build(tmp_path / "o.zarr", paths[:1])
    for mode in ("extend", "append"):
        with pytest.raises(SchemaError, match="obs column 'id' holds whole numbers"):
            build(tmp_path / "o.zarr", paths[1:], mode=mode)


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [[1, "1"], ["a", "a"]])
def test_columns_of_one_name_are_refused(tmp_path, names):
    def load(path):
        a = ad.read_h5ad(path)
        a.obs = pd.DataFrame([[1, 2]] * a.n_obs, columns=pd.Index(names, dtype=object), index=a.obs_names)
        return a

    path = write(small(), tmp_path / "a.h5ad")
    with pytest.raises(SchemaError, match="obs has columns .* which are stored under one name"):
        build(tmp_path / "o.zarr", [path], load_adata=load)


def test_a_src_path_of_the_inputs_own_is_kept_under_another_name(tmp_path):
    labs = ["lab_1"] * 3 + ["lab_2"] * 3
    paths = pair(tmp_path, lambda a: a.obs.insert(0, "src_path", pd.Categorical(labs)), lambda _: None)
    with pytest.warns(UserWarning, match=r"0\.h5ad \(1 of 2 inputs\) has a column src_path, which is input_src_path"):
        collection = build(tmp_path / "o.zarr", paths)
    got = collection.obs()
    assert got["input_src_path"].value_counts().to_dict() == {"lab_1": 3, "lab_2": 3}
    assert got["src_path"].value_counts().to_dict() == {str(p): 6 for p in paths}
    assert collection.verify(against=paths).ok
    assert "input_src_path" not in build(tmp_path / "p.zarr", paths, elements=["-obs/src_path"]).obs()
    both = pair(tmp_path, lambda a: a.obs.insert(0, "src_path", labs), lambda _: None)
    a = ad.read_h5ad(both[0])
    a.obs["input_src_path"] = 1
    with pytest.raises(SchemaError, match="obs has src_path and input_src_path"):
        build(tmp_path / "q.zarr", [write(a, both[0])])


def test_categories_that_are_none_in_all_inputs(tmp_path):
    none = [None] * 6
    paths = pair(
        tmp_path,
        column(pd.Categorical(none, categories=pd.Index([], dtype=object))),
        column(pd.Categorical(none, categories=pd.Index([], dtype=float))),
    )
    assert build(tmp_path / "o.zarr", paths).obs()["id"].isna().all()
