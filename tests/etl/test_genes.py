"""Genes are joined by what they are: by a column of var, without versions, by other names, and what meets is added up."""

import contextlib
import json
import shutil
import tempfile
import warnings
from pathlib import Path

import anndata as ad
import dask
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from annbatch_dask import DatasetCollection, Loader
from annbatch_dask.cli import main
from annbatch_dask.errors import CollectionError, MissingPackageError, SchemaError, SourceError, SourceNotFoundError
from annbatch_dask.etl.sums import add_met
from annbatch_dask.events import Callback
from annbatch_dask.plan.naming import strip_version
from annbatch_dask.plan.schema import MatrixSpec
from tests.etl.inputs import DTYPES, KINDS, cell, dense_x, matrices, read, write
from tests.sources.tenx import write_h5, write_mtx
from tests.tools import tree_digest

pytestmark = pytest.mark.usefixtures("in_this_process")

IDS = [
    *("ENSG00000000003", "ENSG00000000003.15", "ENSG00000000003.4", "ENSG00000182378.15_PAR_Y", "ENSG00000182378.15"),
    *("ENSMUSG00000000001.5", "SYNRG", "AP1GBP1", "NA", "nan", "1", "a/b", " ", "ä", "x.1"),
]


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
        with refused_with_reason(inputs, names, on_duplicate), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "gene_map names none of the genes")
            collection = DatasetCollection(Path(tmp) / "out.zarr")
            for some, mode in ((paths[:n_first], "extend"), (paths[n_first:], "reshuffle")):
                if some:
                    keyed = {path: by_path[path] for path in map(str, some)}
                    collection.add_adatas(some, mode=mode, genes="union", var_key=keyed, **options)
            assert set(collection.var.index) == set().union(*names)
            assert_joined(collection, paths, inputs, names, on_duplicate)
            assert_joined(collection, paths, inputs, names, on_duplicate, element="twin")
            assert collection.verify(against=paths).problems == ()


# --- real meetings ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def meeting(tmp_path_factory):
    """Files of one atlas: pbmc68k_reduced by symbols, 10x files and folders, what scanpy reads of them, and one by ids."""
    import scanpy as sc

    folder = tmp_path_factory.mktemp("meeting")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pbmc = sc.datasets.pbmc68k_reduced()
    symbols = pbmc.raw.var_names[:200].tolist()
    ids = [f"ENSG{k:011d}" for k in range(200)]
    counts = sp.csr_matrix(np.rint(np.expm1(pbmc.raw.X[:, :200].toarray())).astype(np.int32))
    twice = [symbols[1], *symbols[1:]]  # one symbol of two genes, as in every reference
    parts = {n: counts[100 * k : 100 * (k + 1)] for k, n in enumerate(("by_symbol", "v3", "v2", "mtx", "by_id"))}
    barcodes = {name: [f"{name}-{i}" for i in range(100)] for name in parts}
    tenx = {
        n: {"ids": ids, "symbols": twice, "kinds": ["Gene Expression"] * 200, "barcodes": barcodes[n]} for n in parts
    }
    obs = {name: pd.DataFrame({"row": np.arange(100)}, index=barcodes[name]) for name in parts}
    real = ad.AnnData(parts["by_symbol"].astype(np.float32), obs=obs["by_symbol"], var=pd.DataFrame(index=symbols))
    real.write_h5ad(folder / "pbmc.h5ad")
    write_h5(folder / "v3.h5", parts["v3"], **tenx["v3"])
    write_h5(folder / "v2.h5", parts["v2"], **tenx["v2"], version=2)
    write_mtx(folder / "mtx", parts["mtx"], **tenx["mtx"])
    by_id = ad.AnnData(parts["by_id"].astype(np.float32), obs=obs["by_id"])
    by_id.var = pd.DataFrame({"feature_name": pd.Categorical(twice)}, index=[f"{i}.{k % 7}" for k, i in enumerate(ids)])
    by_id.write_h5ad(folder / "cellxgene.h5ad")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, read_it in (("v3.h5", sc.read_10x_h5), ("mtx", sc.read_10x_mtx)):
            found = read_it(folder / name)
            found.var_names_make_unique()
            found.obs_names = [f"scanpy-{n}" for n in found.obs_names]
            found.write_h5ad(folder / f"{name.partition('.')[0]}-scanpy.h5ad")
    total = dict.fromkeys(ids, 0)
    weights = {"by_symbol": 1, "v3": 2, "v2": 1, "mtx": 2, "by_id": 1}  # two are there twice, as scanpy reads them
    for name, n in weights.items():
        for i, count in zip(ids, np.asarray(parts[name].sum(0)).ravel().tolist(), strict=True):
            total[i] += n * count
    return folder, dict(zip(symbols, ids, strict=True)), total


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_what_people_have_joins_in_one_call(meeting, tmp_path):
    folder, ids, total = meeting
    paths = sorted(str(p) for p in folder.iterdir())
    pd.DataFrame({"symbol": ids.keys(), "id": ids.values()}).to_csv(tmp_path / "ids.tsv", sep="\t", index=False)
    keys = {str(folder / "pbmc.h5ad"): "", str(folder / "cellxgene.h5ad"): "", "*": "gene_ids"}
    collection = DatasetCollection(tmp_path / "o.zarr").add_adatas(
        paths, var_key=keys, gene_map=tmp_path / "ids.tsv", strip_versions=True, elements=["obs"], dataset_size=250
    )
    assert collection.var.index.tolist() == sorted(ids.values())
    found = sum(np.asarray(ad.io.read_zarr(g).X.sum(0)).ravel() for g in collection)
    assert dict(zip(collection.var.index, found.tolist(), strict=True)) == total
    assert collection.n_obs == 700
    assert collection.verify(against=paths).ok
    naming = collection.manifest.builds[-1].naming
    by_path = dict(zip(collection.manifest.builds[-1].sources, naming.mapped, strict=True))
    assert by_path.pop(str(folder / "pbmc.h5ad")) == 200
    assert set(by_path.values()) == {0}
    assert (
        collection.var["input_var_names"]
        .isin([*ids, *(f"{s}-1" for s in ids), *(f"{i}.{k % 7}" for k, i in enumerate(ids.values()))])
        .all()
    )


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_by_symbols_counts_of_one_symbol_are_added_up(meeting, tmp_path):
    folder, ids, total = meeting
    symbols = list(ids)
    paths = [folder / "cellxgene.h5ad", folder / "pbmc.h5ad"]
    collection = DatasetCollection(tmp_path / "o.zarr").add_adatas(
        paths, var_key={"*cellxgene*": "feature_name"}, on_duplicate_gene="sum", elements=["obs"]
    )
    assert sorted(collection.var.index) == sorted(symbols)
    one = ad.read_h5ad(paths[0])
    out = ad.concat([ad.io.read_zarr(g) for g in collection])
    wanted = np.asarray(one[:, :2].X.sum(1)).ravel()
    np.testing.assert_array_equal(out[one.obs_names, symbols[1]].X.toarray().ravel(), wanted)
    assert collection.manifest.naming.met == ((symbols[1], tuple(one.var_names[:2])),)


