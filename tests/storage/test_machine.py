"""The share of a machine: see annbatch_dask.storage.machine."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from annbatch_dask.storage import machine

GIB = 2**30
TOTAL = psutil.virtual_memory().total


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Give a function that says which groups the process is in, and what their files say."""

    def say(listed, limits):
        own = tmp_path / "own"
        own.write_text(listed)
        for name, text in limits.items():
            path = tmp_path / "groups" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        monkeypatch.setattr(machine, "_GROUPS", tmp_path / "groups")
        monkeypatch.setattr(machine, "_OWN_GROUPS", own)
        return machine.memory_nbytes()

    return say


@pytest.mark.parametrize(
    ("listed", "limits", "expected"),
    [
        ("0::/\n", {}, TOTAL),
        ("0::/\n", {"memory.max": "max", "memory.high": "max"}, TOTAL),
        ("0::/\n", {"memory.max": 2**60}, TOTAL),
        ("0::/\n", {"memory.max": GIB}, GIB),  # in a container
        ("0::/slurm/job_7/step_0\n", {"slurm/job_7/memory.max": GIB, "slurm/job_8/memory.max": 1}, GIB),
        ("0::/a/b\n", {"a/b/memory.max": GIB, "a/memory.high": GIB // 2, "memory.max": 2 * GIB}, GIB // 2),
        ("5:cpu,cpuacct:/x\n4:memory:/a/b\n0::/\n", {"memory/a/memory.limit_in_bytes": GIB}, GIB),
        ("3:hugetlb,memory:/c:d\n", {"memory/c:d/memory.limit_in_bytes": GIB}, GIB),
        ("4:memory:/docker/7f\n", {"memory/memory.limit_in_bytes": GIB}, GIB),  # the host's name of a container's group
    ],
)
def test_memory_is_the_least_that_a_group_around_the_process_allows(groups, listed, limits, expected):
    assert groups(listed, limits) == expected


def test_without_groups_memory_is_the_machines(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_OWN_GROUPS", tmp_path / "none")
    assert machine.memory_nbytes() == TOTAL


def test_a_job_in_a_group_of_its_own_knows_its_limit():
    group = Path(f"/sys/fs/cgroup/memory/annbatch-dask-{os.getpid()}")
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no group can be made here: {error}")
    try:
        (group / "memory.limit_in_bytes").write_text(str(GIB))
        code = (
            f"import os, pathlib; pathlib.Path({str(group / 'cgroup.procs')!r}).write_text(str(os.getpid()))\n"
            "from annbatch_dask.engines.choose import choose_engine\n"
            "print(choose_engine(None, None).budget.worker_nbytes)"
        )
        said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    finally:
        group.rmdir()
    assert int(said) <= GIB
