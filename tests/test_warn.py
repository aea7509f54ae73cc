"""Warnings that one thread ignores stay ignored while others come and go."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor

from annbatch_dask.warn import muted


def mute(_):
    with muted("Loud"):
        for _ in range(5):
            os.sched_yield()  # others begin and end meanwhile
            warnings.warn("Loud and clear", UserWarning, stacklevel=1)


def test_what_is_ignored_is_ignored_in_all_threads():
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(mute, range(500)))  # each would raise: warnings are errors
