"""A lazy view is what anndata reads into memory: values, obs, categories, names and order."""

import pickle
import shutil
from importlib.metadata import version

import anndata as ad
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from fast_array_utils import stats

from annbatch_dask import concat_lazy, read_lazy
from annbatch_dask.errors import SourceNotFoundError
from tests.lazy.files import assert_equal, assert_same_frame, dense, read, write


@pytest.fixture(scope="module", params=["h5ad", "zarr"])
def paths(request, tmp_path_factory):
    return write(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("join", ["outer", "inner"])
def test_a_join_of_files_equals_that_in_memory(paths, join):
    expected = ad.concat([read(p) for p in paths], join=join, label="file", keys=[str(p) for p in paths])
    assert_equal(concat_lazy(paths, join=join, label="file").to_memory(), expected)


def test_one_file_equals_itself(paths):
    for path in paths:
        found, expected = read_lazy(path).to_memory(), read(path)
        expected.X = expected.X if isinstance(expected.X, np.ndarray) else expected.X.tocsr()
        pd.testing.assert_frame_equal(found.var, expected.var)
        np.testing.assert_array_equal(dense(found.X), dense(expected.X))
        assert_same_frame(found.obs, expected.obs)


def test_slices_stay_lazy_and_equal_those_in_memory(paths):
    view, expected = concat_lazy(paths), ad.concat([read(p) for p in paths], join="outer")
    found = view[view.obs["cell_type"] == "T", ["g03", "g01"]]
    assert isinstance(found.X, da.Array)
    assert_equal(found.to_memory(), expected[expected.obs["cell_type"] == "T", ["g03", "g01"]].copy())
    rows = np.random.default_rng(0).permutation(view.n_obs)[:50]
    assert_equal(view[rows].to_memory(), expected[rows].copy())
    assert_equal(view[50:110:7].to_memory(), expected[50:110:7].copy())


def test_names_may_stay_in_the_files(paths):
    view, expected = concat_lazy(paths, load_annotation_index=False), ad.concat([read(p) for p in paths], join="outer")
    assert view.obs_names[0] == "0"
    assert_equal(view[(view.obs["score"] > 0.5).to_numpy()].to_memory(), expected[expected.obs["score"] > 0.5].copy())


def test_sums_means_and_counts_by_group(paths):
    view, expected = concat_lazy(paths), ad.concat([read(p) for p in paths], join="outer")
    sums = stats.sum(view.X, axis=0).compute()
    np.testing.assert_allclose(sums, expected.X.sum(0).A1, rtol=1e-6)
    np.testing.assert_allclose(stats.mean(view.X, axis=0).compute(), expected.X.mean(0).A1, rtol=1e-6)
    counts = view.obs.ds.groupby("cell_type").count()["score"].to_series()
    assert counts.to_dict() == expected.obs["cell_type"].value_counts().to_dict()


def test_numbers_of_obs_stay_lazy(paths):
    """They are dask arrays, as those of anndata's own lazy views: what is worked out of them reads nothing yet."""
    view, expected = concat_lazy(paths), ad.concat([read(p) for p in paths], join="outer")
    score = view.obs["score"]
    assert isinstance(score.variable._data, da.Array)
    assert score.chunks == ((40, 40, 40),)
    large = (score * 2).astype("bool") & (score > 0.5)
    assert isinstance(large.variable._data, da.Array)
    np.testing.assert_array_equal(large.to_numpy(), expected.obs["score"] > 0.5)
    assert_equal(view[large].to_memory(), expected[expected.obs["score"] > 0.5].copy())
    again = concat_lazy(paths).obs["score"]
    assert again.variable._data.name == score.variable._data.name
    means = view.obs.ds[["cell_type", "score"]].groupby("cell_type").mean()["score"].to_series()
    wanted = expected.obs.groupby("cell_type", observed=True)["score"].mean()
    assert means.to_dict() == pytest.approx(wanted.to_dict())


def test_a_selection_on_obs_of_a_lazy_x(paths):
    """anndata's tutorial: X lazy and obs in memory, of one file, and of ours."""
    expected = read(paths[0])
    wanted = expected[expected.obs["cell_type"] == "T"].X.toarray()
    view = read_lazy(paths[0])
    np.testing.assert_array_equal(view[view.obs["cell_type"] == "T", :].X.compute().toarray(), wanted)
    view.obs = view.obs.to_memory()
    assert isinstance(view.obs, pd.DataFrame)
    assert isinstance(view.X, da.Array)
    np.testing.assert_array_equal(view[view.obs["cell_type"] == "T", :].X.compute().toarray(), wanted)


@pytest.mark.skipif(version("scanpy") < "1.12", reason="scanpy aggregates no dask arrays before 1.12")
def test_scanpy_aggregates_a_view(paths):
    view, expected = concat_lazy(paths), ad.concat([read(p) for p in paths], join="outer")
    view.obs = view.obs.to_memory()
    found = sc.get.aggregate(view, by="cell_type", func="mean")
    wanted = sc.get.aggregate(expected, by="cell_type", func="mean")
    assert found.obs_names.tolist() == wanted.obs_names.tolist()
    np.testing.assert_allclose(dense(found.layers["mean"].compute()), dense(wanted.layers["mean"]), rtol=1e-6)


def test_a_view_and_its_graph_are_small(paths):
    view = concat_lazy(paths)
    assert len(view.X.dask) == 2 * len(paths)  # a block and a map of genes each
    assert len(pickle.dumps(view)) < 40_000
    assert_equal(pickle.loads(pickle.dumps(view[:70].copy())).to_memory(), view[:70].to_memory())


def test_an_error_in_a_task_says_where(paths, tmp_path):
    gone = shutil.copytree(paths[0], tmp_path / "x") if paths[0].is_dir() else shutil.copy(paths[0], tmp_path / "x")
    view = read_lazy(gone)
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(SourceNotFoundError, match="does not exist") as caught:
        view.X.compute()
    assert f"while reading X of {gone}, rows 0 to 40" in caught.value.__notes__