# --- sums ------------------------------------------------------------------------------------------------------------


def small(path, genes, X, var=None, **more):
    """A file of few values."""
    n = X.shape[0]
    obs = pd.DataFrame({"row": np.arange(n)}, index=[f"{Path(path).stem}-{i}" for i in range(n)])
    out = ad.AnnData(X, obs=obs, var=pd.DataFrame(var, index=pd.Index(genes, dtype=object)), **more)
    out.write_h5ad(path)
    return out


def build(path, paths, **options):
    return DatasetCollection(path).add_adatas(paths, **{"seed": 0, "n_obs_per_chunk": 4} | options)


TWO = {"gene_map": {"b": "a"}, "on_duplicate_gene": "sum"}


@pytest.mark.parametrize("form", [sp.csr_matrix, np.asarray], ids=["sparse", "dense"])
@pytest.mark.parametrize(
    ("dtype", "values", "read_as"),
    [
        ("uint8", (200, 100), "uint16"),
        ("int8", (-128, -128), "int16"),
        ("uint16", (65535, 65535), "uint32"),
        ("bool", (True, True), "uint8"),
        ("int32", (2**30, 2**30 - 1), "int32"),
        ("uint64", (2**63, 2**63 - 1), "uint64"),
        ("float32", (2**24, 2), "float32"),
        ("float64", (2**52, 2**52 - 1), "float64"),
        ("float32", (0.1, 0.2), "float32"),
    ],
)
def test_sums_are_exact_in_what_a_reader_gets(tmp_path, form, dtype, values, read_as):
    one, two = np.array(values, dtype)
    small(tmp_path / "x.h5ad", ["a", "c", "b"], form(np.array([[one, 1, two], [0, 1, two]], dtype)))
    collection = build(tmp_path / "o.zarr", [tmp_path / "x.h5ad"], shuffle=False, **TWO)
    assert collection.manifest.matrices["X"].source_dtype == read_as
    wanted = int(one) + int(two) if dtype[0] != "f" else np.dtype(dtype).type(float(one) + float(two))
    (batch,) = Loader(batch_size=2, shuffle=False, dense=True, obs_columns=[]).use_collection(collection)
    assert batch["X"].dtype == read_as
    found = [[v if dtype[0] == "f" else int(v) for v in row] for row in batch["X"]]
    assert found == [[wanted, 1], [two if dtype[0] == "f" else int(two), 1]]
    assert collection.verify(against=[tmp_path / "x.h5ad"]).ok


