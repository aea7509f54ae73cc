"""What a test may leave behind: threads of loaders, open files, processes."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

THREADS = "annbatch-dask"
_KEPT = (".ttf", ".so")  # matplotlib's fonts, libraries
_PATIENCE_S = 60
ROOT = Path("/")


@contextmanager
def nothing_is_left() -> Iterator[None]:
    """Fail if a thread of a loader, a file that was opened in the block, or a process started in it outlives it.

    What processes of fixtures with a longer life start is theirs. A dask task whose neighbour failed may end later.
    """
    files, processes = set(open_files(ROOT)), set(children())

    def open_since():
        return [f for f in open_files(ROOT) if f not in files and not f.endswith(_KEPT)]

    yield
    if loader_threads() or open_since():
        gc.collect()  # an iterator in a reference cycle
    assert not lasting_threads(), f"still running: {loader_threads()}"
    until = time.monotonic() + _PATIENCE_S
    while (found := open_since()) and time.monotonic() < until:
        threading.Event().wait(0.01)
    assert not found, f"still open: {found}"
    started = [p for p in children() if p not in processes and processes.isdisjoint(_parents(p))]
    _, alive = psutil.wait_procs(started, timeout=_PATIENCE_S)
    assert not alive, f"still running: {alive}"


def _parents(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return process.parents()
    return []


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(THREADS)]


def lasting_threads() -> list[threading.Thread]:
    """Those that do not end by themselves: an iterator that is dropped waits for none of its own."""
    until = time.monotonic() + _PATIENCE_S
    for thread in loader_threads():
        thread.join(max(0, until - time.monotonic()))
    return loader_threads()


def open_files(folder: Path) -> list[str]:
    """Files under the folder that this process has open."""
    targets = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            targets.append(link.readlink())
    return [str(target) for target in targets if target.is_relative_to(folder) and target.is_file()]


def children() -> list[psutil.Process]:
    """Processes this one has started, and theirs, but for multiprocessing's own, which stay."""
    found = []
    for pid in _children_of("self"):
        with suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(pid))
    return [p for p in found if not _is_standing(p)]


def _children_of(pid: int | str) -> Iterator[int]:
    """All descendants; psutil would look at every process of the machine, before and after each test."""
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in list(Path(f"/proc/{pid}/task").iterdir()):
            for child in (task / "children").read_text().split():
                yield int(child)
                yield from _children_of(int(child))


def _is_standing(process: psutil.Process) -> bool:
    try:
        command = " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False
    return "multiprocessing.resource_tracker" in command or "multiprocessing.forkserver" in command
