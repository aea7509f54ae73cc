"""What surrounds the code says the same as the code: versions, checks, interpreters, dependencies."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import annbatch_dask

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
pytestmark = pytest.mark.skipif(not (ROOT / ".github").exists(), reason="a source archive has no workflows")


def read_yaml(name):
    return yaml.safe_load((ROOT / name).read_text())


def pinned(name):
    (found,) = (line for line in PROJECT["dependency-groups"]["test"] if line.startswith(f"{name}=="))
    return found.partition("==")[2]


def test_one_version():
    assert read_yaml("CITATION.cff")["version"] == annbatch_dask.__version__
    first = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## "))
    assert first.split()[1] == annbatch_dask.__version__


def test_types_reach_users():
    assert (Path(annbatch_dask.__file__).parent / "py.typed").exists()
    assert "Typing :: Typed" in PROJECT["project"]["classifiers"]


def test_hooks_check_what_make_lint_checks():
    remote, local = read_yaml(".pre-commit-config.yaml")["repos"]
    assert remote["rev"] == f"v{pinned('ruff')}"
    makefile = (ROOT / "Makefile").read_text()
    assert {hook["id"] for hook in remote["hooks"]} == {"ruff-check", "ruff-format"}
    assert "ruff check ." in makefile
    assert "ruff format --check" in makefile
    assert [hook["entry"] for hook in local["hooks"]] == ["make types docs"]


def test_every_interpreter_that_is_named_is_tested():
    tested = set(read_yaml(".github/workflows/test.yml")["jobs"]["test"]["strategy"]["matrix"]["python"])
    named = {c.rpartition(" ")[2] for c in PROJECT["project"]["classifiers"] if re.search(r":: 3\.\d", c)}
    assert tested == named
    assert min(named, key=lambda v: int(v[2:])) == PROJECT["project"]["requires-python"].removeprefix(">=")


def test_the_actions_run_what_anyone_can_run():
    """Each command of the workflows is a target of the Makefile or builds the release."""
    makefile = (ROOT / "Makefile").read_text()
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            for command in [step["run"] for step in job["steps"] if "run" in step]:
                program, word = command.split()[:2]
                assert program in ("pipx", "test") or f"\n{word}:" in makefile, (path.name, command)


def test_a_publication_needs_no_secret():
    text = (ROOT / ".github/workflows/release.yml").read_text()
    assert "id-token: write" in text
    assert "secrets." not in text


CONDA_NAMES = {"dask": "dask-core"}
"""Where conda-forge has another name: its dask brings all extras."""


def test_the_recipe_needs_what_the_package_needs():
    recipe = read_yaml("conda/recipe.yaml")
    needed = {re.sub(r"\[.*\]", "", line) for line in PROJECT["project"]["dependencies"]}
    names = [re.match(r"[\w-]+", line).group() for line in needed]
    expected = {CONDA_NAMES.get(n, n) + " " + line[len(n) :] for n, line in zip(names, needed, strict=True)}
    assert set(recipe["requirements"]["run"][1:]) == expected
    assert recipe["context"]["version"] == annbatch_dask.__version__
