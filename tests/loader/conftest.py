from __future__ import annotations

import pytest

from tests.loader.data import Collection, write_collection


@pytest.fixture(scope="session")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """Three sparse datasets of 130, 1 and 90 rows; read only."""
    return write_collection(tmp_path_factory.mktemp("sparse") / "c.zarr")


@pytest.fixture(scope="session")
def dense_collection(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """The same rows stored dense; read only."""
    return write_collection(tmp_path_factory.mktemp("dense") / "c.zarr", dense=True)
