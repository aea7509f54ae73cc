"""Iterators that are dropped or left open: whatever thread collects them, and however the process ends."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

from annbatch_dask.loader.helpers import Helpers, LoaderThread
from tests.loader.loaders import check_epoch, make

pytestmark = pytest.mark.timeout(600)  # interpreters start here


def run(script: str, *args: object, timeout: int = 240) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own, as a hang would take others with it."""
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


# --- collected by any thread, at any moment

AT_EACH_CALL = """
import gc, sys, threading
from concurrent.futures import ThreadPoolExecutor
from annbatch_dask.loader import Loader, fetch
from annbatch_dask.loader import loader as loader_module
from tests.loader.data import Collection

path, every = sys.argv[1], int(sys.argv[2])
dropped, passed = threading.Event(), threading.Event()
state = dict(stage="", armed=False, left=0, done=False, calls=0)

def hook(frame, event, arg):
    # A collection that an allocation starts at this call: every lock of the caller is held.
    if state["armed"] and event == "call" and threading.current_thread().name.startswith(state["stage"]):
        state["left"] -= 1
        if state["left"] == 0:
            state["armed"] = False
            gc.collect()
            state["done"] = True

CALLS = {"annbatch-dask-fetch": 3, "annbatch-dask-assemble": 2}

def gate(stage, method):
    def later(self, *args):
        state["calls"] += state["stage"] == stage
        if state["calls"] != CALLS[stage] or state["stage"] != stage:
            return method(self, *args)
        dropped.wait(30)
        state["armed"] = True
        try:
            return method(self, *args)
        finally:
            state["armed"] = False
            passed.set()
    return later

loader_module.count_threads = lambda: 4  # then two windows are begun before the first batch
STAGES = {"annbatch-dask-fetch": "_begin", "annbatch-dask-assemble": "_assemble"}
for stage, name in STAGES.items():
    setattr(fetch.Pipeline, name, gate(stage, getattr(fetch.Pipeline, name)))
threading.setprofile(hook)
data = Collection(path, None, None)
loader = Loader(batch_size=20, chunk_size=10, preload_nchunks=2, shuffle=True, seed=0, preload_to_gpu=False)
loader = loader.use_collection(data)
for batch in loader:
    pass
gc.disable()
gc.collect()
gc.freeze()

def dropped_at(stage, left):
    state.update(stage=stage, calls=0, left=left, done=False, armed=False)
    dropped.clear()
    passed.clear()
    cycle = [iter(loader)]
    cycle.append(cycle)
    next(cycle[0])
    del cycle
    dropped.set()
    passed.wait(30)
    if not state["done"]:
        gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("annbatch-dask"):
            thread.join()
    return state["done"]

n_calls = []
for stage in STAGES:
    n = 1
    while dropped_at(stage, n):
        n += every
    n_calls.append(n)
print(*n_calls, ThreadPoolExecutor(1).submit(lambda: "works").result())
"""
"""Drops an iterator, and has it collected in a thread of its own at one call after the other."""


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.chaos)])
def test_an_iterator_may_be_collected_at_any_moment(collection, every):
    done = run(AT_EACH_CALL, collection.path, every)
    assert (done.returncode, done.stderr) == (0, "")
    n_fetching, n_assembling, works = done.stdout.split()
    assert int(n_fetching) > 50
    assert int(n_assembling) > 50
    assert works == "works"


BESIDE_A_TRAINING = """
import faulthandler, sys, threading, time
import numpy as np
from annbatch_dask.loader import Loader

seconds, kind = float(sys.argv[1]), sys.argv[2]
faulthandler.dump_traceback_later(seconds + 30, exit=True)
x = np.random.default_rng(0).poisson(1, (20_000, 200)).astype(np.float32)

def make(seed):
    options = dict(batch_size=256, chunk_size=64, preload_nchunks=16, shuffle=True, preload_to_gpu=False)
    return Loader(seed=seed, **options).add_datasets(np.array_split(x, 20))

class Trainer:
    def __init__(self, loader):
        self.batches, self.callbacks = iter(loader), [self]

    def fit(self, n):
        for _ in range(n):
            next(self.batches)

until, n = time.monotonic() + seconds, 0
while time.monotonic() < until:
    if kind == "folds":
        Trainer(make(n)).fit(20)
        n += 1
        continue
    train, validation = make(0), make(1)
    for k, _ in enumerate(train):
        if k % 10 == 9:
            Trainer(validation).fit(2)
            n += 1
print("no hang in", n, "of them")
"""
"""Trainers with a callback that knows them, a new one for each fold, or one for each validation of a training."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("kind", "seconds"),
    [("validations", 2), *(pytest.param(k, 75, marks=pytest.mark.chaos) for k in ("validations", "folds"))],
)
def test_iterators_in_cycles_do_not_hang(kind, seconds):
    done = run(BESIDE_A_TRAINING, seconds, kind, timeout=seconds + 240)
    assert (done.returncode, done.stderr) == (0, "")
    assert "no hang" in done.stdout


# --- left open as the interpreter ends

START = """
import sys, threading, time
import numpy as np
from annbatch_dask.loader import Loader

