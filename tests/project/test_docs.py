"""Every public name has an entry in the API reference, and an example that runs."""

import doctest
import importlib
import inspect
import re
from pathlib import Path

import anndata as ad
import dask
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

import annbatch_dask
from annbatch_dask.testing import make_adata

PAGES = Path(__file__).parents[2] / "docs/reference"
MODULES = [name for name in annbatch_dask.__all__ if inspect.ismodule(getattr(annbatch_dask, name))]
OF_A_MODULE = {"errors", "events", "mixing", "types"}
"""Modules of many small names, with one example for all of them."""
NEEDS_TORCH = {"annbatch_dask.scdataset.hf_tahoe_to_tensor", "annbatch_dask.utils.convert"}


def public_names():
    """Dotted names of all public classes and functions."""
    for name in annbatch_dask.__all__:
        if name in MODULES:
            module = getattr(annbatch_dask, name)
            yield from (f"annbatch_dask.{name}.{m}" for m in module.__all__ if callable(getattr(module, m)))
        elif not name.startswith("__"):
            yield f"annbatch_dask.{name}"


def documented():
    """What the pages ask mkdocstrings for."""
    text = "\n".join(page.read_text() for page in PAGES.glob("*.md"))
    return set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))


def resolve(name):
    module, _, member = name.rpartition(".")
    return getattr(importlib.import_module(module), member)


@pytest.mark.parametrize("name", list(public_names()))
def test_every_public_name_has_an_entry(name):
    where = {name, name.rpartition(".")[0], resolve(name).__module__}  # itself, or the module it is of
    assert documented() & where


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What examples may use: the public names, a few libraries, and a collection of two files in this folder."""
    folder = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for seed, (name, n_obs) in enumerate({"a.h5ad": 300, "b.h5ad": 200}.items()):
            adata = make_adata(n_obs, [f"gene_{g}" for g in range(10 * seed, 40)], seed=seed)
            adata.obs["donor"] = pd.Categorical([f"D{i % 5}" for i in range(n_obs)])
            adata.write_h5ad(name)
        with dask.config.set(scheduler="threads"):
            collection = annbatch_dask.DatasetCollection("atlas.zarr").add_adatas(["a.h5ad", "b.h5ad"], seed=0)
        public = {name: getattr(annbatch_dask, name) for name in annbatch_dask.__all__}
        yield public | {"ad": ad, "collection": collection, "dask": dask, "np": np, "pd": pd, "sp": sp, "zarr": zarr}


EACH_ONCE = {resolve(n): n for n in public_names() if n.split(".")[1] not in OF_A_MODULE}


@pytest.mark.filterwarnings("ignore:zarr v3 autosharding:UserWarning")
@pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part:UserWarning")
@pytest.mark.parametrize("name", list(EACH_ONCE.values()))
def test_the_example_of_a_name_runs(name, names):
    if name in NEEDS_TORCH:
        pytest.importorskip("torch")
    check(resolve(name), name, names)


def test_the_example_of_the_data_module_runs(names):
    pytest.importorskip("lightning")  # so it is not among the public names
    assert "annbatch_dask.lightning" in documented()
    check(resolve("annbatch_dask.lightning.DataModule"), "DataModule", names)


@pytest.mark.parametrize("name", sorted(OF_A_MODULE))
def test_the_example_of_a_module_runs(name, names):
    check(getattr(annbatch_dask, name), name, names, recurse=False)


def ours_above(obj):
    """The classes of ours that a class inherits methods from and that have no entry of their own."""
    above = obj.__mro__[1:] if inspect.isclass(obj) else ()
    return [
        kind for kind in above if kind.__module__.startswith("annbatch_dask.") and kind.__name__ == "StoredCollection"
    ]


def check(obj, name, names, *, recurse=True):
    """Run the examples of a docstring, and of methods; there must be one."""
    with dask.config.set(scheduler="threads"):
        finder, found = doctest.DocTestFinder(recurse=recurse, exclude_empty=True), []
        for part in (obj, *ours_above(obj)):
            found += finder.find(part, name, module=False, globs=dict(names))
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
        said = []
        for case in found:
            runner.run(case, out=said.append)
    assert any(case.examples for case in found)
    assert not runner.summarize(verbose=False).failed, "".join(said)
