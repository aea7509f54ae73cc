"""annbatch reads our collections, and we read annbatch's."""

import shutil
import warnings
from pathlib import Path

import anndata as ad
import dask
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

from annbatch_dask import DatasetCollection, Loader
from annbatch_dask.abc import Sampler
from annbatch_dask.samplers import (
    ClassSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    WeightedClassSampler,
)
from tests.etl.inputs import dense_x

FIXTURE = Path(__file__).parent / "annbatch_collection.zip"
SIZES = {"batch_size": 32, "chunk_size": 16, "preload_nchunks": 4}


@pytest.fixture(scope="module", params=["open", "packed"])
def ours(tmp_path_factory, h5ad_pair, request):
    """A collection of ours in each layout, and its rows by name."""
    path = tmp_path_factory.mktemp("ours") / "ours.zarr"
    with dask.config.set(scheduler="synchronous"):
        collection = DatasetCollection(path).add_adatas(h5ad_pair, seed=0, dataset_size=200, layout=request.param)
    rows = ad.concat([ad.io.read_zarr(g) for g in collection])
    return path, pd.DataFrame(dense_x(rows), index=rows.obs_names, columns=rows.var_names)


def epoch(loader):
    """Rows of an epoch by name; every one exactly once."""
    X, names = [], []
    for batch in loader:
        x = batch["X"]
        X.append(x.toarray() if hasattr(x, "toarray") else np.asarray(x))
        names += batch["obs"].index.tolist()
    assert len(set(names)) == len(names)
    return pd.DataFrame(np.concatenate(X), index=names).sort_index()