@pytest.mark.parametrize("form", [sp.csr_matrix, np.asarray], ids=["sparse", "dense"])
@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("int32", (2**31 - 1, 1)),
        ("int64", (2**63 - 1, 1)),
        ("uint64", (2**64 - 1, 1)),
        ("float32", (2**24, 1)),
        ("float64", (2**53, 1)),
        ("float16", (2048, 1)),
    ],
)
def test_sums_that_no_reader_would_get_are_refused(tmp_path, form, dtype, values):
    if dtype == "float16" and form is sp.csr_matrix:
        return  # scipy has none
    one, two = np.array(values, dtype)
    small(tmp_path / "x.h5ad", ["a", "c", "b"], form(np.array([[one, 1, two]], dtype)))
    with pytest.raises(
        SchemaError, match=f"on_duplicate_gene='sum' makes .* in X, and {dtype} holds whole numbers up to"
    ):
        build(tmp_path / "o.zarr", [tmp_path / "x.h5ad"], **TWO)
    build(tmp_path / "o.zarr", [tmp_path / "x.h5ad"], **TWO | {"on_duplicate_gene": "first"})


@given(
    rows=st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(-200, 200)), max_size=6), min_size=1, max_size=5),
    dtype=st.sampled_from(["int16", "int64", "float32", "uint8"]),
)
def test_rows_are_summed_as_python_does(rows, dtype):
    unsigned = dtype == "uint8"
    rows = [[(gene, abs(v) if unsigned else v) for gene, v in sorted(row)] for row in rows]
    offsets = np.cumsum([0, *map(len, rows)])
    keys = np.array([gene for row in rows for gene, _ in row], np.uint16)
    values = np.array([v for row in rows for _, v in row], dtype)
    spec = MatrixSpec("X", "csr", "int64", 4, "var")
    ends, keys, values = add_met(offsets, keys, values, spec)
    for k, row in enumerate(rows):
        wanted = {}
        for gene, v in row:
            wanted[gene] = wanted.get(gene, 0) + v
        part = slice(ends[k], ends[k + 1])
        assert list(zip(keys[part].tolist(), values[part].tolist(), strict=True)) == list(wanted.items())


def test_files_whose_rows_have_no_order_are_summed(tmp_path):
    X = sp.csr_matrix((np.array([1, 10, 100], "float32"), np.array([2, 1, 0]), np.array([0, 3])), shape=(1, 3))
    small(tmp_path / "x.h5ad", ["a", "b", "c"], X)
    collection = build(tmp_path / "o.zarr", [tmp_path / "x.h5ad"], gene_map={"c": "a"}, on_duplicate_gene="sum")
    assert ad.io.read_zarr(next(iter(collection))).X.toarray().tolist() == [[101, 10]]


def test_genes_that_a_dense_input_lacks_are_nan_however_many_columns_it_has(tmp_path):
    small(tmp_path / "x.h5ad", ["a", "c", "d"], np.ones((2, 3), np.int32))
    small(tmp_path / "y.h5ad", ["a", "b"], np.ones((1, 2), np.int32))
    collection = build(
        tmp_path / "o.zarr", [tmp_path / "x.h5ad", tmp_path / "y.h5ad"], shuffle=False, var_subset=["a", "b"]
    )
    np.testing.assert_array_equal(ad.io.read_zarr(next(iter(collection))).X, [[1, np.nan], [1, np.nan], [1, 1]])


# --- what is carried beside ------------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path):
    """A file by symbols with ids in a column, of which two are one; and one by ids."""
    genes = ["A", "B", "C", "D"]
    X = sp.csr_matrix(np.arange(12, dtype=np.float32).reshape(3, 4))
    var = {"gene_ids": ["E1", "E2", "E2", "E4"], "length": [1, 2, 3, 4]}
    one = small(tmp_path / "a.h5ad", genes, X, var, layers={"l": 2 * X}, varm={"load": np.arange(8.0).reshape(4, 2)})
    one.raw = ad.AnnData(sp.csr_matrix(np.ones((3, 5), np.float32)), obs=one.obs)
    one.raw.var.index, one.raw.var["gene_ids"] = pd.Index([*genes, "X"]), ["E1", "E2", "E2", "E4", "E9"]
    one.write_h5ad(tmp_path / "a.h5ad")
    two = small(tmp_path / "b.h5ad", ["E1", "E4", "E5"], 10 * X[:, :3], layers={"l": X[:, :3]})
    two.raw = two.copy()
    two.write_h5ad(tmp_path / "b.h5ad")
    return [str(tmp_path / "a.h5ad"), str(tmp_path / "b.h5ad")]


