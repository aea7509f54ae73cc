from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.loader.data import Collection, children, loader_threads, open_files, write_collection


@pytest.fixture(scope="session")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """Three sparse datasets of 130, 1 and 90 rows; read only."""
    return write_collection(tmp_path_factory.mktemp("sparse") / "c.zarr")


@pytest.fixture(scope="session")
def dense_collection(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """The same rows stored dense; read only."""
    return write_collection(tmp_path_factory.mktemp("dense") / "c.zarr", dense=True)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """Whatever a test did with its iterators: no thread, open file or process of the loader outlives them."""
    before = open_files(Path("/"))
    yield
    if loader_threads() or set(open_files(Path("/"))) - set(before):
        gc.collect()  # an iterator in a reference cycle
    assert not loader_threads()
    assert not set(open_files(Path("/"))) - set(before)
    assert not children()
