"""Calls that are made behind who hands them in: in order, bounded, none after one that failed."""

import contextlib
import threading

import pytest

from annbatch_dask.plan.memory import gather_peak_nbytes
from annbatch_dask.storage import uploads
from annbatch_dask.storage.uploads import Behind


@pytest.fixture
def behind():
    made = Behind()
    yield made
    made.abandon()


def test_calls_are_made_in_their_order(behind):
    found = []
    for k in range(100):
        behind.call(found.append, k)
    behind.wait()
    assert found == list(range(100))


def test_the_caller_waits_while_much_is_on_its_way(behind, monkeypatch):
    monkeypatch.setattr(uploads, "_WAITING_NBYTES", 100)
    go, handed_in = threading.Event(), []

    def hand_in():
        for k in range(5):
            behind.call(go.wait, 20, nbytes=40)
            handed_in.append(k)
            if k == 1:
                are_two.set()

    are_two = threading.Event()
    thread = threading.Thread(target=hand_in)
    thread.start()
    assert are_two.wait(20)
    assert handed_in == [0, 1]  # a third would hold 120 bytes
    go.set()
    thread.join(20)
    assert len(handed_in) == 5


def test_one_larger_than_all_that_may_wait_is_taken(behind):
    behind.call(bytes, nbytes=2**40)
    behind.call(bytes, nbytes=2**40)
    behind.wait()


def test_after_an_error_nothing_is_made_and_it_is_raised(behind):
    found, go = [], threading.Event()

    def fail():
        go.wait(20)
        raise OSError(5, "no answer")

    behind.call(fail)
    behind.call(found.append, 1)
    go.set()
    with pytest.raises(OSError, match="no answer"):
        behind.wait()
    with contextlib.suppress(OSError):
        behind.call(found.append, 2)
    assert not found


def test_the_plan_counts_what_is_on_its_way():
    sizes = {"part_nbytes": 1000, "segment_nbytes": 10, "obs_nbytes": 10}
    more = gather_peak_nbytes(**sizes, upload_nbytes=2 * uploads.UPLOAD_NBYTES) - gather_peak_nbytes(**sizes)
    assert more == 2 * uploads.UPLOAD_NBYTES
