"""pipelines/train_classifier.py: what the order of batches does to a model."""

import re
import socket
import subprocess
import sys
from functools import partial

import dask
import numpy as np
import pytest

from annbatch_dask import DatasetCollection
from annbatch_dask.testing import make_adata

pytest.importorskip("torch", reason="torch is not installed")
import train_classifier  # noqa: E402


@pytest.fixture
def run(monkeypatch, call):
    """Run the script in this process, with steps for an atlas a tenth as large."""
    monkeypatch.setattr(train_classifier, "BATCH_SIZE", 30)
    monkeypatch.setattr(train_classifier, "LEARNING_RATE", 0.01)
    return partial(call, train_classifier)


def accuracies(text):
    return [float(found) for found in re.findall(r"accuracy ([\d.]+) on", text)]


def test_the_loader_is_as_good_as_memory_and_a_stream_in_order_is_not(atlas, run, capsys):
    picture = atlas / "accuracy.png"
    options = ("--against", atlas / "in_order.zarr", "--plot", picture)
    assert run(atlas / "shuffled.zarr", "cell_type", *options) == 0
    in_memory, shuffled, in_order = accuracies(capsys.readouterr().out)
    assert in_memory > 0.8
    assert shuffled > in_memory - 0.03
    assert in_order < in_memory - 0.3
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_all_three_learn_from_the_same_cells_and_none_that_is_held_out(atlas):
    collection, ordered = (DatasetCollection(atlas / f"{name}.zarr", mode="r") for name in ("shuffled", "in_order"))
    held_out = train_classifier.hold_out(collection, "cell_type")
    learnt = [
        set(c.obs(columns=["cell_type"]).index[train_classifier.learnt_from(c, "cell_type", held_out)])
        for c in (collection, ordered)
    ]
    assert learnt[0] == learnt[1]
    assert len(learnt[0]) == 3500 - len(held_out.names) == 3150
    assert not learnt[0] & set(held_out.names)


def test_batches_in_memory_are_those_of_the_loader_but_for_their_order(atlas):
    ordered = DatasetCollection(atlas / "in_order.zarr", mode="r")
    held_out = train_classifier.hold_out(ordered, "cell_type")
    sums = [
        np.sort(np.concatenate([batch["X"].sum(1).numpy() for batch in make(ordered, "cell_type", held_out)]))
        for make in (train_classifier.in_order, train_classifier.in_memory)
    ]
    np.testing.assert_allclose(*sums, rtol=1e-4)


def test_collections_of_other_classes_are_refused(atlas, run, tmp_path, h5ad_pair):
    with dask.config.set(scheduler="synchronous"):
        other = DatasetCollection(tmp_path / "other.zarr").add_adatas(h5ad_pair, seed=0)
    with pytest.raises(SystemExit, match="its genes or values of cell_type differ"):
        run(atlas / "shuffled.zarr", "cell_type", "--against", other.path)


def test_one_process_of_torchrun(atlas, run, capsys, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    assert run(atlas / "shuffled.zarr", "cell_type", "--distributed") == 0
    (accuracy,) = accuracies(capsys.readouterr().out)
    assert accuracy > 0.8


@pytest.mark.chaos  # starts four interpreters
def test_three_processes_of_torchrun(atlas):
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "3",
        train_classifier.__file__,
    ]
    done = subprocess.run(
        [sys.executable, *command, atlas / "shuffled.zarr", "cell_type", "--distributed"],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(accuracies(done.stdout)) == 1  # of rank 0
    assert "after 3,150 cells" in done.stdout


def test_fractions_are_no_classes(run, tmp_path):
    adata = make_adata(60, [f"gene_{g}" for g in range(20)], seed=0)
    adata.obs["share"] = np.linspace(0, 1, 60)
    adata.write_h5ad(tmp_path / "a.h5ad")
    with dask.config.set(scheduler="synchronous"):
        DatasetCollection(tmp_path / "o.zarr").add_adatas([tmp_path / "a.h5ad"])
    with pytest.raises(SystemExit, match="share of obs holds fractions, which are no classes"):
        run(tmp_path / "o.zarr", "share")
