"""pipelines/pretrain_tokens.py: it knows more than the genes' frequencies, and goes on as if nothing had happened."""

import json
import re
from functools import partial

import numpy as np
import pytest

from annbatch_dask import DatasetCollection

torch = pytest.importorskip("torch", reason="torch is not installed")
import pretrain_tokens  # noqa: E402


@pytest.fixture
def run(monkeypatch, call):
    """Run the script in this process on the small atlas: 25 batches an epoch, saved after every fourth."""
    small = {"BATCH_SIZE": 128, "MAX_LENGTH": 48, "LEARNING_RATE": 5e-3, "SAVE_EVERY": 4, "N_DIMS": 32, "N_LAYERS": 1}
    for name, value in small.items():
        monkeypatch.setattr(pretrain_tokens, name, value)
    return partial(call, pretrain_tokens)


@pytest.fixture
def learnt(monkeypatch):
    """The tokens of each batch that a model learns from."""
    batches, learn = [], pretrain_tokens.Training.learn

    def record(self, X):
        batches.append(X["input_ids"].tolist())
        if len(batches) == record.stop_after:
            raise KeyboardInterrupt
        learn(self, X)

    record.stop_after = None
    monkeypatch.setattr(pretrain_tokens.Training, "learn", record)
    record.batches = batches
    return record


def test_it_beats_unigrams_on_cells_held_out(atlas, run, capsys):
    assert run(atlas / "shuffled.zarr", "--epochs", 4) == 0
    found = re.findall(r"held out (\S+), unigrams (\S+)", capsys.readouterr().out)
    held_out, unigrams = np.array([[float(text) for text in pair] for pair in found]).T
    assert len(held_out) == 4
    assert len(set(unigrams)) == 1
    assert held_out[-1] < unigrams[-1] - 0.01
    assert held_out[-1] < held_out[0]


def test_a_run_that_is_interrupted_goes_on_with_the_same_batches_to_the_same_model(
    atlas, tmp_path, run, learnt, capsys
):
    options = (atlas / "shuffled.zarr", "--epochs", 2, "--state")
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

    assert "going on in epoch 2, after 4 of its batches" in capsys.readouterr().out
    assert learnt.batches == whole[n_epoch + 4 :]
    models = [torch.load(tmp_path / name)["model"] for name in ("whole.pt", "stopped.pt")]
    for name, values in models[0].items():
        torch.testing.assert_close(models[1][name], values, rtol=0, atol=0)


def test_tables_of_others_are_taken(atlas, tmp_path, run):
    genes = DatasetCollection(atlas / "shuffled.zarr", mode="r").var.index[:400]
    table = tmp_path / "tokens.json"
    table.write_text(json.dumps({"<pad>": 0} | {gene: n + 2 for n, gene in enumerate(genes)}))
    (tmp_path / "medians.csv").write_text("".join(f"{gene},1.5\n" for gene in genes))
    options = ("--vocabulary", table, "--medians", tmp_path / "medians.csv", "--epochs", 1)
    with pytest.raises(SystemExit, match="the vocabulary has no token <mask>"):
        run(atlas / "shuffled.zarr", *options)
    table.write_text(json.dumps(json.loads(table.read_text()) | {"<mask>": 1}))
    options += ("--state", tmp_path / "s.pt")
    assert run(atlas / "shuffled.zarr", *options) == 0
    assert run(atlas / "shuffled.zarr", *options) == 0  # the state is of these
    (tmp_path / "medians.csv").write_text("".join(f"{gene},2.5\n" for gene in genes))
    with pytest.raises(SystemExit, match=r"s.pt is of another vocabulary or other medians; give these, or none"):
        run(atlas / "shuffled.zarr", *options)
