"""What this process may use of its machine: processors and memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil
from dask.system import cpu_count

__all__ = ["memory_nbytes", "n_cpus"]

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


def n_cpus() -> int:
    """Processors this process may use: fewer than it sees where it, or its container, was given a share."""
    return int(cpu_count())


def memory_nbytes() -> int:
    """Bytes of memory: the machine's, or the least that a control group around this process allows.

    Dask looks at the outermost group, which is a container's own. The job of a queue, as SLURM's, and a unit of systemd
    are groups further down.
    """
    try:
        listed = _OWN_GROUPS.read_text()
    except OSError:  # not Linux
        listed = ""
    return int(min([psutil.virtual_memory().total, *_limits(listed)]))


def _limits(listed: str) -> Iterator[int]:
    """Limits of the groups that the kernel lists for a process, and of those around them."""
    for line in listed.splitlines():
        _, controllers, place = line.split(":", 2)
        if not controllers:  # version 2 of control groups
            top, names = _GROUPS, ["memory.max", "memory.high"]
        elif "memory" in controllers.split(","):
            top, names = _GROUPS / "memory", ["memory.limit_in_bytes"]
        else:
            continue
        own = PurePosixPath(place).relative_to("/")
        for group in (own, *own.parents):
            for name in names:
                with contextlib.suppress(OSError, ValueError):  # there is none, or it says "max"
                    yield int((top / group / name).read_text())
