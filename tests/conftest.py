"""Fixtures for all tests: two small files of different genes, and a check that nothing is left running."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import settings

from tests.leaks import nothing_is_left

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# One shared runner: no deadline, since a first call compiles; one seed, so that a red run can be repeated.
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")

N_SPACE, TYPES = 60, ("B", "NK", "T", "mono")


def make_adata(n_obs: int, genes: list[str], *, seed: int) -> ad.AnnData:
    """Counts in CSR float32; cells stand in order of their type, as in real files."""
    rng = np.random.default_rng(seed)
    codes = np.sort(rng.integers(0, len(TYPES), n_obs))
    profile = rng.gamma(0.3, 2.0, (len(TYPES), len(genes)))
    counts = rng.poisson(profile[codes]).astype(np.float32)
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical.from_codes(codes, TYPES),
            "n_counts": counts.sum(1),
            "passed": rng.random(n_obs) < 0.9,
        },
        index=[f"s{seed}_{i}" for i in range(n_obs)],
    )
    return ad.AnnData(X=sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=genes))


def write_pair(folder: Path) -> list[Path]:
    """Two gzip files, 300 and 200 cells, of 45 and 40 genes out of one space of 60."""
    space = [f"gene_{i}" for i in range(N_SPACE)]
    rng = np.random.default_rng(0)
    paths = []
    for k, (n_obs, n_genes) in enumerate([(300, 45), (200, 40)]):
        genes = [space[i] for i in np.sort(rng.choice(N_SPACE, n_genes, replace=False))]
        paths.append(folder / f"part_{k}.h5ad")
        make_adata(n_obs, genes, seed=k).write_h5ad(paths[-1], compression="gzip")
    return paths


@pytest.fixture(scope="session")
def h5ad_pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two small files of different genes; read only."""
    return write_pair(tmp_path_factory.mktemp("pair"))


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
