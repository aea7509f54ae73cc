"""Builds in the packed layout, and with genes in the order of abundance: the same cells as in the open one."""

import json
import logging
import tempfile
from pathlib import Path

import anndata as ad
import dask
import numpy as np
import pytest
import scipy.sparse as sp
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from annbatch_dask import DatasetCollection, Loader, create_anndata_collection
from annbatch_dask.cli import main
from annbatch_dask.errors import IntegrityError, LayoutError
from annbatch_dask.events import Callback
from annbatch_dask.storage.packed import PACKED
from tests.etl.inputs import adatas, assert_holds, exact_or_refused, expected_x, on_genes, write
from tests.etl.packed import GENES, assert_same, build, codecs_of, read
from tests.tools import tree_digest

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(scope="module")
def both(paths, tmp_path_factory):
    folder = tmp_path_factory.mktemp("both")
    with dask.config.set(scheduler="synchronous"):
        return [build(folder / f"{layout}.zarr", paths, layout=layout) for layout in ("open", "packed")]


def test_anndata_reads_the_same_from_both(both):
    assert_same(*map(read, both))


def test_whole_numbers_are_packed_and_the_rest_is_open(both):
    for group in both[1]:
        for name in ("X", "layers/large"):
            assert codecs_of(group[name]["data"]) == codecs_of(group[name]["indices"]) == [PACKED, "crc32c"]
            assert codecs_of(group[name]["indptr"]) == ["bytes", "blosc", "crc32c"]
        assert codecs_of(group["layers/fractions"]["indices"]) == [PACKED, "crc32c"]
        assert (
            codecs_of(group["layers/fractions"]["data"])
            == codecs_of(group["obsm/dense"])
            == ["bytes", "blosc", "crc32c"]
        )
    assert all(PACKED not in codecs_of(group["X"]["data"]) for group in both[0])


def test_what_is_not_packed_is_said(paths, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "annbatch_dask"):
        build(tmp_path / "a.zarr", paths, layout="packed")
    said = [m for m in caplog.messages if "not packed" in m]
    assert len(said) == 2
    assert "layers/fractions: csr float64 values" in said[0]
    assert "obsm/dense: dense" in said[1]


def test_the_default_is_open_and_as_it_was(paths, tmp_path):
    """What says nothing of layouts has the bytes, and the manifest, that releases before had."""
    one = build(tmp_path / "a.zarr", paths)
    build(tmp_path / "b.zarr", paths, layout="open", gene_order="names")
    assert tree_digest(tmp_path / "a.zarr") == tree_digest(tmp_path / "b.zarr")
    record = json.loads((tmp_path / "a.zarr" / "zarr.json").read_text())["attributes"]["annbatch_dask"]["builds"][0]
    assert not {"layout", "gene_order"} & record.keys()
    assert (one.manifest.layout, one.manifest.gene_order) == ("open", "names")


def test_both_have_the_same_rows_and_other_fingerprints_of_plans(both):
    manifests = [c.manifest for c in both]
    assert [[d.fingerprint for d in m.datasets] for m in manifests][0] == [d.fingerprint for d in manifests[1].datasets]
    assert [m.layout for m in manifests] == ["open", "packed"]
    assert manifests[0].builds[0].plan != manifests[1].builds[0].plan


def test_verify_reads_it_and_finds_damage(paths, tmp_path):
    collection = build(tmp_path / "a.zarr", paths, layout="packed")
    assert collection.verify(against=paths).ok
    shard = next((tmp_path / "a.zarr").glob("dataset_0/X/data/c/*"))
    raw = bytearray(shard.read_bytes())
    raw[30] ^= 1
    shard.write_bytes(raw)
    assert not DatasetCollection(tmp_path / "a.zarr").verify().ok
    loader = Loader(batch_size=50, shuffle=False, preload_to_gpu=False, layers=[], obsm=[])
    with pytest.raises(IntegrityError, match="is damaged"):
        list(loader.use_collection(DatasetCollection(tmp_path / "a.zarr")))


