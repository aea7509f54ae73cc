"""scvi-tools trains from our Loader, through the module it has for annbatch.

Skipped without scvi-tools; ``python tests/peers/upstream.py scvi-tools`` brings it, and runs these after its own.
"""

import inspect
import sys
import warnings

import anndata as ad
import dask
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

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


ALL_MODELS = [
    getattr(module, name)
    for module in (scvi.model, scvi.external)
    for name in module.__all__
    if hasattr(getattr(module, name), "setup_annbatch")
]
WITH_REGISTRY = [model for model in ALL_MODELS if "registry" in inspect.signature(model.__init__).parameters]
# Of those that have differential_expression, SCAR's and SysVI's fail with any data module, and MRVI's takes none.
TESTS_GENES = {"SCVI", "LinearSCVI", "AUTOZI", "SCANVI"}
OPTIONS = {"SCAR": {"ambient_profile": np.full((1, 20), 0.05)}, "SysVI": {"prior": "standard_normal"}}


def cells(k, n_obs=160):
    """Counts of one kind of cell in two batches, as a model wants them."""
    rng = np.random.default_rng(k)
    obs = pd.DataFrame({"labels": f"label_{k}", "batch": np.where(np.arange(n_obs) % 2, "b1", "b0")})
    obs["donor"] = [f"d{i % 4}" for i in range(n_obs)]
    obs.index = [f"cell_{k}_{i}" for i in range(n_obs)]
    x = rng.negative_binomial(5, 0.3, (n_obs, 20)).astype(np.float32)
    return ad.AnnData(sp.csr_matrix(x), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(20)]))


def set_up(model, source, folder, **options):
    sizes = {"batch_size": 32, "chunk_size": 16, "preload_nchunks": 4, "preload_to_gpu": False, "dataset_size": 200}
    keys = {"batch_key": "batch", "labels_key": "labels", "sample_key": "donor"}
    if source == "memory":
        return model.setup_annbatch(adatas=[cells(0), cells(1)], **keys, **sizes)
    paths = [folder / f"{k}.h5ad" for k in range(2)]
    for k, path in enumerate(paths):
        cells(k).write_h5ad(path)
    paths = [str(path) for path in paths]
    return model.setup_annbatch(collection_path=str(folder / "c.zarr"), paths=paths, **keys, **sizes, **options)


def new_model(kind, data):
    more = {"datamodule": data, "encode_covariates": False} if kind is scvi.model.SCANVI else {}
    return kind(registry=data.registry, **more, **OPTIONS.get(kind.__name__, {}))


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("source", ["paths", "class sampler", "memory"])
@pytest.mark.parametrize("kind", WITH_REGISTRY, ids=lambda kind: kind.__name__)
def test_each_model_trains_tests_saves_and_loads(tmp_path, kind, source):
    if source == "class sampler":
        data = set_up(kind, source, tmp_path, use_class_sampler=True)
    else:
        data = set_up(kind, source, tmp_path)
    assert (data.n_obs, data.n_vars, data.n_batch) == (320, 20, 2)
    model = new_model(kind, data)
    model.train(max_epochs=1, datamodule=data, accelerator="cpu", train_size=None)
    rows = data.inference_dataloader()
    latent = model.get_latent_representation(dataloader=rows)
    assert np.shape(latent)[0] == 320
    if kind.__name__ in TESTS_GENES:
        found = model.differential_expression(
            dataloader=data.inference_dataloader(),
            groupby="labels",
            group1="label_0",
            group2="label_1",
            mode="vanilla",
            silent=True,
        )
        assert len(found) == 20
    model.save(str(tmp_path / "model"), overwrite=True, datamodule=data)
    loaded = kind.load(str(tmp_path / "model"), adata=False)
    again = loaded.get_latent_representation(dataloader=data.inference_dataloader())
    assert np.shape(again) == np.shape(latent)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("source", ["paths", "memory"])
@pytest.mark.parametrize(
    "kind", [kind for kind in ALL_MODELS if kind not in WITH_REGISTRY], ids=lambda kind: kind.__name__
)
def test_models_that_take_no_registry_get_their_rows(tmp_path, kind, source):
    data = set_up(kind, source, tmp_path)
    batches = list(data)
    assert sum(len(batch["X"]) for batch in batches) == 320
    total = sum(float(batch["X"].sum()) for batch in batches)
    assert total == sum(float(cells(k).X.sum()) for k in range(2))
