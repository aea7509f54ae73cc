"""What CI runs: everything, then what needs no torch on a newer interpreter, if there is one."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = ROOT / ".ci" / "run"
pytestmark = pytest.mark.skipif(not RUN.exists(), reason="a source archive has no CI")


@pytest.fixture
def tools(tmp_path):
    """A folder with the programs that CI finds: what stands in for make says what it was asked for."""
    for name in ("bash", "dirname", "sh", "timeout"):
        (tmp_path / name).symlink_to(shutil.which(name))
    program(tmp_path / "make", 'echo "make $*"')
    program(tmp_path / "chromium", "exit 1")
    return tmp_path


def program(path, line):
    path.write_text(f"#!{shutil.which('bash')}\n{line}\n")
    path.chmod(0o755)


def ci(tools):
    return subprocess.run(
        [shutil.which("bash"), RUN], env={"PATH": str(tools)}, check=True, capture_output=True, text=True, timeout=60
    )


def test_a_newer_interpreter_runs_what_needs_no_torch(tools):
    program(tools / "python3.12", "exit 127")  # a shim, with nothing behind it
    program(tools / "python3.13", "exit 0")
    first, second = ci(tools).stdout.splitlines()
    assert first == "make test"
    assert second.startswith("make test PYTHON=python3.13 VENV=.venv-newer TESTS=tests/peers ")
    assert all((ROOT / part).is_dir() for part in second.partition("TESTS=")[2].split())


def test_pyenv_may_have_it(tools, tmp_path):
    (tmp_path / "versions" / "bin").mkdir(parents=True)
    program(tmp_path / "versions" / "bin" / "python", "exit 0")
    known = f'"latest 3.12") echo 3.12.9 ;; "prefix 3.12.9") echo {tmp_path}/versions ;;'
    program(tools / "pyenv", f'case "$*" in {known} *) exit 1 ;; esac')
    assert f"PYTHON={tmp_path}/versions/bin/python" in ci(tools).stdout


def test_without_one_ci_says_what_it_skips(tools):
    done = ci(tools)
    assert done.stdout.splitlines() == ["make test"]
    assert "No Python of 3.12 or newer is here" in done.stderr


def test_an_interpreter_has_its_own_packages():
    """``make test PYTHON=python3.13`` does not use what python3 was given."""

    def installs_into(*arguments):
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "VENV", "MAKEFLAGS", "MAKELEVEL")}
        done = subprocess.run(
            ["make", "--no-print-directory", "--dry-run", "--always-make", "venv", *arguments],
            cwd=ROOT, env=env, check=True, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        return done.stdout.splitlines()[0]

    assert installs_into() == "python3 -m venv .venv"
    assert installs_into("PYTHON=python3.13") == "python3.13 -m venv .venv-313"
    assert installs_into("PYTHON=/opt/bin/python3.12") == "/opt/bin/python3.12 -m venv .venv-312"
