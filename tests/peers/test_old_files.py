"""Files that anndata 0.7 to 0.13 wrote are read alike; ``old_files.zip`` was written by make_old_files.py."""

import re
import shutil
import zipfile
from pathlib import Path

import anndata as ad
import dask
import fsspec
import h5py
import numpy as np
import pandas as pd
import pytest

from annbatch_dask import DatasetCollection
from annbatch_dask.errors import SourceError
from annbatch_dask.sources.files import GroupSource
from annbatch_dask.sources.open import SourceRef, open_source
from tests.peers.make_old_files import N_OBS, make

ARCHIVE = Path(__file__).parent / "old_files.zip"
NAMES = sorted({n.split("/")[0] for n in zipfile.ZipFile(ARCHIVE).namelist()})
VERSIONS = sorted({n.split("-")[0] for n in NAMES}, key=lambda v: [int(x) for x in v.split(".")])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files."""
    path = tmp_path_factory.mktemp("old")
    shutil.unpack_archive(ARCHIVE, path)
    return path


def test_the_archive_has_every_minor_version():
    assert [re.match(r"0\.\d+", v)[0] for v in VERSIONS if v != "0.7.8"] == [f"0.{k}" for k in range(7, 14)]


def versions():
    """All of them; in the usual run every fourth, and the newest."""
    for k, version in enumerate(VERSIONS):
        usual = k % 4 == 0 or version == VERSIONS[-1]
        yield pytest.param(version, marks=() if usual else pytest.mark.chaos)


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
@pytest.mark.parametrize("version", list(versions()))
def test_files_of_every_version_are_read(tmp_path, folder, version):
    paths = [str(folder / n) for n in NAMES if n.startswith(f"{version}-")]
    assert len(paths) == 4
    for path in paths:
        with open_source(SourceRef(path, path)) as source:
            assert isinstance(source, GroupSource)  # which never reads a file whole
    with dask.config.set(scheduler="synchronous"):
        collection = DatasetCollection(tmp_path / "o.zarr").add_adatas(
            paths, seed=0, dataset_size=33, elements=["-uns/note"]
        )
        assert collection.verify(against=paths).ok
    rows = ad.concat([ad.read_zarr(tmp_path / "o.zarr" / d.name) for d in collection.manifest.datasets], join="outer")
    want = make()
    order = [f"cell_{i}" for i in range(N_OBS)]
    for path in paths:
        found = rows[(rows.obs["src_path"] == path).to_numpy()][order]
        genes = found[:, want.var_names]
        np.testing.assert_array_equal(genes.X.toarray(), want.X.toarray())
        np.testing.assert_array_equal(np.asarray(genes.layers["spliced"]), want.layers["spliced"])
        np.testing.assert_array_equal(found.obsm["X_pca"], want.obsm["X_pca"])
        for name in want.obs:
            kept, made = (frame[name].astype(object).to_numpy() for frame in (found.obs, want.obs))
            pd.testing.assert_series_equal(pd.Series(kept), pd.Series(made), check_dtype=False, obj=name)
        assert found.obs["stage"].cat.categories.tolist() == ["late", "early"]
        assert found.obs["stage"].cat.ordered


def test_a_format_before_0_7_is_refused_at_a_remote_store(tmp_path, folder):
    """Its frames are compound arrays, which only anndata's own, local, reader knows."""
    path = tmp_path / "before.h5ad"
    with h5py.File(path, "w") as f:
        f["X"] = np.zeros((2, 1), np.float32)
        f["obs"] = np.array([(b"a",), (b"b",)], [("index", "S1")])
        f["var"] = np.array([(b"g",)], [("index", "S1")])
    fsspec.filesystem("memory").pipe_file("/before.h5ad", path.read_bytes())
    with pytest.raises(SourceError, match=r"before anndata 0\.7"), open_source(SourceRef("x", "memory://before.h5ad")):
        pass
