"""Lightning trains on a DataModule, and goes on in the middle of an epoch as if it had never stopped."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from annbatch_dask.samplers import ClassSampler
from tests.loader.data import N_VAR

torch = pytest.importorskip("torch")
pytestmark = [  # Lightning's own
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used:UserWarning"),
]
OPTIONS = {"batch_size": 16, "chunk_size": 4, "preload_nchunks": 8, "preload_to_gpu": False, "return_index": True}


@pytest.fixture
def parts(collection):
    """Every fifth row to validate with."""
    is_val = np.arange(len(collection.obs)) % 5 == 0
    return {"train": ~is_val, "val": is_val, "test": is_val, "predict": None}


@pytest.fixture(scope="module")
def lightning():
    """Six seconds, for the one process that runs these tests."""
    return pytest.importorskip("lightning.pytorch")


@pytest.fixture
def Model(lightning):
    class Linear(lightning.LightningModule):
        """Remembers the rows it saw."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(N_VAR, 1)
            self.seen = {"train": [], "val": [], "test": []}

        def training_step(self, batch, _number):
            self.seen["train"].append(batch["index"].tolist())
            return self.layer(batch["X"] / 250).square().mean()

        def validation_step(self, batch, _number):
            self.seen["val"] += batch["index"].tolist()

        def test_step(self, batch, _number):  # noqa: PT019
            self.seen["test"] += batch["index"].tolist()

        def predict_step(self, batch, _number):
            return self.layer(batch["X"])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    return Linear


def trainer(lightning, folder, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=2, num_sanity_val_steps=0, default_root_dir=folder, **quiet | options
    )


def data(collection, parts, **options):
    from annbatch_dask.lightning import DataModule

    return DataModule(collection, parts, dense=True, rng=3, **OPTIONS | options)


def test_it_trains_and_goes_on_in_the_middle_of_an_epoch(lightning, Model, collection, parts, tmp_path):
    each_step = lightning.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = Model()
    trainer(lightning, tmp_path, callbacks=[each_step]).fit(whole, data(collection, parts))

    rows = np.flatnonzero(parts["train"]).tolist()
    n_batches = len(whole.seen["train"]) // 2
    epochs = [sum(whole.seen["train"][k * n_batches :][:n_batches], []) for k in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == rows
    assert epochs[0] != epochs[1]
    assert whole.seen["val"] == 2 * np.flatnonzero(parts["val"]).tolist()

    # The first batch, the middle, the last batch of an epoch, and the first of the next.
    for step in (1, n_batches // 2, n_batches, n_batches + 1):
        resumed = Model()
        checkpoint = tmp_path / f"step={step}.ckpt"
        run = trainer(lightning, tmp_path, enable_checkpointing=False)
        run.fit(resumed, data(collection, parts), ckpt_path=checkpoint)
        assert resumed.seen["train"] == whole.seen["train"][step:]
        for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_it_tests_and_predicts_in_stored_order(lightning, Model, collection, parts, tmp_path):
    model, run = Model(), trainer(lightning, tmp_path, enable_checkpointing=False)
    run.test(model, data(collection, parts))
    assert model.seen["test"] == np.flatnonzero(parts["test"]).tolist()
    predicted = torch.cat(run.predict(model, data(collection, parts)))
    assert torch.allclose(predicted, model.layer(torch.from_numpy(collection.x)), rtol=1e-4)


@pytest.mark.usefixtures("lightning")
def test_ranks_are_those_of_the_trainer(collection, parts):
    def rows(part, rank):
        module = data(collection, parts)
        module.trainer = SimpleNamespace(global_rank=rank, world_size=3)
        loader = getattr(module, f"{part}_dataloader")()
        return [batch["index"].tolist() for batch in loader]

    trained = [rows("train", rank) for rank in range(3)]
    assert len({tuple(len(batch) for batch in batches) for batches in trained}) == 1
    flat = sum(sum(trained, []), [])
    assert len(flat) == len(set(flat))
    assert set(flat) <= set(np.flatnonzero(parts["train"]))
    validated = [rows("val", rank) for rank in range(3)]
    assert len({len(batches) for batches in validated}) == 1
    assert set(sum(sum(validated, []), [])) == set(np.flatnonzero(parts["val"]))
    predicted = [rows("predict", rank) for rank in range(3)]
    assert sorted(sum(sum(predicted, []), [])) == list(range(len(collection.obs)))


@pytest.mark.usefixtures("lightning")
def test_a_sampler_for_training_alone(collection):
    sampler = ClassSampler(1, 8, 8, classes=collection.obs["kind"].values, num_samples=64)
    module = data(collection, {"train": None, "val": None}, train_options={"batch_sampler": sampler})
    for batch in module.train_dataloader():
        assert batch["obs"]["kind"].nunique() == 1
    assert len(module.val_dataloader()) == -(-len(collection.obs) // 16)


@pytest.mark.usefixtures("lightning")
def test_parts_of_other_names_are_refused(collection):
    with pytest.raises(ValueError, match="named train, val, test, predict; got 'valid'"):
        data(collection, {"train": None, "valid": None})
    module = data(collection, {"train": None})
    assert module.val_dataloader() == []
    with pytest.raises(ValueError, match="no part is called 'test'; there are train"):
        module.test_dataloader()
