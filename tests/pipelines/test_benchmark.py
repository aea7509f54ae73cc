"""pipelines/benchmark.py: figures of one's own files and collections, beside annbatch's."""

import re
import sys
from functools import partial

import benchmark
import dask
import pytest


@pytest.fixture
def run(monkeypatch, call):
    """Run the script in this process, without a cluster, in batches for an atlas a tenth as large."""
    monkeypatch.setattr(benchmark, "SIZES", {"batch_size": 256, "chunk_size": 32, "preload_nchunks": 32})
    with dask.config.set(scheduler="synchronous"):
        yield partial(call, benchmark)


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "annbatch", None)


def figures(text):
    """Numbers before each range, by row of the table."""
    rows = re.findall(r"^(\S.*?)  +(.*\(.*)$", text, re.MULTILINE)
    return {what: [float(n.replace(",", "")) for n in re.findall(r"([\d.,]+) \(", rest)] for what, rest in rows}


ROWS = [
    "CSR batches, cells/s",
    "entropy of batches",
    "dense float32 batches, cells/s",
    "dense batches of 2,000 genes, cells/s",
]


def test_files_are_shuffled_and_streamed(atlas, run, alone, tmp_path, capsys):
    files = sorted((atlas / "files").glob("*.h5ad"))
    assert run(*files, "--work", tmp_path, "--repeats", 1) == 0
    shown = capsys.readouterr().out
    assert "annbatch is left out" in shown
    assert "3,500 cells x" in shown
    found = figures(shown)
    assert list(found) == ["shuffle, s", *ROWS]
    assert all(len(values) == 1 and values[0] > 0 for values in found.values())
    assert found["entropy of batches"][0] == pytest.approx(1, abs=0.02)
    assert not list(tmp_path.iterdir())


def test_a_collection_is_streamed_and_its_order_judged(atlas, run, alone, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "SIZES", {"batch_size": 256, "chunk_size": 256, "preload_nchunks": 1})
    assert run(atlas / "in_order.zarr", "--work", tmp_path, "--repeats", 2) == 0
    found = figures(capsys.readouterr().out)
    assert list(found) == ROWS
    assert found["entropy of batches"][0] < 0.7


def test_annbatch_does_the_same_beside_us(atlas, run, tmp_path, capsys):
    pytest.importorskip("annbatch", reason="annbatch needs Python 3.12 and is no dependency")
    files = sorted((atlas / "files").glob("*.h5ad"))
    assert run(*files, "--work", tmp_path, "--repeats", 1) == 0
    shown = capsys.readouterr().out
    assert "times better" in shown
    found = figures(shown)
    assert list(found) == ["shuffle, s", *ROWS]
    assert all(len(values) == 2 and min(values) > 0 for values in found.values())


def test_a_column_that_is_not_there_is_named(atlas, run, alone, tmp_path):
    with pytest.raises(SystemExit, match="no column 'colour'; give --by one of: cell_type"):
        run(atlas / "shuffled.zarr", "--by", "colour", "--work", tmp_path)
