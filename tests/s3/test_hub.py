"""Files and collections of Hugging Face's Hub are read as those of a disk; a collection is published there whole."""

import fsspec
import numpy as np
import pytest

from annbatch_dask import DatasetCollection
from annbatch_dask.errors import CollectionError
from tests.s3.hub import REPO, served
from tests.s3.tools import batches, contents, epoch

pytestmark = [
    pytest.mark.chaos,  # whose rule installs the client
    pytest.mark.usefixtures("in_this_process"),
]
URL = f"hf://datasets/{REPO}"


@pytest.fixture
def hub(monkeypatch):
    reason = "`make chaos` installs it (the dependency group stores)"
    constants = pytest.importorskip("huggingface_hub.constants", reason=reason)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # which watches this machine, and writes a log
    with served() as server:
        yield server
    fsspec.get_filesystem_class("hf").clear_instance_cache()


@pytest.fixture
def local(tmp_path, h5ad_pair):
    return DatasetCollection(tmp_path / "o.zarr").add_adatas(h5ad_pair, seed=0, dataset_size=150)


@pytest.fixture
def options(hub):
    return {"endpoint": hub.url, "token": False}


def test_files_are_inputs(hub, options, h5ad_pair, tmp_path):
    for path in h5ad_pair:
        hub.put(f"in/{path.name}", path)
    urls = [f"{URL}/in/{path.name}" for path in h5ad_pair]
    collection = DatasetCollection(tmp_path / "o.zarr").add_adatas(urls, seed=0, storage_options=options)
    assert [s.path for s in collection.manifest.sources] == urls
    assert collection.verify(against=urls, storage_options=options).ok


def publish(hub, options, collection, folder):
    """As docs/how-to/use-hugging-face.md does it."""
    from huggingface_hub import HfApi

    api = HfApi(**options)
    api.create_repo(REPO, repo_type="dataset", exist_ok=True)
    where = {"repo_id": REPO, "repo_type": "dataset"}
    api.upload_folder(**where, folder_path=collection.path, path_in_repo=folder, ignore_patterns=["zarr.json", ".*"])
    api.upload_file(**where, path_or_fileobj=f"{collection.path}/zarr.json", path_in_repo=f"{folder}/zarr.json")


def test_a_collection_is_published_and_read(hub, options, local):
    publish(hub, options, local, "o.zarr")
    assert hub.commits[-1] == ["o.zarr/zarr.json"]  # which makes it one
    fs = fsspec.filesystem("hf", **options)
    assert contents(fs, f"{URL}/o.zarr") == contents(fsspec.filesystem("file"), str(local.path))
    there = DatasetCollection(f"{URL}/o.zarr", mode="r", storage_options=options)
    assert there.verify().ok
    np.testing.assert_array_equal(np.concatenate(epoch(there)), np.concatenate(epoch(local)))


def test_an_extended_collection_is_published_again(hub, options, h5ad_pair, tmp_path):
    """Its datasets have new names: who reads the old one reads on."""
    first, second = h5ad_pair
    local = DatasetCollection(tmp_path / "o.zarr").add_adatas([first], seed=0, dataset_size=150)
    publish(hub, options, local, "o.zarr")
    before = DatasetCollection(f"{URL}/o.zarr", mode="r", storage_options=options)
    rows, reading = np.concatenate(epoch(before)), batches(before)
    local.add_adatas([second], seed=1, dataset_size=150)
    publish(hub, options, local, "o.zarr")
    fsspec.get_filesystem_class("hf").clear_instance_cache()
    there = DatasetCollection(f"{URL}/o.zarr", mode="r", storage_options=options)
    assert there.n_obs == local.n_obs > before.n_obs
    np.testing.assert_array_equal(np.concatenate(epoch(there)), np.concatenate(epoch(local)))
    np.testing.assert_array_equal(np.concatenate(list(reading)), rows)


def test_nothing_is_built_there(hub, options, h5ad_pair, tmp_path):
    for what in ("collection", "scratch"):
        place = f"{URL}/o.zarr" if what == "collection" else tmp_path / "o.zarr"
        scratch = {"scratch": f"{URL}/scratch", "scratch_options": options} if what == "scratch" else {}
        collection = DatasetCollection(place, storage_options=options if what == "collection" else None)
        with pytest.raises(CollectionError, match=r"hf://\S+ takes whole commits.*publish.*upload_folder"):
            collection.add_adatas(h5ad_pair, seed=0, **scratch)
    assert not hub.commits
    assert not hub.files


def test_nothing_published_is_changed(hub, options, local):
    publish(hub, options, local, "o.zarr")
    n, there = len(hub.commits), DatasetCollection(f"{URL}/o.zarr", storage_options=options)
    with pytest.raises(CollectionError, match="takes whole commits"):
        there.gc()
    assert len(hub.commits) == n
