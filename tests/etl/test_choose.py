"""where: a build of chosen rows is, byte by byte, a build of files that hold those rows alone."""

import contextlib
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

from annbatch_dask import DatasetCollection
from annbatch_dask.errors import SelectionError, SourceError
from annbatch_dask.etl import choose
from annbatch_dask.sources import chosen, picked
from annbatch_dask.testing import make_adata
from tests.etl.inputs import adatas, exact_or_refused, write
from tests.tools import Counter, rows_of, tree_digest

GENES = [f"g{i}" for i in range(30)]


def kept(adata, rows):
    """An input that holds these rows alone, and all of its categories."""
    with warnings.catch_warnings(), ad.settings.override(remove_unused_categories=False):
        warnings.filterwarnings("ignore", "Observation names are not unique")
        return adata[sorted(rows)].copy()


def names(hows):
    return [f"in{i}.{'zarr' if how in ('zarr', 'zarr2') else 'h5ad'}" for i, how in enumerate(hows)]


def build(folder, inputs, hows, **options):
    """A collection of inputs whose paths do not say in which folder they are."""
    with contextlib.chdir(folder), dask.config.set(scheduler="synchronous"):
        paths = names(hows[: len(inputs)])
        for a, path, how in zip(inputs, paths, hows, strict=False):
            write(a, path, how)
        DatasetCollection("out.zarr").add_adatas(paths, allow_mixed_counts=True, **options)
    return rows_and_columns(folder / "out.zarr")


def rows_and_columns(path):
    """Files of all datasets, but for the documents that name the plan."""
    return tree_digest(path, lambda name: name.name != "zarr.json" or len(name.parts) > 2)


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    inputs=st.tuples(adatas(0), adatas(1), adatas(2)).flatmap(lambda xs: st.integers(1, 3).map(lambda n: list(xs[:n]))),
    hows=st.lists(st.sampled_from(["gzip", "lzf", None, "zarr", "zarr2"]), min_size=3, max_size=3),
    rows=st.lists(st.sets(st.integers(0, 12)), min_size=3, max_size=3),
    dataset_size=st.sampled_from([5, 9, 1000]),
    by_path=st.booleans(),
)
def test_datasets_are_those_of_files_that_hold_the_chosen_rows_alone(inputs, hows, rows, dataset_size, by_path):
    paths = names(hows)
    if by_path:
        where = {path: f"row in {sorted(r)} or row == -1" for path, r in zip(paths, rows, strict=True)}
    else:
        where, rows = f"row in {sorted(rows[0])}", [rows[0]] * 3
    few = [kept(a, {r for r in some if r < a.n_obs}) for a, some in zip(inputs, rows, strict=False)]
    if not sum(a.n_obs for a in few):
        return
    if by_path:
        where = dict(list(where.items())[: len(inputs)])
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two, exact_or_refused():
        want = build(Path(two), few, hows, dataset_size=dataset_size, seed=5)
        assert build(Path(one), inputs, hows, dataset_size=dataset_size, seed=5, where=where) == want


@pytest.fixture(params=["small pieces", "as they are"])
def _pieces(request, monkeypatch):
    """Chosen rows are the same however much is read at a time."""
    if request.param == "small pieces":
        monkeypatch.setattr(choose, "_STEP", 7)
        monkeypatch.setattr(chosen, "_WINDOW", 5)
        monkeypatch.setattr(picked, "_GAP", 3)
        monkeypatch.setattr(picked, "_POINTERS", 4)
        monkeypatch.setattr(picked, "_DENSE_NBYTES", 100)


