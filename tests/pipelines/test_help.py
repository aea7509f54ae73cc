"""Each script of pipelines/ says what it is for, and what its options do."""

import importlib
from pathlib import Path

import pytest

SCRIPTS = sorted(path.stem for path in (Path(__file__).parents[2] / "pipelines").glob("*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_says_what_a_script_does_and_how_it_is_called(name, call, capsys):
    if name.startswith("train"):
        pytest.importorskip("torch", reason="torch is not installed")
    script = importlib.import_module(name)
    with pytest.raises(SystemExit) as caught:
        call(script, "--help")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert script.__doc__.strip() in shown
    assert f"\n{name}.py " in shown
