"""qc: cells are kept as scanpy's filters keep them, and what is kept is as if the files held nothing else."""

import contextlib
import json
import tempfile
import warnings
from pathlib import Path

import anndata as ad
import dask
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from distributed import Client, LocalCluster
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from annbatch_dask import QC, DatasetCollection
from annbatch_dask.errors import SchemaError, SelectionError
from annbatch_dask.etl import measure
from annbatch_dask.testing import make_adata
from tests.etl.inputs import adatas, dense_x, exact_or_refused, write
from tests.tools import Counter, rows_of, tree_digest

GENES = [f"{'MT-' if i % 7 == 0 else 'g'}{i}" for i in range(40)]
RULES = {"min_counts": 12, "max_counts": 60, "min_genes": 6, "max_genes": 30}
MITO = {"max_fraction": {"mito": 0.25}, "gene_sets": {"mito": "MT-"}}


def files(folder, n_obs=100, n_files=3):
    out = []
    for k in range(n_files):
        a = make_adata(n_obs, GENES, seed=k)
        del a.obs["n_counts"]
        a.obs["n"] = np.arange(n_obs)
        a.obs_names = [f"{k}-{i}" for i in range(n_obs)]
        a.var["mt"] = a.var_names.str.startswith("MT-")
        a.var["symbol"] = [f"s{name}" for name in a.var_names]
        a.raw = a
        a.layers["dense"], a.layers["csc"], a.layers["csr"] = a.X.toarray(), a.X.tocsc(), a.X.copy()
        out.append(folder / f"{k}.h5ad")
        a.write_h5ad(out[-1], compression=("gzip", None)[k % 2])
    return out


def measured(adata, x=None):
    """What scanpy says of cells."""
    few = ad.AnnData(sp.csr_matrix(adata.X if x is None else x), obs=adata.obs[[]], var=adata.var[["mt"]])
    sc.pp.calculate_qc_metrics(few, qc_vars=["mt"], percent_top=None, log1p=False, inplace=True)
    return few.obs


def passing(obs):
    """Names of the cells that meet the rules."""
    n_counts, n_genes, share = obs["total_counts"], obs["n_genes_by_counts"], obs["pct_counts_mt"] / 100
    return obs.index[n_counts.between(12, 60) & n_genes.between(6, 30) & (share <= 0.25)]


def build(path, paths, **options):
    with dask.config.set(scheduler="synchronous"):
        return DatasetCollection(path).add_adatas(paths, **{"seed": 0, "dataset_size": 40} | options)


@pytest.mark.parametrize("load", [None, ad.read_h5ad])
@pytest.mark.parametrize("counts", ["X", "raw/X", "layers/csc", "layers/dense"])
def test_the_cells_that_scanpy_keeps_are_kept_and_have_its_numbers(tmp_path, counts, load):
    paths = files(tmp_path)
    qc = QC(**RULES, **MITO, annotate=True)
    collection = build(tmp_path / "a.zarr", paths, qc=qc, counts=counts, load_adata=load)
    want = {}
    for path in paths:
        found = measured(ad.read_h5ad(path))
        want |= found.loc[passing(found)].to_dict("index")
    obs = collection.obs()
    assert set(obs.index) == set(want)
    assert 0 < len(obs) < 300
    for name, row in obs.iterrows():
        assert row["n_counts"] == want[name]["total_counts"]
        assert row["n_genes"] == want[name]["n_genes_by_counts"]
        assert row["fraction_mito"] == pytest.approx(want[name]["pct_counts_mt"] / 100, rel=1e-6)
    assert collection.verify(paths, load_adata=load).problems == ()


def test_one_rule_drops_what_filter_cells_drops(tmp_path):
    _, path = files(tmp_path, n_files=2)
    for rule, value in (RULES | {"max_counts": 20, "max_genes": 9}).items():
        a = ad.read_h5ad(path)
        sc.pp.filter_cells(a, **{rule: value})
        found = build(tmp_path / f"{rule}.zarr", [path], qc={rule: value})
        assert set(found.obs().index) == set(a.obs_names), rule
        (source,) = found.manifest.sources
        assert dict(source.dropped) == {rule: 100 - a.n_obs}
        assert 0 < a.n_obs < 100


