"""Fixtures for all tests: two small files of different genes, and a check that nothing is left running."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

import dask
import pytest
from hypothesis import settings

from annbatch_dask.testing import write_h5ad_pair
from tests.leaks import nothing_is_left

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# One shared runner: no deadline, since a first call compiles; one seed, so that a red run can be repeated.
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")


@pytest.fixture(scope="session")
def h5ad_pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two small files of different genes; read only."""
    return write_h5ad_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def in_this_process() -> Iterator[None]:
    """Builds run here, one task after the other, without a cluster."""
    with dask.config.set(scheduler="synchronous"):
        yield


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails for a reason that passes is tried again at once."""
    monkeypatch.setattr("annbatch_dask.storage.transient.sleep", lambda _: None)


@pytest.fixture(scope="session", autouse=True)
def _well_known_ports_are_taken() -> Iterator[None]:
    """Somebody else's Dask scheduler and dashboard are always there, so that no test can count on their ports."""
    with contextlib.ExitStack() as sockets:
        for port in (8786, 8787):
            taken = sockets.enter_context(socket.socket())
            with contextlib.suppress(OSError):  # taken indeed
                taken.bind(("", port))
                taken.listen()
        yield


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """Whatever a test did, no thread of a loader, open file or process outlives it."""
    with nothing_is_left():
        yield
