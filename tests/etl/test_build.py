"""The build as a user calls it: formats, engines, determinism, memory figures, what is carried and what is left out."""

import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import anndata as ad
import dask
import numpy as np
import pandas as pd
import pytest
import zarr

from annbatch_dask import DatasetCollection
from annbatch_dask.errors import IntegrityError, SelectionError
from annbatch_dask.manifest import MatrixRecord
from annbatch_dask.storage.folder import Folder
from annbatch_dask.storage.metadata import open_by_copy
from annbatch_dask.storage.spill import SpillReader
from tests.etl.inputs import dense_x
from tests.tools import Counter, rows_of, tree_digest


def build(out, paths, scheduler="synchronous", **options):
    with dask.config.set(scheduler=scheduler):
        return DatasetCollection(out).add_adatas(paths, **({"seed": 1, "dataset_size": 250} | options))


def test_synchronous_and_threaded_schedulers_agree_to_the_byte(tmp_path, h5ad_pair):
    one = build(tmp_path / "a.zarr", h5ad_pair)
    two = build(tmp_path / "b.zarr", h5ad_pair, "threads")
    assert tree_digest(one.path) == tree_digest(two.path)
    assert len(tree_digest(one.path)) > 50


def test_another_seed_is_another_order(tmp_path, h5ad_pair):
    one = build(tmp_path / "a.zarr", h5ad_pair)
    two = build(tmp_path / "b.zarr", h5ad_pair, seed=2)
    assert one.obs().index.tolist() != two.obs().index.tolist()
    assert rows_of(one) == rows_of(two)


def test_memory_does_not_change_the_result(tmp_path, h5ad_pair, monkeypatch):
    one = build(tmp_path / "a.zarr", h5ad_pair)
    monkeypatch.setitem(dask.config.config, "annbatch_dask", {"block_size": 4000})
    seen = Counter()
    two = build(tmp_path / "b.zarr", h5ad_pair, callbacks=[seen])
    assert seen.tasks["scatter"] > 5
    assert tree_digest(one.path) == tree_digest(two.path)


def test_events_add_up_to_what_was_announced(tmp_path, h5ad_pair):
    seen = Counter()
    build(tmp_path / "a.zarr", h5ad_pair, callbacks=[seen])
    for stage in ("scatter", "gather"):
        n_tasks, n_rows, n_bytes = seen.announced[stage]
        assert (seen.tasks[stage], seen.rows[stage]) == (n_tasks, n_rows) == (n_tasks, 500)
        assert seen.bytes[stage] == pytest.approx(n_bytes, rel=0.01)


def test_only_the_log_is_left_beside_the_collection(tmp_path, h5ad_pair):
    build(tmp_path / "a.zarr", h5ad_pair)
    assert {p.name for p in tmp_path.iterdir()} == {"a.zarr", "a.zarr.log"}
    assert not list((tmp_path / "a.zarr").rglob(".tmp-*"))


def test_scratch_elsewhere(tmp_path, h5ad_pair):
    build(tmp_path / "a.zarr", h5ad_pair, scratch=tmp_path / "spill")
    assert {p.name for p in tmp_path.iterdir()} == {"a.zarr", "a.zarr.log"}


def test_two_collections_of_one_plan_share_a_scratch_folder(tmp_path, h5ad_pair):
    (tmp_path / "spill").mkdir()
    (tmp_path / "spill/of somebody else").touch()
    one = build(tmp_path / "a.zarr", h5ad_pair, scratch=tmp_path / "spill")
    two = build(tmp_path / "b.zarr", h5ad_pair, scratch=tmp_path / "spill")
    assert tree_digest(one.path) == tree_digest(two.path)
    assert [p.name for p in (tmp_path / "spill").iterdir()] == ["of somebody else"]


def test_a_function_that_was_mended_is_used_by_the_next_call(tmp_path, h5ad_pair):
    def broken(path):
        if (tmp_path / "a.zarr.scratch").exists():  # not while scanning
            raise RuntimeError
        return ad.read_h5ad(path)

    with pytest.raises(RuntimeError):
        build(tmp_path / "a.zarr", h5ad_pair, load_adata=broken)
    build(tmp_path / "a.zarr", h5ad_pair, load_adata=ad.read_h5ad)