x = np.zeros((2000, 50), np.float32)
taken = threading.Event()

def loader(**options):
    options = dict(batch_size=5, chunk_size=5, preload_nchunks=2, shuffle=True, seed=0, preload_to_gpu=False) | options
    return Loader(**options).add_datasets(np.array_split(x, 4))

def iterate(loader):
    for _ in loader:
        taken.set()
"""
ENDINGS = {
    "global": ("it = iter(loader()); next(it)", 0),
    "waiting": ("it = iter(loader(prefetch_bytes=1)); next(it)", 0),
    "finished": ("it = iter(loader()); n = len(list(it))", 0),
    "four": ("its = [iter(loader(prefetch_bytes=10_000_000)) for _ in range(4)]; [next(it) for it in its]", 0),
    "cycle": ("class T: pass\nt = T(); t.me = t; t.it = iter(loader(prefetch_bytes=1)); next(t.it)", 0),
    "dropped": ("for _ in loader(): break", 0),
    "error": ("def f():\n it = iter(loader(prefetch_bytes=1)); next(it); raise ValueError('nan')\nf()", 1),
    "exit": ("def f():\n it = iter(loader(prefetch_bytes=1)); next(it); sys.exit(3)\nf()", 3),
    "daemon": (
        "threading.Thread(target=iterate, args=(loader(prefetch_bytes=1),), daemon=True).start(); taken.wait()",
        0,
    ),
    "thread": (
        "def f():\n n = 0\n for _ in loader(): n += 1; taken.set()\n print(n, 'batches')\n"
        "threading.Thread(target=f).start(); taken.wait()",
        0,
    ),
    "atexit": ("import atexit; it = iter(loader()); next(it); atexit.register(lambda: it.close())", 0),
    "interrupt": (
        "import os, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # what a shell starts in the background ignores it
        "threading.Thread(target=lambda: (taken.wait(), os.kill(os.getpid(), signal.SIGINT)), daemon=True).start()\n"
        "while True: iterate(loader())",
        -2,
    ),
    "transform": (
        "def f(b):\n taken.set(); time.sleep(0.2); return b\nit = iter(loader(transform=f)); next(it)",
        0,
    ),
}
USUAL = {"global", "thread"}


@pytest.mark.parametrize("ending", [pytest.param(e, marks=[] if e in USUAL else pytest.mark.chaos) for e in ENDINGS])
def test_an_open_iterator_does_not_keep_the_interpreter_alive(ending):
    script, code = ENDINGS[ending]
    done = run(START + script)
    assert done.returncode == code
    if code in (0, 3):  # Python 3.12 lets nobody start threads once the main one has ended, which a log says
        assert ending == "thread" or done.stderr == ""
    else:
        assert done.stderr.strip().splitlines()[-1] in ("ValueError: nan", "KeyboardInterrupt")
    if ending == "thread":  # its epoch is not cut short because the main thread is done
        assert done.stdout == "400 batches\n"


# --- interrupted by the user


def interrupted(method, *, at):
    """A method, after whose call of some number the user has pressed Ctrl-C."""
    numbers = itertools.count(1)

    def called(*args, **kwargs):
        method(*args, **kwargs)
        if next(numbers) == at:
            raise KeyboardInterrupt

    return called


@pytest.mark.parametrize(
    ("owner", "name", "at"),
    [(LoaderThread, "start", 1), (LoaderThread, "start", 2), (Helpers, "stop", 1), (LoaderThread, "join", 1)],
)
def test_an_interrupt_leaves_no_thread(owner, name, at, collection, monkeypatch):
    """As its threads start, and as they are told to end: that none is left is seen at each test's end."""
    loader = make(collection, batch_size=8)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, interrupted(getattr(owner, name), at=at))
        with pytest.raises(KeyboardInterrupt):
            list(loader)
    check_epoch(loader, collection)
