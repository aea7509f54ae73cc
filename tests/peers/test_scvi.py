"""scvi-tools trains from our Loader, through the module it has for annbatch."""

import sys
import warnings

import dask
import numpy as np
import pytest

import annbatch_dask.samplers
from annbatch_dask import DatasetCollection, Loader

scvi = pytest.importorskip("scvi", reason="scvi-tools is no dependency")
if not hasattr(scvi.dataloaders, "AnnbatchDataModule"):
    pytest.skip("scvi-tools before 1.5 has no module for annbatch", allow_module_level=True)


@pytest.fixture(autouse=True, params=["annbatch", "ours"])
def samplers(request, monkeypatch):
    """Whose samplers the module finds under annbatch's name."""
    if request.param == "annbatch":
        pytest.importorskip("annbatch.samplers", reason="annbatch needs Python 3.12 and is no dependency")
    else:
        monkeypatch.setitem(sys.modules, "annbatch", annbatch_dask)
        monkeypatch.setitem(sys.modules, "annbatch.samplers", annbatch_dask.samplers)


@pytest.fixture
def collection(tmp_path, h5ad_pair):
    with dask.config.set(scheduler="synchronous"):
        return DatasetCollection(tmp_path / "c.zarr").add_adatas(h5ad_pair, seed=0, dataset_size=200)


def module_of(collection, **options):
    loader = Loader(batch_size=32, chunk_size=16, preload_nchunks=4, preload_to_gpu=False, dense=True, to="torch")
    loader.use_collection(collection)
    sizes = {"batch_size": 32, "chunk_size": 16, "preload_nchunks": 4}
    return scvi.dataloaders.AnnbatchDataModule(loader, batch_key="src_path", label_key="cell_type", **sizes, **options)


def test_a_model_learns_and_predicts(collection):
    scvi.settings.seed = 0
    data = module_of(collection, shuffle=True)
    assert (data.n_obs, data.n_vars, data.n_batch) == (500, 58, 2)
    model = scvi.model.SCVI(registry=data.registry, n_hidden=16, n_latent=3, gene_likelihood="nb")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scvi's and Lightning's own
        model.train(datamodule=data, max_epochs=8, accelerator="cpu", train_size=0.8, batch_size=32)
        latent = model.get_latent_representation(dataloader=data.inference_dataloader())
    losses = model.history["train_loss"].to_numpy()
    assert losses[-1] < losses[0]
    assert np.shape(latent) == (500, 3)


def test_batches_are_the_rows_of_the_collection(collection):
    data = module_of(collection)
    found = np.concatenate([batch["X"].numpy() for batch in data])
    expected = np.concatenate([batch["X"] for batch in Loader(batch_size=32, dense=True).use_collection(collection)])
    np.testing.assert_array_equal(found, expected)
