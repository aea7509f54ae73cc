"""More files than a process may have open: collections of many datasets, under the limits that systems set."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections import deque

import dask
import numpy as np
import pytest

from annbatch_dask import DatasetCollection, Loader
from annbatch_dask.chunks import files as chunk_files
from tests.loader.data import dense

GENES = ["gene_41", "gene_5", "gene_20"]
SIZES = {"chunk_size": 4, "preload_nchunks": 40, "batch_size": 16, "shuffle": True, "seed": 1}
N_FILES = 90
"""That may be open."""
_SCRIPT = """
import sys
from annbatch_dask import DatasetCollection, Loader

for batch in Loader(chunk_size=4, preload_nchunks=200, batch_size=50, obs_columns=[]).use_collection(DatasetCollection(sys.argv[1])):
    print(batch["X"].sum())
"""


@pytest.fixture(scope="module", params=["open", "packed"])
def many(request, tmp_path_factory, h5ad_pair):
    """A collection of many small datasets."""
    path = tmp_path_factory.mktemp("many") / "a.zarr"
    with dask.config.set(scheduler="synchronous"):
        return DatasetCollection(path).add_adatas(
            h5ad_pair, seed=0, dataset_size=10, n_obs_per_chunk=4, layout=request.param
        )


@pytest.mark.parametrize("limits", [(0, 0), (7, 9)])
@pytest.mark.parametrize("options", [{}, {"dense": True}, {"dense": True, "var_names": GENES}, {"var_names": GENES}])
def test_batches_are_the_same_with_few_open_files(many, options, limits, monkeypatch):
    plain = [dense(batch["X"]) for batch in Loader(**SIZES, **options).use_collection(many)]
    for name, limit in zip(("_to_keep", "_to_use"), limits, strict=True):
        monkeypatch.setattr(chunk_files, name, deque(range(limit)))
    for batch, expected in zip(Loader(**SIZES, **options).use_collection(many), plain, strict=True):
        np.testing.assert_array_equal(dense(batch["X"]), expected)


def test_a_window_of_more_datasets_than_files_may_be_open(many):
    def limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (N_FILES, N_FILES))

    command = [sys.executable, "-c", _SCRIPT, str(many.path)]
    limited = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert limited.returncode == 0, limited.stderr
    assert limited.stdout == subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert 2 * len(many.manifest.datasets) > N_FILES  # values and columns of each
