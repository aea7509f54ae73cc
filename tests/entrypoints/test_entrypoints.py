"""A build with no client works from wherever Python runs code, and leaves no process behind."""

import subprocess
import sys
import textwrap
import uuid

import nbformat
import psutil
import pytest
from nbclient import NotebookClient

from annbatch_dask import DatasetCollection

MARK = "ANNBATCH_DASK_TEST_RUN"
# No main guard, and a function that only this piece of code defines: workers must not need to import it.
CODE = """\
import anndata as ad
from annbatch_dask import DatasetCollection

def load_adata(path):
    adata = ad.read_h5ad(path)
    adata.obs["read_by"] = "load_adata of the caller"
    return adata

collection = DatasetCollection({target!r})
collection.add_adatas({files!r}, load_adata=load_adata, dataset_size=200, seed=0)
print(f"{{collection.n_obs}} cells")
"""


@pytest.fixture
def mark(monkeypatch):
    """Mark every process that descends from this test."""
    value = uuid.uuid4().hex
    monkeypatch.setenv(MARK, value)
    return value


@pytest.fixture
def target(tmp_path):
    return tmp_path / "out.zarr"


@pytest.fixture
def code(h5ad_pair, target):
    return CODE.format(target=str(target), files=[str(path) for path in h5ad_pair])


def marked_processes(mark):
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:  # gone, or not ours to look at
            continue
    return found


def assert_built(target, mark):
    collection = DatasetCollection(target, mode="r")
    assert (len(collection), collection.n_obs) == (3, 500)
    assert set(collection.obs(columns=["read_by"])["read_by"]) == {"load_adata of the caller"}
    _, alive = psutil.wait_procs(marked_processes(mark), timeout=60)
    assert not alive


@pytest.mark.parametrize("place", ["script", "command", "stdin"])
def test_python_process(place, code, target, mark, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(code)
    arguments = {"script": [str(script)], "command": ["-c", code], "stdin": ["-"]}[place]
    done = subprocess.run(
        [sys.executable, *arguments],
        input=code if place == "stdin" else None,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "500 cells\n"
    assert done.stderr == ""
    assert_built(target, mark)


def test_notebook(code, target, mark, tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(textwrap.dedent(code))])
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=500, kernel_name="python3", resources=resources).execute()
    text = "".join(o.get("text", "") for o in notebook.cells[0].outputs if o.get("name") == "stdout")
    assert text == "500 cells\n"
    assert_built(target, mark)
