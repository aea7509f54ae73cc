import sys

import pytest

from annbatch_dask.events import BuildEnd, BuildStart, StageEnd, StageStart, TaskEnd
from annbatch_dask.formatting import first_few, format_bytes
from annbatch_dask.progress import ProgressBars, default_callbacks


def test_a_bar_per_stage_with_cells_bytes_and_the_dashboard(capsys):
    bars = ProgressBars()
    bars.on_build_start(BuildStart("out.zarr", "a local cluster", "http://here:8787/status"))
    bars.on_stage_start(StageStart("scatter", 2, 3000, 4_000_000))
    bars.on_task_end(TaskEnd("scatter", 0, 1000, 2_000_000))
    bars.on_task_end(TaskEnd("scatter", 1, 2000, 2_000_000, reused=True))
    bars.on_stage_end(StageEnd("scatter", 1.0))
    bars.on_stage_start(StageStart("commit", 1, 0, 0))
    bars.on_task_end(TaskEnd("commit", 0, 0, 0))
    bars.on_build_end(BuildEnd(None))
    out, err = capsys.readouterr()
    assert out == ""
    assert "building on a local cluster" in err
    assert "http://here:8787/status" in err
    assert "3.00k/3.00k" in err
    assert "4.0 MB of 4.0 MB" in err
    assert "commit" in err
    assert "1/1" in err


def test_a_failed_build_leaves_no_bar_open(capsys):
    bars = ProgressBars()
    bars.on_stage_start(StageStart("gather", 3, 30, 0))
    bars.on_build_end(BuildEnd(RuntimeError()))
    bars.on_task_end(TaskEnd("gather", 0, 10, 10))
    err = capsys.readouterr().err
    assert "gather" in err
    assert "10.0/30.0" not in err


def test_bars_are_shown_on_a_terminal_or_on_request(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    assert default_callbacks(progress=None) == []
    assert default_callbacks(progress=False) == []
    assert isinstance(default_callbacks(progress=True)[0], ProgressBars)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert isinstance(default_callbacks(progress=None)[0], ProgressBars)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1536, "1.5 kB"),
        (99_960, "100 kB"),
        (999_600, "1.0 MB"),
        (2.5e9, "2.5 GB"),
        (5e18, "5000 PB"),
    ],
)
def test_sizes_in_words(n_bytes, text):
    assert format_bytes(n_bytes) == text


@pytest.mark.parametrize(("n", "text"), [(0, ""), (1, "0"), (3, "0; 1; 2"), (4, "0; 1; 2; ...")])
def test_the_first_few_of_many_words_are_listed(n, text):
    assert first_few(map(str, range(n)), 3, "; ") == text


def test_a_process_without_standard_error_builds_without_bars(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert default_callbacks(progress=None) == []
