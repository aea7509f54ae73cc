"""The peers' own tests, on this package; downloads their sources."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3000)]


@pytest.mark.parametrize("peer", ["scvi-tools", "annbatch", "scdataset"])
def test_the_peers_own_tests_pass_but_for_those_that_are_named(peer):
    if peer == "scvi-tools" and find_spec("scvi") is None:
        pytest.skip("scvi-tools is no dependency; tests/peers/upstream.py brings it")
    script = Path(__file__).with_name("upstream.py")
    done = subprocess.run([sys.executable, script, peer], capture_output=True, text=True, check=False)
    if "No matching distribution" in done.stderr or "Could not find a version" in done.stderr:
        pytest.skip("there is no package index here")
    assert done.returncode == 0, done.stdout + done.stderr
