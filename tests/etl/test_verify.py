"""verify finds every damage and names its place; gc removes what does not belong."""

import json
import shutil
import threading
from dataclasses import replace

import anndata as ad
import dask
import numpy as np
import pytest

from annbatch_dask import DatasetCollection
from annbatch_dask.cli import main
from annbatch_dask.errors import CollectionError, IntegrityError
from annbatch_dask.etl import verify as verify_module
from annbatch_dask.manifest import _checksum
from annbatch_dask.testing import make_adata

GENES = [f"g{i}" for i in range(30)]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A collection made of two files, extended by a third with other genes."""
    folder = tmp_path_factory.mktemp("verify")
    paths = [folder / f"{i}.h5ad" for i in range(3)]
    for i, (n, genes) in enumerate([(120, GENES[:25]), (90, GENES[5:]), (60, GENES[10:] + ["other"])]):
        adata = make_adata(n, genes, seed=i)
        adata.obs["row"] = np.arange(n)
        adata.layers["half"] = adata.X * 0.5
        adata.obsm["pca"] = np.random.default_rng(i).normal(size=(n, 3)).astype("f4")
        if i:
            adata.obs["cell_type"] = adata.obs["cell_type"].cat.reorder_categories(["T", "mono", "B", "NK"])
            adata.obs["only some have it"] = np.arange(n) % 3
        adata.write_h5ad(paths[i])
    with dask.config.set(scheduler="synchronous"):
        collection = DatasetCollection(folder / "o.zarr").add_adatas(paths[:2], seed=0, dataset_size=80)
        collection.add_adatas(paths[2:], seed=1, mode="append", dataset_size=80)
    return folder / "o.zarr", paths


@pytest.fixture
def copy(built, tmp_path):
    shutil.copytree(built[0], tmp_path / "o.zarr")
    return tmp_path / "o.zarr"


def verify(path, *args, **kwargs):
    return DatasetCollection(path, mode="r").verify(*args, **kwargs)


def test_all_is_well(built):
    path, paths = built
    found = verify(path, against=paths)
    assert found.ok
    assert found.problems == found.leftovers == ()
    assert (found.n_datasets, found.n_obs, found.against) == (4, 270, tuple(map(str, paths)))
    found.raise_for_problems()


@pytest.mark.parametrize("mode", ["extend", "reshuffle"])
def test_after_an_extension_with_more_genes_and_categories(built, tmp_path, mode):
    _, paths = built
    with dask.config.set(scheduler="synchronous"):
        collection = DatasetCollection(tmp_path / "o.zarr").add_adatas(paths[:1], seed=0, dataset_size=80)
        collection.add_adatas(paths[1:], seed=1, mode=mode, genes="union", dataset_size=80)
    assert verify(tmp_path / "o.zarr", against=paths).problems == ()


@pytest.mark.parametrize("first", [{}, {"var_subset": ["g2", "g4"]}], ids=["extended", "chosen"])
def test_genes_that_came_back_later(tmp_path, first):
    """Builds that left out genes, which a later one added, are compared with what they read."""
    paths = [tmp_path / f"{i}.h5ad" for i in range(3)]
    for i, genes in enumerate([GENES[:9], GENES[:20], GENES[5:]]):
        adata = make_adata(20, genes[:-2], seed=i)
        adata.raw = make_adata(20, genes, seed=i)
        adata.write_h5ad(paths[i])
    with dask.config.set(scheduler="synchronous"):
        collection = DatasetCollection(tmp_path / "o.zarr").add_adatas(paths[:1], **first)
        collection.add_adatas(paths[1:2])
        with pytest.warns(UserWarning, match=r"1\.h5ad is in .* already"):
            collection.add_adatas([paths[2], paths[1]], genes="union")
        assert verify(tmp_path / "o.zarr", against=paths).problems == ()
        other = make_adata(20, GENES[:18], seed=9)
        other.raw = make_adata(20, GENES[:20], seed=9)
        other.write_h5ad(paths[1])
        assert [p.where for p in verify(tmp_path / "o.zarr", against=paths).problems] == [str(paths[1])]


def files(path):
    return sorted(p for p in path.rglob("*") if p.is_file() and p.name != ".DS_Store")


def test_every_flipped_bit_is_found_and_placed(built, copy):
    rng = np.random.default_rng(0)
    damaged = [f for f in files(copy) if f.parent == copy or f"dataset_{rng.integers(4)}" in f.parts]
    assert len(damaged) > 20
    for file in damaged[::4]:
        raw = bytearray(file.read_bytes())
        at = int(rng.integers(len(raw)))
        raw[at] ^= 1 << int(rng.integers(8))
        whole = file.read_bytes()
        file.write_bytes(raw)
        name = str(file.relative_to(copy))
        try:
            problems = verify(copy).problems
        except (CollectionError, ValueError, KeyError, TypeError, UnicodeDecodeError, AttributeError):
            assert name == "zarr.json"  # the root itself: it does not even open
        else:
            assert problems, name
            if name != "zarr.json":
                assert name in [p.where for p in problems]
        file.write_bytes(whole)
    assert verify(copy).ok


@pytest.mark.parametrize("what", ["short", "gone", "extra"])
def test_files_short_gone_or_too_many(copy, what, capsys):
    file = next(f for f in files(copy) if f.name == "0" and "X/data" in str(f))
    if what == "short":
        file.write_bytes(file.read_bytes()[:-1])
    elif what == "gone":
        file.unlink()
    else:
        file = file.with_name("1")
        file.write_bytes(b"x")
    found = verify(copy)
    assert [p.where for p in found.problems] == [str(file.relative_to(copy))]
    with pytest.raises(IntegrityError, match="has 1 problem: .*X/data/c/"):
        found.raise_for_problems()
    assert main(["verify", str(copy)]) == 1
    assert str(file.relative_to(copy)) in capsys.readouterr().out


def test_inputs_are_compared_where_a_dataset_is_missing(copy, built):
    shutil.rmtree(copy / "dataset_0")
    found = verify(copy, against=built[1])
    assert {p.where.split("/")[0] for p in found.problems} == {"dataset_0", "zarr.json"}
    for record in DatasetCollection(copy).manifest.datasets[1:]:
        shutil.rmtree(copy / record.name)
    left_out = [p.where for p in verify(copy, against=built[1]).problems if "was not compared, for lack of" in p.what]
    assert left_out == list(map(str, built[1]))


def test_rows_that_do_not_fit_the_manifest_are_found(copy):
    """Somebody rewrote a dataset and its checksums: the rows' fingerprints still tell."""
    root = json.loads((copy / "zarr.json").read_text())
    record = root["attributes"]["annbatch_dask"]["datasets"][1]
    record["fingerprint"] = f"{int(record['fingerprint'], 16) ^ 1:016x}"
    del root["attributes"]["annbatch_dask"]["crc32c"]
    root["attributes"]["annbatch_dask"]["crc32c"] = _checksum(root["attributes"]["annbatch_dask"])
    (copy / "zarr.json").write_text(json.dumps(root))
    wheres = {p.where for p in verify(copy).problems}
    assert wheres == {"zarr.json", "dataset_1"}


