"""A collection whose files are cut short, flipped or lost: verify names the file, and the loader yields no wrong row."""

import shutil

import anndata as ad
import dask
import numpy as np
import pandas as pd
import pytest
import zarr

from annbatch_dask import DatasetCollection, Loader, read_lazy
from annbatch_dask.errors import AnnbatchDaskError, IntegrityError
from annbatch_dask.testing import make_adata
from tests.etl.inputs import dense_x

GENES = [f"g{i}" for i in range(30)]
# What damage to the root's JSON may mean, before and after it is known to be a collection.
ANY = (AnnbatchDaskError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)


@pytest.fixture(scope="module", params=["lz4", "dense"])
def built(request, tmp_path_factory):
    """A collection of two datasets, and its rows by name: X and cell type."""
    folder = tmp_path_factory.mktemp(request.param)
    adata = make_adata(150, GENES, seed=0)
    if request.param == "dense":
        adata.X = adata.X.toarray()
    adata.write_h5ad(folder / "a.h5ad")
    options = {"zarr_compressor": ()} if request.param == "dense" else {}
    with dask.config.set(scheduler="synchronous"):
        collection = DatasetCollection(folder / "o.zarr").add_adatas(
            [folder / "a.h5ad"], seed=0, dataset_size=80, n_obs_per_chunk=16, shard_size=32, **options
        )
    rows = ad.concat([ad.io.read_zarr(g) for g in collection])
    return folder / "o.zarr", dict(
        zip(rows.obs_names, zip(dense_x(rows), rows.obs["cell_type"], strict=True), strict=True)
    )


def epoch(path, rows):
    """Stream an epoch, every row of which must be right; returns how many came."""
    loader = Loader(batch_size=10, chunk_size=5, preload_nchunks=2, shuffle=True, seed=0, dense=True)
    n = 0
    for batch in loader.use_collection(DatasetCollection(path, mode="r")):
        for x, name, kind in zip(batch["X"], batch["obs"].index, batch["obs"]["cell_type"], strict=True):
            np.testing.assert_array_equal(x, rows[name][0])
            assert kind == rows[name][1]
            n += 1
    return n


def damages(raw, rng):
    """The file's content after each kind of damage; None where it is gone."""
    yield "cut", raw[: int(rng.integers(len(raw)))]
    flipped = bytearray(raw)
    flipped[int(rng.integers(len(raw)))] ^= 1 << int(rng.integers(8))
    yield "flipped", bytes(flipped)
    yield "gone", None


def put(file, content):
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)