def kept(adata, mask):
    with warnings.catch_warnings(), ad.settings.override(remove_unused_categories=False):
        warnings.filterwarnings("ignore", "Observation names are not unique")
        return adata[mask].copy()


def built(folder, inputs, **options):
    with contextlib.chdir(folder), dask.config.set(scheduler="synchronous"):
        paths = [f"in{i}.h5ad" for i in range(len(inputs))]
        for a, path in zip(inputs, paths, strict=True):
            write(a, path, "gzip")
        DatasetCollection("out.zarr").add_adatas(paths, allow_mixed_counts=True, seed=5, **options)
    return rows_and_columns(folder / "out.zarr")


def rows_and_columns(path):
    """Files of all datasets, but for the documents that name the plan."""
    return tree_digest(path, lambda name: name.name != "zarr.json" or len(name.parts) > 2)


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    inputs=st.tuples(adatas(0), adatas(1), adatas(2)).flatmap(lambda xs: st.integers(1, 3).map(lambda n: list(xs[:n]))),
    rule=st.sampled_from(["min_counts", "max_counts", "min_genes", "max_genes"]),
    value=st.integers(0, 6),
    row=st.integers(0, 8),
)
def test_datasets_are_those_of_files_that_hold_the_kept_cells_alone(inputs, rule, value, row):
    masks = []
    for a in inputs:
        X = dense_x(a)
        # in the order of a file, as sums of fractions depend on it
        found = np.array([sum(x[x != 0].tolist()) for x in X]) if "counts" in rule else (X != 0).sum(1)
        met = found >= value if rule.startswith("min") else found <= value
        masks.append(np.asarray(met, bool) & (a.obs["row"].to_numpy() <= row))
    few = [kept(a, mask) for a, mask in zip(inputs, masks, strict=True)]
    options = {"dataset_size": 5, "qc": QC(**{rule: value}), "where": f"row <= {row}"}
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two, exact_or_refused():
        if not sum(a.n_obs for a in few):
            if sum(a.n_obs for a in inputs):
                with pytest.raises(SelectionError):
                    built(Path(one), inputs, **options)
            return
        want = built(Path(two), few, dataset_size=5)
        assert built(Path(one), inputs, **options) == want


def test_gene_sets_are_prefixes_lists_and_columns(tmp_path):
    paths = files(tmp_path)
    for path in paths:
        a = ad.read_h5ad(path)
        a.var["maybe"] = pd.array(np.where(a.var["mt"], True, None), "boolean")
        a.write_h5ad(path)
    listed = [n for n in GENES if n.startswith("MT-")]
    sets = ("MT-", listed, "mt", {"symbol": "sMT-"}, {"mt": True}, "maybe", {"maybe": True})
    want = None
    for k, genes in enumerate(sets):
        qc = {"max_fraction": {"mito": 0.25}, "gene_sets": {"mito": genes}}
        found = build(tmp_path / f"{k}.zarr", paths, qc=qc)
        assert found.verify(paths).ok
        want = want or rows_of(found)
        assert rows_of(found) == want
    assert 0 < len(want) < 300


@pytest.mark.parametrize("dtype", ["float32", "int32", "bool"])
@pytest.mark.parametrize("sets", [{}, {"mito": ["g0"]}])
def test_a_gene_that_a_row_names_several_times_is_one(tmp_path, dtype, sets):
    values, columns = [1, 2, 0, 200, 100, 1, 1, 1], [0, 0, 1, 2, 2, 2, 0, 1]
    x = sp.csr_matrix((np.array(values, dtype), columns, [0, 3, 5, 8]), shape=(3, 4))
    a = ad.AnnData(x)
    a.var_names = [f"g{i}" for i in range(4)]
    a.write_h5ad(tmp_path / "a.h5ad")
    wide = sp.csr_matrix((x.data.astype(float), x.indices, x.indptr), x.shape).toarray()
    wide = wide > 0 if dtype == "bool" else wide
    with dask.config.set(scheduler="synchronous"):
        made = DatasetCollection(tmp_path / "o.zarr").add_adatas(
            [tmp_path / "a.h5ad"], qc=QC(max_genes=2, annotate=True, gene_sets=sets), shuffle=False
        )
        few = DatasetCollection(tmp_path / "f.zarr").add_adatas(
            [tmp_path / "a.h5ad"], qc=QC(max_genes=1), shuffle=False
        )
    obs = made.obs()
    np.testing.assert_array_equal(obs["n_counts"], wide.sum(1)[:2])
    np.testing.assert_array_equal(obs["n_genes"], [1, 1])
    if sets:
        np.testing.assert_allclose(obs["fraction_mito"], wide[:2, 0] / wide[:2].sum(1))
    assert few.obs().index.tolist() == obs.index.tolist()
    assert few.verify(against=[tmp_path / "a.h5ad"]).ok


