"""What tasks share, and what they leave."""

import ctypes
import sys

import pytest

from annbatch_dask.etl.job import forget_inputs, trim_memory


class Libc:
    """glibc's functions that are asked for, of a process with so many bytes that were freed and kept."""

    def __init__(self, freed_nbytes=None):
        self.trimmed = []
        self.malloc_trim = self.trimmed.append
        if freed_nbytes is not None:
            self.mallinfo2 = lambda: type("Info", (), {"fordblks": freed_nbytes})


@pytest.fixture
def libc(monkeypatch):
    def install(**has):
        found = Libc(**has)
        monkeypatch.setattr(ctypes, "CDLL", lambda _: found)
        return found

    return install


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
@pytest.mark.parametrize(("freed_nbytes", "keep_nbytes", "n"), [(99, 100, 0), (101, 100, 1), (0, 0, 1), (None, 100, 1)])
def test_freed_memory_stays_for_the_next_task_up_to_a_limit(libc, freed_nbytes, keep_nbytes, n):
    found = libc(freed_nbytes=freed_nbytes)
    trim_memory(keep_nbytes=keep_nbytes)
    assert len(found.trimmed) == n


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_the_next_stage_begins_without_it(libc):
    found = libc(freed_nbytes=1)
    forget_inputs()
    assert len(found.trimmed) == 1
