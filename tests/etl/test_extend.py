"""Extending a collection: nothing is lost, and each mode does what it says."""

import re
import tempfile
from pathlib import Path

import anndata as ad
import dask
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from annbatch_dask import DatasetCollection, Loader
from annbatch_dask.errors import CollectionError, IntegrityError, SchemaError
from annbatch_dask.testing import make_adata
from annbatch_dask.utils import load_all_aligned
from tests.etl.inputs import adatas, assert_conserved, assert_holds, exact_or_refused, on_genes, write
from tests.tools import tree_digest

MODES = ("extend", "append", "reshuffle")


def dense_and_sparse(inputs):
    return len({sp.issparse(a.X) for a in inputs}) > 1


def shares_no_gene(first, other):
    return bool(first.n_vars and other.n_obs and other.n_vars) and not set(first.var_names) & set(other.var_names)


@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    inputs=st.tuples(adatas(0), adatas(1), adatas(2)),
    mode=st.sampled_from(MODES),
    genes=st.sampled_from(["collection", "union"]),
    dataset_size=st.sampled_from([4, 9, 1000]),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_row_is_there_once(inputs, mode, genes, dataset_size, shuffle, seed):
    inputs = list(inputs)
    if not inputs[0].n_obs or not inputs[1].n_obs or (mode, genes) == ("append", "union"):
        return
    if not sp.issparse(inputs[0].X) and dense_and_sparse(inputs):
        return  # refused, see below
    with tempfile.TemporaryDirectory() as tmp, dask.config.set(scheduler="synchronous"), exact_or_refused():
        paths = [Path(tmp) / f"in{i}.h5ad" for i in range(3)]
        for a, path in zip(inputs, paths, strict=True):
            write(a, path, "gzip")
        options = {"dataset_size": dataset_size, "shuffle": shuffle, "seed": seed, "n_obs_per_chunk": 4}
        options["allow_mixed_counts"] = True
        collection = DatasetCollection(Path(tmp) / "out.zarr").add_adatas(paths[:1], **options)
        before = [d.name for d in collection.manifest.datasets]
        if genes == "collection" and any(shares_no_gene(inputs[0], a) for a in inputs[1:]):
            with pytest.raises(SchemaError, match="none of its .* genes|no dtype holds both exactly"):
                collection.add_adatas(paths[1:], mode=mode, genes=genes, **options)
            return
        collection.add_adatas(paths[1:], mode=mode, genes=genes, **options)
        kept = inputs[0].var_names.tolist()
        new = inputs[1].var_names.union(inputs[2].var_names)
        names = kept + [g for g in new if g not in kept] * (genes == "union")
        assert_holds(collection, paths, inputs, names, on_genes(inputs, names))
        after = [d.name for d in collection.manifest.datasets]
        assert len(set(before) & set(after)) == (len(before) if mode == "append" else 0)
        assert len(after) == len(before) or mode != "extend"
        assert sorted(p.name for p in (Path(tmp) / "out.zarr").iterdir()) == sorted([*after, "zarr.json"])
        assert [s.n_obs for s in collection.manifest.sources] == [a.n_obs for a in inputs]


@pytest.fixture
def three(tmp_path):
    genes = [f"g{i}" for i in range(30)]
    paths = [tmp_path / f"{i}.h5ad" for i in range(3)]
    inputs = [make_adata(n, genes, seed=i) for i, n in enumerate((120, 90, 60))]
    for a, path in zip(inputs, paths, strict=True):
        a.obs["row"] = np.arange(a.n_obs)
        a.write_h5ad(path)
    return paths, inputs


def create(path, paths, **options):
    with dask.config.set(scheduler="synchronous"):
        return DatasetCollection(path).add_adatas(paths, **{"seed": 0, "dataset_size": 50} | options)


@pytest.mark.parametrize("mode", MODES)
def test_one_after_another(tmp_path, three, mode):
    paths, inputs = three
    collection = create(tmp_path / "o.zarr", paths[:1])
    for path in paths[1:]:
        with dask.config.set(scheduler="synchronous"):
            DatasetCollection(tmp_path / "o.zarr").add_adatas([path], mode=mode, seed=7, dataset_size=50)
    collection = DatasetCollection(tmp_path / "o.zarr", mode="r")
    assert_conserved(collection, paths, inputs)
    assert [b.mode for b in collection.manifest.builds] == ["create", mode, mode]
    numbers = [d.number for d in collection.manifest.datasets]
    assert collection.manifest.last_dataset == max(numbers)
    written = {"extend": 9, "append": 7, "reshuffle": 14}[mode]  # names are never used twice
    assert max(numbers) == written - 1


