from __future__ import annotations

from pathlib import Path

import pytest

from tests.loader.aligned import adatas, stored  # noqa: F401 - fixtures
from tests.loader.data import Collection, write_collection


@pytest.fixture(scope="session")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """Three sparse datasets of 130, 1 and 90 rows; read only."""
    return write_collection(tmp_path_factory.mktemp("sparse") / "c.zarr")


@pytest.fixture(scope="session")
def dense_collection(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """The same rows stored dense; read only."""
    return write_collection(tmp_path_factory.mktemp("dense") / "c.zarr", dense=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A hang is a failure within minutes, but for tests that start interpreters, which name their own limit."""
    for item in items:
        if Path(__file__).parent in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(240))
