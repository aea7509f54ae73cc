"""What the peers' first pages show, with the import changed: the same calls on small files."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import dask
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

from annbatch_dask import DatasetCollection, Loader, ZarrSparseDataset, create_anndata_collection
from annbatch_dask.errors import CollectionError
from annbatch_dask.testing import make_adata

pytestmark = [
    pytest.mark.filterwarnings("ignore:Consolidated metadata is"),
    pytest.mark.filterwarnings("ignore:Observation names are not unique"),
]
SIZES = (300, 200)


@pytest.fixture(autouse=True)
def _in_this_process():
    with dask.config.set(scheduler="synchronous"):
        yield


@pytest.fixture(scope="module")
def with_raw(tmp_path_factory):
    """Two files as atlases have them: X normalised, counts in raw, which has more genes."""
    folder = tmp_path_factory.mktemp("raw")
    for k, n_obs in enumerate(SIZES):
        adata = make_adata(n_obs, [f"g{i}" for i in range(40 + k)], seed=k)
        raw = adata.copy()
        adata = adata[:, :30].copy()
        adata.X = adata.X.log1p()
        adata.raw = raw
        adata.obs["donor"] = pd.Categorical(np.where(np.arange(n_obs) % 3, "d1", "d2"))
        adata.write_h5ad(folder / f"human_{k}.h5ad")
    return [str(folder / f"human_{k}.h5ad") for k in range(len(SIZES))]


def raw_counts(path):
    lazy = ad.experimental.read_lazy(path)
    x, var = (lazy.raw.X, lazy.raw.var) if lazy.raw is not None else (lazy.X, lazy.var)
    return ad.AnnData(X=x, obs=lazy.obs[["cell_type"]].to_memory(), var=var.to_memory())


def one_column(group):
    return ad.AnnData(
        X=ad.io.sparse_dataset(group["X"]), obs=ad.experimental.read_lazy(group).obs[["cell_type"]].to_memory()
    )


def test_annbatchs_tutorial_of_single_cells(tmp_path, with_raw):
    collection = DatasetCollection(zarr.open(str(tmp_path / "c.zarr"), mode="w"))
    collection.add_adatas(adata_paths=with_raw, load_adata=raw_counts, shuffle=True, dataset_size=100_000)
    assert len(list(collection)) == 1
    loader = Loader(batch_size=4096, chunk_size=512, preload_nchunks=32, preload_to_gpu=False)
    loader = loader.use_collection(collection, load_adata=one_column)
    batches = list(loader)
    assert sum(b["X"].shape[0] for b in batches) == loader.n_obs == 500
    assert batches[0]["X"].shape[1] == 41  # of raw
    assert batches[0]["obs"].columns.tolist() == ["cell_type"]
    total = sum(float(ad.read_h5ad(path).raw.X.sum()) for path in with_raw)
    assert sum(float(b["X"].sum()) for b in batches) == total
    assert collection.obs(columns=["cell_type"]).shape[0] == 500

    with pytest.warns(UserWarning, match=r"human_0\.h5ad is in .* already, with 300 cells, and is added again"):
        collection.add_adatas(adata_paths=with_raw[:1], load_adata=raw_counts)
    assert collection.obs(columns=["cell_type"]).shape[0] == 800
    assert collection.obs(columns=["src_path"])["src_path"].value_counts().to_dict() == {
        with_raw[0]: 600,
        with_raw[1]: 200,
    }
    collection.add_adatas(adata_paths=with_raw[:1], load_adata=raw_counts)  # the very same call again: it is done
    assert collection.n_obs == 800
    with pytest.raises(CollectionError, match=r"already, with 600 cells; leave it out"):
        collection.add_adatas(with_raw[:1], load_adata=raw_counts, seed=1, on_duplicate_source="error")
    assert collection.n_obs == 800


def test_annbatchs_readme(tmp_path, with_raw):
    collection = DatasetCollection(str(tmp_path / "collection.zarr"))
    collection.add_adatas(adata_paths=with_raw, shuffle=True)

    def only_labels(group):
        return ad.AnnData(X=ad.io.sparse_dataset(group["X"]), obs=ad.io.read_elem(group["obs"])[["cell_type"]])

    collection = DatasetCollection(str(tmp_path / "collection.zarr"))
    with ad.settings.override(remove_unused_categories=False):
        loader = Loader(batch_size=4096, chunk_size=32, preload_nchunks=256, preload_to_gpu=False)
        loader = loader.use_collection(collection, load_adata=only_labels)
    (batch,) = loader
    assert batch["X"].shape == (500, 30)
    assert batch["obs"]["cell_type"].cat.categories.tolist() == ["B", "NK", "T", "mono"]


@pytest.mark.parametrize("to_torch", [False, True])
def test_annbatchs_older_page(tmp_path, with_raw, to_torch):
    """Any number of datasets, found by a glob, and two columns of labels."""
    if to_torch:
        pytest.importorskip("torch")
    output = tmp_path / "older"
    with pytest.warns(UserWarning, match="suffix"):
        create_anndata_collection(adata_paths=with_raw, output_path=output, shuffle=True, dataset_size=200)
    paths = sorted(Path(output).glob("*.zarr"))
    assert len(paths) == 3
    dataset = ZarrSparseDataset(
        batch_size=4096, chunk_size=32, preload_nchunks=256, preload_to_gpu=False, to_torch=to_torch
    ).add_anndatas(
        [
            ad.AnnData(
                X=ad.io.sparse_dataset(zarr.open(path)["X"]),
                obs=ad.io.read_elem(zarr.open(path)["obs"]),
            )
            for path in paths
        ],
        obs_keys=["cell_type", "donor"],
    )
    ((x, labels),) = dataset
    assert tuple(x.shape) == (500, 30)
    assert labels.columns.tolist() == ["cell_type", "donor"]
    want = pd.concat([ad.read_h5ad(path).obs[["cell_type", "donor"]] for path in with_raw])
    pd.testing.assert_series_equal(labels.value_counts(), want.value_counts())
    assert len(dataset) == 500
    collection = DatasetCollection(zarr.open(output))
    collection.verify()
    with pytest.warns(UserWarning, match="added again"):
        collection.add_adatas(with_raw[1:], seed=3)
    collection.gc()
    assert collection.n_obs == 700
    assert not list(Path(output).glob("*.zarr"))  # of datasets that are no more


def test_annbatchs_ranks_as_its_tutorial_has_them(tmp_path):
    """A function that says which rank, a Loader for each: as many batches, no row twice."""
    from annbatch_dask.samplers import DistributedSampler, RandomSampler

    x = sp.random(2000, 256, density=0.1, format="lil", dtype="float32", random_state=0)
    x[:, 0] = np.arange(2000)[:, None] + 1
    adata = ad.AnnData(X=sp.csr_matrix(x), var=pd.DataFrame(index=[f"gene_{i}" for i in range(256)]))
    adata.write_h5ad(tmp_path / "synthetic.h5ad")
    DatasetCollection(zarr.open(str(tmp_path / "ddp.zarr"), mode="w")).add_adatas(
        adata_paths=[str(tmp_path / "synthetic.h5ad")], shuffle=True, dataset_size=1000
    )
    collection = DatasetCollection(zarr.open(str(tmp_path / "ddp.zarr"), mode="r"))
    rows = []
    for rank in range(2):
        sampler = DistributedSampler(
            RandomSampler(chunk_size=64, preload_nchunks=8, batch_size=64), dist_info=lambda rank=rank: (rank, 2)
        )
        loader = Loader(batch_sampler=sampler, preload_to_gpu=False).use_collection(
            collection, load_adata=lambda group: ad.AnnData(X=ad.io.sparse_dataset(group["X"]))
        )
        batches = list(loader)
        assert len(batches) == len(loader) == 15
        rows += [row for batch in batches for row in batch["X"][:, 0].toarray().ravel().tolist()]
    assert len(rows) == len(set(rows)) == 2 * 15 * 64