def test_against_other_files(built, tmp_path):
    path, paths = built
    moved = [shutil.copy(p, tmp_path) for p in paths]
    assert verify(path, against=moved).ok
    changed = ad.read_h5ad(moved[1])
    changed.X[7, changed.X[7].indices[0]] += 1
    changed.write_h5ad(moved[1])
    found = verify(path, against=moved)
    assert [(p.where, p.what[:9]) for p in found.problems] == [(str(paths[1]), "its rows ")]
    changed[:50].copy().write_h5ad(moved[1])
    found = verify(path, against=moved)
    assert "has 50 rows and the collection has 90 of it" in found.problems[0].what
    found = verify(path, against=moved[::2])
    assert "was not given: 90 cells were not compared" in found.problems[0].what
    with pytest.raises(IntegrityError, match="; give these files too, or build it again from the given ones alone"):
        found.raise_for_problems()
    other = shutil.copy(paths[0], tmp_path / "other.h5ad")
    with pytest.raises(CollectionError, match=r"other.h5ad is none of the 3 sources of the collection \("):
        verify(path, against=[other])


def test_command_line(built, capsys):
    path, paths = built
    assert main(["verify", str(path), "--against", *map(str, paths)]) == 0
    assert "270 cells in 4 datasets" in (out := capsys.readouterr().out)
    assert "they are the cells of 3 files" in out


def test_nothing_to_verify(tmp_path):
    with pytest.raises(CollectionError, match="has no manifest to compare with"):
        DatasetCollection(tmp_path / "o.zarr").verify()


@pytest.mark.parametrize(
    ("name", "columns", "is_found"),
    [
        ("obs/cell_type/codes/c/0", None, True),
        ("obs/cell_type/codes/c/0", ["cell_type"], True),
        ("obs/cell_type/codes/c/0", ["n_counts"], False),
        ("obs/_index/c/0", ["n_counts"], True),
        ("var/_index/c/0", [], True),
        ("X/data/c/0", [], False),  # its chunks are checked when they are read
    ],
)
def test_a_check_reads_what_a_loader_of_some_columns_does(copy, name, columns, is_found):
    path = copy / "dataset_1" / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    collection = DatasetCollection(copy, mode="r")
    if is_found:
        with pytest.raises(IntegrityError, match=f"dataset_1/{name}: has crc32c"):
            collection.check(columns)
    else:
        collection.check(columns)
    path.unlink()
    with pytest.raises(IntegrityError, match=f"dataset_1/{name}: is missing"):
        collection.check(columns)


def test_metadata_of_several_datasets_are_asked_for_at_once(built, monkeypatch):
    """A store is waited for once, and not once a dataset."""
    together, read = threading.Barrier(3), verify_module.metadata_below

    def below(folder, prefix=""):
        together.wait(20)
        return read(folder, prefix)

    collection = DatasetCollection(built[0], mode="r")
    manifest = replace(collection.manifest, datasets=collection.manifest.datasets[:3])
    monkeypatch.setattr(verify_module, "metadata_below", below)
    verify_module._check_root(collection._root.target, manifest, "zarr.json")
    assert not together.broken
