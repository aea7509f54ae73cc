"""README.md and the pages of docs/: their code runs, their links lead somewhere.

All blocks of a page run in their order, in a folder with the files and the collection that the pages speak of. A block
that cannot run here says why, in a comment before it: ``<!-- not run: it needs a cluster -->``; one that needs an
optional package names it: ``<!-- runs with torch -->``.
"""

from __future__ import annotations

import doctest
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import dask
import numpy as np
import pandas as pd
import pytest
import yaml

from annbatch_dask import DatasetCollection, cli
from annbatch_dask.testing import make_adata

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted(p for p in ROOT.glob("docs/**/*.md") if p.name not in ("changelog.md", "peers.md")),
]
FENCE = re.compile(r"(?:<!-- (.+?) -->\n)?^```(\w*).*?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
CODE = {"python", "sh"}
DATA = {"json", "yaml", "text"}
"""What is shown and not run."""


@dataclass(frozen=True)
class Block:
    """A block of code: the line of the page where it begins, its language, and what is said of it."""

    line: int
    language: str
    code: str
    note: str

    @property
    def runs(self) -> bool:
        """Whether it can run here."""
        if self.note.startswith("runs with "):
            return all(map(importlib.util.find_spec, self.note.removeprefix("runs with ").split(", ")))
        return not self.note.startswith("not run: ")


def blocks_of(page):
    text = page.read_text()
    for match in FENCE.finditer(text):
        yield Block(text[: match.start(3)].count("\n"), match[2], match[3], match[1] or "")


def name_of(page):
    return str(page.relative_to(ROOT))


# --- the folder ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Five small files of different genes, and a collection of the first two."""
    folder = tmp_path_factory.mktemp("pages")
    for seed, name in enumerate("abcde"):
        write_file(folder / f"{name}.h5ad", n_obs=300 - 40 * seed, seed=seed)
    with dask.config.set(scheduler="threads"), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        DatasetCollection("atlas.zarr").add_adatas(["a.h5ad", "b.h5ad"], dataset_size=200)
    (folder / "train.py").write_text("")
    return folder


def write_file(path, *, n_obs, seed):
    genes = [f"GENE{g}" for g in range(5 * seed, 60)]
    rng = np.random.default_rng(seed)
    adata = make_adata(n_obs, genes, seed=seed)
    adata.obs["donor"] = pd.Categorical([f"donor_{d}" for d in rng.integers(0, 6, n_obs)])
    adata.obs["tissue"] = pd.Categorical(rng.choice(["lung", "blood"], n_obs))
    adata.raw = adata.copy()
    adata.layers["counts"] = adata.X.copy()
    adata.layers["spliced"] = adata.X.copy()
    adata.obsm["X_pca"] = rng.normal(size=(n_obs, 4)).astype("f4")
    adata.obsm["X_umap"] = rng.normal(size=(n_obs, 2)).astype("f4")
    adata.write_h5ad(path, compression="gzip")


@pytest.fixture
def folder(files, tmp_path, monkeypatch):
    """A copy of them, where a page runs."""
    shutil.copytree(files, tmp_path / "page")
    monkeypatch.chdir(tmp_path / "page")
    return tmp_path / "page"


# --- code ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:zarr v3 autosharding:UserWarning")  # anndata 0.12, when one writes to zarr
@pytest.mark.filterwarnings("ignore:Batches do not carry:FutureWarning")  # layers and obsm, on most pages
@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_code_of_a_page_runs(page):
    names = {"__name__": "__main__"}
    with dask.config.set(scheduler="threads"):  # tests/entrypoints starts the local cluster
        if name_of(page) in ("README.md", "docs/index.md", "docs/how-to/index.md"):
            shutil.rmtree("atlas.zarr")  # they make it
        for block in blocks_of(page):
            if block.runs:
                run(block, page, names)


def run(block, page, names):
    if block.language == "python" and ">>>" in block.code:
        check_session(block, page, names)
    elif block.language == "python":
        code = compile("\n" * block.line + block.code, str(page), "exec", dont_inherit=True)
        exec(code, names)
    elif block.language == "sh":
        run_shell(block.code)
    elif block.language == "json":
        json.loads(block.code)
    elif block.language == "yaml":
        yaml.safe_load(block.code)


def check_session(block, page, names):
    """Run a block of ``>>>`` lines and compare what it prints."""
    case = doctest.DocTestParser().get_doctest(block.code, names, page.name, str(page), block.line)
    said = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    runner.run(case, out=said.append, clear_globs=False)
    names |= case.globs
    assert not said, "".join(said)


def run_shell(code):
    """Run commands: ours in this process, which has imported everything, and others by bash."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] == "annbatch-dask":
            found = [name for word in words[1:] for name in (sorted(glob(word)) or [word])]
            assert cli.main(found) == 0, line
        elif words:
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            subprocess.run(["bash", "-ec", line], check=True, timeout=300, env=os.environ | {"PATH": path})


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_block_runs_or_says_why_not(page):
    for block in blocks_of(page):
        where = f"{name_of(page)}:{block.line}"
        assert block.language in CODE | DATA, f"{where} has the language {block.language!r}"
        assert not block.note or re.match(r"not run: \w.{10}|runs with [\w, ]+$", block.note), f"{where}: {block.note}"


COMMANDS = [
    line.strip()
    for page in PAGES
    for block in blocks_of(page)
    if block.language == "sh" and not block.runs
    for line in block.code.replace("\\\n", " ").splitlines()
    if line.startswith("annbatch-dask") and "COMMAND" not in line
]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_that_is_not_run_is_valid(line):
    arguments = shlex.split(line, comments=True)[1:]
    assert cli.make_parser().parse_args(arguments).command == arguments[0]


# --- README ----------------------------------------------------------------------------------------------------------


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 125
    assert lines.index("```sh") < 25  # make demo and make test are in the first screen


def test_links_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    targets = re.findall(r'\]\((?!http)([^)#]+)|(?:src|srcset)="([^"]+)"', text)
    assert not [t for pair in targets for t in pair if t and not (ROOT / t).exists()]


def test_make_knows_the_targets():
    makefile = (ROOT / "Makefile").read_text()
    assert not [t for t in ("demo", "test", "lint", "bench", "venv") if f"\n{t}:" not in makefile]


# --- the format ------------------------------------------------------------------------------------------------------


def fields_of(section):
    """The first column of the table below a heading of the page on the format."""
    text = (ROOT / "docs/explanation/format.md").read_text()
    body = re.split(r"^#+ ", text.split(f"# {section}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    return set(re.findall(r"^\| `([^`]+)` \|", body, re.MULTILINE))


def test_the_page_on_the_format_has_the_fields_that_are_written(files):
    attributes = json.loads((files / "atlas.zarr/zarr.json").read_text())["attributes"]
    manifest = attributes["annbatch_dask"]
    dataset = json.loads((files / "atlas.zarr/dataset_0/zarr.json").read_text())["attributes"]
    assert fields_of("Root attributes") == set(attributes)
    assert fields_of("Manifest") == set(manifest)
    assert fields_of("Matrix record") == set(manifest["matrices"]["X"])
    assert fields_of("Dataset record") == set(manifest["datasets"][0])
    assert fields_of("Source record") == set(manifest["sources"][0])
    assert fields_of("Build record") == set(manifest["builds"][0])
    assert fields_of("Datasets") == set(dataset)
