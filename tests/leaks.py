"""What a test may leave behind: threads of loaders, open files, processes."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

THREADS = "annbatch-dask"
ROOT = Path("/")


@contextmanager
def nothing_is_left() -> Iterator[None]:
    """Fail if a thread of a loader, a file that was opened in the block, or a process started in it outlives it."""
    files, processes = set(open_files(ROOT)), set(children())
    yield
    if loader_threads() or set(open_files(ROOT)) - files:
        gc.collect()  # an iterator in a reference cycle
    assert not loader_threads()
    assert not set(open_files(ROOT)) - files
    _, alive = psutil.wait_procs(set(children()) - processes, timeout=10)
    assert not alive, f"still running: {alive}"


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(THREADS)]


def open_files(folder: Path) -> list[str]:
    """Files under the folder that this process has open."""
    targets = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            targets.append(link.readlink())
    return [str(target) for target in targets if target.is_relative_to(folder) and target.is_file()]


def children() -> list[psutil.Process]:
    """Processes this one has started, and theirs, but for multiprocessing's own, which stay."""
    return [p for p in psutil.Process().children(recursive=True) if not _is_standing(p)]


def _is_standing(process: psutil.Process) -> bool:
    try:
        command = " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False
    return "multiprocessing.resource_tracker" in command or "multiprocessing.forkserver" in command
