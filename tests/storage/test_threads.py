"""Threads: see annbatch_dask.storage.threads."""

import threading
from concurrent.futures import ThreadPoolExecutor

from annbatch_dask.storage.threads import unlocked_property


def test_a_value_is_computed_while_that_of_another_object_is():
    """Or a fork meanwhile would leave the child without any."""
    inside, go_on = threading.Event(), threading.Event()

    class Slow:
        def __init__(self, waits):
            self.waits, self.n = waits, 0

        @unlocked_property
        def value(self):
            self.n += 1
            if not self.waits:
                return True
            inside.set()
            return go_on.wait(60)

    with ThreadPoolExecutor(1) as pool:
        slow, quick = Slow(waits=True), Slow(waits=False)
        future = pool.submit(lambda: slow.value)
        assert inside.wait(60)
        assert quick.value
        go_on.set()
        assert future.result()
    assert (slow.value, quick.value, slow.n, quick.n) == (True, True, 1, 1)
