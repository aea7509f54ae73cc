"""groupby: each dataset is sorted, stably, and otherwise as without it."""

from functools import cache
from itertools import product

import anndata as ad
import dask
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from annbatch_dask import DatasetCollection
from annbatch_dask.errors import SchemaError
from annbatch_dask.plan.grouping import Groups, group_layout
from annbatch_dask.plan.layout import Layout
from annbatch_dask.testing import make_adata
from tests.etl.inputs import dense_x

GENES = [f"g{i}" for i in range(30)]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Two files whose categories differ; cells stand in order of their type."""
    folder = tmp_path_factory.mktemp("groups")
    out = []
    for k, (n, types) in enumerate([(120, {"mono": "NK"}), (90, {"B": "platelet"})]):
        a = make_adata(n, GENES, seed=k)
        a.obs["cell_type"] = a.obs["cell_type"].astype(str).replace(types).astype("category")
        a.obs["batch"] = np.arange(n) % 3
        a.obs["half"] = np.where(np.arange(n) % 5 == 0, np.nan, np.arange(n) % 2 / 2)
        a.obs["maybe"] = pd.array(np.where(np.arange(n) % 4 == 0, None, np.arange(n) % 2), dtype="Int64")
        a.obs["word"] = pd.Series(np.where(np.arange(n) % 2, "z", "a"), index=a.obs_names, dtype=object)
        a.obs["gone"] = pd.Categorical(np.where(np.arange(n) % 7 == 0, None, "here"))
        out.append(folder / f"{k}.h5ad")
        a.write_h5ad(out[-1], convert_strings_to_categoricals=False)
    return out


@pytest.fixture(scope="module")
def ungrouped(paths, tmp_path_factory):
    """The datasets of a build without groupby, shuffled or not."""

    @cache
    def datasets(shuffle):
        return read(build(tmp_path_factory.mktemp("plain") / "a.zarr", paths, shuffle=shuffle))

    return datasets


def build(path, paths, **options):
    with dask.config.set(scheduler="synchronous"):
        return DatasetCollection(path).add_adatas(paths, **{"seed": 0, "dataset_size": 80} | options)


def read(collection):
    return [ad.io.read_zarr(g) for g in collection]


def groupings():
    """Each shuffled and not; in the usual run one way in turn, and "cell_type" both."""
    all_of_them = ["cell_type", ["gone", "batch"], ["half", "maybe"], ["word", "passed"], "src_path"]
    for k, by in enumerate(all_of_them):
        for shuffle in (True, False):
            usual = by == "cell_type" or shuffle == (k % 2 == 0)
            yield pytest.param(by, shuffle, marks=() if usual else pytest.mark.chaos)
    for by, shuffle in product((["half"], ["maybe", "cell_type"]), (True, False)):
        yield pytest.param(by, shuffle, marks=pytest.mark.chaos)


@pytest.mark.parametrize(("by", "shuffle"), list(groupings()))
def test_datasets_are_those_of_a_build_without_sorted_stably(tmp_path, paths, ungrouped, by, shuffle):
    collection = build(tmp_path / "b.zarr", paths, shuffle=shuffle, groupby=by)
    for a, b in zip(ungrouped(shuffle), read(collection), strict=True):
        want = a.obs.sort_values(by, kind="stable")
        pd.testing.assert_frame_equal(b.obs, want)
        np.testing.assert_array_equal(dense_x(b), dense_x(a)[a.obs_names.get_indexer(want.index)])
    assert collection.verify(against=paths).ok
    assert collection.manifest.builds[0].groupby == ((by,) if isinstance(by, str) else tuple(by))


def test_in_little_memory_the_bytes_are_the_same(tmp_path, paths, monkeypatch):
    """Parts of a few rows: large groups in pieces, small ones together."""
    from annbatch_dask.plan import sizing as module

    whole = build(tmp_path / "a.zarr", paths, groupby="cell_type", elements=["obs"])
    monkeypatch.setitem(dask.config.config, "annbatch_dask", {"block_size": 2000})
    monkeypatch.setattr(module, "_MAX_TASKS", 2**30)
    pieces = build(tmp_path / "b.zarr", paths, groupby="cell_type", elements=["obs"])
    assert [d.metadata for d in whole.manifest.datasets] == [d.metadata for d in pieces.manifest.datasets]
    assert all(d.fingerprint for d in whole.manifest.datasets)


def test_an_extension_sorts_old_and_new_rows(tmp_path, paths):
    build(tmp_path / "a.zarr", paths[:1], groupby="cell_type")
    collection = build(tmp_path / "a.zarr", paths[1:], groupby="cell_type")
    for a in read(collection):
        assert a.obs["cell_type"].cat.codes.is_monotonic_increasing
        assert a.obs["src_path"].nunique() == 2
    assert collection.verify(against=paths).ok


@pytest.mark.parametrize(
    ("by", "error", "words"),
    [
        ([], ValueError, "must contain at least one"),
        (["batch", "batch"], ValueError, "must be unique"),
        ("none", SchemaError, "Could not find groupby columns: 'none' is in no input's obs, which has '"),
    ],
)
def test_columns_that_are_not_there_are_refused(tmp_path, paths, by, error, words):
    with pytest.raises(error, match=words):
        DatasetCollection(tmp_path / "o.zarr").plan_adatas(paths, seed=0, groupby=by)


def test_a_column_that_only_some_inputs_have_is_refused(tmp_path, paths, h5ad_pair):
    with pytest.raises(SchemaError, match="not present in all anndatas"):
        DatasetCollection(tmp_path / "o.zarr").plan_adatas([paths[0], h5ad_pair[0]], seed=0, groupby="batch")


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    part_rows=st.integers(1, 12),
    n_groups=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_parts_hold_whole_groups_or_pieces_in_order(sizes, part_rows, n_groups, seed):
    rng = np.random.default_rng(seed)
    layout = Layout(tuple(sizes), part_rows)
    column = rng.integers(0, n_groups, sum(sizes))
    groups = Groups.of([column])
    codes = groups.codes([column])
    rows = np.arange(sum(sizes))
    dataset = np.searchsorted(layout.dataset_starts, rows, side="right") - 1
    grouped = group_layout(layout, groups.n_groups, dataset, codes, np.ones(len(rows), int))
    part, place = grouped.locate(rows, codes)
    assert np.bincount(part).max() <= part_rows
    order = np.lexsort([place, codes, part])
    want = np.lexsort([rows, codes, dataset])
    np.testing.assert_array_equal(order, want)
    for k in range(len(sizes)):
        assert set(part[dataset == k]) <= set(grouped.parts_of(k))
