"""Lightning trains on a DataModule, and goes on in the middle of an epoch as if it had never stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from annbatch_dask.samplers import ClassSampler
from tests.loader.data import N_VAR

torch = pytest.importorskip("torch")
pytestmark = [  # Lightning's own
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The `srun` command is available on your system:UserWarning"),
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
    usual = {"max_epochs": 2, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(
        accelerator="cpu", devices=1, num_sanity_val_steps=0, default_root_dir=folder, **usual | options
    )


def data(collection, parts, **options):
    from annbatch_dask.lightning import DataModule

    return DataModule(collection, parts, dense=True, seed=3, **OPTIONS | options)


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


def test_epochs_that_lightning_cuts_short_go_on_as_well(lightning, Model, collection, parts, tmp_path):
    """With ``limit_train_batches`` an epoch is over before the loader's is."""
    cut = {"limit_train_batches": 4, "limit_val_batches": 0, "max_epochs": 3}
    each_step = lightning.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    whole = Model()
    trainer(lightning, tmp_path, callbacks=[each_step], **cut).fit(whole, data(collection, parts))
    assert len(whole.seen["train"]) == 12
    for step in (2, 4, 6):
        resumed, run = Model(), trainer(lightning, tmp_path, enable_checkpointing=False, **cut)
        run.fit(resumed, data(collection, parts), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert resumed.seen["train"] == whole.seen["train"][step:]


# The imports take longer than all the rest: one process makes them, the ranks are forked from it.
TWO_RANKS = """
import json, multiprocessing, os, sys
from types import SimpleNamespace
from pathlib import Path

import lightning.pytorch as lightning
import torch
import torch.distributed as dist
import zarr
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

from annbatch_dask.lightning import DataModule

folder, path = Path(sys.argv[1]), sys.argv[2]


class Collection:
    is_empty = False

    def __iter__(self):
        group = zarr.open_group(path, mode="r")
        return (group[name] for name in sorted(group.keys()))


class Model(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(23, 1)
        self.seen = []

    def training_step(self, batch, _):
        self.seen.append(batch["index"].tolist())
        return self.layer(batch["X"] / 250).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def module():
    return DataModule(
        Collection(), {"train": None}, batch_size=16, chunk_size=4, preload_nchunks=8, dense=True, seed=3,
        preload_to_gpu=False, return_index=True,
    )


def train(rank, name, checkpoint):
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet_{name}", rank=rank, world_size=2)
    model, save = Model(), ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)
    run = lightning.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, callbacks=[] if checkpoint else [save],
        default_root_dir=folder, enable_checkpointing=not checkpoint, logger=False, enable_progress_bar=False,
        enable_model_summary=False,
    )
    run.fit(model, module(), ckpt_path=checkpoint)
    (folder / f"{name}_{rank}.json").write_text(json.dumps(model.seen))
    if checkpoint is None:  # the two hold parts of one model
        strategy, peer = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2), module()
        names = ("data_parallel", "tensor_parallel")
        strategy._device_mesh = dist.device_mesh.init_device_mesh("cpu", (1, 2), mesh_dim_names=names)
        peer.trainer = SimpleNamespace(distributed_sampler_kwargs=strategy.distributed_sampler_kwargs)
        found = [batch["index"].tolist() for batch in peer.train_dataloader()]
        (folder / f"peers_{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


for name, checkpoint in (("whole", None), ("from_2", folder / "step=2.ckpt"), ("from_8", folder / "step=8.ckpt")):
    start = multiprocessing.get_context("fork").Process
    ranks = [start(target=train, args=(rank, name, checkpoint)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0], name
"""


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("lightning")
def test_two_ranks_go_on_from_one_checkpoint(collection, tmp_path):
    """Lightning saves the state of rank 0 alone, and hands it to both."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TWO_RANKS, str(tmp_path), str(collection.path)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]

    def written(name):
        return [json.loads((tmp_path / f"{name}_{rank}.json").read_text()) for rank in range(2)]

    whole = written("whole")
    assert [len(seen) for seen in whole] == [12, 12]
    for epoch in (slice(0, 6), slice(6, 12)):
        rows = [row for seen in whole for batch in seen[epoch] for row in batch]
        assert len(set(rows)) == len(rows) == 2 * 6 * 16
    for step in (2, 8):
        assert written(f"from_{step}") == [seen[step:] for seen in whole]
    peers = written("peers")
    assert peers[0] == peers[1]
    assert sorted(row for batch in peers[0] for row in batch) == list(range(221))


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
        module.trainer = SimpleNamespace(distributed_sampler_kwargs={"rank": rank, "num_replicas": 3})
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