@pytest.mark.parametrize("dense", [False, "cpu"])
@pytest.mark.parametrize("var_names", [None, [GENES[k] for k in (9, 3, 30)]])
def test_loaders_give_the_same_batches(both, dense, var_names):
    batches = []
    for collection in both:
        options = {"shuffle": True, "seed": 0, "dense": dense, "var_names": var_names, "layers": ["large"], "obsm": []}
        loader = Loader(batch_size=16, chunk_size=4, preload_nchunks=8, preload_to_gpu=False, **options)
        batches.append([(b["X"], b["layers"]["large"]) for b in loader.use_collection(collection)])
    for pair in zip(*batches, strict=True):
        for a, b in zip(*pair, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(*(x.toarray() if sp.issparse(x) else x for x in (a, b)))


def test_views_are_the_same(both):
    views = [c.to_lazy().X.compute() for c in both]
    np.testing.assert_array_equal(*(x.toarray() for x in views))


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    inputs=st.tuples(adatas(0), adatas(1)),
    gene_order=st.sampled_from(["names", "abundance"]),
    dataset_size=st.sampled_from([4, 1000]),
    chunk=st.sampled_from([1, 4, 64]),
)
def test_every_row_is_there_once(inputs, gene_order, dataset_size, chunk):
    inputs = list(inputs)
    if not any(a.n_obs for a in inputs):
        return
    with tempfile.TemporaryDirectory() as tmp, dask.config.set(scheduler="synchronous"), exact_or_refused():
        files = [Path(tmp) / f"{k}.h5ad" for k in range(2)]
        for a, path in zip(inputs, files, strict=True):
            write(a, path, "gzip")
        collection = build(
            Path(tmp) / "out.zarr",
            files,
            dataset_size=dataset_size,
            n_obs_per_chunk=chunk,
            allow_mixed_counts=True,
            layout="packed",
            gene_order=gene_order,
        )
        names = collection.var.index.tolist()
        assert sorted(names) == sorted(expected_x(inputs)[0])
        assert_holds(collection, files, inputs, names, on_genes(inputs, names))


def test_groups_are_sorted_alike_in_both(paths, tmp_path):
    options = {"groupby": ["cell_type"], "dataset_size": 240}
    both = [build(tmp_path / f"{layout}.zarr", paths, layout=layout, **options) for layout in ("open", "packed")]
    assert_same(*map(read, both))
    assert read(both[1])[0].obs["cell_type"].cat.codes.is_monotonic_increasing


class Interrupt(Callback):
    def on_task_end(self, event):
        if event.stage == "gather":
            raise KeyboardInterrupt


def test_an_interrupted_build_goes_on(both, paths, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "a.zarr", paths, layout="packed", callbacks=[Interrupt()])
    assert_same(read(build(tmp_path / "a.zarr", paths, layout="packed")), read(both[1]))
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "b.zarr", paths, layout="open", callbacks=[Interrupt()])
    collection = build(tmp_path / "b.zarr", paths, layout="packed")
    assert all(PACKED in codecs_of(group["X"]["data"]) for group in collection)


def test_the_same_call_again_does_nothing(paths, tmp_path):
    first = build(tmp_path / "a.zarr", paths, layout="packed").manifest
    assert build(tmp_path / "a.zarr", paths, layout="packed").manifest == first
    assert build(tmp_path / "a.zarr", paths).manifest == first  # which keeps the collection's layout


@pytest.mark.parametrize("mode", ["extend", "append", "reshuffle"])
def test_an_extension_keeps_layout_and_order(paths, tmp_path, mode):
    genes = build(tmp_path / "a.zarr", paths[:1], layout="packed", gene_order="abundance").var.index.tolist()
    collection = build(tmp_path / "a.zarr", paths[1:], mode=mode)
    assert (collection.manifest.layout, collection.manifest.gene_order) == ("packed", "abundance")
    assert all(codecs_of(group["X"][part])[0] == PACKED for group in collection for part in ("data", "indices"))
    assert collection.var.index.tolist() == genes
    assert_holds(collection, paths, inputs := [ad.read_h5ad(path) for path in paths], genes, on_genes(inputs, genes))
    assert collection.verify(against=paths).ok


def test_an_extension_may_change_the_layout_of_what_it_writes_anew(paths, tmp_path):
    build(tmp_path / "a.zarr", paths[:1])
    with pytest.raises(LayoutError, match="mode='append' would leave it in two"):
        build(tmp_path / "a.zarr", paths[1:], layout="packed", mode="append")
    collection = build(tmp_path / "a.zarr", paths[1:], layout="packed")
    assert collection.manifest.layout == "packed"
    assert all(codecs_of(group["X"]["data"])[0] == PACKED for group in collection)


def test_an_extension_does_not_reorder_genes(paths, tmp_path):
    build(tmp_path / "a.zarr", paths[:1])
    with pytest.raises(LayoutError, match="order of names, and gene_order is 'abundance'"):
        build(tmp_path / "a.zarr", paths[1:], gene_order="abundance")


@pytest.mark.parametrize("wrong", [{"layout": "closed"}, {"gene_order": "size"}])
def test_unknown_layouts_are_refused(paths, tmp_path, wrong):
    with pytest.raises(LayoutError, match="give 'open' or 'packed'"):
        build(tmp_path / "a.zarr", paths, **wrong)