KEYED = {"var_key": {"*a.h5ad": "gene_ids"}, "on_duplicate_gene": "sum"}


def test_layers_raw_and_annotations_follow(pair, tmp_path):
    collection = build(tmp_path / "o.zarr", pair, shuffle=False, merge="first", **KEYED)
    out = ad.io.read_zarr(next(iter(collection)))
    assert out.var_names.tolist() == ["E1", "E2", "E4", "E5"]
    np.testing.assert_array_equal(out.X.toarray()[0], [0, 3, 3, 0])
    np.testing.assert_array_equal(out.layers["l"].toarray()[:3], 2 * out.X.toarray()[:3])
    assert out.raw.var_names.tolist() == ["E1", "E2", "E4", "E5", "E9"]
    np.testing.assert_array_equal(out.raw.X.toarray()[0], [1, 2, 1, 0, 1])
    assert out.var["input_var_names"].tolist() == ["A", "B", "D", "E5"]
    assert out.raw.var["input_var_names"].tolist() == ["A", "B", "D", "E5", "X"]
    assert out.var["length"].tolist()[:3] == [1, 2, 4]  # of the first, where two are one
    assert collection.verify(against=pair).ok


def test_a_single_input_keeps_its_annotations(pair, tmp_path):
    out = ad.io.read_zarr(
        next(iter(build(tmp_path / "o.zarr", pair[:1], var_key="gene_ids", on_duplicate_gene="first")))
    )
    assert out.var[["gene_ids", "length"]].to_numpy().tolist() == [["E1", 1], ["E2", 2], ["E4", 4]]
    assert out.varm["load"].tolist() == [[0, 1], [2, 3], [6, 7]]
    assert out.X.toarray().sum(0).tolist() == [12, 15, 21]
    assert out.raw.X.toarray().sum(0).tolist() == [3, 3, 3, 3]


def test_counts_of_raw_are_named_by_its_column(pair, tmp_path):
    collection = build(tmp_path / "o.zarr", pair, counts={pair[0]: "raw/X"}, elements=["obs"], shuffle=False, **KEYED)
    assert collection.var.index.tolist() == ["E1", "E2", "E4", "E5", "E9"]
    np.testing.assert_array_equal(ad.io.read_zarr(next(iter(collection))).X.toarray()[0], [1, 2, 1, 0, 1])
    assert collection.verify(against=pair).ok


def test_names_elsewhere_are_those_of_the_collection(pair, tmp_path):
    collection = build(tmp_path / "o.zarr", pair, var_subset=["E2", "E4"], elements=["obs"], **KEYED)
    assert collection.var.index.tolist() == ["E2", "E4"]
    assert [s.n_vars for s in collection.manifest.sources] == [2, 1]
    (batch,) = Loader(batch_size=6, shuffle=False, var_names=["E2"], dense=True).use_collection(collection)
    assert sorted(batch["X"].ravel().tolist()) == [0, 0, 0, 3, 11, 19]


def test_what_load_adata_returns_has_keys_too(pair, tmp_path):
    def load(path):
        out = ad.read_h5ad(path)
        out.var["key"] = out.var.get("gene_ids", pd.Series(out.var_names, out.var_names)).astype("category")
        return out

    options = {"var_key": "key", "on_duplicate_gene": "sum", "elements": ["obs", "-raw"]}
    collection = build(tmp_path / "o.zarr", pair, load_adata=load, **options)
    assert collection.var.index.tolist() == ["E1", "E2", "E4", "E5"]
    assert collection.verify(against=pair, load_adata=load).ok


def test_numbers_name_genes(tmp_path):
    small(tmp_path / "x.h5ad", ["a", "b"], np.ones((2, 2), np.float32), {"entrez": [672, 7157]})
    assert build(tmp_path / "o.zarr", [tmp_path / "x.h5ad"], var_key="entrez").var.index.tolist() == ["672", "7157"]


# --- maps ------------------------------------------------------------------------------------------------------------


def forms(folder):
    """One map in every form."""
    frame = pd.DataFrame({"alias": ["A", "NA"], "id": ["E1", "nan"]})
    frame.to_csv(folder / "m.csv", index=False)
    frame.to_csv(folder / "m.csv.gz", index=False)
    frame.to_csv(folder / "m.tsv", index=False, sep="\t")
    yield from (dict(frame.to_numpy()), frame, frame.set_index("alias"), frame.set_index("alias")["id"])
    yield from (folder / "m.csv", str(folder / "m.csv.gz"), folder / "m.tsv")


