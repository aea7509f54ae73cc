"""A collection that the release before wrote is read, checked and extended; ``collection_v1.zip`` holds it.

That release (format version 1) built it, with ``seed=3, dataset_size=20``, from the two files beside it.
"""

import shutil
from pathlib import Path

import dask
import pytest

from annbatch_dask import DatasetCollection, Loader
from annbatch_dask.errors import IntegrityError
from annbatch_dask.testing import make_adata

ARCHIVE = Path(__file__).parent / "collection_v1.zip"
INPUTS = ["0.h5ad", "1.h5ad"]
GENES = [f"g{k}" for k in range(12)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The collection and its inputs, which it knows by relative paths."""
    shutil.unpack_archive(ARCHIVE, tmp_path)
    monkeypatch.chdir(tmp_path)
    with dask.config.set(scheduler="synchronous"):
        yield tmp_path


def names(collection):
    loader = Loader(batch_size=7, preload_to_gpu=False).use_collection(collection)
    return sorted(name for batch in loader for name in batch["obs"].index)


def test_it_is_read_and_checked(folder):
    collection = DatasetCollection("v1.zarr", mode="r")
    assert len(names(collection)) == collection.n_obs == 51
    assert collection.verify(against=INPUTS).ok
    assert collection.report().sources


@pytest.mark.parametrize("mode", ["extend", "append", "reshuffle"])
def test_it_is_extended(folder, mode):
    make_adata(9, GENES, seed=7).write_h5ad("2.h5ad")
    before = names(DatasetCollection("v1.zarr"))
    collection = DatasetCollection("v1.zarr").add_adatas(["2.h5ad"], mode=mode, seed=1)
    assert names(collection) == sorted([*before, *(f"s7_{i}" for i in range(9))])
    assert collection.verify(against=[*INPUTS, "2.h5ad"]).ok
    assert not collection.verify().leftovers


def test_damage_is_found(folder):
    path = folder / "v1.zarr/dataset_1/obs/n_counts/c/0"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="n_counts"):
        DatasetCollection("v1.zarr").check()
    assert not DatasetCollection("v1.zarr").verify().ok
