"""What users do around a build: change folders, lose files, hand over functions that are none."""

import contextlib
import shutil
import threading

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import zarr

from annbatch_dask import DatasetCollection, Loader
from annbatch_dask.errors import CollectionError, IntegrityError, SourceError, SourceNotFoundError
from annbatch_dask.testing import make_adata

pytestmark = pytest.mark.usefixtures("in_this_process")

GENES = [f"g{i}" for i in range(20)]


@pytest.fixture
def file(tmp_path):
    make_adata(60, GENES, seed=0).write_h5ad(tmp_path / "a.h5ad")
    return tmp_path / "a.h5ad"


@pytest.fixture
def built(tmp_path, file):
    return DatasetCollection(tmp_path / "c.zarr").add_adatas([file], dataset_size=20)


# --- the working directory ---------------------------------------------------------------------------------------------


def test_a_collection_by_a_relative_path_stays_where_it_was_opened(built, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    with contextlib.chdir(tmp_path):
        collection = DatasetCollection("c.zarr")
        loader = Loader(batch_size=16, seed=0).use_collection(collection)
    with contextlib.chdir(other):
        assert sum(batch["X"].shape[0] for batch in loader) == 60
        assert collection.verify().ok
        assert len(collection.obs()) == 60
        assert [v.n_obs for v in collection.versions] == [60]
        assert collection.status().state == "idle"
    assert collection.path == "c.zarr"
    assert list(other.iterdir()) == []


@pytest.mark.parametrize("is_planned", [False, True])
def test_a_build_goes_where_the_collection_was_opened(file, tmp_path, is_planned):
    other = tmp_path / "other"
    other.mkdir()
    with contextlib.chdir(tmp_path):
        collection = DatasetCollection("new.zarr")
        plan = collection.plan_adatas([file])
    with contextlib.chdir(other):
        plan.run() if is_planned else collection.add_adatas([file])
    assert DatasetCollection(tmp_path / "new.zarr", mode="r").n_obs == collection.n_obs == 60
    assert list(other.iterdir()) == []


# --- files that are lost -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [0, 100, -100])
def test_a_root_document_that_was_copied_in_part_is_named(built, tmp_path, left):
    document = tmp_path / "c.zarr" / "zarr.json"
    document.write_bytes(document.read_bytes()[:left])
    uses = [
        lambda: DatasetCollection(tmp_path / "c.zarr"),
        lambda: DatasetCollection(tmp_path / "c.zarr", version=1),
        lambda: built.versions,
        lambda: next(iter(Loader(batch_size=8, seed=0).use_collection(built))),
    ]
    for use in uses:
        with pytest.raises(IntegrityError, match=r"zarr\.json is damaged or was copied in part"):
            use()


@pytest.mark.usefixtures("built")
def test_a_collection_that_is_removed_while_it_is_opened_is_not_called_damaged(tmp_path, monkeypatch):
    opened = zarr.open_group

    def remove_and_open(*args, **options):
        shutil.rmtree(tmp_path / "c.zarr")
        return opened(*args, **options)

    monkeypatch.setattr(zarr, "open_group", remove_and_open)
    with pytest.raises(CollectionError, match="there is no collection at"):
        DatasetCollection(tmp_path / "c.zarr", mode="r")


def test_a_dataset_that_somebody_removed_is_named(built, tmp_path, file):
    shutil.rmtree(tmp_path / "c.zarr" / "dataset_1")
    uses = [list, DatasetCollection.obs, DatasetCollection.report, lambda c: c.aggregate(["cell_type"], ["sum"])]
    for use in uses:
        with pytest.raises(IntegrityError, match="cannot be read: dataset_1"):
            use(DatasetCollection(tmp_path / "c.zarr"))
    with pytest.raises(SourceNotFoundError, match="dataset_1 of the collection is missing"):
        built.add_adatas([shutil.copy(file, tmp_path / "b.h5ad")], seed=1)


def test_a_file_that_is_none_of_ours_is_to_be_removed(built, tmp_path):
    (tmp_path / "c.zarr" / "dataset_0" / "notes.txt").write_bytes(b"x")
    with pytest.raises(IntegrityError, match=r"notes\.txt: was not written by the build; remove it"):
        next(iter(Loader(batch_size=8, seed=0).use_collection(built)))


@pytest.mark.filterwarnings("ignore:Object at .* is not recognized:zarr.errors.ZarrUserWarning")
def test_what_a_system_leaves_in_folders_stops_nothing(built, tmp_path):
    for name in (".DS_Store", "._zarr.json", ".nfs0000a1"):
        for folder in ("", "dataset_0", "dataset_0/X", "versions"):
            (tmp_path / "c.zarr" / folder).mkdir(exist_ok=True)
            (tmp_path / "c.zarr" / folder / name).write_bytes(b"x")
    assert built.verify().problems == ()
    assert sum(len(batch["obs"]) for batch in Loader(batch_size=8, seed=0).use_collection(built)) == built.n_obs
    built.gc()
    assert built.verify().problems == ()


# --- load_adata --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "found"),
    [(lambda _: None, "NoneType"), (str, "str"), (lambda p: ad.read_h5ad(p).to_df(), "DataFrame")],
)
def test_what_load_adata_returns_is_an_anndata(file, tmp_path, load, found):
    with pytest.raises(SourceError, match=f"load_adata returned {found} for .*a.h5ad; it must return an AnnData"):
        DatasetCollection(tmp_path / "c.zarr").add_adatas([file], load_adata=load)


def test_a_function_that_cannot_be_sent_leaves_nothing(file, tmp_path):
    lock = threading.Lock()

    def load(path):
        with lock:
            return ad.read_h5ad(path)

    with pytest.raises(SourceError, match=r"load_adata cannot be sent to workers \(cannot pickle '_thread.lock'"):
        DatasetCollection(tmp_path / "c.zarr").add_adatas([file], load_adata=load)
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5ad"]


@pytest.mark.parametrize(
    ("axis", "what"), [(0, "60 cells when .* and has 59 now"), (1, "20 columns in X .* has 19 now")]
)
def test_a_function_that_returns_something_else_each_time_is_named(file, tmp_path, axis, what):
    called = tmp_path / "called"

    def load(path):
        found = ad.read_h5ad(path)
        if called.exists():
            return found[:59] if axis == 0 else found[:, :19]
        called.touch()
        return found

    with pytest.raises(SourceError, match=f"had {what}; load_adata must return the same"):
        DatasetCollection(tmp_path / "c.zarr").add_adatas([file], load_adata=load)


# --- obs ---------------------------------------------------------------------------------------------------------------


def test_rows_are_grouped_by_halves(tmp_path):
    a = make_adata(60, GENES, seed=0)
    a.obs["half"] = np.tile([0.5, np.nan, -1, 65504, 0, np.inf], 10).astype(np.float16)
    a.write_h5ad(tmp_path / "a.h5ad")
    collection = DatasetCollection(tmp_path / "c.zarr").add_adatas([tmp_path / "a.h5ad"], groupby="half")
    (dataset,) = collection
    found = ad.io.read_elem(dataset["obs"])["half"]
    assert found.dtype == np.float16
    pd.testing.assert_series_equal(found, found.sort_values(kind="stable"))


def test_a_mistake_of_ours_is_not_taken_for_a_missing_file(built):
    with pytest.raises(KeyError, match="nothing"), built._root.explained():
        {}["nothing"]
    with pytest.raises(IntegrityError, match="nothing.* is missing; restore it"), built._root.explained():
        next(iter(built))["nothing"]
