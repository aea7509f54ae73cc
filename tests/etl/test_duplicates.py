"""duplicates=: cells whose X is equal to an earlier cell's are found, all of them and no others, and left out if asked."""

import tempfile
import warnings
from collections import Counter
from pathlib import Path

import anndata as ad
import dask
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from annbatch_dask import DatasetCollection, events
from annbatch_dask.cli import main
from annbatch_dask.engines.local_cluster import local_client
from annbatch_dask.errors import DuplicateCellsError
from annbatch_dask.etl import cells, duplicates
from tests.etl.inputs import adatas, dense_x, exact_or_refused, expected_x, on_genes, write
from tests.tools import Counter as Tasks
from tests.tools import rows_of, tree_digest

GENES = [f"g{i:02d}" for i in range(20)]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Several blocks, bins and pieces of a few hundred cells, in this process."""
    monkeypatch.setattr(cells, "_BIN_ROWS", 100)
    config = {"scheduler": "synchronous", "annbatch_dask.block_size": 4000}
    with dask.config.set(config):
        yield


def table(X, genes=None, prefix="c"):
    names = [f"{prefix}-{i}" for i in range(X.shape[0])]
    obs = pd.DataFrame({"row": np.arange(X.shape[0])}, index=names)
    return ad.AnnData(X=X, obs=obs, var=pd.DataFrame(index=genes or GENES))


def counts(n, seed, rate=0.4):
    """(n, 20) counts: of so few genes that some cells are equal by chance, and some empty."""
    return np.random.default_rng(seed).poisson(rate, (n, len(GENES))).astype(np.float32)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two files of 300 and 200 cells with planted duplicates: 50 of the second in the first, 10 within it."""
    folder = tmp_path_factory.mktemp("files")
    a, b = counts(300, 0), counts(200, 1)
    a[10:20] = a[:10]
    b[:50] = a[100:150]
    a[5] = a[15] = b[199] = 0
    inputs = [table(sp.csr_matrix(a)), table(sp.csr_matrix(b[:, ::-1].astype(np.int32)), GENES[::-1], "d")]
    paths = [folder / "a.h5ad", folder / "b.h5ad"]
    for adata, path in zip(inputs, paths, strict=True):
        adata.write_h5ad(path)
    return paths, inputs


def build(path, paths, duplicates="drop", **options):
    given = {"seed": 3, "dataset_size": 90, "allow_mixed_counts": True} | options
    return DatasetCollection(path).add_adatas(paths, duplicates=duplicates, **given)


def find(X, source, n_old=0):
    """What pandas says: for each row the first that equals it, or -1; and cells by the sources of both.

    Rows of zeros and NaN alone are none, nor are the first ``n_old`` rows.
    """
    keys = [tuple(None if np.isnan(v) else float(v) for v in row) for row in X]
    rows = pd.Series(range(len(keys)))
    first = rows.groupby(pd.Series(keys, dtype=object)).transform("min") if keys else rows
    is_empty = np.array([not any(k) for k in keys], bool)
    is_again = (first < rows).to_numpy() & ~is_empty & (np.arange(len(keys)) >= n_old)
    pairs = Counter((source[k], source[first[k]]) for k in np.flatnonzero(is_again))
    return is_again, pairs


def sources_of(paths, inputs):
    return [str(p) for p, a in zip(paths, inputs, strict=True) for _ in range(a.n_obs)]


def assert_kept(collection, paths, inputs, kept):
    """The collection holds exactly these rows of the inputs, with their X."""
    genes, X = expected_x(inputs)
    first = dict(zip(map(str, paths), np.cumsum([0, *[a.n_obs for a in inputs]]), strict=False))
    seen = np.zeros(len(X), int)
    for group in collection:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Observation names are not unique")
            out = ad.io.read_zarr(group)
        assert out.var_names.tolist() == genes
        rows = np.array([first[p] + r for p, r in zip(out.obs["src_path"], out.obs["row"], strict=True)])
        seen[rows] += 1
        np.testing.assert_array_equal(dense_x(out), X[rows])
    np.testing.assert_array_equal(seen, kept.astype(int))


