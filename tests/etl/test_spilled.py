"""What a gather task reads of spill files: the same rows however they are read, and few ranges where files are many."""

import json
from collections import Counter
from contextlib import contextmanager

import dask
import fsspec
import pytest

import annbatch_dask.etl.spilled
import annbatch_dask.plan.reads
from annbatch_dask import DatasetCollection
from annbatch_dask.plan.reads import expected_reads
from annbatch_dask.storage.filesystems import LocalRanges, RemoteRanges
from annbatch_dask.testing import make_adata
from tests.tools import tree_digest

GENES = [f"g{i}" for i in range(40)]


@pytest.fixture
def paths(tmp_path):
    found = []
    for k in range(6):
        make_adata(150, GENES, seed=k).write_h5ad(path := tmp_path / f"{k}.h5ad")
        found.append(str(path))
    return found


@pytest.fixture
def _few_are_many(monkeypatch):
    monkeypatch.setattr(annbatch_dask.etl.spilled, "MAX_OPEN", 1)
    monkeypatch.setattr(annbatch_dask.plan.reads, "MAX_OPEN", 1)


@contextmanager
def counted(cls, what="gather"):
    """Count reads of spill files."""
    reads = Counter()
    original = cls.read_into

    def read_into(self, start, out):
        if "spill-" in self.path:
            reads[self.path.rpartition("/")[2]] += 1
        return original(self, start, out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cls, "read_into", read_into)
        yield reads


def build(out, paths, **options):
    with dask.config.set({"scheduler": "synchronous", "annbatch_dask.block_size": 4000}):
        collection = DatasetCollection(out)
        plan = collection.plan_adatas(paths, seed=1, dataset_size=120, **options)
        return collection.add_adatas(paths, seed=1, dataset_size=120, **options), plan


def test_files_of_a_disk_are_read_array_by_array(tmp_path, paths):
    with counted(LocalRanges) as reads:
        _, plan = build(tmp_path / "o.zarr", paths)
    n_blocks = len(plan.blocks)
    assert n_blocks > 10
    n = sum(len(plan.layout.parts_of(k)) for k in range(plan.n_datasets))
    assert reads.total() <= 2 * n_blocks * (plan.n_datasets + n)  # not of parts that have no row of a block
    assert expected_reads(plan)[0] == 2 * n_blocks * (1 + len(plan.layout.parts_of(0)))


@pytest.mark.usefixtures("_few_are_many")
def test_many_files_take_three_reads_of_each(tmp_path, paths):
    """Whatever the parts, and as many more as there are blocks. Until this, three and two for every part."""
    found = {}
    for n_files in (3, 6):
        with counted(LocalRanges) as reads:
            _, plan = build(tmp_path / f"{n_files}.zarr", paths[:n_files])
        assert len(plan.layout.parts_of(0)) > 2
        assert len(reads) == len(plan.blocks)
        assert max(reads.values()) == 3 * plan.n_datasets  # fewer of a block with no row for some dataset
        found[len(plan.blocks)] = expected_reads(plan)[0]
    (few, n_few), (many, n_many) = sorted(found.items())
    assert many == 2 * few
    assert n_many / many == n_few / few == 3


@pytest.mark.usefixtures("_few_are_many")
@pytest.mark.parametrize("room", [0, 3000, 10_000])
@pytest.mark.parametrize("options", [{}, {"groupby": "cell_type"}, {"duplicates": "drop"}], ids=str)
def test_memory_decides_how_much_is_read_at_a_time_and_nothing_else(tmp_path, paths, monkeypatch, room, options):
    make_adata(150, GENES, seed=0).write_h5ad(paths[1])  # cells that are twice there
    paths = paths[:3]
    want, _ = build(tmp_path / "whole.zarr", paths, **options)
    monkeypatch.setattr(annbatch_dask.plan.reads, "_AHEAD_NBYTES", room)
    with counted(LocalRanges) as reads:
        found, plan = build(tmp_path / "o.zarr", paths, **options)
    assert tree_digest(found.path) == tree_digest(want.path)
    assert (reads.total() > 3 * len(plan.blocks) * plan.n_datasets) or room == 10_000


def test_a_store_is_asked_three_times_for_each_file(tmp_path, paths):
    local, _ = build(tmp_path / "o.zarr", paths)
    fs = fsspec.filesystem("memory")
    fs.rm("/spilled", recursive=True) if fs.exists("/spilled") else None
    with counted(RemoteRanges) as reads:
        _, plan = build("memory://spilled/o.zarr", paths)
    assert max(reads.values()) == 3 * plan.n_datasets
    fs.get("/spilled/o.zarr", str(tmp_path / "copy.zarr"), recursive=True)
    ours = {k: v for k, v in tree_digest(local.path).items() if "/" in k}
    assert {k: v for k, v in tree_digest(tmp_path / "copy.zarr").items() if "/" in k} == ours
    fs.rm("/spilled", recursive=True)


def test_receipts_of_scatter_know_nothing_of_datasets(tmp_path, paths, monkeypatch):
    sizes = {}

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("annbatch_dask.etl.build.gather_tasks", stop)
    for size in (400, 10):
        scratch = tmp_path / f"scratch-{size}"
        with dask.config.set(scheduler="synchronous"), pytest.raises(KeyboardInterrupt):
            DatasetCollection(tmp_path / f"{size}.zarr").add_adatas(paths, seed=1, dataset_size=size, scratch=scratch)
        receipts = sorted(scratch.rglob("scatter-*.json"))
        sizes[size] = [len(p.read_bytes()) for p in receipts]
        assert set(json.loads(receipts[0].read_bytes().partition(b"\n")[2])) == {
            *("n_rows", "n_bytes", "spilled", "ranges", "nnz", "fingerprint")
        }
    assert max(abs(a - b) for a, b in zip(sizes[400], sizes[10], strict=True)) < 10  # of the spilled bytes' digits
