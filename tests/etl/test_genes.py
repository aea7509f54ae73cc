"""Genes are joined by what they are: by a column of var, without versions, by other names, and what meets is added up."""

import contextlib
import tempfile
from pathlib import Path

import anndata as ad
import dask
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from annbatch_dask import DatasetCollection
from annbatch_dask.errors import SchemaError
from annbatch_dask.plan.naming import strip_version
from tests.etl.inputs import DTYPES, KINDS, cell, dense_x, matrices, read, write

IDS = [
    *("ENSG00000000003", "ENSG00000000003.15", "ENSG00000000003.4", "ENSG00000182378.15_PAR_Y", "ENSG00000182378.15"),
    *("ENSMUSG00000000001.5", "SYNRG", "AP1GBP1", "NA", "nan", "1", "a/b", " ", "ä", "x.1"),
]


@pytest.fixture(autouse=True)
def synchronous():
    with dask.config.set(scheduler="synchronous"):
        yield


# --- a plain reference -----------------------------------------------------------------------------------------------


def named(adata, key, gene_map, strip):
    """Names of the genes in the collection; None where one has no name."""
    names = adata.var[key].astype(object) if key else pd.Series(adata.var_names)
    if names.isna().any() or (names == "").any():
        return None
    without = lambda n: n.split(".")[0] + "_PAR_Y" * n.endswith("_PAR_Y") if n.startswith("ENS") else n  # noqa: E731
    if strip:
        names = names.map(without)
        gene_map = {without(k): without(v) for k, v in gene_map.items()}
    return [gene_map.get(n, n) for n in names]


def joined(matrix, names, on_duplicate):
    """A matrix by the names of its genes; whole numbers are Python's, so that no sum overflows."""
    dense = matrix.toarray() if sp.issparse(matrix) else np.asarray(matrix)
    whole = dense.dtype.kind in "biu"
    out = {}
    for name, column in zip(names, dense.T, strict=True):
        values = (
            column.astype(int).astype(object) if dense.dtype.kind == "b" else column.astype(object if whole else float)
        )
        if name in out and on_duplicate == "sum":
            with np.errstate(invalid="ignore"):
                out[name] = out[name] + values
        out.setdefault(name, values)
    return out


def on(genes, columns, n_obs, fill):
    """(n_obs, n_vars) values on some genes."""
    out = np.full((n_obs, len(genes)), fill, object)
    for k, gene in enumerate(genes):
        if gene in columns:
            out[:, k] = columns[gene]
    return out.astype(float)


def assert_joined(collection, paths, inputs, names, on_duplicate, *, element="X"):
    """Every row of every input is there once, with its values on the genes of the collection."""
    genes = collection.var.index.tolist()
    matrix = lambda a: a.X if element == "X" else a.layers[element]  # noqa: E731
    fill = np.nan if not any(sp.issparse(matrix(a)) for a in inputs) else 0.0
    wanted = {
        str(path): on(genes, joined(matrix(a), some, on_duplicate), a.n_obs, fill)
        for path, a, some in zip(paths, inputs, names, strict=True)
    }
    source, seen = dict(zip(map(str, paths), inputs, strict=True)), set()
    for group in collection:
        out = read(group)
        assert out.var_names.tolist() == genes
        found = dense_x(out) if element == "X" else dense_x(ad.AnnData(out.layers[element]))
        for row, path, number in zip(found, out.obs["src_path"], out.obs["row"], strict=True):
            np.testing.assert_allclose(row, wanted[path][number], rtol=2e-7)
            assert (path, number) not in seen
            seen.add((path, number))
        assert [cell(n) for n in out.obs_names] == [
            source[p].obs_names[r] for p, r in zip(out.obs["src_path"], out.obs["row"], strict=True)
        ]
    assert len(seen) == sum(a.n_obs for a in inputs)