def test_more_gene_sets_than_a_byte_has_bits(tmp_path):
    (path,) = files(tmp_path, n_files=1)
    sets = {f"s{k}": [GENES[k], GENES[k + 1]] for k in range(12)}
    obs = build(tmp_path / "a.zarr", [path], qc=QC(gene_sets=sets, annotate="qc_")).obs()
    X = ad.read_h5ad(path)[obs.index].X.toarray()
    for k in range(12):
        want = X[:, k : k + 2].sum(1) / X.sum(1)
        np.testing.assert_allclose(obs[f"qc_fraction_s{k}"], want, rtol=1e-6)


@pytest.fixture
def fractions(tmp_path):
    """Files whose values are no whole numbers, so that each sum depends on its order."""
    paths = files(tmp_path)
    for path in paths:
        a = ad.read_h5ad(path)
        a.X.data = (a.X.data / 3).astype(np.float32)
        a.write_h5ad(path)
    return paths


def test_the_same_bytes_on_one_and_on_four_workers(tmp_path, fractions):
    options = {"qc": QC(min_counts=6, **MITO, annotate=True), "where": "n % 9 != 4"}
    options |= {"dataset_size": "20kB", "elements": ["-layers/csc"]}  # whose blocks are as large as can be
    one = build(tmp_path / "one.zarr", fractions, **options)
    with (
        dask.config.set({"annbatch_dask.block_size": "2kB"}),
        LocalCluster(n_workers=4, threads_per_worker=1, processes=False, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        counter = Counter()
        four = DatasetCollection(tmp_path / "four.zarr").add_adatas(
            fractions, seed=0, client=client, callbacks=[counter], **options
        )
    assert counter.tasks["measure"] > 3
    assert len(one) > 1
    assert tree_digest(one.path) == tree_digest(four.path)


@pytest.mark.parametrize("mode", ["extend", "append", "reshuffle"])
def test_cells_that_are_there_are_not_measured(tmp_path, mode):
    one, two, three = files(tmp_path)
    collection = build(tmp_path / "a.zarr", [one])
    counter = Counter()
    collection = build(collection.path, [two, three], qc=QC(**RULES), mode=mode, callbacks=[counter])
    assert counter.rows["measure"] == 200
    kept = {n for n in rows_of(collection) if not n.startswith("0-")}
    assert len(rows_of(collection)) - len(kept) == 100
    assert kept == set(build(tmp_path / "b.zarr", [two, three], qc=QC(**RULES)).obs().index)
    assert collection.verify([one, two, three]).ok


def test_an_annotated_collection_is_extended(tmp_path):
    one, two, three = files(tmp_path)
    qc = QC(min_genes=6, annotate=True)
    collection = build(build(tmp_path / "a.zarr", [one, two], qc=qc).path, [three], qc=qc)
    obs = collection.obs()
    assert obs["n_genes"].min() >= 6
    assert not obs["n_counts"].isna().any()
    assert collection.verify([one, two, three]).ok


def test_groups_may_be_of_what_is_measured(tmp_path):
    paths = files(tmp_path)
    collection = build(tmp_path / "a.zarr", paths, qc=QC(min_genes=6, annotate=True), groupby="n_genes")
    for group in collection:
        assert (np.diff(ad.io.read_elem(group["obs"])["n_genes"]) >= 0).all()


class Killed(BaseException):
    """As Ctrl-C ends a build."""


def test_a_build_that_was_killed_measures_nothing_again(tmp_path, monkeypatch):
    paths = files(tmp_path)
    options = {"qc": QC(**RULES, **MITO, annotate=True)}
    want = tree_digest(build(tmp_path / "want.zarr", paths, **options).path)
    for stage, n_before in (("measure", 2), ("scatter", 1), ("gather", 1)):
        target = tmp_path / f"{stage}.zarr"

        class Kill(Counter):
            def on_task_end(self, event, stage=stage, n_before=n_before):
                super().on_task_end(event)
                if self.tasks.get(stage, 0) == n_before:
                    raise Killed

        with pytest.raises(Killed):
            build(target, paths, callbacks=[Kill()], **options)
        again = Counter()
        found = build(target, paths, callbacks=[again], **options)
        assert again.reused >= n_before + (0 if stage == "measure" else 3)
        assert tree_digest(found.path) == want


def test_what_was_measured_is_worked_out_again_where_it_was_damaged(tmp_path, monkeypatch):
    paths = files(tmp_path)
    options = {"qc": QC(**RULES, annotate=True)}
    want = tree_digest(build(tmp_path / "a.zarr", paths, **options).path)
    found, write_metrics = [], measure.write_metrics

    def torn(folder, index, metrics):
        write_metrics(folder, index, metrics)
        payload = folder.read(f"metrics-{index:06d}")
        folder.write(f"metrics-{index:06d}", payload[:-1] + b"\xff", durable=False)
        found.append(index)

    monkeypatch.setattr(measure, "write_metrics", torn)
    assert tree_digest(build(tmp_path / "b.zarr", paths, **options).path) == want
    assert len(found) == 3


def test_a_plan_says_what_has_to_be_decided_and_runs_once(tmp_path):
    paths = files(tmp_path)
    collection = DatasetCollection(tmp_path / "a.zarr")
    with dask.config.set(scheduler="synchronous"):
        plan = collection.plan_adatas(paths, qc=QC(**RULES), dataset_size=40)
        assert "up to 300 cells" in plan.title
        assert "min_counts, max_counts, min_genes, max_genes: X is read once more" in plan.summary()
        assert "3 measure + 3 scatter" in plan.summary()
        plan.run()
        counter = Counter()
        plan.run(callbacks=[counter])
    assert not counter.tasks
    (record,) = collection.manifest.builds
    assert QC.of(record.qc) == QC(**RULES)
    dropped = sum(sum(s.dropped.values()) for s in collection.manifest.sources)
    assert dropped == 300 - collection.n_obs > 0
    json.dumps(collection.manifest.to_json())


def test_rules_that_keep_nothing_leave_nothing_behind(tmp_path):
    paths = files(tmp_path)
    with pytest.raises(SelectionError, match=r"qc keeps none of the 300 cells of 3 inputs: min_counts drops 300"):
        build(tmp_path / "a.zarr", paths, qc=QC(min_counts=10**6))
    assert not [*tmp_path.glob("a.zarr/*"), *tmp_path.glob("a.zarr.scratch/*")]
    collection = build(tmp_path / "b.zarr", paths[:1])
    with pytest.raises(SelectionError):
        build(collection.path, paths[1:], qc=QC(min_counts=10**6))
    assert collection.verify(paths[:1]).ok


@pytest.mark.parametrize(("stage", "options"), [("measure", {"qc": QC(**RULES)}), ("group", {"groupby": "cell_type"})])
def test_what_a_build_leaves_that_was_killed_before_it_scattered_is_swept(tmp_path, stage, options):
    paths = files(tmp_path)

    class Kill(Counter):
        def on_task_end(self, event):
            assert event.stage == stage
            raise Killed

    with pytest.raises(Killed):
        build(tmp_path / "a.zarr", paths, callbacks=[Kill()], **options)
    DatasetCollection(tmp_path / "a.zarr").gc()
    assert not [*tmp_path.glob("a.zarr/*"), *tmp_path.glob("a.zarr.scratch/*")]


@pytest.mark.parametrize(
    ("qc", "match"),
    [
        (
            {"gene_sets": {"mito": "mt-"}, "max_fraction": {"mito": 0.1}},
            r"gene set 'mito' \('mt-'\) has none of the 40",
        ),
        ({"gene_sets": {"mito": ["x", "y"]}, "max_fraction": {"mito": 0.1}}, r"has none of the 40 genes"),
        ({"gene_sets": {"mito": {"nope": "MT-"}}, "max_fraction": {"mito": 0.1}}, r"has no column 'nope'"),
        ({"gene_sets": {"mito": {"text": True}}, "annotate": "q_"}, r"'text' of var of .* is not true or false"),
        ({"annotate": True}, r"obs has n_counts, which qc adds"),
    ],
)
def test_rules_that_do_not_fit_an_input_are_refused_before_work(tmp_path, qc, match):
    paths = files(tmp_path)
    a = ad.read_h5ad(paths[1])
    a.obs["n_counts"] = 1
    a.write_h5ad(paths[1])
    for path in paths:
        a = ad.read_h5ad(path)
        a.var["text"] = "False"
        a.write_h5ad(path)
    with pytest.raises(SchemaError, match=match):
        build(tmp_path / "a.zarr", paths, qc=qc)
    assert not (tmp_path / "a.zarr").exists()


@pytest.mark.parametrize(
    ("qc", "error", "match"),
    [
        ({}, ValueError, "QC has no rule"),
        ({"min_counts": "many"}, TypeError, "give a number"),
        ({"min_genes": 5, "max_genes": 4}, ValueError, "min_genes=5 is more than max_genes=4"),
        ({"max_fraction": {"mito": 0.2}}, ValueError, "max_fraction names 'mito', and gene_sets has none"),
        ({"max_fraction": {"mito": 20}, "gene_sets": {"mito": "MT-"}}, ValueError, "a share from 0 to 1"),
        ({"max_counts": np.nan}, ValueError, "max_counts is NaN, which no cell meets"),
        ({"min_umis": 3}, TypeError, "some of min_counts"),
        (7, TypeError, "give QC"),
        ({"max_fraction": 0.2, "gene_sets": {"mito": "MT-"}}, TypeError, r"max_fraction is 0.2; give a share for a"),
        ({"max_fraction": {"m": "0.2"}, "gene_sets": {"m": "MT-"}}, TypeError, "max_fraction of 'm' is '0.2'; give"),
        ({"gene_sets": "MT-", "annotate": True}, TypeError, "gene_sets is 'MT-'; give each a name"),
        ({"gene_sets": {"m": None}, "annotate": True}, TypeError, "gene set 'm' is None; give a prefix"),
        ({"gene_sets": {"m": ""}, "annotate": True}, TypeError, "gene set 'm' is ''; give a prefix"),
        ({"gene_sets": {"m": {}}, "annotate": True}, TypeError, "gene set 'm' is {}; give a prefix"),
        ({"gene_sets": {"m": {"a": "x", "b": "y"}}, "annotate": True}, TypeError, "gene set 'm' is {'a': 'x', 'b'"),
        ({"gene_sets": {"m": {"a": False}}, "annotate": True}, TypeError, "gene set 'm' is {'a': False}; give"),
        ({"annotate": "true"}, TypeError, "annotate is 'true'; give True or False, or a text to put before"),
        ({"annotate": 1}, TypeError, "annotate is 1; give True or False"),
    ],
)
def test_rules_that_make_no_sense_are_refused(tmp_path, h5ad_pair, qc, error, match):
    with pytest.raises(error, match=match):
        DatasetCollection(tmp_path / "a.zarr").plan_adatas(h5ad_pair, qc=qc)


def test_obs_that_is_left_out_is_not_annotated(tmp_path, h5ad_pair):
    with pytest.raises(ValueError, match="elements leaves obs out"):
        DatasetCollection(tmp_path / "a.zarr").plan_adatas(h5ad_pair, qc=QC(annotate=True), elements=["layers"])
