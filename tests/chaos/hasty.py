"""Preloaded by workers of a test: what they wait for, they wait for a moment."""

import time

from annbatch_dask.storage import transient


def dask_setup(worker):
    transient.sleep = lambda _: time.sleep(0.1)
