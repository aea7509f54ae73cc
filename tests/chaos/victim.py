"""One call of add_adatas in a process of its own, which kills itself where it is told to."""

import json
import os
import signal

import dask

from annbatch_dask import DatasetCollection
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


def add(out, paths, options, reports, kill, scheduler):
    """Build; die at ``kill``: a stage, and "start", "end" or a number of finished tasks."""
    with dask.config.set(scheduler=scheduler):
        DatasetCollection(out).add_adatas(paths, callbacks=[Killer(kill, reports)], progress=False, **options)
