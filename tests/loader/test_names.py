"""Names and signatures that code written for annbatch uses: changing the import is all it takes."""

from __future__ import annotations

import inspect
import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse as sp
import zarr

import annbatch_dask
from annbatch_dask import Loader, types, utils

ARGUMENTS = {
    "batch_sampler": None,
    "chunk_size": None,
    "preload_nchunks": None,
    "shuffle": None,
    "return_index": False,
    "batch_size": None,
    "drop_last": None,
    "to": None,
    "rng": None,
}


def test_arguments_of_the_loader():
    found = inspect.signature(Loader.__init__).parameters
    assert {name: found[name].default for name in ARGUMENTS} == ARGUMENTS
    assert "preload_to_gpu" in found
    assert all(p.kind is p.KEYWORD_ONLY for name, p in found.items() if name != "self")


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("use_collection", ["collection", "load_adata"]),
        ("add_adatas", ["adatas"]),
        ("add_adata", ["adata"]),
        ("add_datasets", ["datasets", "obs", "var"]),
        ("add_dataset", ["dataset", "obs", "var"]),
    ],
)
def test_arguments_of_methods(method, arguments):
    assert list(inspect.signature(getattr(Loader, method)).parameters)[1:] == arguments


def test_keywords_in_a_dictionary():
    arguments = {"dataset": np.zeros((4, 3)), "obs": None, "var": None}
    assert Loader(batch_size=2, preload_to_gpu=False).add_dataset(**arguments).n_obs == 4


def test_aliases_of_types():
    assert zarr.Array in types.BackingArray_T.__value__.__args__
    assert sp.csr_array in types.InputInMemoryArray_T.__value__.__args__
    assert np.ndarray in types.OutputInMemoryArray_T.__value__.__args__
    with pytest.raises(AttributeError, match="has no attribute 'Array_T'"):
        _ = types.Array_T


def test_the_package_and_its_types_are_imported_without_zarr():
    code = "import sys, annbatch_dask.types; assert not {'zarr', 'anndata', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_pieces_of_a_size():
    whole = np.arange(7)
    views, copies = utils.split_given_size(whole, 3), utils.split_given_size(whole, 3, copy=True)
    assert [v.tolist() for v in views] == [c.tolist() for c in copies] == [[0, 1, 2], [3, 4, 5], [6]]
    assert views[0].base is whole
    assert copies[0].base is None


def test_what_scvi_tools_reaches_for():
    loader = Loader(batch_size=2, preload_to_gpu=False).add_dataset(np.zeros((4, 3)))
    assert loader._obs is None
    assert loader._batch_sampler is loader.batch_sampler


def test_every_public_name_is_there():
    for name in annbatch_dask.__all__:
        assert getattr(annbatch_dask, name) is not None
