"""One S3 server for all tests here, and a bucket with the two small files."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import dask
import fsspec
import pytest

from annbatch_dask import DatasetCollection
from tests.s3.server import S3Server
from tests.s3.tools import contents

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def server() -> Iterator[S3Server]:
    """The server."""
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def atlas(server: S3Server, h5ad_pair: list[Path]) -> SimpleNamespace:
    """A bucket with the inputs: its file system, and the inputs' URLs."""
    fs = fsspec.filesystem("s3", **server.options)
    fs.call_s3("create_bucket", Bucket="atlas")
    for path in h5ad_pair:
        fs.put_file(str(path), f"atlas/in/{path.name}")
    return SimpleNamespace(fs=fs, urls=[f"s3://atlas/in/{p.name}" for p in h5ad_pair])


@pytest.fixture
def bucket(atlas: SimpleNamespace, request: pytest.FixtureRequest) -> Iterator[str]:
    """A folder of the bucket for one test."""
    url = f"s3://atlas/{request.node.name.split('[')[0]}"
    with dask.config.set(scheduler="synchronous"):
        yield url
    if found := atlas.fs.find(url):
        atlas.fs.rm(found)


@pytest.fixture(scope="session")
def local(atlas: SimpleNamespace, server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """The same collection built on a local disk, of the same inputs."""
    path = tmp_path_factory.mktemp("local") / "o.zarr"
    with dask.config.set(scheduler="synchronous"):
        collection = DatasetCollection(path).add_adatas(
            atlas.urls, seed=0, dataset_size=300, storage_options=server.options
        )
    return collection, contents(fsspec.filesystem("file"), str(path))
