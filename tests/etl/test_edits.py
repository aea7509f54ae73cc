"""A dataset that its owner edited: verify names what was edited, loaders and views read it, and no build loses it."""

import contextlib
import shutil
from importlib.metadata import version

import anndata as ad
import dask
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

from annbatch_dask import DatasetCollection, Loader, concat_lazy
from annbatch_dask.cli import main
from annbatch_dask.errors import CollectionChangedError, CollectionError, IntegrityError, SchemaError
from annbatch_dask.etl.edits import look_at_files
from annbatch_dask.events import Callback
from annbatch_dask.storage.folder import Folder
from annbatch_dask.testing import make_adata
from tests.etl.inputs import dense_x

GENES = [f"g{i}" for i in range(30)]

pytestmark = [
    pytest.mark.usefixtures("in_this_process"),
    pytest.mark.filterwarnings("ignore:zarr v3 autosharding", "ignore:Writing zarr v2"),
    pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part"),
    pytest.mark.filterwarnings("ignore:Adding dataset with dtype"),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A collection of two datasets, and its input."""
    folder = tmp_path_factory.mktemp("edits")
    adata = make_adata(150, GENES, seed=0)
    adata.layers["half"] = (adata.X * 0.5).tocsr()
    adata.obsm["pca"] = np.random.default_rng(0).normal(size=(150, 3)).astype("f4")
    adata.uns["about"] = {"by": "them"}
    adata.write_h5ad(folder / "a.h5ad")
    with dask.config.set(scheduler="synchronous"):
        DatasetCollection(folder / "o.zarr").add_adatas([folder / "a.h5ad"], seed=0, dataset_size=80)
    return folder / "o.zarr", folder / "a.h5ad"


@pytest.fixture
def path(built, tmp_path):
    return shutil.copytree(built[0], tmp_path / "o.zarr")


def write(group, name, value, **options):
    """As an owner does: in the place of what is there."""
    parent, _, leaf = name.rpartition("/")
    group = group[parent] if parent else group
    if leaf in group:
        del group[leaf]
    ad.io.write_elem(group, leaf, value, dataset_kwargs=options)


def write_whole(adata, path):
    """As zarr v3, which is not the default of anndata 0.12."""
    is_old = tuple(map(int, version("anndata").split(".")[:2])) < (0, 13)
    with ad.settings.override(zarr_write_format=3) if is_old else contextlib.nullcontext():
        adata.write_zarr(path)


def x_of_other_sparsity(group):
    n, m = group["X"].attrs["shape"]
    write(group, "X", sp.random(n, m, 0.7, format="csr", random_state=1).ceil().astype(np.float32))


def x_of_the_same_shape(group):
    x = ad.io.read_elem(group["X"])
    x.data = x.data[::-1].copy()
    write(group, "X", x)


def x_of_other_dtype(group):
    write(group, "X", ad.io.read_elem(group["X"]).astype(np.float64) * 3)


def x_of_other_chunks(group):
    write(group, "X", ad.io.read_elem(group["X"]) * 2, chunks=(7,))


def x_that_is_dense(group):
    write(group, "X", ad.io.read_elem(group["X"]).toarray() + 1)


def values_of_x_alone(group):
    values = group["X/data"][...] + 1
    write(group, "X/data", values)


def a_layer(group):
    write(group, "layers/half", ad.io.read_elem(group["X"]) * 4)


def no_layer(group):
    del group["layers/half"]


def a_new_obsm(group):
    write(group, "obsm/new", np.arange(group["obsm/pca"].shape[0] * 2.0).reshape(-1, 2))


def obs(group):
    frame = ad.io.read_elem(group["obs"])
    frame["n_counts"] += 1
    frame["batch"] = pd.Categorical(np.where(np.arange(len(frame)) % 2, "odd", "even"))
    write(group, "obs", frame)


def a_column_of_obs(group):
    write(group, "obs/n_counts", ad.io.read_elem(group["obs/n_counts"])[::-1].copy())


def a_new_column_of_obs(group):
    n = group["obs/n_counts"].shape[0]
    write(group, "obs/number", np.arange(n))
    group["obs"].attrs["column-order"] = [*group["obs"].attrs["column-order"], "number"]


def an_attribute(group):
    group.attrs["note"] = "mine"


def everything(group):
    adata = ad.io.read_elem(group)
    adata.X = (adata.X * 3).tocsr()
    write_whole(adata, group.store.root / group.path)


EDITS = [
    (x_of_other_sparsity, ["X"]),
    (x_of_the_same_shape, ["X"]),
    (x_of_other_dtype, ["X"]),
    (x_of_other_chunks, ["X"]),
    (x_that_is_dense, ["X"]),
    (values_of_x_alone, ["X"]),
    (a_layer, ["layers/half"]),
    (no_layer, ["layers/half"]),
    (a_new_obsm, ["obsm/new"]),
    (obs, ["obs"]),
    (a_column_of_obs, ["obs/n_counts"]),
    (a_new_column_of_obs, ["obs", "obs/number"]),
    (an_attribute, [""]),
    (everything, [""]),
]
OPEN = {
    "iterated": lambda path: list(DatasetCollection(path)),
    "path": lambda path: [zarr.open_group(f"{path}/dataset_{k}", mode="r+") for k in range(2)],
    "appended": lambda path: [zarr.open_group(f"{path}/dataset_{k}", mode="a") for k in range(2)],
}


def expected(path):
    """What plain anndata reads of the datasets."""
    return ad.concat([ad.read_zarr(f"{path}/dataset_{k}") for k in range(2)], join="outer")


def loader(**options):
    return Loader(**({"batch_size": 10, "chunk_size": 5, "preload_nchunks": 4, "preload_to_gpu": False} | options))


def read(collection, **options):
    """Rows of one pass by name: X, and what else is asked for."""
    out = {}
    for batch in loader(dense=True, layers=[], **({"obsm": []} | options)).use_collection(collection):
        kinds = batch["obs"]["cell_type"]
        for k, name in enumerate(batch["obs"].index):
            beside = [batch["obsm"][o][k] for o in options.get("obsm", ())]
            out[name] = (batch["X"][k], kinds.iloc[k], *beside)
    return out


def check_rows(path, collection, **options):
    want, got = expected(path), read(collection, **options)
    assert set(got) == set(want.obs_names)
    for k, (name, x) in enumerate(zip(want.obs_names, dense_x(want), strict=True)):
        np.testing.assert_array_equal(got[name][0], x)
        assert got[name][1] == want.obs["cell_type"].iloc[k]
        for o, found in zip(options.get("obsm", ()), got[name][2:], strict=True):
            np.testing.assert_array_equal(found, want.obsm[o][k])


CASES = [(edit, names, "iterated") for edit, names in EDITS]
CASES += [(edit, names, how) for how in ("path", "appended") for edit, names in (EDITS[0], EDITS[9])]


@pytest.mark.parametrize(("edit", "names", "how"), CASES, ids=lambda e: getattr(e, "__name__", str(e)))
def test_verify_names_what_was_edited_and_loaders_read_it(path, edit, names, how):
    before = DatasetCollection(path)  # opened before, as in annbatch's own tests
    is_for_all = edit in (x_that_is_dense, a_new_obsm)
    for group in OPEN[how](path)[0 if is_for_all else 1 :]:
        edit(group)
    collection = before if how == "path" else DatasetCollection(path, mode="r")
    found = collection.verify()
    assert {f"dataset_1/{name}".rstrip("/") for name in names} <= set(found.edited) - {"zarr.json"}
    assert {p.where for p in found.problems} == set(found.edited)
    obsm = ["new"] if edit is a_new_obsm else ["pca"]
    check_rows(path, collection, obsm=obsm, obs_columns=["cell_type"] if how == "path" else None)
    if how == "path":
        np.testing.assert_array_equal(dense_x(collection.to_lazy().to_memory()), dense_x(expected(path)))


@pytest.mark.parametrize("name", ["obs/zarr.json", "X/zarr.json", "X/data/zarr.json", "obs/cell_type/zarr.json"])
def test_a_bit_that_flipped_is_no_edit(path, name):
    """Wherever it is in a document, in the seal and in the names of keys too."""
    target, record = Folder(str(path)), DatasetCollection(path, mode="r").manifest.datasets[1]
    file = path / record.name / name
    whole = file.read_bytes()
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 7]) + whole[at + 1 :])
        look = look_at_files(target, record, lambda _: True)
        assert [p.where for p in look.damage] == [f"{record.name}/{name}"]
        assert not look.edits


def test_a_changed_obs_is_what_batches_and_frames_carry(path):
    for group in DatasetCollection(path):
        obs(group)
    want, collection = expected(path).obs, DatasetCollection(path)
    pd.testing.assert_frame_equal(collection.obs(), want, check_categorical=False, check_names=False)
    batches = loader(obs_columns=["batch", "n_counts"], layers=[], obsm=[]).use_collection(collection)
    seen = pd.concat(batch["obs"] for batch in batches)
    assert seen["batch"].astype(str).to_dict() == want["batch"].astype(str).to_dict()
    assert seen["n_counts"].to_dict() == want["n_counts"].to_dict()
    assert collection.obs_dataset()["n_counts"].to_numpy().tolist() == want["n_counts"].tolist()


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
@pytest.mark.parametrize(("n", "element"), [(69, "obs"), (71, "X"), (71, "")])
def test_another_number_of_rows_is_refused_with_both_numbers(path, n, element):
    whole = ad.read_zarr(path / "dataset_1")
    new = whole[np.arange(n) % 70].copy()
    assert whole.n_obs == 70
    if element:
        write(list(DatasetCollection(path))[1], element, getattr(new, element))
    else:
        write_whole(new, path / "dataset_1")
    collection = DatasetCollection(path)
    with pytest.raises(CollectionError, match=f"dataset_1 was edited: its {element or 'obs'} has {n} rows, and had 70"):
        loader().use_collection(collection)
    assert {"dataset_1", f"dataset_1/{element}"} & {p.where for p in collection.verify().problems}


def test_values_that_an_edit_brought_are_not_cast_by_what_was_recorded(path):
    collection = DatasetCollection(path)
    loader(dtype="uint8", layers=[], obsm=[]).use_collection(collection)  # counts, as recorded
    group = next(iter(collection))
    write(group, "X", ad.io.read_elem(group["X"]).astype(np.float32) * 1000)
    with pytest.raises(SchemaError, match="uint8"):
        loader(dtype="uint8", layers=[], obsm=[]).use_collection(collection)


def test_damage_beside_an_edit_is_found(path):
    collection = DatasetCollection(path)
    x_of_other_dtype(next(iter(collection)))
    file = path / "dataset_0/obs/n_counts/c/0"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    with pytest.raises(IntegrityError, match="dataset_0/obs/n_counts/c/0: has crc32c"):
        loader().use_collection(collection)
    assert {"dataset_0/X", "dataset_0/obs/n_counts/c/0"} <= {p.where for p in collection.verify().problems}
    file.unlink()
    with pytest.raises(IntegrityError, match="dataset_0/obs/n_counts/c/0: is missing"):
        loader().use_collection(collection)


@pytest.mark.parametrize("name", ["X", "obs", "var"])
def test_what_is_needed_and_gone_is_no_edit(path, name):
    del next(iter(DatasetCollection(path)))[name]
    with pytest.raises(IntegrityError, match=f"dataset_0/{name}/.* is missing"):
        loader().use_collection(DatasetCollection(path))


def test_the_command_line_names_edits_and_fails(path, capsys):
    a_layer(next(iter(DatasetCollection(path))))
    assert main(["verify", str(path)]) == 1
    said = capsys.readouterr()
    assert "dataset_0/layers/half: was written anew by somebody since the build" in said.out
    assert "if these edits are not yours, restore these files" in said.err


@pytest.mark.parametrize("where", ["", "dataset_0"])
def test_metadata_that_were_consolidated_after_an_edit(path, where):
    collection = DatasetCollection(path)
    x_of_other_sparsity(next(iter(collection)))
    zarr.consolidate_metadata(path / where)
    check_rows(path, DatasetCollection(path))
    found = DatasetCollection(path).verify()
    assert "dataset_0/X" in found.edited
    assert ("zarr.json" in found.edited) == bool(where)  # the root's copy is renewed
    x_of_other_dtype(next(iter(DatasetCollection(path))))  # again, and not consolidated again
    check = dense_x(ad.io.read_elem(zarr.open_group(path / "dataset_0", use_consolidated=False)))
    got = read(DatasetCollection(path))
    names = ad.io.read_elem(next(iter(DatasetCollection(path)))["obs"]).index
    np.testing.assert_array_equal([got[name][0] for name in names], check)


@pytest.mark.parametrize("edit", [x_of_other_sparsity, x_of_the_same_shape, values_of_x_alone, obs])
def test_a_loader_under_which_a_dataset_is_edited(path, edit):
    collection = DatasetCollection(path)
    want = read(collection)
    held = loader(dense=True, layers=[], obsm=[], prefetch_bytes=1).use_collection(collection)
    batches = iter(held)
    got = [next(batches)]
    edit(list(collection)[1])
    errors = []
    for epoch in (batches, held):
        try:
            got += list(epoch)
        except CollectionChangedError as error:
            errors.append(str(error))
    assert all("dataset_1" in error for error in errors)
    assert errors or edit is obs  # which was read when the loader was made
    for batch in got:
        for x, name in zip(batch["X"], batch["obs"].index, strict=True):
            np.testing.assert_array_equal(x, want[name][0])


def more(built, folder):
    """An input of 20 other cells."""
    other = ad.read_h5ad(built[1])[:20].copy()
    other.obs_names = [f"new{i}" for i in range(20)]
    other.write_h5ad(folder / "b.h5ad")
    return folder / "b.h5ad"


@pytest.mark.parametrize("edit", [x_of_other_dtype, a_new_obsm, a_column_of_obs, an_attribute, everything])
def test_no_build_loses_an_edit(path, built, tmp_path, edit):
    collection = DatasetCollection(path)
    edit(next(iter(collection)))
    new, want = more(built, tmp_path), ad.read_zarr(path / "dataset_0")
    for mode in ("extend", "reshuffle"):
        with pytest.raises(CollectionError, match="was edited, which writing its datasets anew would lose: dataset_0"):
            collection.add_adatas([new], mode=mode)
    with pytest.raises(
        CollectionError, match="dataset_0.*; give another path, move the collection elsewhere, or remove"
    ):
        DatasetCollection(path, mode="w").add_adatas([new])
    with pytest.raises(CollectionError, match="anew would lose: dataset_0.*; build a new collection with these"):
        DatasetCollection(path).repack(tmp_path / "packed.zarr", "packed")
    assert DatasetCollection(path).gc() == []
    now = ad.read_zarr(path / "dataset_0")
    np.testing.assert_array_equal(dense_x(now), dense_x(want))
    pd.testing.assert_frame_equal(now.obs, want.obs)
    assert set(now.obsm) == set(want.obsm)  # in the order of a listing


def test_appending_leaves_an_edit_as_it_is(path, built, tmp_path):
    collection = DatasetCollection(path)
    x_of_other_sparsity(next(iter(collection)))
    want = expected(path)
    collection.add_adatas([more(built, tmp_path)], mode="append", seed=1)
    assert collection.verify().edited == ("dataset_0/X",)  # and the root's copy is of now
    got = read(collection)
    assert len(got) == 170
    for name, x in zip(want.obs_names, dense_x(want), strict=True):
        np.testing.assert_array_equal(got[name][0], x)
    through_root = zarr.open_group(path, mode="r", use_consolidated=True)["dataset_0"]
    np.testing.assert_array_equal(dense_x(ad.io.read_elem(through_root)), dense_x(ad.read_zarr(path / "dataset_0")))


def test_edited_datasets_are_inputs_of_a_new_collection(path, tmp_path):
    x_of_other_dtype(next(iter(DatasetCollection(path))))
    new = DatasetCollection(tmp_path / "new.zarr").add_adatas(
        [path / "dataset_0", path / "dataset_1"], load_adata=without_origin, elements=["-uns/about"], seed=0
    )
    want = expected(path)
    got = read(new)
    for name, x in zip(want.obs_names, dense_x(want), strict=True):
        np.testing.assert_array_equal(got[name][0], x)
    assert new.verify().ok
    view = concat_lazy([path / "dataset_0", path / "dataset_1"])
    np.testing.assert_array_equal(dense_x(view.to_memory()), dense_x(want))


def without_origin(path):
    adata = ad.read_zarr(path)
    del adata.obs["src_path"]
    return adata


class EditAt(Callback):
    """Edits a dataset when a stage has ended."""

    def __init__(self, stage, group):
        self.stage, self.group = stage, group

    def on_stage_end(self, event):
        if event.stage == self.stage:
            x_of_other_dtype(self.group)


@pytest.mark.parametrize("stage", ["scatter", "gather"])
def test_an_edit_while_a_build_reads_the_dataset_is_not_removed(path, built, tmp_path, stage):
    collection = DatasetCollection(path)
    callbacks = [EditAt(stage, next(iter(collection)))]
    collection.add_adatas([more(built, tmp_path)], mode="extend", seed=1, callbacks=callbacks)
    assert ad.read_zarr(path / "dataset_0").X.dtype == np.float64
    with pytest.raises(CollectionError, match="did not write for this collection: dataset_0/X"):
        collection.gc()


def test_a_collection_of_an_earlier_release_is_edited_too(tmp_path):
    shutil.unpack_archive("tests/peers/collection_v1.zip", tmp_path)
    path = next(p for p in tmp_path.rglob("zarr.json") if p.parent.parent == tmp_path or p.parent == tmp_path).parent
    collection = DatasetCollection(path)
    group = next(iter(collection))
    assert group.metadata.consolidated_metadata is None
    before = read_x(collection)
    write(group, "X", ad.io.read_elem(group["X"]).astype(np.float64) * 2)
    assert f"{group.basename}/X" in collection.verify().edited
    after = read_x(DatasetCollection(path))
    assert set(before) == set(after)
    names = ad.io.read_elem(group["obs"]).index
    for name in names:
        np.testing.assert_array_equal(after[name], before[name] * 2)


def read_x(collection):
    batches = loader(dense=True).use_collection(collection)
    return {n: x for b in batches for n, x in zip(b["obs"].index, b["X"], strict=True)}
