"""Kernels where nothing can be written: a container with a read-only site-packages, run by a user without a home."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import annbatch_dask

CODE = """
import numpy as np
import annbatch_dask.kernels.assemble, annbatch_dask.kernels.values
from annbatch_dask.etl import gather, scatter
from annbatch_dask.kernels.rows import copy_runs

print(gather.__file__)
out, one = np.zeros(3, np.float32), np.array([0])
copy_runs(np.arange(3, dtype=np.float32), one, out, one, np.array([3]))
print(out.tolist())
"""


@pytest.fixture
def package(tmp_path):
    """A copy of the package beside whose modules nothing can be kept, whoever runs it: there are files in the way."""
    copy = tmp_path / "site" / "annbatch_dask"
    shutil.copytree(Path(annbatch_dask.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in [copy, *(p for p in copy.rglob("*") if p.is_dir())]:
        (folder / "__pycache__").touch()
    return copy


def run(package, **environment):
    nowhere = os.devnull + "/home"
    env = {k: v for k, v in os.environ.items() if k not in ("XDG_CACHE_HOME", "NUMBA_CACHE_DIR")}
    env |= {"HOME": nowhere, "PYTHONPATH": str(package.parent)} | environment
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, env=env, cwd=package.parent, capture_output=True, text=True, check=True)
    where, values = done.stdout.splitlines()
    assert Path(where).is_relative_to(package)
    assert values == "[0.0, 1.0, 2.0]"
    return done.stderr


def test_kernels_run_where_nothing_can_be_kept_and_say_so_once(package):
    said = run(package)
    assert said.count("NUMBA_CACHE_DIR") == said.count("\n") == 1


def test_a_folder_of_numba_s_own_setting_is_used(package, tmp_path):
    assert run(package, NUMBA_CACHE_DIR=str(tmp_path / "kept")) == ""
    assert list((tmp_path / "kept").rglob("*.nbi"))


def test_kernels_are_compiled_anew_after_any_file_of_kernels_changed(package, tmp_path):
    """They hold what they call; numba looks at the file of the kernel alone."""

    def kept():
        run(package, NUMBA_CACHE_DIR=str(tmp_path / "kept"))
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*.nbi")}

    first = kept()
    assert kept() == first
    os.utime(package / "kernels" / "shared.py")
    assert kept() != first