def test_an_interrupted_build_goes_on(tmp_path, h5ad_pair, monkeypatch):
    whole = build(tmp_path / "whole.zarr", h5ad_pair)

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("annbatch_dask.etl.build.commit", fail)
        build(tmp_path / "a.zarr", h5ad_pair)
    assert DatasetCollection(tmp_path / "a.zarr").is_empty
    seen = Counter()
    again = build(tmp_path / "a.zarr", h5ad_pair, callbacks=[seen])
    assert seen.reused == seen.tasks["scatter"] + seen.tasks["gather"]
    assert tree_digest(again.path) == tree_digest(whole.path)


def test_a_target_removed_after_an_interrupted_build_is_written_again(tmp_path, h5ad_pair, monkeypatch):
    """Receipts of gather tasks outlive their datasets; trusting them would publish a collection without its cells."""
    whole = build(tmp_path / "whole.zarr", h5ad_pair)

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("annbatch_dask.etl.build.commit", fail)
        build(tmp_path / "a.zarr", h5ad_pair)
    shutil.rmtree(tmp_path / "a.zarr")
    again = build(tmp_path / "a.zarr", h5ad_pair)
    assert tree_digest(again.path) == tree_digest(whole.path)


def test_rows_that_are_not_those_that_were_read_are_not_published(tmp_path, h5ad_pair, monkeypatch):
    marks = SpillReader.marks
    others = property(lambda reader: marks.fget(reader) + np.uint64(1))
    monkeypatch.setattr(SpillReader, "marks", others)
    with pytest.raises(IntegrityError, match="fingerprint"):
        build(tmp_path / "a.zarr", h5ad_pair)
    assert DatasetCollection(tmp_path / "a.zarr").is_empty


def test_datasets_that_are_right_each_and_wrong_together_are_not_published(tmp_path, h5ad_pair, monkeypatch):
    """As if a spill file, whole as it is, were of another build."""
    from annbatch_dask.etl import build as module

    make = module.gather

    def another(file, task):
        receipt = make(file, task)
        return receipt if task.dataset else replace(receipt, fingerprint=f"{int(receipt.fingerprint, 16) ^ 1:016x}")

    monkeypatch.setattr(module, "gather", another)
    with pytest.raises(IntegrityError, match="the rows written have fingerprint"):
        build(tmp_path / "a.zarr", h5ad_pair)
    assert DatasetCollection(tmp_path / "a.zarr").is_empty


def test_plan_touches_nothing(tmp_path, h5ad_pair):
    plan = DatasetCollection(tmp_path / "o.zarr").plan_adatas(h5ad_pair, seed=3, dataset_size=200)
    assert not list(tmp_path.iterdir())
    assert (plan.n_obs, plan.n_vars, plan.n_datasets, plan.seed) == (500, 58, 3, 3)
    for word in ("tasks", "bytes", "limit", "peak", "500 cells", "3 datasets"):
        assert word in repr(plan)
    again = DatasetCollection(tmp_path / "o.zarr").plan_adatas(h5ad_pair, seed=3, dataset_size=200)
    assert plan.fingerprint == again.fingerprint
    other = DatasetCollection(tmp_path / "o.zarr").plan_adatas(h5ad_pair, seed=4, dataset_size=200)
    assert plan.fingerprint != other.fingerprint