@pytest.mark.parametrize("mode", MODES)
def test_old_categories_keep_their_codes(tmp_path, three, mode):
    paths, inputs = three
    for path, a, kinds in zip(paths, inputs, (["x", "z"], ["a", "x"], ["0", "z", "b"]), strict=True):
        a.obs["kind"] = pd.Categorical(np.resize(kinds, a.n_obs), categories=kinds)
        a.write_h5ad(path)
    collection = create(tmp_path / "o.zarr", paths[:1])
    for path, expected in zip(paths[1:], (["x", "z", "a"], ["x", "z", "a", "0", "b"]), strict=True):
        with dask.config.set(scheduler="synchronous"):
            collection.add_adatas([path], mode=mode, seed=7, dataset_size=50)
        loader = Loader(preload_to_gpu=False, obs_codes=["kind"], obsm=[], layers=[]).use_collection(collection)
        assert loader.obs_categories["kind"].tolist() == expected
    assert_conserved(collection, paths, inputs)


def layer_as_x(group):
    adata = load_all_aligned(group)
    return ad.AnnData(adata.layers["l"], obs=adata.obs, var=adata.var)


@pytest.mark.parametrize("mode", MODES)
def test_what_range_values_have_is_known_of_all_datasets(tmp_path, three, mode):
    paths, inputs = three
    for path, a, low, high in zip(paths, inputs, (-0.5, 0, -3), (4, 300, 5), strict=True):
        a.X.data[:] = np.minimum(a.X.data, 4)
        a.X.data[0] = high
        a.layers["l"] = a.X.copy()
        a.layers["l"].data[0] = low
        a.write_h5ad(path)

    def loader(dtype, **options):
        made = Loader(preload_to_gpu=False, dtype=dtype, layers=[], obsm=[], batch_size=30)
        return made.use_collection(collection, **options)

    collection = create(tmp_path / "o.zarr", paths[:1])
    assert next(iter(loader("uint8")))["X"].dtype == np.uint8
    with pytest.raises(SchemaError, match="lie between -0.5 and 4, not all of them whole"):
        loader("int8", load_adata=layer_as_x)
    with dask.config.set(scheduler="synchronous"):
        collection.add_adatas(paths[1:], mode=mode, seed=7, dataset_size=50)
    with pytest.raises(SchemaError, match="lie between 0 and 300: it holds whole numbers from 0 to 255"):
        loader("uint8")
    loader("int16")
    with pytest.raises(SchemaError, match="lie between -3 and 4, not all of them whole"):
        loader("int16", load_adata=layer_as_x)


def test_extending_deals_new_cells_evenly_and_keeps_old_ones_in_their_dataset(tmp_path, three):
    paths, inputs = three
    collection = create(tmp_path / "o.zarr", paths[:1])
    before = [set(ad.io.read_elem(g["obs"])["row"]) for g in collection]
    with dask.config.set(scheduler="synchronous"):
        collection.add_adatas(paths[1:], seed=1)
    frames = [ad.io.read_elem(g["obs"]) for g in collection]
    old = [set(f[f["src_path"] == str(paths[0])]["row"]) for f in frames]
    assert old == before
    assert [len(f) for f in frames] == [50 + 62, 50 + 63, 20 + 25]
    for f in frames:  # old and new cells are mixed: the mean place of new ones is near the middle
        places = np.flatnonzero(f["src_path"] != str(paths[0])) / len(f)
        assert abs(places.mean() - 0.5) < 4 * np.sqrt(1 / 12 / len(places))


@pytest.mark.parametrize("mode", MODES)
def test_names_of_genes_are_stored_alike_whichever_dtype_pandas_has_for_text(tmp_path, three, mode):
    (first, second, _), _ = three
    collection = create(tmp_path / "o.zarr", [first])
    with dask.config.set(scheduler="synchronous"):
        collection.add_adatas([second], mode=mode, seed=1)
    indexes = [group[f"{frame}/_index"] for group in collection for frame in ("var", "obs")]
    assert {index.attrs["encoding-type"] for index in indexes} == {"string-array"}


def test_the_same_extension_gives_the_same_bytes_and_is_not_done_twice(tmp_path, three):
    paths, _ = three
    digests = []
    for name in ("a", "b"):
        collection = create(tmp_path / name / "o.zarr", paths[:1])
        with dask.config.set(scheduler="synchronous"):
            collection.add_adatas(paths[1:], seed=1)
            digests.append(tree_digest(collection.path))
            collection.add_adatas(paths[1:], seed=1)
        assert tree_digest(collection.path) == digests[-1]
    assert digests[0] == digests[1]


def test_an_input_that_is_there_already_is_refused_where_asked(tmp_path, three):
    paths, _ = three
    collection = create(tmp_path / "o.zarr", paths[:2])
    with pytest.raises(CollectionError, match=r"1\.h5ad is in .* already, with 90 cells; leave it out"):
        collection.add_adatas(paths[1:], seed=1, on_duplicate_source="error")
    with pytest.raises(CollectionError, match="leave it out"):
        collection.add_adatas(paths[:2], seed=1, on_duplicate_source="error")  # another seed