# ---------------------------------------------------------------------------------------------------- genes


@pytest.mark.parametrize("kind", [sp.csr_matrix, sp.csc_matrix, np.asarray])
def test_genes_in_the_order_of_how_many_cells_have_them(tmp_path, kind):
    """Over all inputs; of equal ones the first by name."""
    rng = np.random.default_rng(0)
    share = rng.permutation(np.linspace(0.02, 0.98, 20))
    x = (rng.random((400, 20)) < share).astype(np.float32)
    names = np.array([f"g{i:02d}" for i in range(20)])
    files = []
    for k, (rows, genes) in enumerate([(slice(0, 250), slice(0, 15)), (slice(250, 400), slice(5, 20))]):
        a = ad.AnnData(kind(x[rows, genes]))
        a.var_names, a.obs_names = names[genes], [f"{k}-{i}" for i in range(a.n_obs)]
        files.append(tmp_path / f"{k}.h5ad")
        a.write_h5ad(files[-1])
    n_cells = (x[:250] > 0).sum(0) * (np.arange(20) < 15) + (x[250:] > 0).sum(0) * (np.arange(20) >= 5)
    collection = build(tmp_path / "a.zarr", files, gene_order="abundance", dataset_size=1000)
    assert collection.var.index.tolist() == names[np.argsort(-n_cells, kind="stable")].tolist()
    assert collection.verify(against=files).ok
    X = read(collection)[0].X
    assert X.shape == (400, 20)
    if sp.issparse(X):
        assert X.has_sorted_indices


def test_a_sample_of_many_cells_will_do(tmp_path):
    """Cells of one kind stand together: the sample is spread over the file."""
    x = np.zeros((5000, 4), np.float32)
    x[:, 3] = 1
    x[2000:, 1] = 1
    x[4000:, 2] = 1
    x[:40, 0] = 1
    a = ad.AnnData(sp.csr_matrix(x))
    a.var_names, a.obs_names = list("abcd"), [str(i) for i in range(5000)]
    a.write_h5ad(tmp_path / "a.h5ad")
    collection = build(
        tmp_path / "a.zarr", [tmp_path / "a.h5ad"], gene_order="abundance", dataset_size=5000, n_obs_per_chunk=64
    )
    assert collection.var.index.tolist() == ["d", "b", "c", "a"]


def test_the_plan_says_it(paths, tmp_path):
    plan = DatasetCollection(tmp_path / "a.zarr").plan_adatas(paths, layout="packed", gene_order="abundance")
    assert "packed" in repr(plan)
    assert "how many cells have them" in repr(plan)
    assert "packed" not in repr(DatasetCollection(tmp_path / "a.zarr").plan_adatas(paths))


# ------------------------------------------------------------------------------------------------ elsewhere


def test_the_command_line_and_the_older_name_know_it(paths, tmp_path, capsys):
    files = list(map(str, paths))
    assert (
        main(["shuffle", *files, "-o", str(tmp_path / "a.zarr"), "--layout", "packed", "--gene-order", "abundance"])
        == 0
    )
    main(["info", str(tmp_path / "a.zarr")])
    assert "layout packed" in capsys.readouterr().out
    collection = create_anndata_collection(paths, tmp_path / "b.zarr", layout="packed", gene_order="abundance")
    assert collection.manifest.layout == DatasetCollection(tmp_path / "a.zarr").manifest.layout == "packed"


def test_a_long_row_and_columns_of_32_bits(tmp_path):
    rng = np.random.default_rng(0)
    n_vars = 70_000
    dense = np.zeros((6, n_vars), np.int32)
    dense[1] = rng.integers(1, 2**31 - 1, n_vars)  # a row of many blocks
    dense[2, rng.choice(n_vars, 5000, replace=False)] = 7
    dense[4, [0, n_vars - 1]] = 2**31 - 1, -(2**31)
    a = ad.AnnData(sp.csr_matrix(dense))
    a.var_names, a.obs_names = [f"g{i:05d}" for i in range(n_vars)], list("abcdef")
    a.write_h5ad(tmp_path / "a.h5ad")
    collection = build(tmp_path / "a.zarr", [tmp_path / "a.h5ad"], layout="packed", shuffle=False, n_obs_per_chunk=2)
    (found,) = read(collection)
    np.testing.assert_array_equal(found.X.toarray(), dense)
    group = zarr.open_group(tmp_path / "a.zarr" / "dataset_0", mode="r")
    assert {group["X"][k].dtype for k in ("indices", "data")} == {np.dtype(np.uint32), np.dtype(np.int32)}