def test_a_map_is_the_same_in_every_form(tmp_path):
    small(tmp_path / "x.h5ad", ["A", "B", "NA"], np.ones((2, 3), np.float32))
    made = [build(tmp_path / f"{k}.zarr", [tmp_path / "x.h5ad"], gene_map=m) for k, m in enumerate(forms(tmp_path))]
    assert {tuple(c.var.index) for c in made} == {("E1", "B", "nan")}
    assert len({c.manifest.builds[0].request for c in made}) == 1
    assert len({json.dumps(tree_digest(c.path)) for c in made}) == 1


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("alias,id\nA,E1\nA,E2\n", "1 names that stand for two ids: A -> E1 and A -> E2"),
        ("alias,id\nA,\n", "1 row of 1 without a name, for example 'A' -> ''"),
        ("alias,id,more\nA,E1,x\n", r"has 3 columns \(alias, id, more\); give two"),
        ("ENSG00000000001,ENSG00000000002\nA,E1\n", "no line of column names"),
        ("", "cannot be read as csv"),
    ],
)
def test_a_table_that_is_no_map_is_refused(tmp_path, rows, words):
    small(tmp_path / "x.h5ad", ["A"], np.ones((1, 1), np.float32))
    (tmp_path / "m.csv").write_text(rows)
    with pytest.raises((SchemaError, SourceError), match=words):
        build(tmp_path / "o.zarr", [tmp_path / "x.h5ad"], gene_map=tmp_path / "m.csv")
    assert not (tmp_path / "o.zarr").exists()


def test_other_maps_that_are_none_are_refused(tmp_path, monkeypatch):
    small(tmp_path / "x.h5ad", ["A"], np.ones((1, 1), np.float32))
    make = lambda m: build(tmp_path / "o.zarr", [tmp_path / "x.h5ad"], gene_map=m)  # noqa: E731
    with pytest.raises(SourceNotFoundError, match=r"none\.csv does not exist"):
        make(tmp_path / "none.csv")
    with pytest.raises(SourceError, match="no ending that tells what it is"):
        make("map.xls")
    with pytest.raises(TypeError, match="gene_map is a list"):
        make(["A"])
    with pytest.raises(SchemaError, match=r"1 row of 1 without a name, for example 'A' -> nan"):
        make({"A": np.nan})
    monkeypatch.setattr(pd, "read_parquet", lambda _: (_ for _ in ()).throw(ImportError("no pyarrow")))
    with pytest.raises(MissingPackageError, match="pip install pyarrow"):
        make("m.parquet")
    with pytest.raises(SchemaError, match=r"ENSG00000000001 twice once versions are stripped, for B and for C"):
        build(
            tmp_path / "o.zarr",
            [tmp_path / "x.h5ad"],
            gene_map={"ENSG00000000001.1": "B", "ENSG00000000001.2": "C"},
            strip_versions=True,
        )
    with pytest.warns(UserWarning, match="gene_map names none of the genes of the 1 input: it has names such as E1"):
        make({"E1": "A"})


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"var_key": "feature_id"}, SchemaError, r"a\.h5ad: var has no column 'feature_id', which var_key names"),
        ({"var_key": {"*b.h5ad": "gene_ids"}}, SchemaError, r"b\.h5ad: var has no column 'gene_ids'"),
        ({"var_key": {"c.h5ad": "gene_ids"}}, SourceError, r"var_key names c\.h5ad, which is none of the 2 inputs"),
        ({"var_key": KEYED["var_key"]}, SchemaError, r"a\.h5ad: 4 genes get 3 names: B, C all become E2; give on_dup"),
        ({"gene_map": {"B": "A"}}, SchemaError, r"A, B all become A"),
        ({"gene_map": {"B": "A"}, "on_duplicate_gene": "add"}, ValueError, "on_duplicate_gene is 'add'"),
        ({"strip_versions": "yes"}, TypeError, "strip_versions is the text 'yes'"),
        ({"strip_versions": 2}, ValueError, "strip_versions is 2"),
        ({"var_key": 3}, TypeError, "var_key is a int"),
        ({"var_key": {"*a.h5ad": "length"}, "on_duplicate_gene": "sum"}, SchemaError, "raw.var has no column 'length'"),
    ],
)
def test_what_is_asked_in_vain_is_refused_before_anything_is_read(pair, tmp_path, options, error, words):
    for method in ("plan_adatas", "add_adatas"):
        with pytest.raises(error, match=words):
            getattr(DatasetCollection(tmp_path / "o.zarr"), method)(pair, **options)
    assert not (tmp_path / "o.zarr").exists()


