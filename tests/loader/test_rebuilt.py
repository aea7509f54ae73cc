"""What becomes of a Loader, a collection and a view when another collection comes to stand at their path.

Each goes on with what it opened, or ends with a CollectionChangedError; a row's counts are those of its name.
"""

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import zarr

from annbatch_dask import DatasetCollection, Loader, read_lazy
from annbatch_dask.errors import CollectionChangedError
from annbatch_dask.loader import reading
from tests.loader.data import quiet

pytestmark = pytest.mark.usefixtures("in_this_process")

N_OBS, N_VARS = 300, 40


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    """A file, and its rows by name."""
    folder = tmp_path_factory.mktemp("rebuilt")
    x = np.random.default_rng(0).poisson(1.0, (N_OBS, N_VARS)).astype(np.float32)
    x[:, 0] = np.arange(N_OBS) + 1
    adata = ad.AnnData(sp.csr_matrix(x))
    adata.obs_names, adata.var_names = [f"c{i}" for i in range(N_OBS)], [f"g{i}" for i in range(N_VARS)]
    adata.obs["row"] = np.arange(N_OBS)
    path = folder / "a.h5ad"
    adata.write_h5ad(path)
    return path, dict(zip(adata.obs_names, x, strict=True))


def build(path, atlas, seed=0, **options):
    return DatasetCollection(path).add_adatas([atlas[0]], seed=seed, dataset_size=120, progress=False, **options)


@pytest.fixture
def path(tmp_path, atlas):
    """A collection of three datasets."""
    build(tmp_path / "c.zarr", atlas)
    return tmp_path / "c.zarr"


def loader_of(path, **options):
    loader = Loader(batch_size=50, chunk_size=10, preload_nchunks=5, preload_to_gpu=False, **options)
    return loader.use_collection(DatasetCollection(path, mode="r"))


def n_right(batches, atlas):
    """Rows whose counts are those of their name; all must be."""
    found = 0
    for batch in batches:
        for name, row in zip(batch["obs"].index, batch["X"].toarray(), strict=True):
            np.testing.assert_array_equal(row, atlas[1][name])
            found += 1
    return found


def by_another_process(path, atlas):
    """mode="w" of this package."""
    code = (
        "import sys, dask; from annbatch_dask import DatasetCollection\n"
        "dask.config.set(scheduler='synchronous')\n"
        "DatasetCollection(sys.argv[1], mode='w').add_adatas([sys.argv[2]], seed=1, dataset_size=120, progress=False)"
    )
    subprocess.run([sys.executable, "-c", code, str(path), str(atlas[0])], check=True)


def removed_and_built(path, atlas):
    """Under the same names, of other rows."""
    shutil.rmtree(path)
    build(path, atlas, seed=1)


def by_zarr(path, atlas):
    """Another collection's files, written over by zarr."""
    build(path.parent / "other.zarr", atlas, seed=1)
    zarr.open_group(path, mode="w")
    shutil.copytree(path.parent / "other.zarr", path, dirs_exist_ok=True)


def copied_over(path, atlas):
    """Files that keep their inodes and their times."""
    build(path.parent / "other.zarr", atlas, seed=1)
    for new in sorted((path.parent / "other.zarr").rglob("*")):
        old = path / new.relative_to(path.parent / "other.zarr")
        if new.is_file():
            old.write_bytes(new.read_bytes())
            shutil.copystat(new, old)


WAYS = [removed_and_built, by_zarr, copied_over, pytest.param(by_another_process, marks=pytest.mark.slow)]


def goes_on_or_says_so(read: Callable[[], int]):
    try:
        assert read() == N_OBS
    except CollectionChangedError as e:
        assert "since it was opened" in str(e)  # noqa: PT017


@pytest.mark.parametrize("rebuild", WAYS)
@pytest.mark.parametrize("when", ["before the first epoch", "after an epoch", "in an epoch"])
def test_a_loader_reads_what_it_opened(path, atlas, rebuild, when):
    loader = loader_of(path)
    batches = iter(loader)
    if when == "before the first epoch":
        rebuild(path, atlas)
        goes_on_or_says_so(lambda: n_right(batches, atlas))
    elif when == "after an epoch":
        assert n_right(batches, atlas) == N_OBS
        rebuild(path, atlas)
    else:
        n_first = n_right([next(batches)], atlas)
        rebuild(path, atlas)
        goes_on_or_says_so(lambda: n_first + n_right(batches, atlas))
    goes_on_or_says_so(lambda: n_right(loader, atlas))
    assert n_right(loader_of(path), atlas) == N_OBS


