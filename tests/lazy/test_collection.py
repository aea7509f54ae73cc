"""A collection to look at, and lazy views as inputs of one."""

from collections import Counter
from pathlib import Path

import anndata as ad
import dask
import numpy as np
import pytest
import xarray as xr

from annbatch_dask import DatasetCollection, concat_lazy
from annbatch_dask.errors import CollectionError
from annbatch_dask.lazy import blocks, view
from tests.lazy.files import assert_same_frame, assert_shuffled, dense, preprocessed, read, write
from tests.s3.tools import At, CrashError, crash

pytestmark = pytest.mark.filterwarnings("ignore:left out")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write(tmp_path_factory.mktemp("files"), "h5ad", n_obs=200)


@pytest.fixture(scope="module")
def collection(paths, tmp_path_factory):
    with dask.config.set(scheduler="synchronous"):
        return DatasetCollection(tmp_path_factory.mktemp("c") / "c.zarr").add_adatas(paths, seed=0, dataset_size=250)


def test_a_lazy_collection_equals_its_datasets(collection):
    found = collection.to_lazy().to_memory()
    expected = ad.concat([ad.io.read_zarr(group) for group in collection])
    assert found.var_names.tolist() == expected.var_names.tolist()
    assert found.obs_names.tolist() == expected.obs_names.tolist()
    assert_same_frame(found.obs, expected.obs)
    np.testing.assert_array_equal(dense(found.X), dense(expected.X))
    np.testing.assert_array_equal(dense(found.layers["twice"]), dense(expected.layers["twice"]))
    assert found.X.dtype == np.float32  # as in the files, whatever is on disk


def test_obs_as_an_xarray_dataset(collection):
    obs, expected = collection.obs_dataset(), collection.obs()
    assert type(obs) is xr.Dataset
    assert obs.sizes == {"obs": 600}
    assert obs["obs_names"].to_numpy().tolist() == expected.index.tolist()
    assert_same_frame(obs.to_dataframe().set_index("obs_names"), expected.rename_axis("obs_names"))
    T = obs.isel(obs=obs["cell_type"] == "T")
    assert T["cell_type"].dtype.categories.tolist() == expected["cell_type"].cat.categories.tolist()
    means = obs[["cell_type", "score"]].groupby("cell_type").mean()["score"].to_series()
    assert means.to_dict() == pytest.approx(expected.groupby("cell_type", observed=True)["score"].mean().to_dict())


def test_a_column_of_obs_may_be_called_as_the_names_are(paths, tmp_path):
    with dask.config.set(scheduler="synchronous"):
        one = DatasetCollection(tmp_path / "c.zarr").add_adatas(
            paths[:1], seed=0, load_adata=lambda path: with_column(read(Path(path)), "obs_names")
        )
    obs, expected = one.obs_dataset(), one.obs()
    assert obs["obs_names"].to_numpy().tolist() == expected["obs_names"].tolist()
    assert obs["_index"].to_numpy().tolist() == expected.index.tolist()


def with_column(adata, name):
    adata.obs[name] = np.arange(adata.n_obs)
    return adata


@pytest.mark.filterwarnings("ignore:Loading h5ad is currently not supported")
def test_a_folder_of_h5ad_files_says_how_to_look_at_them(paths, tmp_path):
    with dask.config.set(scheduler="synchronous"):
        h5ad = DatasetCollection(tmp_path / "c", is_collection_h5ad=True).add_adatas(paths, seed=0)
    for look in (h5ad.to_lazy, h5ad.obs_dataset):
        with pytest.raises(CollectionError, match="is a folder of h5ad files; open them with concat_lazy"):
            look()


def test_an_empty_collection_has_nothing_to_look_at(tmp_path):
    with pytest.raises(CollectionError, match="holds no dataset to look at"):
        DatasetCollection(tmp_path / "c.zarr").to_lazy()


def test_a_task_reads_the_blocks_of_its_own_rows_once(paths, tmp_path, monkeypatch):
    monkeypatch.setattr(view, "_BLOCK_NBYTES", 10_000)
    lazy, expected = preprocessed(paths)
    n_blocks = concat_lazy(paths).X.numblocks[0]
    assert n_blocks >= 5
    reads, original = Counter(), blocks._read_csr
    monkeypatch.setattr(
        blocks, "_read_csr", lambda csr, schema, *rest: reads.update([schema.name]) or original(csr, schema, *rest)
    )
    with dask.config.set(scheduler="synchronous"):
        collection = DatasetCollection(tmp_path / "c.zarr").add_adatas([lazy], seed=0)
    assert_shuffled(collection, expected)
    assert n_blocks < reads["X"] <= n_blocks + 2  # the scan looks at the first one, of two after filtering


def test_a_view_is_known_again_and_holds_no_secret_on_disk(paths, tmp_path):
    urls = [f"file://{p}" for p in paths]
    lazy = concat_lazy(urls, storage_options={"auto_mkdir": False, "s3cr3t-key": "s3cr3t"})
    with dask.config.set(scheduler="synchronous"):
        with pytest.raises(CrashError):
            DatasetCollection(tmp_path / "c.zarr").add_adatas([lazy[:100]], seed=0, callbacks=[At("gather", crash)])
        left = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        assert any(p.name.startswith("job-") for p in left)
        assert not [p for p, content in left.items() if b"s3cr3t" in content]
        collection = DatasetCollection(tmp_path / "c.zarr").add_adatas([lazy[:100]], seed=0)
        again = concat_lazy(urls, storage_options={"auto_mkdir": False, "s3cr3t-key": "s3cr3t"})
        assert collection.add_adatas([again[:100]], seed=0).n_obs == 100
        assert collection.add_adatas([again[100:250]], seed=1).n_obs == 250
        assert collection.verify(against=[again[:100], again[100:250]]).ok


def test_an_anndata_in_memory_is_no_input(paths, tmp_path):
    with pytest.raises(TypeError, match="a lazy AnnData, not AnnData; write it to a file"):
        DatasetCollection(tmp_path / "c.zarr").add_adatas([read(paths[0])])