def assert_found(collection, paths, inputs, mode):
    """Record, rows and sources are what pandas says; files and rows are verified."""
    _, X = expected_x(inputs)
    source = sources_of(paths, inputs)
    again, pairs = find(X, source)
    record = collection.manifest.builds[-1].duplicates
    assert (record.mode, record.n_obs) == (mode, again.sum())
    assert {(a, b): n for a, b, n in record.pairs} == pairs
    kept = ~again if mode == "drop" else np.ones(len(X), bool)
    assert_kept(collection, paths, inputs, kept)
    by_source = Counter(np.array(source)[kept].tolist())
    for found, adata, path in zip(collection.manifest.sources, inputs, paths, strict=True):
        assert (found.n_obs, found.n_obs + found.n_dropped) == (by_source[str(path)], adata.n_obs)
    assert collection.n_obs == kept.sum() == sum(d.n_obs for d in collection.manifest.datasets)
    assert collection.verify(against=paths).problems == ()
    return again


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    inputs=st.tuples(adatas(0), adatas(1), adatas(2)).flatmap(lambda xs: st.integers(1, 3).map(lambda n: list(xs[:n]))),
    mode=st.sampled_from(["report", "drop"]),
    dataset_size=st.sampled_from([1, 5, 1000]),
    shuffle=st.booleans(),
    groupby=st.sampled_from([None, "src_path"]),
)
def test_duplicates_are_those_that_pandas_finds(inputs, mode, dataset_size, shuffle, groupby):
    if not sum(a.n_obs for a in inputs):
        return
    with tempfile.TemporaryDirectory() as tmp, exact_or_refused():
        paths = [Path(tmp, f"{k}.h5ad") for k in range(len(inputs))]
        for a, path in zip(inputs, paths, strict=True):
            write(a, path, None)
        options = {"dataset_size": dataset_size, "shuffle": shuffle, "groupby": groupby}
        assert_found(build(Path(tmp, "o.zarr"), paths, mode, **options), paths, inputs, mode)


