"""What tests of pipelines share: the demo's atlas, a tenth as large, and a way to run a script in this process."""

import sys
from pathlib import Path

import dask
import pytest

from annbatch_dask import DatasetCollection

PIPELINES = Path(__file__).parents[2] / "pipelines"
sys.path.insert(0, str(PIPELINES))

import demo  # noqa: E402


@pytest.fixture(scope="session")
def atlas(tmp_path_factory):
    """A folder with the demo's files, and collections of their cells: shuffled, and in order."""
    folder = tmp_path_factory.mktemp("atlas")
    with pytest.MonkeyPatch.context() as patch, dask.config.set(scheduler="synchronous"):
        patch.setattr(demo, "N_SPACE", 1200)
        patch.setattr(demo, "PARTS", {"a.h5ad": (2000, 1000), "b.h5ad": (1500, 850)})
        files = demo.make_files(folder / "files")
        for name, shuffle in (("shuffled", True), ("in_order", False)):
            DatasetCollection(folder / f"{name}.zarr").add_adatas(files, shuffle=shuffle, seed=0, dataset_size=1500)
    return folder


@pytest.fixture
def call(monkeypatch):
    """Run a script's main with a command line."""

    def run(script, *args):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, args)])
        return script.main()

    return run
