"""HDF5 from remote stores, with garbage that holds h5py objects: see annbatch_dask.sources.garbage."""

import gc
import subprocess
import sys
import threading

import pytest

from annbatch_dask.sources import garbage
from annbatch_dask.sources.garbage import no_garbage_collection

# A store that reads on a thread of its own, as fsspec's do, which makes so much garbage that it is collected there.
READ = """
import io, sys
from concurrent.futures import ThreadPoolExecutor

import fsspec, h5py

from annbatch_dask.sources.open import SourceRef, open_source

class File(io.RawIOBase):
    def __init__(self, data):
        self.data, self.pool = io.BytesIO(data), ThreadPoolExecutor(1)
    def readable(self): return True
    def seekable(self): return True
    def seek(self, *at): return self.data.seek(*at)
    def tell(self): return self.data.tell()
    def _read(self, n):
        if cycles:
            cycles.pop()
        litter = [[] for _ in range(2_000)]
        return self.data.read(n)
    def read(self, n=-1): return self.pool.submit(self._read, n).result()
    def readinto(self, out):
        found = self.read(len(out))
        out[: len(found)] = found
        return len(found)
    def close(self):
        if not self.closed: self.pool.shutdown()
        super().close()

class Threaded(fsspec.AbstractFileSystem):
    protocol = "threaded"
    def info(self, path, **_): return {"name": path, "size": len(data), "type": "file"}
    def _open(self, path, mode="rb", **_): return File(data)

fsspec.register_implementation("threaded", Threaded)
data = open(sys.argv[1], "rb").read()
other = h5py.File(sys.argv[1], "r")
cycles = [[other["obs"]] for _ in range(100)]
for cycle in cycles:
    cycle.append(cycle)
del cycle
for _ in range(20):
    with open_source(SourceRef("a.h5ad", "threaded://a.h5ad")) as source:
        n_obs = source.schema().n_obs
print(n_obs)
"""


def test_garbage_with_h5py_objects_does_not_stop_a_remote_read(h5ad_pair):
    command = [sys.executable, "-c", READ, str(h5ad_pair[0])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert (done.returncode, done.stdout) == (0, "300\n"), done.stderr


def test_garbage_is_collected_again_after_the_last_pause():
    entered, leave = threading.Event(), threading.Event()

    def other():
        with no_garbage_collection():
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait(60)
    with no_garbage_collection():
        assert not gc.isenabled()
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled()


class Cycle:
    """Garbage that only the collector finds, and whose end takes until it is allowed to."""

    def __init__(self, begun, leave):
        self.me, self.begun, self.leave = self, begun, leave

    def __del__(self):
        self.begun.set()
        self.leave.wait(60)


def test_a_collection_that_began_before_the_first_pause_is_waited_for(monkeypatch):
    begun, leave, naps = threading.Event(), threading.Event(), []
    collector = garbage._Collector()
    monkeypatch.setattr(garbage.time, "sleep", lambda seconds: (naps.append(seconds), leave.set()))
    thread = threading.Thread(target=lambda: (Cycle(begun, leave) and None, gc.collect()))
    thread.start()
    begun.wait(60)
    collector.pause()
    try:
        collector.wait()
        assert naps  # the other thread could go on only then
        assert collector.is_watched
    finally:
        collector.resume()
        gc.callbacks.remove(collector.note)
        thread.join()


def test_the_collector_calls_nothing_of_ours_before_hdf5_is_read_from_a_store():
    code = "import gc, annbatch_dask, annbatch_dask.collection, annbatch_dask.sources.open; print(gc.callbacks)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("failing", [False, True])
def test_garbage_is_not_collected_again_where_it_was_not_before(failing):
    gc.disable()
    try:
        with pytest.raises(ZeroDivisionError) if failing else no_garbage_collection(), no_garbage_collection():
            if failing:
                1 / 0  # noqa: B018
        assert not gc.isenabled()
    finally:
        gc.enable()