@pytest.mark.parametrize("groupby", [None, "src_path"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_the_first_of_equals_stays(tmp_path, files, shuffle, groupby):
    paths, inputs = files
    collection = build(tmp_path / "o.zarr", paths, shuffle=shuffle, groupby=groupby)
    again = assert_found(collection, paths, inputs, "drop")
    assert again.sum() >= 58
    whole = build(tmp_path / "w.zarr", paths, "keep", shuffle=shuffle, groupby=groupby)
    names = [f"c-{i}" for i in range(300)] + [f"d-{i}" for i in range(200)]
    gone = {n for n, is_again in zip(names, again, strict=True) if is_again}
    for some, every in zip(collection, whole, strict=True):  # the others are where they would be, moved together
        kept = [n for n in ad.io.read_elem(every["obs"]).index if n not in gone]
        assert ad.io.read_elem(some["obs"]).index.tolist() == kept


def test_equal_hashes_are_compared_and_not_believed(tmp_path, files, monkeypatch):
    paths, inputs = files
    honest = tree_digest(build(tmp_path / "a.zarr", paths).path)
    monkeypatch.setattr(cells, "mixed", lambda sums: (sums & np.uint64(3)) << np.uint64(62) | np.uint64(1))
    collection = build(tmp_path / "b.zarr", paths)
    assert_found(collection, paths, inputs, "drop")
    assert tree_digest(collection.path) == honest


@pytest.mark.parametrize("kind", ["dense", "csr", "csc"])
def test_the_dtype_and_the_form_of_x_do_not_matter(tmp_path, kind):
    X = counts(80, 0)
    dtypes = ("float32", "float64", "uint8", "int64")
    of = {"dense": np.asarray, "csr": sp.csr_matrix, "csc": sp.csc_matrix}[kind]
    inputs = [table(of(X.astype(d)), prefix=d) for d in dtypes]
    paths = [tmp_path / f"{d}.h5ad" for d in dtypes]
    for a, path in zip(inputs, paths, strict=True):
        a.write_h5ad(path)
    collection = build(tmp_path / "o.zarr", paths)
    assert_found(collection, paths, inputs, "drop")
    assert collection.n_obs <= 80 + 3 * (X == 0).all(axis=1).sum()


def test_rows_are_compared_by_what_they_mean(tmp_path):
    """A zero that is stored is none, genes in any order, and named twice, are added up: as a loader yields them."""
    data = np.array([1, 2, 0, 2, 1, 1, 1, 2, -0.0, 300, 150, 150, np.nan, np.nan], np.float32)
    genes = np.array([0, 3, 5, 3, 0, 0, 3, 3, 7, 2, 2, 2, 4, 4])
    offsets = np.array([0, 3, 5, 8, 9, 10, 12, 13, 14])  # 1 and 2; the same; 1 and 3; nothing; 300; 150 + 150; NaN; NaN
    X = sp.csr_matrix((8, len(GENES)), dtype=np.float32)
    X.data, X.indices, X.indptr = data, genes, offsets
    table(X).write_h5ad(tmp_path / "a.h5ad")
    collection = build(tmp_path / "o.zarr", [tmp_path / "a.h5ad"], shuffle=False)
    assert collection.obs(["row"])["row"].tolist() == [0, 2, 3, 4, 6, 7]
    assert collection.verify(against=[tmp_path / "a.h5ad"]).ok


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_zeros_of_either_sign_are_equal_in_dense_rows_and_missing_genes_are_no_zeros(tmp_path, dtype):
    a = np.array([[0, 1], [-0.0, 1], [0, 0], [-0.0, 0], [1, 0]], dtype)
    b = np.array([[1, 0, 0], [1, 0, 5], [0, 0, 0]], dtype)
    inputs = [table(a, ["a", "b"]), table(b, ["a", "b", "c"], "d")]
    paths = [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]
    for x, path in zip(inputs, paths, strict=True):
        x.write_h5ad(path)
    again = assert_found(build(tmp_path / "o.zarr", paths), paths, inputs, "drop")
    assert np.flatnonzero(again).tolist() == [1]


def test_a_dataset_of_which_nothing_stays_is_not_written(tmp_path, files):
    paths, inputs = files
    collection = build(tmp_path / "o.zarr", paths, dataset_size=50, shuffle=False)
    assert_found(collection, paths, inputs, "drop")
    assert [d.number for d in collection.manifest.datasets] == [0, 1, 2, 3, 4, 5, 7, 8, 9]
    assert collection.manifest.last_dataset == 9


def test_layers_obs_and_obsm_stay_beside_their_rows(tmp_path):
    X = np.repeat(counts(50, 0), 3, axis=0)
    a = table(sp.csr_matrix(X))
    a.layers["place"] = np.arange(X.size, dtype=np.float32).reshape(X.shape)
    a.layers["few"] = sp.csr_matrix(np.eye(*X.shape, dtype=np.float32))
    a.obsm["frame"] = pd.DataFrame({"x": np.arange(150.0), "s": [f"s{i}" for i in range(150)]}, index=a.obs_names)
    a.write_h5ad(tmp_path / "a.h5ad")
    collection = build(tmp_path / "o.zarr", [tmp_path / "a.h5ad"], dataset_size=60)
    _, X = expected_x([a])
    kept = ~find(X, ["a"] * 150)[0]
    for group in collection:
        out = ad.io.read_zarr(group)
        want = a[out.obs_names]
        np.testing.assert_array_equal(out.layers["place"], want.layers["place"])
        np.testing.assert_array_equal(out.layers["few"].toarray(), want.layers["few"].toarray())
        assert out.obsm["frame"].to_numpy().tolist() == want.obsm["frame"].to_numpy().tolist()
    assert sorted(rows_of(collection)) == sorted(a.obs_names[kept])
    assert collection.verify(against=[tmp_path / "a.h5ad"]).ok


# --- however the work is done ---------------------------------------------------------------------------------------


def test_bytes_do_not_depend_on_how_the_work_is_cut_or_who_does_it(tmp_path, files, monkeypatch):
    paths, _ = files
    want = tree_digest(build(tmp_path / "a.zarr", paths).path)
    with dask.config.set(scheduler="threads", num_workers=4):
        assert tree_digest(build(tmp_path / "b.zarr", paths).path) == want
    monkeypatch.setattr(cells, "_BIN_ROWS", 2**19)
    with dask.config.set({"annbatch_dask.block_size": 2**27}):
        assert tree_digest(build(tmp_path / "c.zarr", paths).path) == want


@pytest.mark.chaos
def test_one_process_and_four_write_the_same_bytes(tmp_path, files, monkeypatch):
    monkeypatch.setattr(cells, "_BIN_ROWS", 2**19)  # as workers have it
    paths, _ = files
    digests = []
    for n in (1, 4):
        with local_client(n_workers=n, threads_per_worker=1, memory_limit=2**31) as client:
            digests.append(tree_digest(build(tmp_path / f"{n}.zarr", paths, client=client).path))
    assert digests[0] == digests[1]


class Interrupt(events.Callback):
    """Stops the build when a stage has ended."""

    def __init__(self, stage):
        self.stage = stage

    def on_stage_end(self, event):
        if event.stage == self.stage:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stage", ["find", "collect", "compare", "gather"])
def test_an_interrupted_build_goes_on(tmp_path, files, stage):
    paths, _ = files
    want = tree_digest(build(tmp_path / "a.zarr", paths).path)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "b.zarr", paths, callbacks=[Interrupt(stage)])
    tasks = Tasks()
    assert tree_digest(build(tmp_path / "b.zarr", paths, callbacks=[tasks]).path) == want
    stages = ["scatter", "find", "collect", "compare", "gather"]
    assert tasks.reused == sum(tasks.tasks[s] for s in stages[: stages.index(stage) + 1])
    assert not (tmp_path / "b.zarr.scratch").exists()


class Damage(events.Callback):
    """Spoils the files of a kind when the stage that writes them has ended."""

    def __init__(self, scratch, stage, pattern, how):
        self.scratch, self.stage, self.pattern, self.how, self.spoilt = scratch, stage, pattern, how, 0

    def on_stage_end(self, event):
        if event.stage == self.stage:
            for path in sorted(self.scratch.rglob(self.pattern))[:2]:
                self.spoilt += 1
                if self.how == "remove":
                    path.unlink()
                else:
                    raw = bytearray(path.read_bytes())
                    raw[len(raw) // 2] ^= 1
                    path.write_bytes(raw)


@pytest.mark.parametrize("how", ["remove", "flip"])
@pytest.mark.parametrize(
    ("stage", "pattern"),
    [
        ("scatter", "hashes-*.bin"),
        ("find", "found-*.bin"),
        ("find", "spill-*.bin"),
        ("collect", "cells-*.bin"),
        ("compare", "left-*.bin"),
    ],
)
def test_damaged_scratch_files_are_written_anew(tmp_path, files, stage, pattern, how):
    paths, _ = files
    want = tree_digest(build(tmp_path / "a.zarr", paths).path)
    damage = Damage(tmp_path / "b.zarr.scratch", stage, pattern, how)
    assert tree_digest(build(tmp_path / "b.zarr", paths, callbacks=[damage]).path) == want
    assert damage.spoilt


# --- what a call says -----------------------------------------------------------------------------------------------


def test_keep_writes_what_was_written_before_there_was_a_choice(tmp_path, files):
    paths, _ = files
    options = {"seed": 3, "dataset_size": 90, "allow_mixed_counts": True}
    plain = DatasetCollection(tmp_path / "a.zarr").add_adatas(paths, **options)
    tasks = Tasks()
    kept = build(tmp_path / "b.zarr", paths, "keep", callbacks=[tasks])
    assert tree_digest(kept.path) == tree_digest(plain.path)
    assert set(tasks.tasks) == {"scatter", "gather", "commit"}
    assert "duplicates" not in str(plain.manifest.to_json())


def test_report_changes_no_row(tmp_path, files):
    paths, inputs = files
    plain = build(tmp_path / "a.zarr", paths, "keep")
    found = build(tmp_path / "b.zarr", paths, "report")
    assert_found(found, paths, inputs, "report")
    assert [d.fingerprint for d in found.manifest.datasets] == [d.fingerprint for d in plain.manifest.datasets]
    assert rows_of(found) == rows_of(plain)


def test_error_names_the_files_and_publishes_nothing(tmp_path, files):
    paths, _ = files
    with pytest.raises(DuplicateCellsError, match=r"\d+ of 500 cells .* of .*b\.h5ad in .*a\.h5ad.*duplicates='drop'"):
        build(tmp_path / "o.zarr", paths, "error")
    assert DatasetCollection(tmp_path / "o.zarr").is_empty
    assert build(tmp_path / "o.zarr", paths, "drop").n_obs < 500


def test_error_passes_where_there_are_none(tmp_path):
    X = np.eye(60, len(GENES), dtype=np.float32) + np.arange(60)[:, None]
    table(X).write_h5ad(tmp_path / "a.h5ad")
    collection = build(tmp_path / "o.zarr", [tmp_path / "a.h5ad"], "error")
    assert collection.n_obs == 60
    assert collection.manifest.builds[-1].duplicates.n_obs == 0


def test_a_mode_there_is_not_is_refused(tmp_path, files):
    with pytest.raises(ValueError, match="duplicates is 'remove'; it must be one of 'keep', 'report', 'drop', 'error'"):
        build(tmp_path / "o.zarr", files[0], "remove")


@pytest.mark.parametrize("mode", ["report", "drop", "error"])
def test_the_plan_says_that_it_looks(tmp_path, files, mode):
    plan = DatasetCollection(tmp_path / "o.zarr").plan_adatas(files[0], duplicates=mode, allow_mixed_counts=True)
    assert "cells with the X of an earlier cell" in plan.summary()


def test_the_command_line_finds_them_and_says_so(tmp_path, files, capsys):
    paths, _ = files
    arguments = [*map(str, paths), "-o", str(tmp_path / "o.zarr"), "--allow-mixed-counts", "--no-progress"]
    assert main(["shuffle", *arguments, "--duplicates", "drop"]) == 0
    assert main(["info", str(tmp_path / "o.zarr")]) == 0
    assert "cells with the X of an earlier cell, dropped" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "o.zarr"), "--against", *map(str, paths)]) == 0
    assert (
        main(["shuffle", *arguments[:-4], "-o", str(tmp_path / "p.zarr"), *arguments[-2:], "--duplicates", "error"])
        == 1
    )
    assert "b.h5ad in" in capsys.readouterr().err


