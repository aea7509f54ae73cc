"""docs/peers.md says what runs: each of its names is here, and each name of the peers is in it."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import annbatch_dask
from annbatch_dask import scdataset

PAGE = (Path(__file__).parents[2] / "docs/peers.md").read_text()
NAMES = re.findall(r"^\| `([\w.]+)` \|", PAGE, re.MULTILINE)
OF_ANNBATCH = [name for name in NAMES if name.startswith("annbatch.")]
OF_SCDATASET = [name for name in NAMES if name.startswith("scdataset.")]


def find(name):
    """What a dotted name stands for."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for part in parts[n:]:
            found = getattr(found, part) if not hasattr(found, "__annotations__") or hasattr(found, part) else found
        return found
    raise ModuleNotFoundError(name)


def test_each_name_of_the_tables_is_here():
    assert len(OF_ANNBATCH) > 30
    assert len(OF_SCDATASET) == 12
    for name in OF_ANNBATCH:
        assert find(name.replace("annbatch.", "annbatch_dask.", 1)) is not None
    for name in OF_SCDATASET:
        assert find(f"annbatch_dask.{name}") is not None
    assert {name.split(".")[1] for name in OF_SCDATASET} == set(scdataset.__all__) - {"StrategySampler"}


def test_packages_that_import_annbatch_find_this_one():
    """Each name under annbatch's own, in a process of its own."""
    script = (
        "import sys, annbatch_dask; annbatch_dask.install_as_annbatch(); annbatch_dask.install_as_annbatch()\n"
        "from annbatch import Loader; from annbatch.samplers import ClassSampler; import annbatch.types\n"
        "assert Loader is annbatch_dask.Loader and annbatch is annbatch_dask\n"
        "from importlib import import_module\n"
        f"for name in {sorted({n.rpartition('.')[0] for n in OF_ANNBATCH if n.split('.')[1].islower()})}:\n"
        "    parent = name if not name.split('.')[-1][0].isupper() else name.rpartition('.')[0]\n"
        "    assert import_module(parent).__name__.startswith('annbatch_dask'), name\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_annbatch_itself_is_not_replaced_under_its_users(monkeypatch):
    class Other:
        Loader = object

    monkeypatch.setitem(sys.modules, "annbatch", Other)
    with pytest.raises(ImportError, match="imported already"):
        annbatch_dask.install_as_annbatch()


def test_each_name_of_annbatch_is_in_the_table():
    annbatch = pytest.importorskip("annbatch", reason="annbatch needs Python 3.12 and is no dependency")
    there = {f"annbatch.{name}" for name in annbatch.__all__ if not inspect.ismodule(getattr(annbatch, name))}
    there |= {f"annbatch.samplers.{name}" for name in vars(annbatch.samplers) if name.endswith("Sampler")}
    there |= {
        f"annbatch.{kind.__name__}.{name}"
        for kind in (annbatch.Loader, annbatch.DatasetCollection)
        for name in vars(kind)
        if not name.startswith("_")
    }
    assert there <= set(OF_ANNBATCH)
    for name in there:  # with the arguments that it has there
        theirs, ours = find(name), find(name.replace("annbatch.", "annbatch_dask.", 1))
        if callable(theirs):
            missing = inspect.signature(theirs).parameters.keys() - inspect.signature(ours).parameters.keys()
            assert not missing, name


def test_each_model_of_scvi_tools_is_there():
    pytest.importorskip("scvi", reason="scvi-tools is no dependency")
    for name in NAMES:
        if name.startswith("scvi."):
            assert find(name) is not None
