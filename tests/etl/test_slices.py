"""Slices of a dataset's rows: the same collection whatever their size, and no more held than one of them."""

import anndata as ad
import dask
import numpy as np
import pytest
import scipy.sparse as sp

import annbatch_dask.etl.slices
from annbatch_dask import DatasetCollection
from annbatch_dask.etl import gather as gather_module
from annbatch_dask.etl.rows import PLACE
from annbatch_dask.storage.spill import SpillReader
from annbatch_dask.testing import make_adata
from tests.tools import tree_digest

GENES = [f"g{i}" for i in range(40)]


@pytest.fixture
def paths(tmp_path):
    """Counts below 256, above, and no counts: blocks hold them in different dtypes, packed and not."""
    found = []
    for k, scale in enumerate([1, 300, 1]):
        adata = make_adata(150, GENES, seed=k)
        adata.X = sp.csr_matrix(adata.X * np.float32(scale))
        adata.layers["any"] = adata.X.copy()
        if k == 2:
            adata.layers["any"].data += np.float32(0.5)
        adata.layers["dense"] = adata.X.toarray() * np.float32(scale)
        adata.write_h5ad(path := tmp_path / f"{k}.h5ad")
        found.append(str(path))
    return found


def build(out, paths, **options):
    with dask.config.set({"scheduler": "synchronous", "annbatch_dask.block_size": 8000}):
        return DatasetCollection(out).add_adatas(paths, seed=1, dataset_size=200, **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"groupby": "cell_type"}, {"duplicates": "drop"}, {"layout": "packed", "stats_by": "cell_type"}],
    ids=str,
)
def test_slices_of_any_size_make_the_same_collection(tmp_path, paths, monkeypatch, options):
    if "duplicates" in options:
        ad.read_h5ad(paths[0])[::3].copy().write_h5ad(tmp_path / "again.h5ad")
        paths = [*paths, str(tmp_path / "again.h5ad")]
    want = tree_digest(build(tmp_path / "whole.zarr", paths, **options).path)
    for nbytes in (1, 3000):
        monkeypatch.setattr(annbatch_dask.etl.slices, "_SLICE_NBYTES", nbytes)
        collection = build(tmp_path / f"{nbytes}.zarr", paths, **options)
        assert tree_digest(collection.path) == want
    if "duplicates" not in options:
        assert collection.verify(against=paths).ok


def test_matrices_are_unpacked_a_slice_at_a_time(tmp_path, paths, monkeypatch):
    nbytes, most, n_slices = 3000, [], []
    each_slice = gather_module.each_slice

    def watched(*args):
        buffers = set()
        for fixed, ragged in each_slice(*args):
            arrays = [v for name, (v, _) in ragged.items() if not name.endswith("#bytes")]
            arrays += [v for name, v in fixed.items() if name.endswith("#dense")]
            most.append(sum(v.nbytes for v in arrays))
            buffers |= {v.ctypes.data for v in arrays}
            yield fixed, ragged
        n_slices.append(len(most))
        assert len(buffers) < 4 * 2 * 5  # arrays times sets times how often a longer one is needed

    monkeypatch.setattr(annbatch_dask.etl.slices, "_SLICE_NBYTES", nbytes)
    monkeypatch.setattr(gather_module, "each_slice", watched)
    build(tmp_path / "o.zarr", paths)
    assert max(most) <= nbytes
    assert n_slices[-1] > 20


def test_rows_of_a_spill_file_lie_in_the_order_in_which_they_are_written(tmp_path, paths, monkeypatch):
    """So that a slice takes the next few rows of each, and each block of packed values is unpacked once."""
    n_seen = []

    def read_fixed(self, part):
        found = original(self, part)
        if PLACE in found:
            assert (np.diff(found[PLACE].astype(np.int64)) > 0).all()
            n_seen.append(len(found[PLACE]))
        return found

    original = SpillReader.read_fixed
    monkeypatch.setattr(SpillReader, "read_fixed", read_fixed)
    build(tmp_path / "o.zarr", paths)
    assert sum(n_seen) == 450


def test_a_store_is_asked_now_and_then_whether_the_build_goes_on(paths, monkeypatch):
    asked = []
    check = gather_module.check_scratch
    monkeypatch.setattr(gather_module, "check_scratch", lambda folder: [asked.append(folder), check(folder)])
    monkeypatch.setattr(annbatch_dask.etl.slices, "_SLICE_NBYTES", 3000)
    n_asked = []
    for name, seconds in (("often", 0.0), ("once", 1e9)):
        monkeypatch.setattr(gather_module, "_CHECK_S", seconds)
        collection = build(f"memory://slices/{name}.zarr", paths)
        n_asked.append(len(asked))
        asked.clear()
    assert n_asked[0] > 20
    assert n_asked[1] == len(collection)
