"""Notebooks run as they stand, quietly, and show what is committed."""

import re

import nbformat
import pytest

from tests.notebooks.execute import NOTEBOOKS, execute

pytestmark = pytest.mark.timeout(900)  # each starts processes of its own, which a busy machine takes minutes for
NEEDS_TORCH = {"training", "migration"}
MAX_BYTES = 150_000
VARIES = "varies"
"""Tag of cells whose outputs differ from run to run: times, ports, who did what."""
SLOW_CLOSE = "distributed.nanny - WARNING - Worker process still alive after"
"""What Dask says of a cluster that is closed on a busy machine."""
X_IS_A_LAYER = "\n    layers: None (.X)"
"""What anndata says from 0.13 on."""
ABSOLUTE_PATH = re.compile(r"""(?:^|[\s'"(=])(?:file://|/[\w.-]+/|[A-Z]:\\)""", re.MULTILINE)


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def text_of(output):
    """All that can be read in an output."""
    texts = {kind: text for kind, text in output.get("data", {}).items() if kind.startswith("text/")}
    return "\n".join([output.get("text", ""), *texts.values()])


def repeatable_text(notebook):
    """What each cell prints and returns, for the cells that do the same in each run."""
    return [
        [_shown(o) for o in cell.outputs if o.get("name") != "stderr"]
        for cell in code_cells(notebook)
        if VARIES not in cell.metadata.get("tags", [])
    ]


def _shown(output):
    text = output.get("text") or output.get("data", {}).get("text/plain")
    return text and text.replace(X_IS_A_LAYER, "")


def test_a_notebook_runs_quietly_and_shows_what_is_committed(path, tmp_path):
    if path.stem in NEEDS_TORCH:
        pytest.importorskip("torch", reason="torch is not installed")
    ran = execute(path, tmp_path)
    said = [line for o in outputs(ran) if o.get("name") == "stderr" for line in o.text.splitlines()]
    assert not [line for line in said if SLOW_CLOSE not in line]
    assert repeatable_text(ran) == repeatable_text(nbformat.read(path, as_version=4))


def test_a_notebook_is_committed_as_one_run_left_it(path):
    cells = code_cells(nbformat.read(path, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"]


def test_a_notebook_makes_folders_that_may_be_there(path):
    """Whoever runs it again has them."""
    source = "\n".join(cell.source for cell in code_cells(nbformat.read(path, as_version=4)))
    assert not re.findall(r"\.mkdir\((?![^)]*exist_ok=True)", source)


def test_a_committed_notebook_is_small_and_names_no_place_of_the_machine_it_ran_on(path):
    notebook = nbformat.read(path, as_version=4)
    assert path.stat().st_size < MAX_BYTES
    assert not [text for text in map(text_of, outputs(notebook)) if ABSOLUTE_PATH.search(text)]
    assert not [cell.source for cell in notebook.cells if ABSOLUTE_PATH.search(cell.source)]
    assert "widgets" not in notebook.metadata
