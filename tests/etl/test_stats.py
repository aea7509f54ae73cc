"""Statistics of genes: what a build sums up is what the rows that it wrote say."""

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
from annbatch_dask.errors import MemoryBudgetError, SchemaError
from annbatch_dask.etl.stats import DatasetSums, stored_sums
from annbatch_dask.testing import make_adata
from tests.etl.inputs import adatas, dense_x, exact_or_refused, read, write
from tests.statistics.reference import sums_by, sums_of
from tests.tools import tree_digest

GENES = [f"g{i}" for i in range(30)]


def build(path, paths, **options):
    with dask.config.set(scheduler="synchronous"):
        return DatasetCollection(path).add_adatas(paths, **{"seed": 0, "dataset_size": 80} | options)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Three files whose donors differ, some of whose cells have none."""
    folder, out = tmp_path_factory.mktemp("stats"), []
    for k, (n, donors) in enumerate([(120, ["b", "a"]), (90, ["c", None, "a"]), (40, ["d"])]):
        a = make_adata(n, [f"g{i}" for i in range(2 * k, 30 + k)], seed=k)
        a.obs["donor"] = pd.Categorical(np.array(donors, object)[np.arange(n) % len(donors)])
        out.append(folder / f"{k}.h5ad")
        a.write_h5ad(out[-1])
    return out


def assert_stored(group, by=None):
    """The statistics of a dataset are those of its rows; whole numbers exactly, where they are not large."""
    found, a = stored_sums(group), read(group)
    X = dense_x(a)
    if by is None:
        assert (found.by, len(found.groups)) == ("", 0)
        want = {None: sums_of(X)}
    else:
        assert found.by == by
        want = sums_by(X, a.obs[by])
    nothing = np.zeros((X.shape[1], 7))
    counts = (
        [(None, X)] if by is None else [(k, X[[x == k or (k is None and x != x) for x in a.obs[by]]]) for k in want]
    )
    n_cells = {k: len(rows) for k, rows in counts}
    for k, name in enumerate([*found.groups, None]):
        assert found.n_cells[k] == n_cells.get(name, 0)
        with np.errstate(all="ignore"):
            np.testing.assert_allclose(found.sums[k], want.get(name, nothing), rtol=1e-11, atol=1e-300)
        if (X == np.floor(X)).all() and np.abs(X).sum() < 2**20:
            np.testing.assert_array_equal(found.sums[k][:, :3], want.get(name, nothing)[:, :3])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    inputs=st.tuples(adatas(0), adatas(1), adatas(2)).flatmap(lambda xs: st.integers(1, 3).map(lambda n: list(xs[:n]))),
    dataset_size=st.sampled_from([3, 9, 1000]),
    by=st.sampled_from([None, "label", "src_path"]),
)
def test_what_is_stored_is_what_the_rows_say(inputs, dataset_size, by):
    if not sum(a.n_obs for a in inputs):
        return
    if by == "label" and not any(by in a.obs for a in inputs):
        by = None
    with tempfile.TemporaryDirectory() as tmp, exact_or_refused():
        paths = [Path(tmp, f"{i}.h5ad") for i in range(len(inputs))]
        for a, path in zip(inputs, paths, strict=True):
            write(a, path, "gzip")
        try:
            collection = build(
                Path(tmp, "out.zarr"),
                paths,
                dataset_size=dataset_size,
                stats=True,
                stats_by=by,
                allow_mixed_counts=True,
            )
        except SchemaError as e:
            if by != "label" or "categorical" not in str(e):  # nearly one category a cell are strings
                raise
            return
        for group in collection:
            assert_stored(group, by)


def test_they_are_there_where_asked_for_and_change_nothing_else(tmp_path, paths):
    plain, with_stats = build(tmp_path / "a.zarr", paths), build(tmp_path / "b.zarr", paths, stats_by="donor")
    mine = lambda name: "annbatch_dask_stats" in name.parts  # noqa: E731
    documents = lambda name: name.name != "zarr.json" and not mine(name)  # noqa: E731
    assert not tree_digest(plain.path, mine)
    assert tree_digest(with_stats.path, mine)
    assert tree_digest(plain.path, documents) == tree_digest(with_stats.path, documents)
    for group in with_stats:
        assert_stored(group, "donor")
    assert with_stats.verify(against=paths).ok
    plan = DatasetCollection(tmp_path / "c.zarr").plan_adatas(paths, stats_by="donor")
    assert "of each gene, by donor (4 groups)" in plan.summary()


@pytest.mark.parametrize("mode", ["extend", "append", "reshuffle"])
def test_extensions_make_them_as_the_collection_has_them(tmp_path, paths, mode):
    collection = build(tmp_path / "c.zarr", paths[:2], stats_by="donor")
    before = {group.basename: stored_sums(group) for group in collection}
    build(collection.path, paths[2:], mode=mode)
    collection = DatasetCollection(collection.path)
    for group in collection:
        assert_stored(group, "donor")
        if mode == "append" and group.basename in before:
            np.testing.assert_array_equal(stored_sums(group).sums, before[group.basename].sums)
    assert collection.manifest.stats == (True, "donor")
    assert all("annbatch_dask_stats" in read(g).uns for g in collection)


def test_an_extension_may_do_without(tmp_path, paths):
    collection = build(tmp_path / "c.zarr", paths[:1], stats=True)
    collection = build(collection.path, paths[1:2], stats=False)
    assert collection.manifest.stats == (False, "")
    assert [stored_sums(g) for g in collection] == [None] * len(collection)
    assert not any("annbatch_dask_stats" in read(g).uns for g in collection)


def test_those_of_a_dataset_that_is_an_input_are_not_carried_on(tmp_path, paths):
    first = build(tmp_path / "a.zarr", paths[:1], stats=True)
    ad.io.read_zarr(next(iter(first))).write_h5ad(tmp_path / "d.h5ad")
    second = build(tmp_path / "b.zarr", [tmp_path / "d.h5ad"], elements=["-obs/src_path"])
    assert not any("annbatch_dask_stats" in read(g).uns for g in second)


def test_two_workers_write_the_bytes_of_one(tmp_path, paths):
    one = build(tmp_path / "one.zarr", paths, stats_by="donor")
    with dask.config.set(scheduler="threads", num_workers=4):
        four = DatasetCollection(tmp_path / "four.zarr").add_adatas(paths, seed=0, dataset_size=80, stats_by="donor")
    assert tree_digest(one.path) == tree_digest(four.path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stats_by": "nobody"}, SchemaError, "stats_by='nobody' is in no input's obs, which has .*'donor'"),
        ({"stats_by": "n_counts"}, SchemaError, "is a column of .*; make it categorical in load_adata"),
        ({"stats": False, "stats_by": "donor"}, ValueError, "leave one of them out"),
        ({"stats_by": ["donor"]}, TypeError, r"stats_by is \['donor'\]; name one column of obs"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(tmp_path, paths, options, error, message):
    with pytest.raises(error, match=message):
        build(tmp_path / "a.zarr", paths, **options)
    assert not (tmp_path / "a.zarr").exists()


def test_groups_that_do_not_fit_memory_are_refused(tmp_path, monkeypatch):
    a = ad.AnnData(sp.csr_matrix((200, 40_000), dtype=np.float32))
    a.obs["many"] = pd.Categorical(np.arange(200) % 90)
    a.write_h5ad(tmp_path / "a.h5ad")
    plan = DatasetCollection(tmp_path / "c.zarr").plan_adatas
    with dask.config.set(scheduler="synchronous"):
        assert plan([tmp_path / "a.h5ad"], memory_limit="700MB").n_obs == 200
        with pytest.raises(MemoryBudgetError, match="gathering a dataset"):
            plan([tmp_path / "a.h5ad"], memory_limit="700MB", stats_by="many")


def test_a_build_that_was_interrupted_goes_on_to_the_same_bytes(tmp_path, paths, monkeypatch):
    whole = build(tmp_path / "a.zarr", paths, stats_by="donor")
    calls, wrote = [], DatasetSums.written

    def fail_once(self):
        calls.append(self)
        if len(calls) == 2:
            raise RuntimeError("gone")
        return wrote(self)

    monkeypatch.setattr(DatasetSums, "written", fail_once)
    with pytest.raises(RuntimeError, match="gone"):
        build(tmp_path / "b.zarr", paths, stats_by="donor")
    build(tmp_path / "b.zarr", paths, stats_by="donor")
    assert len(calls) == len(whole) + 1  # what was done stays
    assert tree_digest(whole.path) == tree_digest(tmp_path / "b.zarr")


@pytest.mark.parametrize("options", [{"where": "donor == 'a'"}, {"groupby": "donor"}, {"layout": "packed"}])
def test_with_other_options(tmp_path, paths, options):
    for group in build(tmp_path / "a.zarr", paths, stats_by="donor", **options):
        assert_stored(group, "donor")


def test_other_layouts_have_the_same(tmp_path, paths):
    first = build(tmp_path / "a.zarr", paths, stats_by="donor")
    for one, two in zip(first, first.repack(tmp_path / "b.zarr", "packed"), strict=True):
        np.testing.assert_array_equal(stored_sums(one).sums, stored_sums(two).sums)


@pytest.mark.filterwarnings("ignore:Loading h5ad is currently not supported:UserWarning")
def test_files_of_h5ad_hold_them(tmp_path, paths):
    with dask.config.set(scheduler="synchronous"):
        files = DatasetCollection(tmp_path / "c", is_collection_h5ad=True)
        files.add_adatas(paths, seed=0, dataset_size=100, stats=True)
    found = [ad.read_h5ad(p).uns["annbatch_dask_stats"]["n_cells"].sum() for p in (tmp_path / "c").glob("*.h5ad")]
    assert sum(found) == 250