@pytest.mark.parametrize("mode", ["path", "group"])
def test_annbatch_reads_ours(ours, mode):
    annbatch = pytest.importorskip("annbatch", reason="annbatch needs Python 3.12 and is no dependency")
    path, rows = ours
    theirs = annbatch.DatasetCollection(str(path) if mode == "path" else zarr.open_group(path, mode="r"))
    assert not theirs.is_empty
    assert len(list(theirs)) == 3
    assert sorted(theirs.obs(columns=["cell_type"]).index) == sorted(rows.index)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # annbatch's own
        loader = annbatch.Loader(**SIZES, shuffle=True, preload_to_gpu=False).use_collection(theirs)
        got = epoch(loader)
    want = rows.sort_index()
    assert got.index.tolist() == want.index.tolist()
    np.testing.assert_array_equal(got.to_numpy(), want.to_numpy())


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A collection that annbatch 0.3.1 wrote (see make_fixture.py), and its rows by name."""
    folder = tmp_path_factory.mktemp("theirs")
    shutil.unpack_archive(FIXTURE, folder)
    return folder / "annbatch.zarr", pd.read_csv(folder / "rows.csv", index_col=0)


def test_we_read_annbatchs(theirs):
    path, want = theirs
    collection = DatasetCollection(path, mode="r")
    assert not collection.is_empty
    assert len(collection) == 3
    assert collection.manifest is None
    assert (collection.n_obs, collection.n_var) == (60, 5)
    assert collection.var.index.tolist() == want.columns.drop("row").tolist()
    obs = collection.obs()
    assert obs["row"].tolist() == want["row"].loc[obs.index].tolist()
    assert isinstance(obs["kind"].dtype, pd.CategoricalDtype)
    for shuffle in (True, False):
        got = epoch(Loader(**SIZES, shuffle=shuffle, preload_to_gpu=False).use_collection(collection))
        assert got.index.tolist() == sorted(want.index)
        np.testing.assert_array_equal(got.to_numpy(), want.drop(columns="row").sort_index().to_numpy())


@pytest.mark.parametrize("mode", ["extend", "append", "reshuffle"])
def test_annbatchs_extended_by_us_is_whole(tmp_path, theirs, mode):
    """Where the rows that annbatch wrote come from is not recorded: verify did take that for damage."""
    path, want = theirs
    shutil.copytree(path, tmp_path / "a.zarr")
    genes = want.columns.drop("row")
    obs = pd.DataFrame({"row": np.arange(20) + 100, "kind": pd.Categorical(["new"] * 20)}, [f"n{i}" for i in range(20)])
    more = ad.AnnData(sp.csr_matrix(np.ones((20, len(genes)), np.float32)), obs=obs, var=pd.DataFrame(index=genes))
    more.write_h5ad(tmp_path / "more.h5ad")
    collection = DatasetCollection(tmp_path / "a.zarr").add_adatas([tmp_path / "more.h5ad"], mode=mode, seed=0)
    assert collection.n_obs == 80
    assert collection.verify().problems == ()
    assert collection.verify(against=[tmp_path / "more.h5ad"]).problems == ()
    assert collection.obs()["row"].loc[want.index].tolist() == want["row"].tolist()
    shard = tmp_path / "a.zarr" / collection.manifest.datasets[-1].name / "X/data/c/0"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert len(collection.verify().problems) == 1


def test_both_loaders_yield_the_same_rows_of_a_live_collection(tmp_path, h5ad_pair):
    annbatch = pytest.importorskip("annbatch", reason="annbatch needs Python 3.12 and is no dependency")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = annbatch.DatasetCollection(zarr.open(tmp_path / "a.zarr", mode="w"))
        made.add_adatas(
            [str(p) for p in h5ad_pair], shuffle_chunk_size=10, dataset_size=200, rng=np.random.default_rng(0)
        )
        a = epoch(annbatch.Loader(**SIZES, shuffle=True, preload_to_gpu=False).use_collection(made))
    b = epoch(
        Loader(**SIZES, shuffle=True, preload_to_gpu=False).use_collection(
            DatasetCollection(tmp_path / "a.zarr", mode="r")
        )
    )
    pd.testing.assert_frame_equal(a, b, check_dtype=False)


class Counting(Sampler):
    """A sampler of a third party around another: it reads where each slice of a request starts and stops."""

    def __init__(self, inner):
        self.inner, self.n_rows = inner, 0

    batch_size = property(lambda self: self.inner.batch_size)
    shuffle = property(lambda self: self.inner.shuffle)

    def n_batches(self, n_obs):
        return self.inner.n_batches(n_obs)

    def validate(self, n_obs):
        self.inner.validate(n_obs)

    def _sample(self, n_obs):
        for request in self.inner.sample(n_obs):
            self.n_rows += sum(part.stop - part.start for part in request["requests"])
            yield {
                "requests": [slice(part.start, part.stop) for part in request["requests"]],
                "splits": request["splits"],
            }


CLASSES = pd.Categorical(np.repeat(["a", "b"], 200))


@pytest.mark.parametrize(
    "inner",
    [
        RandomSampler(16, 4, 32),
        RandomSampler(16, 4, 32, replacement=True, num_samples=640, rng=np.random.default_rng(0)),
        SequentialSampler(16, 4, 32, mask=slice(7, 333)),
        ClassSampler(16, 4, 32, classes=CLASSES, num_samples=640),
        WeightedClassSampler(16, 4, 32, classes=CLASSES, num_samples=640, class_weights=np.array([3.0, 1.0])),
        DistributedSampler(RandomSampler(16, 4, 32), dist_info=lambda: (0, 1)),
    ],
    ids=lambda inner: type(inner).__name__,
)
def test_a_wrapper_of_a_third_party_reads_slices(inner):
    x = np.arange(400, dtype=np.float32)[:, None] * np.ones(3, np.float32)
    sampler = Counting(inner)
    loader = Loader(batch_sampler=sampler, preload_to_gpu=False, return_index=True).add_dataset(x)
    batches = list(loader)
    assert sampler.n_rows == sum(len(batch["index"]) for batch in batches) > 300
    for batch in batches:
        assert batch["X"][:, 0].tolist() == batch["index"].tolist()
