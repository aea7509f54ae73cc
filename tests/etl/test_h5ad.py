"""A folder of ``dataset_<i>.h5ad``: the same shuffle as into zarr, in files that anndata reads."""

import os

import anndata as ad
import dask
import h5py
import numpy as np
import pandas as pd
import pytest

from annbatch_dask import DatasetCollection
from annbatch_dask.errors import CollectionError
from tests.etl.everything import make, write
from tests.etl.inputs import dense_x

pytestmark = [
    pytest.mark.filterwarnings("ignore:Loading h5ad is currently not supported"),
    pytest.mark.filterwarnings("ignore:left out"),
]


def build(path, paths, *, is_h5ad=True, mode="a", **options):
    with dask.config.set(scheduler="synchronous"):
        collection = DatasetCollection(path, is_collection_h5ad=is_h5ad, mode=mode)
        return collection.add_adatas(paths, **{"seed": 3, "dataset_size": 20} | options)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_the_same_cells_in_the_same_places_as_in_zarr(tmp_path):
    paths = write(tmp_path, [make(0), make(1, n_obs=20)])
    collection = build(tmp_path / "h5ad", paths)
    zarr = build(tmp_path / "o.zarr", paths, is_h5ad=False)
    assert names(tmp_path / "h5ad") == ["dataset_0.h5ad", "dataset_1.h5ad", "dataset_2.h5ad"]
    for k, group in enumerate(zarr):
        found, want = ad.read_h5ad(tmp_path / "h5ad" / f"dataset_{k}.h5ad"), ad.io.read_zarr(group)
        pd.testing.assert_frame_equal(found.obs, want.obs)
        np.testing.assert_array_equal(dense_x(found), dense_x(want))
        np.testing.assert_array_equal(dense_x(found.raw), dense_x(want.raw))
        np.testing.assert_array_equal(found.obsm["place"], want.obsm["place"])
        dtypes = found.X.dtype, found.raw.X.dtype, found.layers["twice"].dtype, found.obsm["place"].dtype
        assert dtypes == (np.float32, np.float32, np.float32, np.float64)  # as the inputs have them
    pd.testing.assert_frame_equal(collection.obs(), zarr.obs())


@pytest.mark.parametrize("compressor", ["gzip", "lzf", None])
def test_the_compressor_has_its_effect(tmp_path, compressor):
    build(tmp_path / "h5ad", write(tmp_path, [make(0)]), h5ad_compressor=compressor)
    with h5py.File(tmp_path / "h5ad" / "dataset_0.h5ad") as f:
        assert f["X/data"].compression == compressor


def test_files_that_are_there_are_replaced_only_if_asked(tmp_path):
    paths = write(tmp_path, [make(0), make(1, n_obs=20)])
    build(tmp_path / "h5ad", paths)
    with pytest.raises(CollectionError, match="holds 3 h5ad files, to which none can be added"):
        build(tmp_path / "h5ad", paths[:1])
    build(tmp_path / "h5ad", paths[:1], mode="w", dataset_size=100)
    assert names(tmp_path / "h5ad") == ["dataset_0.h5ad"]


def test_files_of_others_are_kept(tmp_path):
    (tmp_path / "h5ad").mkdir()
    paths = write(tmp_path / "h5ad", [make(0), make(1, n_obs=20)])  # the inputs lie there
    before = {path: path.read_bytes() for path in paths}
    with pytest.raises(CollectionError, match=r"holds 0\.h5ad, one of 2 h5ad files that no build wrote"):
        build(tmp_path / "h5ad", paths, mode="w")
    assert {path: path.read_bytes() for path in paths} == before


@pytest.mark.parametrize("what", ["another AnnData", "a dataset written again", "no HDF5 at all"])
def test_a_file_of_others_with_the_name_of_a_dataset_is_kept(tmp_path, what):
    inputs = write(tmp_path, [make(0), make(1, n_obs=20)])
    build(tmp_path / "h5ad", inputs)
    path = tmp_path / "h5ad" / "dataset_0.h5ad"
    if what == "no HDF5 at all":
        path.write_bytes(b"notes")
    else:
        (ad.read_h5ad(path) if what == "a dataset written again" else make(2, genes=["a"], raw=["a"])).write_h5ad(path)
    before = path.read_bytes()
    with pytest.raises(CollectionError, match=r"holds dataset_0\.h5ad, one of 1 h5ad files that no build wrote"):
        build(tmp_path / "h5ad", inputs, mode="w")
    assert path.read_bytes() == before


def test_old_files_stay_until_the_new_ones_are_there(tmp_path, monkeypatch):
    paths = write(tmp_path, [make(0), make(1, n_obs=20)])
    build(tmp_path / "h5ad", paths)
    whole = names(tmp_path / "h5ad")
    replaced, replace = [], os.replace

    def fail_at_last(source, target):
        if str(target).endswith(".h5ad"):
            replaced.append(target)
            if len(replaced) == 2:
                raise OSError("cut off")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_at_last)
    with pytest.raises(OSError, match="cut off"):
        build(tmp_path / "h5ad", paths[:1], mode="w", dataset_size=20)
    assert set(whole) <= set(names(tmp_path / "h5ad"))
    monkeypatch.undo()
    build(tmp_path / "h5ad", paths[:1], dataset_size=20)  # goes on
    assert names(tmp_path / "h5ad") == ["dataset_0.h5ad", "dataset_1.h5ad"]


def test_a_build_that_was_interrupted_goes_on(tmp_path, monkeypatch):
    paths = write(tmp_path, [make(0), make(1, n_obs=20)])
    monkeypatch.setattr(ad.AnnData, "write_h5ad", lambda *_, **__: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        build(tmp_path / "h5ad", paths)
    assert not [name for name in names(tmp_path / "h5ad") if name.startswith("dataset")]
    monkeypatch.undo()
    build(tmp_path / "h5ad", paths)
    assert names(tmp_path / "h5ad") == ["dataset_0.h5ad", "dataset_1.h5ad", "dataset_2.h5ad"]
