"""One call of add_adatas in a process of its own, which kills itself where it is told to."""

import json
import os
import signal

import anndata
import dask

from annbatch_dask import DatasetCollection
from annbatch_dask.etl import scan
from annbatch_dask.events import Callback


class Killer(Callback):
    """Writes a line for each finished task, and kills this process at its time."""

    def __init__(self, kill, reports):
        self.stage, self.when = kill or (None, None)
        self.reports = reports
        self.done = 0

    def _die(self, stage, when):
        if (stage, when) == (self.stage, self.when):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_stage_start(self, event):
        self.done = 0
        self._die(event.stage, "start")

    def on_task_end(self, event):
        with open(self.reports, "a") as f:
            f.write(json.dumps({"stage": event.stage, "task": event.task, "reused": event.reused}) + "\n")
        self.done += 1
        self._die(event.stage, self.done)

    def on_stage_end(self, event):
        self._die(event.stage, "end")


class Fragile:
    """Opens inputs as scan does, and kills this process instead of opening one more than ``n``."""

    def __init__(self, n):
        self.n, self.open = n, scan.open_source

    def __call__(self, ref):
        if self.n == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.n -= 1
        return self.open(ref)


def die_before_renaming(path):
    """Kill this process when a file is written, and is about to appear as ``path``."""
    replace = os.replace

    def fatal(written, to):
        if to == path:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(written, to)

    os.replace = fatal


def die_once(item, pid_of, flag):
    """``load_adata`` that kills a process the first time it is called: its own, or another."""
    if not flag.exists():
        flag.touch()
        os.kill(pid_of or os.getpid(), signal.SIGKILL)
    return anndata.io.read_h5ad(item)


def add(out, paths, options, reports, kill, scheduler):
    """Build; die at ``kill``: a stage, and "start", "rename" (of the root), "end" or a number of finished tasks."""
    if kill is not None and kill[0] == "scan":
        scan.open_source = Fragile(kill[1])
    if kill == ("commit", "rename"):
        die_before_renaming(f"{out}/zarr.json")
    with dask.config.set(scheduler=scheduler):
        DatasetCollection(out).add_adatas(paths, callbacks=[Killer(kill, reports)], progress=False, **options)


def die_while(item, flag, victims):
    """``load_adata`` that kills its process for some files, as long as the flag is there."""
    if flag.exists() and str(item) in victims:
        flag.with_name("died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return anndata.io.read_h5ad(item)