def files(folder, n_obs=120, n_files=3):
    out = []
    for k in range(n_files):
        a = make_adata(n_obs, GENES, seed=k)
        a.obs["n"] = np.arange(n_obs)
        a.obs_names = [f"{k}-{i}" for i in range(n_obs)]
        a.layers["dense"] = a.X.toarray() + 1
        a.layers["csc"] = a.X.tocsc()
        a.raw = a
        a.obsm["pca"] = np.arange(3 * n_obs, dtype=np.float64).reshape(n_obs, 3)
        out.append(folder / f"{k}.h5ad")
        a.write_h5ad(out[-1], compression=("gzip", None)[k % 2])
    return out


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("load", [None, ad.read_h5ad, lambda p: ad.read_h5ad(p, backed="r")])
@pytest.mark.parametrize("counts", ["X", "raw/X", "layers/csc", "layers/dense"])
def test_every_kind_of_input_gives_the_chosen_rows(tmp_path, counts, load):
    paths = files(tmp_path)
    with dask.config.set(scheduler="synchronous"):
        collection = DatasetCollection(tmp_path / "a.zarr").add_adatas(
            paths, where="n % 5 == 1 or 60 < n < 73", counts=counts, load_adata=load, dataset_size=40
        )
        assert collection.verify(paths, load_adata=load).problems == ()
    found, n_kept = rows_of(collection), 0
    for path in paths:
        a = ad.read_h5ad(path)
        X = a.raw.X if counts == "raw/X" else a.X if counts == "X" else a.layers[counts.partition("/")[2]]
        X = X.toarray() if sp.issparse(X) else X
        for i in np.flatnonzero((a.obs["n"] % 5 == 1) | ((a.obs["n"] > 60) & (a.obs["n"] < 73))):
            assert found[a.obs_names[i]][0] == tuple(X[i].astype(float))
            n_kept += 1
    assert n_kept == collection.n_obs == len(found)


def test_lazy_inputs_give_the_chosen_rows(tmp_path):
    from anndata.experimental import read_lazy

    (path,) = files(tmp_path, n_files=1)
    with dask.config.set(scheduler="synchronous"):
        lazy = DatasetCollection(tmp_path / "lazy.zarr").add_adatas(
            [path], where="n % 4 == 3", load_adata=read_lazy, dataset_size=20
        )
        plain = DatasetCollection(tmp_path / "plain.zarr").add_adatas([path], where="n % 4 == 3", dataset_size=20)
    assert rows_of(lazy) == rows_of(plain)
    assert lazy.n_obs == 30


def test_the_plan_knows_what_is_kept_and_the_manifest_what_was_dropped(tmp_path):
    paths = files(tmp_path)
    collection = DatasetCollection(tmp_path / "a.zarr")
    with dask.config.set(scheduler="synchronous"):
        plan = collection.plan_adatas(paths, where={str(paths[0]): "n < 20", "*.h5ad": "n < 50"}, dataset_size=30)
        assert (plan.n_obs, plan.n_datasets) == (120, 4)
        assert "120 of 360: where drops 240" in plan.summary()
        counter = Counter()
        assert plan.run(callbacks=[counter]) is collection
        assert counter.rows["scatter"] == counter.rows["gather"] == 120
    assert [(s.n_obs, s.where, dict(s.dropped)) for s in collection.manifest.sources] == [
        (20, "n < 20", {"where": 100}),
        (50, "n < 50", {"where": 70}),
        (50, "n < 50", {"where": 70}),
    ]


def test_what_was_dropped_may_change_and_what_was_kept_may_not(tmp_path):
    paths = files(tmp_path)
    with dask.config.set(scheduler="synchronous"):
        collection = DatasetCollection(tmp_path / "a.zarr").add_adatas(paths, where="n < 50")
        a = ad.read_h5ad(paths[0])
        a.X.data[a.X.indptr[70]] += 1
        a.write_h5ad(paths[0])
        assert collection.verify(paths).ok
        a.X.data[a.X.indptr[30]] += 1
        a.write_h5ad(paths[0])
        (problem,) = collection.verify(paths).problems
        assert problem.where == str(paths[0])


def test_the_same_call_does_nothing_and_another_condition_is_another_call(tmp_path):
    (path,) = files(tmp_path, n_files=1)
    with dask.config.set(scheduler="synchronous"):
        collection = DatasetCollection(tmp_path / "a.zarr").add_adatas([path], where="n < 50")
        assert collection.add_adatas([path], where="n < 50").n_obs == 50
        with pytest.warns(UserWarning, match="is added again"):
            assert collection.add_adatas([path], where="n >= 50", mode="append").n_obs == 120
        found = rows_of(collection)
        assert len(found) == 120
        assert collection.verify([path]).ok


