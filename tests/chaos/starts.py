"""Preloaded by workers of a test: each task says that it starts, and takes as long as a larger one.

With ``TEST_HELD``, as JSON, tasks of one stage are held until a file is there, but for the first one of each machine
but one: that goes on once that machine has one.
"""

import json
import os
import time

from annbatch_dask.engines import base

_timed = base._timed
UNTIL_S = 300


def told(fn, *args):
    what = {"task": getattr(fn, "__name__", str(fn)), "pid": os.getpid(), "node": os.environ.get("TEST_NODE")}
    line = json.dumps(what) + "\n"
    fd = os.open(os.environ["TEST_STARTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, line.encode())
    os.close(fd)
    time.sleep(float(os.environ["TEST_SECONDS"]))  # the work of a larger one
    if (held := json.loads(os.environ.get("TEST_HELD", "{}"))) and held["task"] == what["task"]:
        is_first = what["node"] != held["node"] and n_begun(held["task"], what["node"]) == 1
        until = time.monotonic() + UNTIL_S
        while not os.path.exists(held["file"]) and time.monotonic() < until:
            if is_first and n_begun(held["task"], held["node"]):
                break
            time.sleep(0.02)
    return _timed(fn, *args)


def n_begun(task, node):
    """How many tasks of a stage a machine has begun."""
    with open(os.environ["TEST_STARTS"]) as file:
        found = [json.loads(line) for line in file if line.endswith("}\n")]
    return sum((line["task"], line["node"]) == (task, node) for line in found)


def dask_setup(worker):
    base._timed = told
