"""pipelines/train_vae.py: it learns, and goes on in the middle of an epoch as if nothing had happened."""

import re
from functools import partial

import dask
import numpy as np
import pytest

from annbatch_dask import DatasetCollection
from annbatch_dask.testing import make_adata

torch = pytest.importorskip("torch", reason="torch is not installed")
import train_vae  # noqa: E402


@pytest.fixture
def run(monkeypatch, call):
    """Run the script in this process on the small atlas: 25 batches an epoch, saved after every fourth."""
    for name, value in {"BATCH_SIZE": 128, "LEARNING_RATE": 5e-3, "SAVE_EVERY": 4, "N_HIDDEN": 32}.items():
        monkeypatch.setattr(train_vae, name, value)
    return partial(call, train_vae)


@pytest.fixture
def learnt(monkeypatch):
    """The depths of the cells of each batch that a model learns from."""
    batches, learn = [], train_vae.Training.learn

    def record(self, X):
        batches.append(X.sum(1).numpy())
        if len(batches) == record.stop_after:
            raise KeyboardInterrupt
        learn(self, X)

    record.stop_after = None
    monkeypatch.setattr(train_vae.Training, "learn", record)
    record.batches = batches
    return record


def test_the_elbo_of_cells_held_out_improves_with_each_epoch(atlas, run, capsys):
    picture = atlas / "latent.png"
    assert run(atlas / "shuffled.zarr", "cell_type", "--epochs", 4, "--genes", 300, "--plot", picture) == 0
    found = re.findall(r"ELBO a cell (\S+), held out (\S+)", capsys.readouterr().out)
    learnt, held_out = np.array(found, float).T
    assert len(held_out) == 4
    assert (np.diff(held_out) > 0).all()
    assert learnt[-1] > learnt[0]
    assert held_out[-1] == pytest.approx(learnt[-1], rel=0.05)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_run_that_is_interrupted_goes_on_with_the_same_batches_to_the_same_model(
    atlas, tmp_path, run, learnt, capsys
):
    options = (atlas / "shuffled.zarr", "cell_type", "--epochs", 2, "--genes", 100, "--state")
    run(*options, tmp_path / "whole.pt")
    whole = learnt.batches.copy()
    n_epoch = len(whole) // 2

    learnt.batches.clear()
    learnt.stop_after = n_epoch + 7  # in the second epoch, between two saves
    with pytest.raises(KeyboardInterrupt):
        run(*options, tmp_path / "stopped.pt")
    learnt.batches.clear()
    learnt.stop_after = None
    run(*options, tmp_path / "stopped.pt")

    n_saved = (n_epoch + 6) // 4 * 4
    assert n_saved > n_epoch
    assert f"going on in epoch 2, after {n_saved} batches" in capsys.readouterr().out
    assert [b.tolist() for b in learnt.batches] == [b.tolist() for b in whole[n_saved:]]
    models = [torch.load(tmp_path / name)["model"] for name in ("whole.pt", "stopped.pt")]
    for name, values in models[0].items():
        torch.testing.assert_close(models[1][name], values, rtol=0, atol=0)


def test_a_state_of_as_many_epochs_says_that_nothing_is_left(atlas, tmp_path, run, capsys):
    options = (atlas / "shuffled.zarr", "cell_type", "--genes", 50, "--state", tmp_path / "state.pt", "--epochs")
    run(*options, 2)
    capsys.readouterr()
    assert run(*options, 1) == 0
    assert (
        capsys.readouterr().out
        == f"{tmp_path}/state.pt has 2 epochs already; to go on, give --epochs a number above that\n"
    )


def test_a_state_of_other_genes_is_refused(atlas, tmp_path, run):
    options = (atlas / "shuffled.zarr", "cell_type", "--epochs", 1, "--state", tmp_path / "s.pt")
    run(*options, "--genes", 50)
    with pytest.raises(SystemExit, match=r"^train_vae: --genes is 40, and .*s.pt has a model of 50; leave out one"):
        run(*options, "--genes", 40)
    assert run(*options) == 0


def test_dense_counts_are_learnt_from(tmp_path, run, capsys):
    adata = make_adata(200, [f"gene_{g}" for g in range(20)], seed=0)
    adata.X = adata.X.toarray()
    adata.write_h5ad(tmp_path / "a.h5ad")
    with dask.config.set(scheduler="synchronous"):
        DatasetCollection(tmp_path / "dense.zarr").add_adatas([tmp_path / "a.h5ad"], seed=0)
    assert run(tmp_path / "dense.zarr", "cell_type", "--epochs", 1) == 0
    assert "epoch   1: ELBO a cell" in capsys.readouterr().out


def test_what_is_no_count_is_refused(tmp_path, run):
    adata = make_adata(200, [f"gene_{g}" for g in range(20)], seed=0)
    adata.X = adata.X / 2
    adata.write_h5ad(tmp_path / "a.h5ad")
    with dask.config.set(scheduler="synchronous"):
        DatasetCollection(tmp_path / "halves.zarr").add_adatas([tmp_path / "a.h5ad"], seed=0)
    with pytest.raises(SystemExit, match="holds fractions, and the likelihood is one of counts"):
        run(tmp_path / "halves.zarr", "cell_type")
