"""benchmarks/scale.py: what a plan of many files leads to is within the numbers set before, and grows with the files."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks/scale.py"


@pytest.fixture(scope="module")
def scale():
    spec = importlib.util.spec_from_file_location("scale", PATH)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "scale", module)  # where dataclasses look for their names
        spec.loader.exec_module(module)
        yield module


def test_what_a_plan_leads_to_grows_with_its_files(scale, capsys, monkeypatch):
    monkeypatch.setattr(scale, "N_GENES", 3000)
    monkeypatch.setattr(scale, "N_SPACE", 4000)
    found = {}
    for n_files in (100, 200):
        assert scale.rehearse_plan(scale.Atlas(n_files * 100_000, n_files, n_files // 10))
        found[n_files] = json.loads(capsys.readouterr().out)
    one, two = found.values()
    assert two["tasks"] == pytest.approx([2 * n for n in one["tasks"]], rel=0.02)  # the last dataset is smaller
    for name in ("job_nbytes", "scatter_receipts_nbytes", "gather_receipts_nbytes", "reads_of_a_gather"):
        assert two[name] / one[name] == pytest.approx(2, rel=0.1), name
    assert one["parts_a_dataset"] == pytest.approx(two["parts_a_dataset"], rel=0.02)


def test_a_root_document_grows_with_datasets_and_files(scale, capsys):
    found = {}
    for n in (1000, 2000):
        assert scale.rehearse_root(n, n)
        found[n] = json.loads(capsys.readouterr().out)["root_nbytes"]
    assert found[2000] / found[1000] == pytest.approx(2, rel=0.05)


@pytest.mark.chaos
def test_a_stage_of_tasks_that_only_write_receipts():
    """In a process of its own: what others took before would hide what this takes, or be taken for it."""
    command = [sys.executable, str(PATH), "tasks", "--tasks", "2000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["receipt_nbytes"] < 400
