"""What the peers' first pages show, with the import changed: the same calls on small files."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

from annbatch_dask import DatasetCollection, Loader, ZarrSparseDataset, create_anndata_collection
from annbatch_dask.errors import CollectionError, SourceError
from annbatch_dask.testing import make_adata
from tests.loader.data import quiet

pytestmark = [
    pytest.mark.usefixtures("in_this_process"),
    pytest.mark.filterwarnings("ignore:Consolidated metadata is"),
    pytest.mark.filterwarnings("ignore:Observation names are not unique"),
]
SIZES = (300, 200)


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


def test_annbatchs_images(tmp_path):
    """Images in obsm of cells that have no genes and no X, from files that are no AnnData."""
    paths = [str(tmp_path / f"cells_{k}.h5sc") for k in range(2)]
    for k, path in enumerate(paths):
        images = np.full((30, 5, 8, 8), 0.5, np.float16)
        images[:, 0, 0, 0] = np.arange(30) + 30 * k
        with h5py.File(path, "w") as file:
            ids = pd.DataFrame({"id": np.arange(30) + 30 * k}, index=[str(i) for i in range(30)])
            ad.io.write_elem(file, "obs", ids)
            ad.io.write_elem(file.create_group("obsm"), "single_cell_images", images)

    def load_images(path):
        file = h5py.File(path, "r")
        obs = ad.io.read_elem(file["obs"])
        images = ad.experimental.read_elem_lazy(file["obsm"]["single_cell_images"], chunks=(16, -1, -1, -1))
        obs.index = f"{Path(path).stem}_" + obs.index.astype(str)
        return ad.AnnData(obs=obs, obsm={"single_cell_images": images})

    collection = DatasetCollection(zarr.open(str(tmp_path / "images.zarr"), mode="w"))
    collection.add_adatas(
        adata_paths=paths, load_adata=load_images, shuffle=True, n_obs_per_chunk=16, dataset_size=100_000
    )
    assert len(list(collection)) == 1
    loader = Loader(batch_size=16, chunk_size=8, preload_nchunks=32, preload_to_gpu=False).add_datasets(
        datasets=[group["obsm"]["single_cell_images"] for group in collection],
        obs=[ad.io.read_elem(group["obs"]) for group in collection],
    )
    batches = list(loader)
    assert [batch["X"].shape for batch in batches] == [(n, 5, 8, 8) for n in (16, 16, 16, 12)]
    for batch in batches:
        assert batch["X"].dtype == np.float16
        assert batch["X"][:, 0, 0, 0].tolist() == batch["obs"]["id"].tolist()
    assert sorted(i for batch in batches for i in batch["obs"]["id"]) == list(range(60))
    collection.verify()


@pytest.mark.parametrize("form", ["h5ad", "zarr"])
def test_files_without_genes_need_no_x(tmp_path, form):
    """The same from files, with no load_adata; what has genes and no X is refused still (tests/etl/test_bad_input)."""
    obs = pd.DataFrame({"id": np.arange(40)}, index=[f"c{i}" for i in range(40)])
    adata = ad.AnnData(obs=obs, obsm={"embedding": np.arange(120, dtype=np.float32).reshape(40, 3)})
    path = tmp_path / f"a.{form}"
    with quiet():
        getattr(adata, f"write_{form}")(path)
    collection = DatasetCollection(tmp_path / "c.zarr").add_adatas([path], seed=0, dataset_size=25)
    assert (collection.n_obs, collection.n_var) == (40, 0)
    loader = Loader(batch_size=8, chunk_size=4, preload_nchunks=4, preload_to_gpu=False, obsm=["embedding"])
    for batch in loader.use_collection(collection):
        assert batch["X"].shape == (8, 0)
        np.testing.assert_array_equal(batch["obsm"]["embedding"][:, 0], batch["obs"]["id"] * 3)


def test_annbatchs_genetics(tmp_path):
    """Genotypes of one byte, whose names load_adata makes from columns."""
    rng = np.random.default_rng(0)
    adata = ad.AnnData(
        sp.csr_matrix((rng.random((300, 500)) < 0.01).astype(np.int8)),
        obs=pd.DataFrame({"iid": np.arange(300) + 1000}, index=[str(i) for i in range(300)]),
    )
    adata.var["2"] = [f"22:{i}:A:C" for i in range(500)]
    with quiet():
        adata.write_zarr(tmp_path / "rare.zarr")

    def load_genotypes(path):
        a = ad.read_zarr(path)
        a.obs = a.obs[["iid"]].astype({"iid": "str"}).set_index("iid")
        a.var = pd.DataFrame(index=a.var["2"].astype("str").to_numpy())
        return a

    collection = DatasetCollection(zarr.open(str(tmp_path / "genetics.zarr"), mode="w"))
    collection.add_adatas(adata_paths=[str(tmp_path / "rare.zarr")], load_adata=load_genotypes, shuffle=True)
    loader = Loader(batch_size=512, chunk_size=64, preload_nchunks=32, preload_to_gpu=False).use_collection(
        collection, load_adata=lambda group: ad.AnnData(X=ad.io.sparse_dataset(group["X"]))
    )
    (batch,) = loader
    assert (batch["X"].shape, batch["X"].dtype, batch["X"].sum()) == ((300, 500), np.int8, adata.X.sum())
    assert batch["obs"] is None
    assert sorted(collection.obs().index) == sorted(map(str, range(1000, 1300)))
    assert collection.var.index[:2].tolist() == ["22:0:A:C", "22:1:A:C"]


@pytest.mark.parametrize("own", [None, "read_elem"])
def test_modalities_of_hdf5_files_as_groups(tmp_path, own):
    """annbatch takes h5py groups, such as a modality of MuData's files; two of one file are two inputs."""
    files = [tmp_path / f"{k}.h5mu" for k in range(2)]
    for k, path in enumerate(files):
        with h5py.File(path, "w") as file:
            modalities = file.create_group("mod")
            for name in ("rna", "again"):
                adata = make_adata(60, [f"g{i}" for i in range(20)], seed=k)
                adata.obs_names = [f"{name}_{k}_{i}" for i in range(60)]
                with quiet():
                    ad.io.write_elem(modalities, name, adata)
    load = None if own is None else ad.io.read_elem
    collection = DatasetCollection(tmp_path / "c.zarr")
    opened = [h5py.File(path, "r") for path in files]
    groups = [opened[0]["mod/rna"], opened[1]["mod/rna"], opened[0]["mod/again"]]
    collection.add_adatas(groups, load_adata=load, seed=0, dataset_size=100)
    collection.add_adatas(groups, load_adata=load, seed=0, dataset_size=100)  # the very same call: it is done
    for file in opened:
        file.close()
    obs = collection.obs(columns=["src_path"])
    assert obs["src_path"].value_counts().to_dict() == {
        f"{files[0]}/mod/rna": 60,
        f"{files[1]}/mod/rna": 60,
        f"{files[0]}/mod/again": 60,
    }
    assert collection.n_obs == 180
    total = sum(float(make_adata(60, [f"g{i}" for i in range(20)], seed=k).X.sum()) for k in (0, 1, 0))
    loader = Loader(batch_size=32, chunk_size=8, preload_nchunks=4, preload_to_gpu=False).use_collection(collection)
    assert sum(float(batch["X"].sum()) for batch in loader) == total
    with pytest.raises(SourceError, match="given 2 times"), h5py.File(files[0], "r") as file:
        DatasetCollection(tmp_path / "d.zarr").add_adatas([file["mod/rna"], file["mod/rna"]])