def test_a_layer_that_new_inputs_lack_is_refused(tmp_path, three):
    paths, inputs = three
    inputs[0].layers["raw"] = inputs[0].X.copy()
    inputs[0].write_h5ad(paths[0])
    collection = create(tmp_path / "o.zarr", paths[:1])
    with pytest.raises(SchemaError, match="the collection has layers/raw and an input lacks it"):
        collection.add_adatas(paths[1:])


def test_a_dense_collection_stays_dense(tmp_path, three):
    paths, inputs = three
    inputs[0].X = inputs[0].X.toarray()
    inputs[0].write_h5ad(paths[0])
    collection = create(tmp_path / "o.zarr", paths[:1])
    with pytest.raises(SchemaError, match="X is dense in the collection and sparse in an input"):
        collection.add_adatas(paths[1:])


@pytest.mark.parametrize(("options", "match"), [({"mode": "a"}, "mode is 'a'"), ({"genes": "both"}, "genes 'both'")])
def test_modes_that_do_not_exist(tmp_path, three, options, match):
    with pytest.raises(ValueError, match=match):
        DatasetCollection(tmp_path / "o.zarr").add_adatas(three[0], **options)


def test_append_cannot_add_genes(tmp_path, three):
    collection = create(tmp_path / "o.zarr", three[0][:1])
    with pytest.raises(ValueError, match="mode='append' leaves the datasets as they are"):
        collection.add_adatas(three[0][1:], mode="append", genes="union")


def test_the_plan_says_of_which_genes_older_cells_have_no_counts(tmp_path, three):
    collection = create(tmp_path / "o.zarr", three[0][:1], var_subset=["g1", "g2"])
    assert re.search("new genes +28, of which", str(collection.plan_adatas(three[0][1:], genes="union")))
    assert "new genes" not in str(collection.plan_adatas(three[0][1:]))


def test_an_extension_keeps_the_genes_that_are_there(tmp_path, three):
    subset = ["g1", "g2"]
    collection = create(tmp_path / "o.zarr", three[0][:1], var_subset=subset)
    with pytest.raises(SchemaError, match=r"var_subset lacks 1 of the collection's 2 genes, such as \['g2'\]"):
        collection.add_adatas(three[0][1:], var_subset=["g1", "g3"])
    assert re.search(
        "not found +1 name of var_subset", str(collection.plan_adatas(three[0][1:], var_subset=[*subset, "g3"]))
    )
    with pytest.warns(UserWarning, match="1 of the 3 names of var_subset are no genes: 'g3'"):
        collection.add_adatas(three[0][1:], var_subset=[*subset, "g3"])
    assert list(collection.var.index) == subset


def flip_a_bit(dataset):
    shard = dataset / "X/data/c/0"
    raw = bytearray(shard.read_bytes())
    raw[3] ^= 1
    shard.write_bytes(raw)


def change_a_value(dataset):
    """To another one, of which the file is as long."""
    array, shard = zarr.open_array(dataset / "obs/n_counts", mode="r+"), dataset / "obs/n_counts/c/0"
    was, size = array[0], shard.stat().st_size
    for other in array[1:]:
        array[0] = other
        if other != was and shard.stat().st_size == size:
            return
    pytest.fail("each other value gives a file of another size")


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (flip_a_bit, "dataset_1/X/data: entries 0 to .* are damaged .*; restore the file"),
        (change_a_value, "dataset_1: its rows have fingerprint"),
    ],
)
def test_old_rows_that_are_damaged_are_not_carried_over(tmp_path, three, damage, match):
    paths, _ = three
    collection = create(tmp_path / "o.zarr", paths[:1])
    damage(tmp_path / "o.zarr/dataset_1")
    before = (tmp_path / "o.zarr/zarr.json").read_bytes()
    with pytest.raises(IntegrityError, match=match):
        create(tmp_path / "o.zarr", paths[1:])
    assert (tmp_path / "o.zarr/zarr.json").read_bytes() == before
    assert collection.manifest.n_obs == 120


def test_a_file_of_another_scale_than_the_collection_is_told_what_it_can_change(three):
    """The remedy names the new file, not a dataset, whose matrix cannot be chosen."""
    paths = three[0]
    normal = ad.read_h5ad(paths[0])
    normal.X = normal.X.log1p()
    normal.write_h5ad(paths[0])
    with dask.config.set(scheduler="synchronous"):
        collection = DatasetCollection(paths[0].parent / "out.zarr").add_adatas(paths[:1])
        with pytest.raises(SchemaError, match=r"choose the matrix of .*1\.h5ad that is like the collection's X"):
            collection.add_adatas(paths[1:2])