def test_no_wrong_row_is_yielded_and_verify_names_the_file(built, tmp_path):
    path, rows = built
    copy = shutil.copytree(path, tmp_path / "o.zarr")
    rng = np.random.default_rng(0)
    files = [p for p in sorted((copy / "dataset_1").rglob("*")) if p.is_file() and p.stat().st_size]
    shards = [p for p in files if "X" in p.parts and "c" in p.parts]
    assert len(shards) >= 3
    others = [p for p in files if p not in shards]
    for i, file in enumerate([*rng.choice(others, 6, replace=False), *shards[:: len(shards) // 3]]):
        whole = file.read_bytes()
        what, content = list(damages(whole, rng))[i % 3]
        put(file, content)
        where = str(file.relative_to(copy))
        with pytest.raises(IntegrityError, match=where):
            epoch(copy, rows)
        assert where in [p.where for p in DatasetCollection(copy, mode="r").verify().problems], what
        file.write_bytes(whole)
    assert epoch(copy, rows) == 150


@pytest.mark.parametrize("name", ["data", "indices", "indptr"])
def test_a_bit_that_flips_in_a_chunk_ends_the_epoch_before_its_rows(built, tmp_path, name):
    path, rows = built
    copy = shutil.copytree(path, tmp_path / "o.zarr")
    shards = [p for p in sorted((copy / "dataset_0/X").rglob("*")) if "c" in p.parts and p.is_file()]
    file = next((p for p in shards if name in p.parts), shards[0])  # a dense X is one array
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 3] ^= 1
    file.write_bytes(raw)
    with pytest.raises(IntegrityError, match=f"(the chunk at byte|the shard index of).*{file.relative_to(copy)}"):
        epoch(copy, rows)


def test_a_damaged_root_is_refused_or_means_the_same(built, tmp_path):
    path, rows = built
    copy = shutil.copytree(path, tmp_path / "o.zarr")
    root, rng = copy / "zarr.json", np.random.default_rng(1)
    whole, refused = root.read_bytes(), 0
    for _ in range(8):
        for _, content in damages(whole, rng):
            put(root, content)
            try:
                assert epoch(copy, rows) == 150
            except ANY:
                refused += 1
    assert refused > 20
    root.write_bytes(whole)
    assert epoch(copy, rows) == 150


def test_a_collection_read_through_zarr_is_checked_too(built, tmp_path):
    """As on an object store: zarr's own codecs check the chunks."""
    path, _ = built
    copy = shutil.copytree(path, tmp_path / "o.zarr")
    file = next(p for p in sorted((copy / "dataset_0/X").rglob("*")) if "c" in p.parts and p.is_file())
    raw = bytearray(file.read_bytes())
    raw[7] ^= 16
    file.write_bytes(raw)
    array = zarr.open_array(file.parents[len(file.parts) - 1 - file.parts.index("c")], mode="r")
    with pytest.raises(ValueError, match="(?i)checksum"):
        array[...]


READS = {
    "obs": lambda c, _: c.obs(),
    "var": lambda c, _: c.var,
    "split": lambda c, _: c.split({"a": 0.5, "b": 0.5}, by="cell_type"),
    "report": lambda c, _: c.report(),
    "to_lazy": lambda c, _: c.to_lazy(),
    "obs_dataset": lambda c, _: c.obs_dataset(),
    "aggregate": lambda c, _: c.aggregate(by=["cell_type"], func="sum"),
    "gene_stats": lambda c, _: c.gene_stats(),
    "repack": lambda c, tmp_path: c.repack(tmp_path / "packed.zarr", "packed"),
    "read_lazy": lambda c, _: read_lazy(f"{c.path}/dataset_0"),
    "plan": lambda c, tmp_path: DatasetCollection(tmp_path / "new.zarr").plan_adatas([f"{c.path}/dataset_0"]),
    "build": lambda c, tmp_path: DatasetCollection(tmp_path / "new.zarr").add_adatas(list(c)),
}


@pytest.mark.parametrize(
    ("gone", "read"),
    [
        ("obs", "obs"),
        ("obs/cell_type", "obs"),
        ("var", "var"),
        ("obs", "split"),
        ("X", "report"),
        ("obs/cell_type", "to_lazy"),
        ("obs", "repack"),
        # zarr reads zeros in place of these
        ("obs/cell_type/codes/c", "obs"),
        ("obs/cell_type/codes/c", "split"),
        ("var/_index/c", "var"),
        ("X/indptr/c", "report"),
        ("X/data/c", "to_lazy"),
        ("obs/cell_type/codes/c", "obs_dataset"),
        ("X/data/c", "aggregate"),
        ("X/data/c", "gene_stats"),
        ("X/data/c", "repack"),
        ("X/data/c", "read_lazy"),
        ("obs/cell_type/codes/c", "plan"),
        ("X/indices/c", "build"),
    ],
)
def test_what_is_missing_is_said_by_whatever_reads_it(built, tmp_path, gone, read):
    copy = shutil.copytree(built[0], tmp_path / "o.zarr")
    if gone.startswith("X/") and (copy / "dataset_0/X/c").exists():  # it is dense
        gone = "X/c"
    shutil.rmtree(copy / "dataset_0" / gone)
    with pytest.raises(IntegrityError, match=rf"{gone.rpartition('/')[2]}.* is missing.* restore it"):
        READS[read](DatasetCollection(copy), tmp_path)
    assert not (tmp_path / "new.zarr").exists()


def test_what_is_missing_of_others_does_not_matter(built, tmp_path):
    """Who copies obs alone, to look at it, can."""
    path, _ = built
    copy = shutil.copytree(path, tmp_path / "o.zarr", ignore=shutil.ignore_patterns("X"))
    pd.testing.assert_frame_equal(DatasetCollection(copy).obs(), DatasetCollection(path).obs())
    pd.testing.assert_frame_equal(DatasetCollection(copy).var, DatasetCollection(path).var)