@pytest.mark.parametrize("rebuild", WAYS)
def test_a_pickled_loader_reads_what_it_had_opened(path, atlas, rebuild):
    pickled = pickle.dumps(loader_of(path))
    assert n_right(pickle.loads(pickled), atlas) == N_OBS
    rebuild(path, atlas)
    goes_on_or_says_so(lambda: n_right(pickle.loads(pickled), atlas))


def test_obs_and_counts_are_of_one_version(path, atlas, monkeypatch):
    load = reading.load_dataset

    def load_and_rebuild(group, **options):
        adata = load(group, **options)
        if group.name == "/dataset_1":
            removed_and_built(path, atlas)
        return adata

    monkeypatch.setattr("annbatch_dask.loader.added.load_dataset", load_and_rebuild)
    with pytest.raises(CollectionChangedError, match="since it was opened"):
        loader_of(path)


def test_a_loader_of_a_collection_that_annbatch_wrote(path, atlas):
    attributes = zarr.open_group(path, mode="r+").attrs
    del attributes["annbatch_dask"]
    loader = loader_of(path)
    assert n_right(loader, atlas) == N_OBS
    copied_over(path, atlas)
    with pytest.raises(CollectionChangedError, match="was replaced since it was opened"):
        n_right(loader, atlas)


def test_a_loader_of_a_zarr_array(tmp_path):
    with quiet():
        zarr.save_array(tmp_path / "a.zarr", np.arange(60.0).reshape(20, 3))
    loader = Loader(batch_size=5, chunk_size=5, preload_nchunks=1, preload_to_gpu=False)
    loader.add_dataset(zarr.open_array(tmp_path / "a.zarr", mode="r"))
    assert sum(len(b["X"]) for b in loader) == 20
    for file in (tmp_path / "a.zarr/c").rglob("*"):
        os.utime(file)
    with pytest.raises(CollectionChangedError, match="was replaced since it was opened"):
        list(loader)


@pytest.mark.parametrize("rebuild", WAYS)
@pytest.mark.parametrize(
    "use",
    [
        lambda c: c.obs(),
        lambda c: c.var,
        lambda c: c.report(),
        lambda c: c.to_lazy(),
        lambda c: c.obs_dataset(),
        lambda c: c.lease(),
        lambda c: Loader(batch_size=5).use_collection(c),
    ],
    ids=["obs", "var", "report", "to_lazy", "obs_dataset", "lease", "Loader"],
)
def test_a_collection_that_another_one_replaced_says_so(path, atlas, use, rebuild):
    collection = DatasetCollection(path, mode="r")
    use(collection)
    rebuild(path, atlas)
    with pytest.raises(CollectionChangedError, match="was changed since it was opened"):
        use(collection)


def test_a_collection_that_grew_is_the_one_that_was_opened(path, atlas):
    collection = DatasetCollection(path, mode="r")
    more = ad.read_h5ad(atlas[0])
    more.obs_names = [f"d{i}" for i in range(N_OBS)]
    more.write_h5ad(path.parent / "b.h5ad")
    DatasetCollection(path).add_adatas([path.parent / "b.h5ad"], seed=0, mode="append", progress=False)
    assert len(collection.obs()) == N_OBS
    assert n_right(Loader(batch_size=50, preload_to_gpu=False).use_collection(collection), atlas) == N_OBS


@pytest.mark.parametrize("rebuild", WAYS)
@pytest.mark.parametrize("use", [lambda v: v.X.compute(), lambda v: v.obs["row"].to_numpy()], ids=["X", "obs"])
def test_a_view_reads_what_it_opened(path, atlas, use, rebuild):
    view = DatasetCollection(path, mode="r").to_lazy()
    assert len(use(view).shape) > 0
    rebuild(path, atlas)
    with pytest.raises(CollectionChangedError, match="is not what it was when the view was opened"):
        use(view)


def test_a_view_of_a_file_reads_what_it_opened(atlas, tmp_path):
    shutil.copy(atlas[0], tmp_path / "a.h5ad")
    view = read_lazy(tmp_path / "a.h5ad")
    assert view.X.compute().shape == (N_OBS, N_VARS)
    more = ad.read_h5ad(atlas[0])
    more.X = more.X * 2
    more.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(CollectionChangedError, match="is not what it was when the view was opened"):
        view.X.compute()