@pytest.mark.parametrize("missing", ["", np.nan])
def test_genes_without_a_name_are_refused(tmp_path, missing):
    names = pd.Series(["E1", missing, "E3"], dtype="category" if missing != "" else object).to_numpy(object)
    var = {"id": pd.Categorical(names)}
    small(tmp_path / "x.h5ad", ["a", "GFP", "c"], np.ones((2, 3), np.float32), var)
    with pytest.raises(
        SchemaError, match=r"var column 'id', which var_key names, has no value for 1 of 3 genes \(GFP\)"
    ):
        build(tmp_path / "o.zarr", [tmp_path / "x.h5ad"], var_key="id", on_duplicate_gene="first")


def test_fractions_name_no_genes(tmp_path):
    small(tmp_path / "x.h5ad", ["a", "b"], np.ones((2, 2), np.float32), {"id": [0.5, 1.5]})
    with pytest.raises(SchemaError, match="var column 'id' holds float64 values"):
        build(tmp_path / "o.zarr", [tmp_path / "x.h5ad"], var_key="id")


# --- extensions, resumes, copies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["extend", "append", "reshuffle"])
def test_an_extension_names_genes_as_the_collection_does(pair, tmp_path, mode):
    options = KEYED | {"elements": ["obs"]}
    small(tmp_path / "z.h5ad", ["E1", "E2"], np.ones((1, 2), np.float32))
    first = [pair[0], str(tmp_path / "z.h5ad")]
    collection = build(tmp_path / "o.zarr", first, **options, gene_map={"E4": "E5"})
    before = collection.var
    assert before["input_var_names"].tolist() == ["A", "B", "D"]
    again = ad.read_h5ad(pair[0])
    again.obs_names = ["2a-0", "2a-1", "2a-2"]
    again.write_h5ad(tmp_path / "2a.h5ad")
    new = [str(tmp_path / "2a.h5ad"), pair[1]]
    small(new[1], ["E1", "E4", "E9"], np.ones((2, 3), np.float32))  # E4 is E5 by the map of the first build
    collection.add_adatas(new, mode=mode, elements=["obs"])
    assert collection.var.equals(before)
    naming = collection.manifest.naming
    assert (naming.on_duplicate, naming.renamed, naming.joined) == ("sum", (4, 1), (1, 0))
    assert collection.verify(against=[*first, *new]).ok
    rows = ad.concat([ad.io.read_zarr(g) for g in collection])
    assert rows["b-0"].X.toarray().tolist() == [[1, 0, 1]]
    for group in collection:
        assert ad.io.read_zarr(group).var.equals(before)


def test_an_extension_by_another_key_is_refused(pair, tmp_path):
    collection = build(tmp_path / "o.zarr", pair[:1], var_key="gene_ids", on_duplicate_gene="sum", elements=["obs"])
    for key, words in (("", "the index of var"), ("length", "var column 'length'")):
        with pytest.raises(
            SchemaError,
            match=f"has its genes by var column 'gene_ids', and those of .*b.h5ad would be named by {words}; name",
        ):
            collection.add_adatas(pair[1:], var_key=key)
    with pytest.raises(SchemaError, match="was built with strip_versions=False, and strip_versions is True"):
        collection.add_adatas(pair[1:], strip_versions=True)


def test_an_input_that_no_rule_names_is_not_named_by_chance(pair, tmp_path):
    options = {"on_duplicate_gene": "sum", "elements": ["obs"]}
    collection = build(tmp_path / "o.zarr", pair[:1], var_key={pair[0]: "gene_ids"}, **options)
    with pytest.raises(
        SchemaError, match=r"those of .*b\.h5ad would be named by the index of var; name them so with var_key"
    ):
        collection.add_adatas(pair[1:], elements=["obs"])


@pytest.mark.parametrize("naming", [{"strip_versions": True}, {}], ids=["named", "plain"])
@pytest.mark.parametrize("mode", ["extend", "append", "reshuffle"])
def test_an_input_that_shares_no_gene_is_refused(pair, tmp_path, naming, mode):
    collection = build(tmp_path / "o.zarr", pair[1:], elements=["obs"], **naming)
    with pytest.raises(
        SchemaError, match=r"none of its 4 genes, such as A, is among the 3 of the collection, such as E1"
    ):
        collection.add_adatas(pair[:1], elements=["obs"], mode=mode)
    collection.add_adatas(pair[:1], elements=["obs"], genes="union")
    assert collection.n_vars == 7


