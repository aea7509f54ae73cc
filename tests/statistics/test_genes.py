"""gene_stats: the same whether a build stored it or a pass over X finds it."""

import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from annbatch_dask import DatasetCollection
from annbatch_dask.errors import CollectionError, IntegrityError
from tests.etl.inputs import dense_x
from tests.statistics.made import adatas, build, joined, write
from tests.statistics.reference import NAMES, sums_by, sums_of

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write(tmp_path_factory.mktemp("files"), adatas(n_vars=60))


@pytest.fixture(scope="module")
def stored(tmp_path_factory, paths):
    return build(tmp_path_factory.mktemp("stored") / "c.zarr", paths, stats_by="donor")


@pytest.fixture(scope="module")
def plain(tmp_path_factory, paths):
    return build(tmp_path_factory.mktemp("plain") / "c.zarr", paths)


def assert_is(frame, X):
    want = sums_of(X)
    for k, name in enumerate(NAMES):
        compare = np.testing.assert_array_equal if k < 3 else np.testing.assert_allclose
        compare(frame[name], want[:, k])
    assert (frame["n_cells"] == len(X)).all()
    total = X.sum(1, keepdims=True)
    scaled = X * 1e4 / np.where(total == 0, 1, total)
    for kind, values in (("", X), ("normalized_", scaled), ("log_", np.log1p(scaled))):
        np.testing.assert_allclose(frame[f"{kind}mean"], values.mean(0))
        np.testing.assert_allclose(frame[f"{kind}variance"], values.var(0, ddof=1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("how", ["stored", "plain"])
def test_all_cells(how, request, paths):
    collection = request.getfixturevalue(how)
    frame = collection.gene_stats()
    assert frame.index.equals(collection.var.index)
    assert frame.attrs == {"target_sum": 1e4}
    assert_is(frame, dense_x(joined(collection)))


@pytest.mark.parametrize("how", ["stored", "plain"])
@pytest.mark.parametrize("by", ["donor", "side", "src_path"])
def test_by_a_column_of_obs(how, by, request):
    collection = request.getfixturevalue(how)
    frame, whole = collection.gene_stats(by), joined(collection)
    assert frame.index.names == [by, collection.var.index.name]
    labels = whole.obs[by]
    assert list(frame.index.get_level_values(0).unique()) == list(pd.Categorical(collection.obs([by])[by]).categories)
    assert len(frame) == labels.nunique() * collection.n_vars
    for name in labels.dropna().unique():
        assert_is(frame.loc[name], dense_x(whole[(labels == name).to_numpy()]))


def test_the_log_says_when_x_is_read(stored, plain, caplog):
    caplog.set_level(logging.INFO, "annbatch_dask.statistics")
    stored.gene_stats()
    stored.gene_stats("donor")
    assert not caplog.messages
    plain.gene_stats()
    stored.gene_stats("src_path")
    assert [m.split(": ")[1] for m in caplog.messages] == [
        f"{len(plain)} of {len(plain)} datasets have no statistics",
        f"{len(stored)} of {len(stored)} datasets have no statistics by src_path",
    ]


@pytest.mark.parametrize("mode", ["extend", "append", "reshuffle"])
@pytest.mark.parametrize("stats", [{"stats": True}, {"stats_by": "donor"}, {}])
def test_extensions_are_as_exact_as_a_build_of_all(tmp_path, paths, stored, mode, stats, caplog):
    collection = build(tmp_path / "c.zarr", paths[:2], **stats)
    build(collection.path, paths[2:], mode=mode)
    extended = DatasetCollection(collection.path)
    genes = list(extended.var.index)
    for by in (None, "donor"):
        got = extended.gene_stats(by)
        want = stored.gene_stats(by)
        want = want.loc[got.index] if by is None else want.reindex(got.index)
        if by is None and set(genes) != set(stored.var.index):
            continue
        whole = joined(extended)
        if by is None:
            assert_is(got, dense_x(whole))
        else:
            for name in got.index.get_level_values(0).unique():
                assert_is(got.loc[name], dense_x(whole[(whole.obs[by] == name).to_numpy()]))
    caplog.set_level(logging.INFO, "annbatch_dask.statistics")
    extended.gene_stats()
    assert bool(caplog.messages) == (not stats)


def test_datasets_of_which_some_have_them(tmp_path, paths, caplog):
    collection = build(tmp_path / "c.zarr", paths[:2])
    n_old = len(collection)
    collection = build(collection.path, paths[2:], mode="append", stats_by="donor")
    caplog.set_level(logging.INFO, "annbatch_dask.statistics")
    assert_is(collection.gene_stats(), dense_x(joined(collection)))
    assert f"{n_old} of {len(collection)} datasets have no statistics" in caplog.text
    found, whole = collection.gene_stats("donor"), joined(collection)
    want = sums_by(dense_x(whole), whole.obs["donor"])
    for name in found.index.get_level_values(0).unique():
        np.testing.assert_array_equal(found.loc[name, "sum"], want[name][:, 1])


def test_a_dataset_that_was_edited_is_counted_anew(tmp_path, paths, caplog):
    collection = build(tmp_path / "c.zarr", paths, stats=True)
    group = next(iter(collection))
    X = ad.io.read_elem(group["X"])
    with ad.settings.override(auto_shard_zarr_v3=False):
        ad.io.write_elem(group, "X", X * 3)
    caplog.set_level(logging.INFO, "annbatch_dask.statistics")
    collection = DatasetCollection(collection.path)
    assert_is(collection.gene_stats(), dense_x(joined(collection)))
    assert "1 of" in caplog.text


def test_statistics_that_rotted_are_refused(tmp_path, paths):
    collection = build(tmp_path / "c.zarr", paths, stats=True)
    file = next((tmp_path / "c.zarr" / "dataset_0/uns/annbatch_dask_stats/sum").rglob("c/*/*"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(IntegrityError, match="annbatch_dask_stats/sum"):
        collection.gene_stats()
    assert "annbatch_dask_stats/sum" in str(collection.verify().problems)


def test_a_collection_that_annbatch_wrote(tmp_path, plain):
    """Without our attributes: groups of the root, of which nothing is recorded."""
    import zarr

    root = zarr.open_group(tmp_path / "theirs.zarr", mode="w", zarr_format=3)
    root.attrs.update({"encoding-type": "annbatch-preshuffled", "encoding-version": "0.1.0"})
    for k, group in enumerate(plain):
        with ad.settings.override(auto_shard_zarr_v3=False):
            ad.io.write_elem(root, f"dataset_{k}", ad.io.read_zarr(group))
    theirs = DatasetCollection(tmp_path / "theirs.zarr", mode="r")
    assert theirs.manifest is None
    pd.testing.assert_frame_equal(theirs.gene_stats(), plain.gene_stats())


@pytest.mark.parametrize("stats_by", [None, "nothing"])
def test_a_column_without_values_has_no_groups(tmp_path, stats_by):
    files = adatas(n_vars=20)[:1]
    files[0].obs["nothing"] = pd.Categorical([None] * files[0].n_obs, ["a"] if stats_by else [])
    collection = build(tmp_path / "c.zarr", write(tmp_path, files), stats_by=stats_by)
    found = collection.gene_stats("nothing")
    assert len(found) == (20 if stats_by else 0)
    assert (found["n_cells"] == 0).all()
    assert list(found.columns) == list(collection.gene_stats().columns)
    assert collection.aggregate("nothing", ["sum", "mean"]).shape == (0, 20)


def test_what_is_not_there_is_refused(tmp_path, stored):
    with pytest.raises(CollectionError, match="obs has no column 'nobody'; it has .*'donor'"):
        stored.gene_stats("nobody")
    with pytest.raises(CollectionError, match="no zarr datasets"):
        DatasetCollection(tmp_path / "new.zarr").gene_stats()


def test_a_column_that_would_make_a_group_of_nearly_each_cell_is_refused(tmp_path):
    (a,) = adatas(n_vars=20, sizes=(240,), donors=(("b", "a"),))
    a.obs["share"], a.obs["third"] = np.arange(240) / 240, np.arange(240) // 3 / 10
    a.obs["barcode"], a.obs["pair"] = pd.Categorical(a.obs_names), pd.Categorical((np.arange(240) // 2).astype(str))
    collection = build(tmp_path / "c.zarr", write(tmp_path, [a]))
    for name in ("share", "barcode"):
        for method in (collection.gene_stats, collection.aggregate):
            with pytest.raises(
                CollectionError, match=rf"obs column '{name}' has 240 different values in 240 cells, and"
            ):
                method(name)
        with pytest.raises(CollectionError, match=f"obs column '{name}' has 240 different values"):
            collection.highly_variable(5, batch_key=name)
    assert len(collection.gene_stats("pair")) == 120 * 20
    assert collection.aggregate("third").shape == (80, 20)


def test_other_readers_see_datasets_as_they_were(stored, plain):
    for a, b in zip(stored, plain, strict=True):
        one, two = ad.io.read_zarr(a), ad.io.read_zarr(b)
        assert set(one.uns) == {"annbatch_dask_stats"}
        np.testing.assert_array_equal(dense_x(one), dense_x(two))
    assert not stored.to_lazy().uns