@pytest.mark.parametrize("mode", ["extend", "append", "reshuffle"])
def test_cells_that_are_there_are_not_asked(tmp_path, mode):
    one, two, _ = files(tmp_path)
    with dask.config.set(scheduler="synchronous"):
        collection = DatasetCollection(tmp_path / "a.zarr").add_adatas([one], dataset_size=50)
        collection.add_adatas([two], where="n < 10", mode=mode, dataset_size=50)
        assert collection.n_obs == 130
        assert collection.verify([one, two]).ok
    assert {name for name in rows_of(collection) if name.startswith("1-")} == {f"1-{i}" for i in range(10)}


def test_groups_are_those_of_chosen_rows(tmp_path):
    paths = files(tmp_path)
    with dask.config.set(scheduler="synchronous"):
        collection = DatasetCollection(tmp_path / "a.zarr").add_adatas(
            paths, where="cell_type != 'B' and n < 90", groupby="cell_type", dataset_size=50
        )
    for group in collection:
        codes = ad.io.read_elem(group["obs"])["cell_type"].cat.codes
        assert (np.diff(codes) >= 0).all()
    assert "B" not in set(collection.obs()["cell_type"])


@pytest.mark.parametrize(
    ("where", "match"),
    [
        ("n > 500", r"where='n > 500' is met by none of the 360 cells of 3 inputs"),
        ("nope == 1", r"obs of .*[0-2].h5ad has no column 'nope'; it has cell_type, n, "),
        ("n >", r"where='n >' cannot be read"),
        ("cell_type > 3", r"cannot be worked out"),
    ],
)
def test_conditions_that_do_not_fit_are_refused_before_work(tmp_path, where, match):
    paths = files(tmp_path)
    collection = DatasetCollection(tmp_path / "a.zarr")
    with dask.config.set(scheduler="synchronous"):
        for call in (collection.add_adatas, collection.plan_adatas):
            with pytest.raises(SelectionError, match=match):
                call(paths, where=where)
    assert not (tmp_path / "a.zarr").exists()


def test_conditions_by_path_are_each_for_an_input(tmp_path):
    paths = files(tmp_path)
    collection = DatasetCollection(tmp_path / "a.zarr")
    with dask.config.set(scheduler="synchronous"):
        with pytest.raises(SourceError, match=r"where names other.h5ad, which is none of the 3 inputs"):
            collection.plan_adatas(paths, where={"other.h5ad": "n > 3"})
        for given in ({str(paths[0]): "n < 50", "*": "n < 9"}, {"*": "n < 9", str(paths[0]): "n < 50"}):
            plan = collection.plan_adatas(paths[:1], where=given)  # the path comes first, and the pattern has none left
            assert plan.n_obs == collection.plan_adatas(paths[:1], where="n < 50").n_obs


def test_missing_values_and_texts_mean_what_pandas_makes_of_them(tmp_path):
    a = make_adata(60, GENES)
    a.obs["maybe"] = pd.array([None if i % 3 == 0 else i % 2 == 0 for i in range(60)], dtype="boolean")
    a.obs["word"] = pd.Series([f"w{i % 7}" for i in range(60)], index=a.obs_names, dtype=object)
    a.obs["part"] = pd.Categorical([None if i % 5 == 0 else f"p{i % 4}" for i in range(60)])
    a.obs_names = [str(i) for i in range(60)]
    a.write_h5ad(tmp_path / "a.h5ad", convert_strings_to_categoricals=False)
    for text in ("maybe", "not maybe", "word.str.contains('[135]') and part != 'p1'", "part.isna() | word in ['w2']"):
        with dask.config.set(scheduler="synchronous"):
            found = DatasetCollection(tmp_path / "a.zarr", mode="w").add_adatas([tmp_path / "a.h5ad"], where=text)
        python = a.obs.query(text, engine="python") if "maybe" not in text else None
        want = {n for n, v in a.obs["maybe"].items() if v is not pd.NA and v == (text == "maybe")}
        assert set(rows_of(found)) == (want if python is None else set(python.index)), text
