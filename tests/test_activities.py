"""Seconds by activity: they add up, nest, and cost nothing where nobody measures."""

import threading
from types import SimpleNamespace

import pytest

from annbatch_dask import activities
from annbatch_dask.activities import activity, during, measured


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(s=0.0)
    monkeypatch.setattr(activities, "perf_counter", lambda: now.s)
    return now


def test_what_is_inside_counts_once(clock):
    with measured() as spent:
        with activity("read"):
            clock.s += 1
            with activity("inflate"):
                clock.s += 2
            with activity("read"):
                clock.s += 4
        clock.s += 8
    assert spent == {"inflate": 2, "read": 5}


def test_an_error_ends_an_activity(clock):
    with measured() as spent, pytest.raises(KeyError), activity("read"):
        clock.s += 1
        raise KeyError
    assert spent == {"read": 1}


def test_an_iterator_is_waited_for(clock):
    def items():
        for i in range(3):
            clock.s += 1
            yield i

    with measured() as spent:
        for _ in during("wait", items()):
            clock.s += 10
    assert spent == {"wait": 3}


def test_nobody_measures_outside_or_in_another_thread(clock):
    def work():
        with activity("encode"):
            clock.s += 1

    work()
    with measured() as spent:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert spent == {}
