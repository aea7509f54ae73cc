"""Inputs of every kind for the tests of the build, and what a build of them must contain."""

import contextlib
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from hypothesis import strategies as st

from annbatch_dask.errors import SchemaError

SPACE = [f"g{i:02d}" for i in range(12)]
KINDS = ("csr", "csc", "dense")
DTYPES = ("float32", "float64", "int32", "int64", "uint8", "uint16", "int8", "bool")
LABELS = ("a", "b", "c", "long label", "ä ö")


@st.composite
def matrices(draw, n_obs, n_vars, dtype):
    """(n_obs, n_vars) arrays, mostly zero, with what tests forget: empty rows, extremes, NaN, infinities, -0.0."""
    dtype = np.dtype(dtype)
    values = [0, 0, 0, 1, 2]
    if dtype.kind == "f":
        values += draw(
            st.sampled_from([[], [255, 256, 65536], [0.5, -1.0, 1e-30], [np.nan, np.inf, -np.inf], [0.1], [2**40]])
        )
    elif dtype.kind in "iu":
        info = np.iinfo(dtype)
        values += draw(st.sampled_from([[], [100], [int(info.max), int(info.min)]]))
    rows = draw(
        st.lists(st.lists(st.sampled_from(values), min_size=n_vars, max_size=n_vars), min_size=n_obs, max_size=n_obs)
    )
    return np.array(rows, dtype=dtype).reshape(n_obs, n_vars)


@st.composite
def frames(draw, n_obs, file):
    """obs of many kinds; which columns there are differs from file to file."""
    columns = {"row": np.arange(n_obs)}
    some = lambda elements: draw(st.lists(st.sampled_from(elements), min_size=n_obs, max_size=n_obs))  # noqa: E731
    if draw(st.booleans()):
        columns["label"] = pd.Categorical(some((*LABELS[file:], None)))
    if draw(st.booleans()):
        columns["word"] = pd.Series(some(("x", "", "y" * 40, "μ")), dtype=object)
    if draw(st.booleans()):
        columns["score"] = np.array(some((0.0, 1.5, np.nan)), np.float32)
    if draw(st.booleans()):
        columns["flag"] = np.array(some((True, False)), bool)
    if draw(st.booleans()):
        columns["count"] = pd.array(some((1, 2, pd.NA)), dtype="Int64")
    if draw(st.booleans()):
        columns["maybe"] = pd.array(some((True, False, pd.NA)), dtype="boolean")
    if draw(st.booleans()):
        columns["number"] = np.array(some((-5, 0, 2**40)), np.int64)
    index = pd.Index([f"{file}-{i % 7}" for i in range(n_obs)], dtype=object)  # names repeat
    return pd.DataFrame(columns, index=range(n_obs)).set_axis(index)


@st.composite
def adatas(draw, file):
    """One input."""
    n_obs = draw(st.sampled_from([0, 1, 2, 6, 13]))
    genes = draw(st.permutations(SPACE))[: draw(st.integers(1, len(SPACE)))]
    kind, dtype = draw(st.sampled_from(KINDS)), draw(st.sampled_from(DTYPES))
    dense = draw(matrices(n_obs, len(genes), dtype))
    X = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": np.asarray}[kind](dense)
    obs, var = draw(frames(n_obs, file)), pd.DataFrame(index=pd.Index(list(genes), dtype=object))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Observation names are not unique")
        return ad.AnnData(X=X, obs=obs, var=var)


def expected_x(inputs):
    """The outer join of X, row by row, dense float64; NaN where a gene is absent and every input is dense."""
    genes = inputs[0].var_names
    for a in inputs[1:]:
        genes = genes.union(a.var_names)
    fill = np.nan if not any(sp.issparse(a.X) for a in inputs) else 0.0
    out = []
    for a in inputs:
        X = a.X.toarray() if sp.issparse(a.X) else a.X
        joined = np.full((a.n_obs, len(genes)), fill)
        joined[:, genes.get_indexer(a.var_names)] = X
        out.append(joined)
    return list(genes), np.concatenate(out)


def read(group):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Observation names are not unique")
        return ad.io.read_zarr(group)


def dense_x(adata):
    return (adata.X.toarray() if sp.issparse(adata.X) else np.asarray(adata.X)).astype(np.float64)


def cell(value):
    """A value of an obs column as something that compares: missing values as None."""
    return None if pd.isna(value) else (value.item() if hasattr(value, "item") else value)


def assert_conserved(collection, paths, inputs):
    """Every input row is in the collection exactly once, with its values, obs, name and source."""
    genes, X = expected_x(inputs)
    assert_holds(collection, paths, inputs, genes, X)


@contextlib.contextmanager
def exact_or_refused():
    """Inputs whose integers no common dtype holds are refused, and no more is asked of them."""
    try:
        yield
    except SchemaError as e:
        if "no dtype holds both exactly" not in str(e):
            raise


def on_genes(inputs, genes):
    """X of all inputs, row by row, on the genes given; NaN where one is absent and every input is dense."""
    fill = np.nan if not any(sp.issparse(a.X) for a in inputs) else 0.0
    out = []
    for a in inputs:
        at = pd.Index(genes).get_indexer(a.var_names)
        joined = np.full((a.n_obs, len(genes)), fill)
        joined[:, at[at >= 0]] = dense_x(a)[:, at >= 0]
        out.append(joined)
    return np.concatenate(out)


def assert_holds(collection, paths, inputs, genes, X):
    """Every input row is in the collection exactly once, with X as given; rows in the order of the inputs."""
    first = dict(zip(map(str, paths), np.cumsum([0, *[a.n_obs for a in inputs]]), strict=False))
    source = dict(zip(map(str, paths), inputs, strict=True))
    seen = np.zeros(len(X), int)
    for group in collection:
        out = read(group)
        assert out.var_names.tolist() == list(genes)
        rows = np.array([first[p] + r for p, r in zip(out.obs["src_path"], out.obs["row"], strict=True)])
        seen[rows] += 1
        np.testing.assert_array_equal(dense_x(out), X[rows])
        for i, (path, row) in enumerate(zip(out.obs["src_path"], out.obs["row"], strict=True)):
            obs = source[path].obs
            assert out.obs_names[i] == obs.index[row]
            for name in out.obs.columns.drop("src_path"):
                want = cell(obs[name].iloc[row]) if name in obs else None
                assert cell(out.obs[name].iloc[i]) == want, (name, path, row)
    assert (seen == 1).all()


def write(adata, path, how):
    settings = {"allow_write_nullable_strings": True, "auto_shard_zarr_v3": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata's on what it will do in the next release
        with ad.settings.override(**settings, zarr_write_format=2 if how == "zarr2" else 3):
            if how in ("zarr", "zarr2"):
                ad.io.write_zarr(path, adata, convert_strings_to_categoricals=False)
            else:
                adata.write_h5ad(path, compression=how, convert_strings_to_categoricals=False)
