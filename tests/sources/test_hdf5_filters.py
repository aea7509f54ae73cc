"""Files that were written with filters of hdf5plugin, which HDF5 has only where that was imported."""

import anndata as ad
import h5py
import hdf5plugin
import pytest

from annbatch_dask import DatasetCollection
from annbatch_dask.engines.local_cluster import local_client
from annbatch_dask.errors import MissingPackageError
from annbatch_dask.storage.hdf5_filters import missing_filter, register_filters


@pytest.fixture
def zstd(h5ad_pair, tmp_path):
    """A file that anndata wrote with Zstandard."""
    path = tmp_path / "zstd.h5ad"
    ad.read_h5ad(h5ad_pair[0]).write_h5ad(path, compression=hdf5plugin.FILTERS["zstd"])
    return path


@pytest.fixture
def without_plugin(zstd, monkeypatch):
    """As in a process where hdf5plugin is not installed; what reads ``zstd`` there."""
    monkeypatch.setattr("annbatch_dask.sources.open.register_filters", lambda: None)
    h5py.h5z.unregister_filter(hdf5plugin.FILTERS["zstd"])
    yield
    hdf5plugin.register("zstd", force=True)


def test_workers_know_the_filters(zstd, tmp_path):
    with local_client(n_workers=1, threads_per_worker=1, memory_limit=2**31) as client:
        collection = DatasetCollection(tmp_path / "a.zarr").add_adatas([zstd], client=client)
        collection.verify(against=[zstd]).raise_for_problems()


@pytest.mark.usefixtures("without_plugin")
def test_a_filter_that_is_missing_is_named_before_any_work(zstd, tmp_path):
    with pytest.raises(MissingPackageError, match="zstd.h5ad: .* is stored with filter 32015 .*pip install hdf5plugin"):
        DatasetCollection(tmp_path / "a.zarr").add_adatas([zstd])
    assert not (tmp_path / "a.zarr").exists()


def test_nothing_is_missing_of_what_hdf5_reads_itself(h5ad_pair, zstd):
    register_filters()
    for path in (h5ad_pair[0], zstd):
        with h5py.File(path) as file:
            assert not missing_filter(file)
