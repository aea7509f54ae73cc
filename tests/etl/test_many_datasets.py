"""Collections of many datasets: what their root document holds, and that nothing depends on more."""

import json

import anndata as ad
import pytest

import annbatch_dask.etl.commit
from annbatch_dask import DatasetCollection, Loader
from annbatch_dask.errors import CollectionError, IntegrityError
from annbatch_dask.manifest import Manifest
from annbatch_dask.testing import make_adata

pytestmark = pytest.mark.usefixtures("in_this_process")

GENES = [f"g{k}" for k in range(8)]


@pytest.fixture
def paths(tmp_path):
    out = []
    for i, n in enumerate((40, 23, 11)):
        make_adata(n, GENES, seed=i).write_h5ad(path := tmp_path / f"{i}.h5ad")
        out.append(str(path))
    return out


@pytest.fixture
def _is_large(monkeypatch):
    """As if the metadata were more than a root document shall hold."""
    monkeypatch.setattr(annbatch_dask.etl.commit, "MAX_CONSOLIDATED_NBYTES", 0)


def rows(collection):
    loader = Loader(batch_size=7, preload_to_gpu=False).use_collection(collection)
    return sorted(name for batch in loader for name in batch["obs"].index)


def root(collection):
    return json.loads((collection._root.target / "x").fs.cat_file(f"{collection._root.target.path}/zarr.json"))


@pytest.mark.usefixtures("_is_large")
@pytest.mark.parametrize("mode", ["extend", "append", "reshuffle"])
def test_without_consolidated_metadata(tmp_path, paths, mode):
    collection = DatasetCollection(tmp_path / "o.zarr").add_adatas(paths[:2], seed=0, dataset_size=10)
    assert "consolidated_metadata" not in root(collection)
    reader = DatasetCollection(tmp_path / "o.zarr", mode="r")
    held = Loader(batch_size=5, preload_to_gpu=False).use_collection(reader)
    collection.add_adatas(paths[2:], seed=0, mode=mode)
    assert len(rows(collection)) == collection.n_obs == 74
    assert collection.verify(against=paths).ok
    assert sum(b["X"].shape[0] for b in held) == 63  # its datasets stay as long as it reads them
    if mode != "append":
        with pytest.raises(CollectionError, match="was changed since it was opened"):
            reader.lease()
    del held
    DatasetCollection(tmp_path / "o.zarr").gc()
    assert sorted(p.name for p in (tmp_path / "o.zarr").iterdir() if p.is_dir()) == sorted(
        d.name for d in collection.manifest.datasets
    )
    assert sum(len(ad.read_zarr(tmp_path / "o.zarr" / d.name)) for d in collection.manifest.datasets) == 74


def test_the_root_grows_by_a_record_a_dataset(tmp_path, paths, monkeypatch):
    sizes = {}
    monkeypatch.setattr(annbatch_dask.etl.commit, "MAX_CONSOLIDATED_NBYTES", 0)
    for n_rows in (40, 4):
        collection = DatasetCollection(tmp_path / f"{n_rows}.zarr").add_adatas(paths, seed=0, dataset_size=n_rows)
        sizes[len(collection)] = collection._root.target.size("zarr.json")
    (few, least), (many, most) = sizes.items()
    assert (most - least) / (many - few) < 500  # bytes; 90,000 with the files and metadata of each


def test_the_manifest_is_parsed_once(tmp_path, paths, monkeypatch):
    DatasetCollection(tmp_path / "o.zarr").add_adatas(paths, seed=0)
    calls = []
    parse = Manifest.from_json
    monkeypatch.setattr(Manifest, "from_json", lambda values: calls.append(1) or parse(values))
    collection = DatasetCollection(tmp_path / "o.zarr", mode="r")
    assert collection.manifest is collection.manifest
    assert (len(collection), collection.n_obs, collection.n_var) == (1, 74, 8)
    repr(collection)
    assert len(calls) == 1


@pytest.mark.parametrize("is_large", [False, True])
def test_a_changed_group_document_is_found(tmp_path, paths, monkeypatch, is_large):
    if is_large:
        monkeypatch.setattr(annbatch_dask.etl.commit, "MAX_CONSOLIDATED_NBYTES", 0)
    collection = DatasetCollection(tmp_path / "o.zarr").add_adatas(paths, seed=0, dataset_size=30)
    path = tmp_path / "o.zarr/dataset_1/zarr.json"
    text = path.read_text()
    path.write_text(text.replace("annbatch_dask_files", "annbatch_dask_filez"))
    with pytest.raises(IntegrityError, match="dataset_1/zarr.json"):
        collection.check()
    assert "dataset_1/zarr.json" in {p.where for p in collection.verify().problems}
    path.unlink()
    with pytest.raises(IntegrityError, match="dataset_1/zarr.json.*missing"):
        collection.check()
    path.write_text(text)
    collection.check()
