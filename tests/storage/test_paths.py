"""Paths of universal_pathlib, which have the options of their file systems with them."""

import dask
import fsspec
import pytest
from upath import UPath

from annbatch_dask import DatasetCollection, read_lazy
from annbatch_dask.storage.paths import is_path, located


def test_options_of_the_path_and_those_given():
    path = UPath("s3://bucket/a.h5ad", anon=True, endpoint_url="http://one")
    assert located(path, {"endpoint_url": "http://other"}) == (
        "s3://bucket/a.h5ad",
        {"anon": True, "endpoint_url": "http://other"},
    )
    assert located("a.h5ad", None) == ("a.h5ad", {})
    assert not is_path(3)


@pytest.fixture
def in_memory(h5ad_pair):
    """The two files in memory, whose file system is taken for a remote one."""
    files = fsspec.filesystem("memory")
    for path in h5ad_pair:
        files.pipe(f"/{path.name}", path.read_bytes())
    yield [UPath("memory://") / path.name for path in h5ad_pair]
    for path in [*(f"/{path.name}" for path in h5ad_pair), "/upath.zarr", "/upath.zarr.log"]:
        files.rm(path, recursive=True)


@pytest.mark.filterwarnings("ignore:.*does not write on the condition")
def test_inputs_and_collection(in_memory, h5ad_pair, tmp_path):
    with dask.config.set(scheduler="synchronous"):
        collection = DatasetCollection(UPath("memory://upath.zarr")).add_adatas(in_memory, seed=0)
        local = DatasetCollection(UPath(tmp_path) / "a.zarr").add_adatas([UPath(p) for p in h5ad_pair], seed=0)
    assert collection.n_obs == local.n_obs
    assert not collection.verify(against=in_memory).problems
    assert read_lazy(in_memory[0]).n_obs + read_lazy(in_memory[1]).n_obs == local.n_obs
