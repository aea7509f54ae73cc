"""Each script of pipelines/ says what it is for, and what its options do."""

import importlib
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "pipelines").glob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_help_says_what_a_script_does_and_how_it_is_called(path, call, capsys):
    if "import torch" in path.read_text():
        pytest.importorskip("torch", reason="torch is not installed")
    script = importlib.import_module(path.stem)
    with pytest.raises(SystemExit) as caught:
        call(script, "--help")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert script.__doc__.strip() in shown
    assert f"\n{path.name} " in shown