@st.composite
def adatas(draw, file):
    """An input whose genes have other names in a column."""
    n_obs, n_vars = draw(st.sampled_from([1, 2, 9])), draw(st.integers(1, 8))
    kind, dtype = draw(st.sampled_from(KINDS)), draw(st.sampled_from(DTYPES))
    form = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": np.asarray}[kind]
    ids = draw(st.lists(st.sampled_from(IDS), min_size=n_vars, max_size=n_vars))
    if draw(st.integers(0, 9)) == 0:
        ids[0] = draw(st.sampled_from(["", None]))
    index = draw(st.lists(st.sampled_from(IDS), min_size=n_vars, max_size=n_vars, unique=True))
    column = pd.Categorical(ids) if draw(st.booleans()) else pd.Series(ids, dtype="string", index=index)
    obs = pd.DataFrame({"row": np.arange(n_obs)}, index=[f"{file}-{i}" for i in range(n_obs)])
    X = form(draw(matrices(n_obs, n_vars, dtype)))
    out = ad.AnnData(X, obs=obs, var=pd.DataFrame({"id": column}, index=pd.Index(index, dtype=object)))
    out.layers["twin"] = form(draw(matrices(n_obs, n_vars, "float32")))
    return out


@contextlib.contextmanager
def refused_with_reason(inputs, names, on_duplicate):
    """What has to be refused is, and nothing else."""
    reason = None
    if any(n is None for n in names):
        reason = "has no value for"
    elif on_duplicate == "error" and any(len(set(n)) < len(n) for n in names):
        reason = "all become"
    said = ""
    try:
        yield
    except SchemaError as e:
        said = str(e)
    if reason is not None or not said:
        assert reason == (reason if reason and reason in said else None), said
        return
    inexact = "on_duplicate_gene='sum' makes" in said
    assert inexact or "no dtype holds both exactly" in said or "cannot hold exactly" in said, said
    assert not inexact or too_large(inputs, names), said


def too_large(inputs, names):
    """True if a sum of whole numbers is beyond what its dtype, or float64, holds."""
    for a, some in zip(inputs, names, strict=True):
        for matrix in (a.X, a.layers["twin"]):
            dtype = matrix.dtype
            limit = (
                np.iinfo(dtype).max
                if dtype.kind in "iu" and dtype.itemsize > 2
                else 2 ** {4: 24, 8: 53}.get(dtype.itemsize, 24)
            )
            for values in joined(matrix, some, "sum").values():
                if any(np.isfinite(float(v)) and abs(v) > limit for v in values):
                    return True
    return False


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    inputs=st.tuples(adatas(0), adatas(1), adatas(2)),
    keys=st.tuples(*[st.sampled_from(["id", ""])] * 3),
    gene_map=st.dictionaries(st.sampled_from(IDS), st.sampled_from([*IDS, "new"]), max_size=4),
    strip=st.booleans(),
    on_duplicate=st.sampled_from(["sum", "sum", "first", "error"]),
    dataset_size=st.sampled_from([4, 1000]),
    how=st.sampled_from(["gzip", "zarr"]),
)
def test_genes_are_joined_as_a_plain_reference_joins_them(
    inputs, keys, gene_map, strip, on_duplicate, dataset_size, how
):
    if strip and len({strip_version(k): v for k, v in gene_map.items()}) < len(gene_map):
        gene_map = {}
    names = [named(a, key, gene_map, strip) for a, key in zip(inputs, keys, strict=True)]
    with tempfile.TemporaryDirectory() as tmp, dask.config.set(scheduler="synchronous"):
        paths = [Path(tmp) / f"{k}.{'zarr' if how == 'zarr' else 'h5ad'}" for k in range(3)]
        for a, path in zip(inputs, paths, strict=True):
            write(a, path, how)
        options = {
            "gene_map": gene_map,
            "strip_versions": strip,
            "on_duplicate_gene": on_duplicate,
            "allow_mixed_counts": True,
            "dataset_size": dataset_size,
            "n_obs_per_chunk": 4,
        }
        by_path = {str(path): key for path, key in zip(paths, keys, strict=True)}
        n_first = 2 if keys[2] in keys[:2] and (sp.issparse(inputs[0].X) or not sp.issparse(inputs[2].X)) else 3
        with refused_with_reason(inputs, names, on_duplicate):
            collection = DatasetCollection(Path(tmp) / "out.zarr")
            for some, mode in ((paths[:n_first], "extend"), (paths[n_first:], "reshuffle")):
                if some:
                    keyed = {path: by_path[path] for path in map(str, some)}
                    collection.add_adatas(some, mode=mode, genes="union", var_key=keyed, **options)
            assert set(collection.var.index) == set().union(*names)
            assert_joined(collection, paths, inputs, names, on_duplicate)
            assert_joined(collection, paths, inputs, names, on_duplicate, element="twin")
            assert collection.verify(against=paths).problems == ()