def test_chosen_cells_are_compared(tmp_path, files):
    paths, inputs = files
    collection = build(tmp_path / "o.zarr", paths, where="row >= 10")
    _, X = expected_x(inputs)
    chosen = np.concatenate([np.arange(a.n_obs) >= 10 for a in inputs])
    again, _ = find(X[chosen], np.array(sources_of(paths, inputs))[chosen])
    kept = chosen.copy()
    kept[chosen] = ~again
    assert_kept(collection, paths, inputs, kept)
    assert collection.verify(against=paths).problems == ()
    by_rule = [dict(s.dropped) for s in collection.manifest.sources]
    assert sum(d.get("duplicates", 0) for d in by_rule) == again.sum()
    assert [sum(d.values()) for d in by_rule] == [
        a.n_obs - s.n_obs for a, s in zip(inputs, collection.manifest.sources, strict=True)
    ]


# --- a collection that holds cells ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["extend", "reshuffle"])
def test_new_cells_are_compared_with_those_that_are_there(tmp_path, files, mode):
    paths, inputs = files
    build(tmp_path / "o.zarr", paths[:1], "keep")
    collection = build(tmp_path / "o.zarr", paths[1:], mode=mode)
    X = on_genes(inputs, GENES)
    again, pairs = find(X, sources_of(paths, inputs), n_old=300)
    assert again[:300].sum() == 0
    assert again.sum() >= 50
    record = collection.manifest.builds[-1].duplicates
    assert {(a, b): n for a, b, n in record.pairs} == pairs
    assert collection.manifest.builds[0].duplicates is None
    assert_kept(collection, paths, inputs, ~again)
    assert collection.verify(against=paths).problems == ()


def test_append_reads_no_old_cell_and_is_refused_at_once(tmp_path, files):
    paths, _ = files
    build(tmp_path / "o.zarr", paths[:1], "keep")
    with pytest.raises(ValueError, match="does not read the collection's cells.*give mode='extend'"):
        build(tmp_path / "o.zarr", paths[1:], mode="append")


def test_the_pairs_of_many_files_stay_few(tmp_path, monkeypatch):
    monkeypatch.setattr(duplicates, "_MAX_PAIRS", 2)
    X = counts(40, 0)
    paths = [tmp_path / f"{k}.h5ad" for k in range(5)]
    for path in paths:
        table(X, prefix=path.stem).write_h5ad(path)
    record = build(tmp_path / "o.zarr", paths, "report").manifest.builds[-1].duplicates
    assert len(record.pairs) == 3
    assert record.pairs[-1][:2] == ("", "")
    assert sum(n for _, _, n in record.pairs) == record.n_obs
