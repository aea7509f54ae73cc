"""What README.md shows is what runs."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from annbatch_dask import DatasetCollection
from annbatch_dask.cli import _parser

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PYTHON, SHELL = (re.findall(rf"```{kind}\n(.*?)```", README, re.DOTALL) for kind in ("python", "sh"))
COMMANDS = [line for block in SHELL for line in block.splitlines() if line.startswith("annbatch-dask")]


def test_the_first_example_runs_as_shown(h5ad_pair, tmp_path):
    for path, name in zip(h5ad_pair, ("a.h5ad", "b.h5ad"), strict=True):
        shutil.copy(path, tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", PYTHON[0]],
        cwd=tmp_path,
        env=os.environ | {"DASK_SCHEDULER": "threads"},  # tests/entrypoints starts the local cluster
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert DatasetCollection(tmp_path / "atlas.zarr", mode="r").n_obs == 500


def test_the_first_example_is_short():
    assert len([line for line in PYTHON[0].splitlines() if line.strip()]) <= 10


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_are_valid(line):
    arguments = shlex.split(line, comments=True)[1:]
    assert _parser().parse_args(arguments).command == arguments[0]


def test_make_knows_the_targets():
    makefile = (ROOT / "Makefile").read_text()
    assert not [t for t in ("demo", "test", "lint", "bench", "venv") if f"\n{t}:" not in makefile]