def test_dataset_size_in_bytes(tmp_path, h5ad_pair):
    plan = DatasetCollection(tmp_path / "o.zarr").plan_adatas(h5ad_pair, seed=0, dataset_size="20KB")
    assert plan.n_datasets == -(-plan.n_obs // plan.layout.sizes[0])
    mean = plan.n_bytes_read / plan.n_obs
    assert 0.9 * 20 * 1024 <= plan.layout.sizes[0] * mean <= 20 * 1024


def test_rng_is_a_seed(tmp_path, h5ad_pair):
    one = build(tmp_path / "a.zarr", h5ad_pair, seed=None, rng=np.random.default_rng(5))
    two = build(tmp_path / "b.zarr", h5ad_pair, seed=None, rng=np.random.default_rng(5))
    assert tree_digest(one.path) == tree_digest(two.path)


def load_filtered(path):
    """A loader as users write it: lazily, filtered, with a column of its own."""
    adata = ad.experimental.read_lazy(path)
    adata = adata[np.flatnonzero(adata.obs["passed"].to_numpy())]
    return ad.AnnData(X=adata.X, obs=adata.obs.to_memory().assign(extra=1.5), var=adata.var.to_memory())


def load_view(path):
    adata = ad.read_h5ad(path)
    adata.obsm["X_pca"] = np.linspace(0, 1, 2 * adata.n_obs).reshape(-1, 2)
    return adata[:]


@pytest.mark.parametrize("how", ["memory", "view", "backed", "lazy and filtered", "sparse dataset"])
def test_load_adata_may_return_anything(tmp_path, h5ad_pair, how):
    import h5py

    loads = {
        "memory": ad.read_h5ad,
        "view": load_view,
        "backed": lambda p: ad.read_h5ad(p, backed="r"),
        "lazy and filtered": load_filtered,
        "sparse dataset": lambda p: ad.AnnData(
            X=ad.io.sparse_dataset(h5py.File(p)["X"]), obs=ad.read_h5ad(p).obs, var=ad.read_h5ad(p).var
        ),
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)  # read_lazy's on consolidated metadata
        out = build(tmp_path / "o.zarr", h5ad_pair, load_adata=loads[how])
    inputs = [ad.read_h5ad(p) for p in h5ad_pair]
    want = ad.concat(inputs, join="outer")
    if how == "lazy and filtered":
        want = want[want.obs["passed"]]
        assert (out.obs()["extra"] == 1.5).all()
    got = ad.concat([ad.io.read_zarr(g) for g in out])
    assert sorted(got.obs_names) == sorted(want.obs_names)
    np.testing.assert_array_equal(dense_x(got), dense_x(want[got.obs_names]))
    assert got.obs["cell_type"].astype(str).tolist() == want[got.obs_names].obs["cell_type"].astype(str).tolist()


def test_var_subset_and_merge(tmp_path, h5ad_pair):
    inputs = [ad.read_h5ad(p) for p in h5ad_pair]
    for i, a in enumerate(inputs):
        a.var["symbol"] = [n.upper() for n in a.var_names]
        a.var["own"] = i
        a.write_h5ad(tmp_path / f"{i}.h5ad")
    subset = ["gene_5", "gene_1", "gene_40", "no such gene"]
    with pytest.warns(UserWarning, match="1 of the 4 names of var_subset are no genes: 'no such gene'$"):
        out = build(tmp_path / "o.zarr", [tmp_path / "0.h5ad", tmp_path / "1.h5ad"], var_subset=subset, merge="first")
    want = ad.concat(inputs, join="outer", merge="first")
    want = want[:, want.var_names.isin(subset)].copy()
    got = ad.concat([ad.io.read_zarr(g) for g in out], merge="first")
    assert got.var_names.tolist() == want.var_names.tolist()
    pd.testing.assert_frame_equal(got.var, want.var)
    np.testing.assert_array_equal(dense_x(got), dense_x(want[got.obs_names]))


def test_var_columns_of_a_single_input_are_kept(tmp_path, h5ad_pair):
    a = ad.read_h5ad(h5ad_pair[0])
    a.var["symbol"] = [n.upper() for n in a.var_names]
    a.write_h5ad(tmp_path / "a.h5ad")
    out = build(tmp_path / "o.zarr", [tmp_path / "a.h5ad"])
    pd.testing.assert_frame_equal(out.var, ad.read_h5ad(tmp_path / "a.h5ad").var)


def test_values_take_the_smallest_dtype_and_say_what_they_were(tmp_path, h5ad_pair):
    out = build(tmp_path / "o.zarr", h5ad_pair)
    for group in out:
        assert group["X/data"].dtype == np.uint8
        assert group["X/indices"].dtype == np.uint8
        assert group["X"].attrs["source-dtype"] == "float32"
    facts = {"kind": "csr", "dtype": "uint8", "source_dtype": "float32", "n_nan": 0, "n_inf": 0}
    facts |= {"integral": True, "low": 0, "high": max(int(ad.read_h5ad(path).X.max()) for path in h5ad_pair)}
    assert out.manifest.matrices == {"X": MatrixRecord(**facts)}


@pytest.mark.parametrize(
    "compressor",
    [
        (),
        pytest.param(zarr.codecs.ZstdCodec(level=1), marks=pytest.mark.chaos),
        zarr.codecs.GzipCodec(level=1),
        zarr.codecs.BloscCodec(cname="zstd", clevel=1),
    ],
    ids=["none", "zstd", "gzip", "blosc-zstd"],
)
def test_compressors(tmp_path, h5ad_pair, compressor):
    plain = build(tmp_path / "a.zarr", h5ad_pair)
    out = build(tmp_path / "b.zarr", h5ad_pair, zarr_compressor=compressor)
    assert rows_of(out) == rows_of(plain)


def test_sharding_is_as_asked(tmp_path, h5ad_pair):
    out = build(tmp_path / "o.zarr", h5ad_pair, n_obs_per_chunk=8, shard_size=32, dataset_size=200)
    group = next(iter(out))
    data, n = group["X/data"], 200
    assert data.chunks[0] == round(8 * data.shape[0] / n)
    assert data.shards[0] == data.chunks[0] * 4
    assert len(list((Path(out.path) / "dataset_0/X/data/c").iterdir())) == -(-data.shape[0] // data.shards[0])


def test_consolidated_metadata_equal_those_on_disk(tmp_path, h5ad_pair):
    out = build(tmp_path / "o.zarr", h5ad_pair)
    consolidated = zarr.open_group(out.path, mode="r", use_consolidated=True)
    plain = zarr.open_group(out.path, mode="r", use_consolidated=False)
    names = sorted(n for n, _ in plain.members(max_depth=None))
    assert sorted(n for n, _ in consolidated.members(max_depth=None)) == names
    for name in names:
        attributes = plain[name].metadata.to_dict()["attributes"]
        for own in ("annbatch_dask_files", "annbatch_dask_nodes"):  # these stand in each dataset's own document alone
            attributes.pop(own, None)
        assert consolidated[name].metadata.to_dict()["attributes"] == attributes
    dataset = zarr.open_group(Path(out.path) / "dataset_0", mode="r")
    assert dataset.metadata.consolidated_metadata is None  # its owner may write to it
    copied = open_by_copy(dataset)
    assert sorted(n for n, _ in copied.members(max_depth=None)) == sorted(n for n, _ in dataset.members(max_depth=None))
    assert copied["X"].metadata.consolidated_metadata is not None


def test_read_lazy_opens_every_dataset(tmp_path, h5ad_pair):
    out = build(tmp_path / "o.zarr", h5ad_pair)
    want = ad.concat([ad.io.read_zarr(g) for g in out])
    root = zarr.open_group(out.path, mode="r")  # whose metadata are consolidated
    lazy = [ad.experimental.read_lazy(root[f"dataset_{k}"]) for k in range(len(out))]
    X = np.concatenate([a.X.compute().toarray() for a in lazy])
    np.testing.assert_array_equal(X, dense_x(want))
    names = np.concatenate([np.asarray(a.obs_names) for a in lazy])
    assert names.tolist() == want.obs_names.tolist()
    kinds = np.concatenate([np.asarray(a.obs["cell_type"]) for a in lazy])
    assert kinds.tolist() == want.obs["cell_type"].tolist()


def test_a_zarr_group_as_target_and_as_input(tmp_path, h5ad_pair):
    target = zarr.open_group(tmp_path / "o.zarr", mode="w")
    first = DatasetCollection(target)
    with dask.config.set(scheduler="synchronous"):
        first.add_adatas(h5ad_pair, seed=0, dataset_size=300)
        with pytest.warns(UserWarning, match="has a column src_path, which is input_src_path in the collection"):
            second = DatasetCollection(tmp_path / "p.zarr").add_adatas(list(first), seed=1, dataset_size=300)
    assert second.n_obs == first.n_obs == 500
    assert sorted(second.obs().index) == sorted(first.obs().index)


def test_obs_reads_columns_across_datasets(tmp_path, h5ad_pair):
    out = build(tmp_path / "o.zarr", h5ad_pair)
    frame = out.obs(columns=["src_path", "cell_type"])
    assert frame.columns.tolist() == ["src_path", "cell_type"]
    assert len(frame) == 500
    assert isinstance(frame["src_path"].dtype, pd.CategoricalDtype)
    assert frame["src_path"].cat.categories.tolist() == [str(p) for p in h5ad_pair]
    assert out.obs(columns=[]).shape == (out.n_obs, 0)
    with pytest.raises(SelectionError, match=r"obs has no column 'no such'; it has .*'cell_type'.*'src_path'"):
        out.obs(["cell_type", "no such"])


def test_folder_publishes_whole_files_or_none(tmp_path):
    folder = Folder(str(tmp_path / "f"))
    with pytest.raises(RuntimeError), folder.create("x") as f:
        f.write(b"half")
        raise RuntimeError
    assert folder.names() == []
    folder.write("x", b"whole")
    assert folder.names() == ["x"]
    assert folder.read("x") == b"whole"