def test_a_collection_by_the_index_takes_inputs_by_a_column(pair, tmp_path):
    collection = build(tmp_path / "o.zarr", pair[1:], elements=["obs"])
    collection.add_adatas(pair[:1], elements=["obs"], var_key="gene_ids", on_duplicate_gene="sum")
    assert collection.var["input_var_names"].to_dict() == {"E1": "A", "E4": "D", "E5": "E5"}
    assert collection.verify(against=pair).ok


def test_views_and_the_other_options_work_on_joined_genes(pair, tmp_path):
    shutil.copy(pair[0], tmp_path / "2a.h5ad")
    options = KEYED | {"elements": ["obs", "raw"], "where": "row > 0", "duplicates": "drop", "stats": True}
    collection = build(tmp_path / "o.zarr", [*pair, str(tmp_path / "2a.h5ad")], merge="first", **options)
    assert collection.n_obs == 4  # those of 2a are those of a
    view = collection.to_lazy()
    assert view.var["input_var_names"].to_numpy().tolist() == ["A", "B", "D", "E5"]
    found = ad.concat([ad.io.read_zarr(g) for g in collection])
    np.testing.assert_array_equal(view.X.compute().toarray(), found.X.toarray())
    sums = collection.gene_stats()
    np.testing.assert_array_equal(sums["sum"], found.X.toarray().sum(0))


def test_versions_that_the_collection_has_stay(tmp_path):
    for name in ("x", "y"):
        small(tmp_path / f"{name}.h5ad", ["ENSG00000000003.15"], np.ones((2, 1), np.float32))
    collection = build(tmp_path / "o.zarr", [tmp_path / "x.h5ad"])
    with pytest.raises(SchemaError, match=r"1 genes of the collection have versions, such as ENSG00000000003\.15"):
        collection.add_adatas([tmp_path / "y.h5ad"], strip_versions=True)


def test_a_map_that_was_lost_is_asked_for(pair, tmp_path):
    options = {"elements": ["obs"], "gene_map": {"E1": "A", "B": "C1"}}
    collection = build(tmp_path / "o.zarr", pair[:1], **options)
    shutil.rmtree(tmp_path / "o.zarr.log")
    with pytest.raises(
        CollectionError, match=r"kept as .*genes\.json, and it is not there, or another; copy that folder"
    ):
        collection.add_adatas(pair[1:], elements=["obs"])
    with pytest.raises(CollectionError, match="copy that folder"):
        collection.verify(against=pair[:1])
    assert collection.verify().ok
    collection.add_adatas(pair[1:], **options)
    assert collection.verify(against=pair).ok


def test_a_copy_knows_the_map(pair, tmp_path):
    collection = build(tmp_path / "o.zarr", pair, **KEYED, elements=["obs"], gene_map={"E5": "E6"})
    packed = collection.repack(tmp_path / "p.zarr", "packed")
    assert packed.verify(against=pair).ok
    assert packed.manifest.naming == collection.manifest.naming


class Interrupt(Callback):
    def on_task_end(self, event):
        if event.stage == "scatter":
            raise KeyboardInterrupt


def test_an_interrupted_build_goes_on_and_another_map_is_another_build(pair, tmp_path):
    options = KEYED | {"elements": ["obs"], "gene_map": {"E4": "E5"}}
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "o.zarr", pair, callbacks=[Interrupt()], **options)
    clean = build(tmp_path / "clean.zarr", pair, **options)
    other = build(tmp_path / "other.zarr", pair, **options | {"gene_map": {"E4": "E6"}})
    resumed = build(tmp_path / "o.zarr", pair, **options)
    assert tree_digest(resumed.path) == tree_digest(clean.path)
    assert other.manifest.builds[0].plan != clean.manifest.builds[0].plan
    before = tree_digest(resumed.path)
    assert build(tmp_path / "o.zarr", pair, **options).manifest == resumed.manifest  # done
    assert tree_digest(resumed.path) == before
    with pytest.warns(UserWarning, match="is added again"):
        build(tmp_path / "o.zarr", pair, **options | {"gene_map": {"E4": "E6"}, "genes": "union"})


def test_maps_that_swap_names_are_two_builds(tmp_path):
    small(tmp_path / "x.h5ad", ["a", "b"], np.array([[1, 2]], np.float32))
    maps = [{"a": "b", "b": "a"}, {"a": "a"}]
    made = [build(tmp_path / f"{k}.zarr", [tmp_path / "x.h5ad"], gene_map=m) for k, m in enumerate(maps)]
    assert [ad.io.read_zarr(next(iter(c)))[:, "a"].X.item() for c in made] == [2, 1]
    assert len({c.manifest.builds[0].plan for c in made}) == 2


