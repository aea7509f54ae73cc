"""10x Genomics' files and folders are inputs, as scanpy reads them."""

import sys

import anndata as ad
import dask
import numpy as np
import pytest
import scipy.sparse as sp

from annbatch_dask import DatasetCollection, read_lazy
from annbatch_dask.errors import MissingPackageError, SourceError
from annbatch_dask.testing import make_adata
from tests.etl.inputs import dense_x
from tests.sources.tenx import write_h5, write_mtx

SYMBOLS = ["CD3E", "TBCE", "TBCE", "MS4A1", "CD3_protein"]
KINDS = ["Gene Expression"] * 4 + ["Antibody Capture"]
WANTED = ["CD3E", "TBCE", "TBCE-1", "MS4A1"]


def counts(seed):
    """Cells by features, among them an antibody and a symbol that two genes have."""
    return sp.csr_matrix(np.random.default_rng(seed).poisson(0.8, (40, len(SYMBOLS))).astype(np.int32))


def features(seed, n):
    barcodes = [f"cell{seed}-{i}" for i in range(40)]
    return {"ids": [f"ENSG{i}" for i in range(n)], "symbols": SYMBOLS[:n], "kinds": KINDS[:n], "barcodes": barcodes}


@pytest.fixture
def paths(tmp_path):
    return [
        write_h5(tmp_path / "a.h5", counts(0), **features(0, 5)),
        write_h5(tmp_path / "old.h5", counts(1)[:, :4], **features(1, 4), version=2),
        write_mtx(tmp_path / "filtered_feature_bc_matrix", counts(2), **features(2, 5)),
    ]


def build(path, paths):
    with dask.config.set(scheduler="synchronous"):
        return DatasetCollection(path).add_adatas(paths, seed=0, merge="same")


def test_cells_of_cell_ranger_are_shuffled(tmp_path, paths):
    other = make_adata(30, ["MS4A1", "CD3E"], seed=9)
    other.write_h5ad(tmp_path / "x.h5ad")
    collection = build(tmp_path / "o.zarr", [*paths, tmp_path / "x.h5ad"])
    out = ad.concat([ad.io.read_zarr(g) for g in collection])
    assert set(out.var_names) == set(WANTED)
    for seed in range(3):
        rows = out[[f"cell{seed}-{i}" for i in range(40)], WANTED]
        np.testing.assert_array_equal(dense_x(rows), counts(seed)[:, :4].toarray())
    assert collection.verify(against=[*paths, tmp_path / "x.h5ad"]).ok
    assert [s.n_obs for s in collection.manifest.sources] == [40, 40, 40, 30]


def test_what_is_said_of_genes_is_kept(tmp_path, paths):
    collection = build(tmp_path / "o.zarr", paths[:1])
    assert collection.var.loc["TBCE-1", "gene_ids"] == "ENSG2"


def test_views_read_them(paths):
    for seed, path in enumerate(paths):
        found = read_lazy(path).to_memory()
        assert found.var_names.tolist() == WANTED
        np.testing.assert_array_equal(dense_x(found), counts(seed)[:, :4].toarray())


def test_without_scanpy_the_remedy_is_named(tmp_path, paths, monkeypatch):
    monkeypatch.setitem(sys.modules, "scanpy", None)
    with pytest.raises(MissingPackageError, match="pip install scanpy"):
        build(tmp_path / "o.zarr", paths)


def test_at_a_url_they_are_refused(tmp_path, paths):
    import fsspec

    fsspec.filesystem("memory").pipe_file("/tenx/a.h5", paths[0].read_bytes())
    with pytest.raises(SourceError, match="read from local disks only; copy it, or read it in load_adata"):
        build(tmp_path / "o.zarr", ["memory://tenx/a.h5"])
