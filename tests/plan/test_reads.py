"""Reads of spill files, maps of genes, lists of names: what a plan of thousands of files keeps, and that it is exact."""

import pickle

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from annbatch_dask.plan.build import build_plan
from annbatch_dask.plan.genes import GeneMap, GeneSpace, join_genes, order_genes
from annbatch_dask.plan.memory import MIB, Budget
from annbatch_dask.plan.options import Options
from annbatch_dask.plan.reads import windows
from annbatch_dask.plan.schema import MatrixSchema, SourceSchema, heaviest_at, shared_names
from annbatch_dask.plan.summary import summary


@given(st.lists(st.integers(0, 50), max_size=12), st.integers(0, 120), st.integers(1, 5), st.booleans())
def test_windows_tile_the_parts_and_fit(nbytes, room, n_files, is_far):
    runs = list(windows(nbytes, room, n_files=n_files, is_far=is_far))
    assert [k for run, _ in runs for k in run] == list(range(len(nbytes)))
    for run, is_whole in runs:
        assert len(run) == 1 or is_whole
        assert not is_whole or sum(nbytes[k] for k in run) <= room
        end = run.stop  # and no run could be longer
        assert not is_whole or end == len(nbytes) or sum(nbytes[k] for k in run) + nbytes[end] > room


@pytest.mark.parametrize("is_far", [False, True])
def test_large_reads_of_a_disk_are_left_as_they_are(is_far):
    runs = list(windows([4 * MIB, 4 * MIB], 100 * MIB, n_files=4, is_far=is_far))
    assert [is_whole for _, is_whole in runs] == ([True] if is_far else [False, False])


@given(st.data())
def test_a_gene_map_is_exact(data):
    n_cols = data.draw(st.integers(1, 400))
    if data.draw(st.booleans()):
        places = sorted(data.draw(st.sets(st.integers(0, n_cols - 1))))
    else:
        places = data.draw(st.lists(st.integers(-1, n_cols - 1), max_size=500))
    places = np.array(places, np.int32)
    kept = GeneMap.of(places, n_cols)
    np.testing.assert_array_equal(kept.places, places)
    assert kept.places.dtype == np.int32
    found = np.bincount(places[places >= 0], minlength=1)
    assert kept.counts == (np.count_nonzero(found), found.max())
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(kept)).places, places)


def test_a_gene_map_takes_a_bit_a_column_where_it_can():
    rng = np.random.default_rng(0)
    places = np.sort(rng.permutation(42_000)[:30_000]).astype(np.int32)
    assert GeneMap.of(places, 42_000).stored.nbytes == 5_250
    assert GeneMap.of(places[::-1], 42_000).stored.nbytes == 60_000
    assert GeneMap.of(places[:200], 42_000).stored.nbytes == 400


def source(number, names, *, kind="csr", n_obs=64):
    nnz = 10 * np.minimum(np.arange(-(-n_obs // 64) + 1) * 64, n_obs)
    heaviest = 10 * (heaviest_at(n_obs) + 1)
    x = MatrixSchema(
        "X",
        kind,
        "float32",
        "int32",
        len(names),
        64,
        nnz,
        integral=True,
        heaviest=heaviest,
        n_stored=nnz[-1] * (kind == "csc"),
    )
    return SourceSchema(f"{number}.h5ad", n_obs, names, (x,), (), identity=str(number))


def test_equal_lists_of_names_are_one_object():
    names = [f"gene {i}" for i in range(50)]
    one, two = shared_names(np.array(names, object)), shared_names(list(names))
    assert one is two
    sent = [pickle.loads(pickle.dumps(source(k, one))) for k in range(3)]
    assert {id(s.var_names) for s in sent} == {id(one)}
    other = pickle.loads(pickle.dumps(source(0, shared_names([*names, "ä\udc80"]))))
    assert other.var_names.tolist() == [*names, "ä\udc80"]
    assert shared_names([]).tolist() == []


@given(st.lists(st.lists(st.sampled_from("abcdef"), unique=True), min_size=1, max_size=5), st.data())
def test_lists_that_are_one_object_join_as_equal_ones_do(lists, data):
    shared = [shared_names(names) for names in lists]
    apart = [np.array(names, object) for names in lists]
    genes = join_genes(shared, None)
    assert genes.tolist() == join_genes(apart, None).tolist()
    one, two = (GeneSpace.of(genes, {(k, "var"): x for k, x in enumerate(some)}) for some in (shared, apart))
    assert one.which == two.which
    counts = [np.array(data.draw(st.lists(st.integers(0, 9), min_size=len(x), max_size=len(x))), float) for x in lists]
    pd.testing.assert_index_equal(order_genes(genes, shared, counts), order_genes(genes, apart, counts))


def planned(n_files, n_lists=2, n_genes=300, **given):
    space = np.array([f"g{i:04d}" for i in range(n_genes + n_lists)], object)
    lists = [shared_names(np.delete(space, k)) for k in range(n_lists)]
    sources = [source(k, lists[k % n_lists], **given) for k in range(n_files)]
    budget = Budget(600 * MIB, block_nbytes=1000)
    return build_plan(sources, Options(seed=0, dataset_rows=100), budget=budget)


def test_a_plan_of_many_files_says_what_gather_tasks_read():
    assert "ranges of" not in summary(planned(20))
    assert "130 files, of which a gather task reads about 390 ranges of" in summary(planned(130))


@pytest.mark.parametrize(
    ("n_obs", "words"),
    [
        (300_000, "2 inputs stored by columns (CSC), and read 2 times: 48.0 MB more to read"),
        (
            1_000_000,
            "2 inputs stored by columns (CSC), and read once: 160 MB that are put in the order of rows first",
        ),
    ],
)
def test_inputs_by_columns_that_are_larger_than_a_task_are_named(n_obs, words):
    few = planned(2, kind="csc")
    assert "stored by columns" not in summary(few)
    sources = [source(k, shared_names(["a", "b"]), kind="csc", n_obs=n_obs) for k in range(2)]
    large = build_plan(sources, Options(seed=0, dataset_rows=10_000), budget=Budget(520 * MIB))
    assert words in summary(large)
    assert max(s.peak_nbytes for s in large.strips or large.blocks) <= large.peak_nbytes[0] <= large.budget.task_nbytes
    for t in large.transposed:
        bounds = [b.start for b in large.blocks if b.source == t.source]
        assert t.rows == (*bounds, n_obs)
        assert [t.bands(a, a + 1) for a in bounds] == [range(k, k + 1) for k in range(len(bounds))]
        assert t.bands(0, n_obs) == range(len(bounds))


def test_a_plan_that_puts_nothing_in_order_holds_a_gibibyte_of_columns_at_most():
    large = [source(0, shared_names(["a", "b"]), kind="csc", n_obs=20 * 10**6)]
    plan = build_plan(large, Options(seed=0, dataset_rows=10**6), budget=Budget(2**40), transposes=False)
    assert not plan.transposed
    assert 1 < len(plan.blocks)
    assert max(b.n_bytes for b in plan.blocks) <= 2**30