def test_four_workers_write_the_same_bytes_as_one(pair, tmp_path):
    from distributed import Client, LocalCluster

    options = KEYED | {"elements": ["obs"], "gene_map": {"E4": "E5"}, "dataset_size": 2}
    one = build(tmp_path / "one.zarr", pair, **options)
    with (
        LocalCluster(n_workers=4, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        four = build(tmp_path / "four.zarr", pair, client=client, **options)
    assert tree_digest(four.path) == tree_digest(one.path)


# --- where people are ------------------------------------------------------------------------------------------------


def test_plan_manifest_report_and_info_say_the_same(pair, tmp_path, capsys):
    options = KEYED | {"elements": ["obs"], "gene_map": {"E5": "E6"}}
    plan = DatasetCollection(tmp_path / "o.zarr").plan_adatas(pair, **options)
    words = [
        "by var column 'gene_ids' of *a.h5ad, else by the index; gene_map ",
        "5 genes of 2 sources, 1 by gene_map",
        "1 gene of 1 source went into others, of which there are 1; added up: E2 (B, C)",
    ]
    for text in words:
        assert text in plan.summary()
        assert text in str(plan.figures())
    collection = build(tmp_path / "o.zarr", pair, **options)
    assert collection.manifest.naming == plan.naming
    assert (
        type(collection.manifest).from_json(json.loads(json.dumps(collection.manifest.to_json())))
        == collection.manifest
    )
    page = collection.report().html
    assert "Names of genes" in page
    assert "of *a.h5ad" in page
    assert main(["info", str(tmp_path / "o.zarr")]) == 0
    said = capsys.readouterr().out
    assert all(text in said for text in words)


def test_what_inputs_call_differently_is_said(tmp_path):
    for name, symbol in (("x", "SYNRG"), ("y", "AP1GBP1")):
        small(tmp_path / f"{name}.h5ad", [symbol, "B"], np.ones((2, 2), np.float32), {"id": ["E1", "E2"]})
    collection = build(tmp_path / "o.zarr", [tmp_path / "x.h5ad", tmp_path / "y.h5ad"], var_key="id")
    assert collection.manifest.naming.called == (("E1", ("SYNRG", "AP1GBP1")),)
    assert collection.var["input_var_names"].tolist() == ["SYNRG", "B"]
    assert "Sources call them differently" in collection.report().html


def test_many_names_stay_few_in_the_manifest(tmp_path):
    genes = [f"g{k}" for k in range(400)]
    small(tmp_path / "x.h5ad", genes, np.ones((2, 400), np.float32), {"id": [f"E{k // 2}" for k in range(400)]})
    collection = build(tmp_path / "o.zarr", [tmp_path / "x.h5ad"], var_key="id", on_duplicate_gene="sum")
    naming = collection.manifest.naming
    assert (naming.joined, naming.n_met, len(naming.met)) == ((200,), 200, 32)
    assert "and 168 more genes" in collection.report().html


def test_the_command_line_names_genes(pair, tmp_path, capsys):
    (tmp_path / "m.csv").write_text("alias,id\nE5,E6\n")
    out = str(tmp_path / "o.zarr")
    options = ["--var-key", "*a.h5ad=gene_ids", "--on-duplicate-gene", "sum", "--gene-map", str(tmp_path / "m.csv")]
    assert main(["shuffle", *pair, "-o", out, "--elements=obs", "--strip-versions", *options]) == 0
    collection = DatasetCollection(out, mode="r")
    assert collection.var.index.tolist() == ["E1", "E2", "E4", "E6"]
    assert collection.manifest.naming.strip_versions
    assert main(["plan", pair[0], "--var-key", "gene_ids", "--on-duplicate-gene", "first"]) == 0
    assert "the first of each kept" in capsys.readouterr().out
    assert main(["plan", *pair, "--var-key", "gene_ids", "--var-key", "x=y"]) == 1
    assert "give one name for all files, or PATTERN=NAME" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("ENSG00000000003.15", "ENSG00000000003"),
        ("ENSMUSG00000000001.5", "ENSMUSG00000000001"),
        ("ENSG00000182378.15_PAR_Y", "ENSG00000182378_PAR_Y"),
        ("ENSGR0000182378.10", "ENSGR0000182378"),
        ("ENSG00000223972.5_2", "ENSG00000223972"),
        ("MGP_C57BL6NJ_G0000001.1", "MGP_C57BL6NJ_G0000001"),
        *((same, same) for same in ("ENSG00000000003", "HLA-A.1", "RP11-34P13.7", "ERCC-00002", "AC000001.1", "")),
    ],
)
def test_versions(name, wanted):
    assert strip_version(name) == wanted
