"""What rows weigh: bounds that no choice of rows exceeds, and shapes that must not be under-counted."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from annbatch_dask.plan.build import build_plan
from annbatch_dask.plan.columns import texts_of, unite_columns
from annbatch_dask.plan.costs import Weight, bounds_of, heaviest_rows
from annbatch_dask.plan.layout import Layout
from annbatch_dask.plan.memory import MIB, RESERVED_NBYTES, Budget
from annbatch_dask.plan.options import Options
from annbatch_dask.plan.schema import Categories, ColumnSchema, MatrixSchema, SourceSchema, heaviest_at
from annbatch_dask.plan.summary import figures
from annbatch_dask.sources.matrices import counted


def source(counts, columns=(), path="a.h5ad", **fields):
    """A source of rows with so many stored values each."""
    x = counted(MatrixSchema("X", "csr", "float32", "int32", 3), np.cumsum(counts))
    names = np.array(["a", "b", "c"], object)
    return SourceSchema(path, len(counts), names, (x,), tuple(columns), **fields)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 7, 8, 9, 1000])
def test_the_heaviest_rows_are_counted_at_powers_of_two_and_at_the_end(n):
    at = heaviest_at(n)
    assert len(np.unique(at)) == len(at)
    assert (at >= 0).all()
    if n:
        assert at[-1] == n - 1
        assert at.tolist()[:-1] == [2**k - 1 for k in range(len(at) - 1)]


@given(
    st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=40), min_size=1, max_size=3),
    st.integers(0, 3),
    st.integers(0, 120),
)
def test_no_choice_of_rows_outweighs_the_heaviest(rows, per_row, n):
    sources, weight = [source(counts) for counts in rows], Weight(per_row, {"X": 8})
    ends, sums = heaviest_rows(sources, [weight] * len(sources))
    assert (np.diff(ends) >= 0).all()
    each = sorted((per_row + 8 * c for counts in rows for c in counts), reverse=True)
    assert np.interp(n, ends, sums) >= sum(each[:n]) - 1e-6
    assert sums[-1] == pytest.approx(sum(each))


@pytest.mark.parametrize("options", [{"shuffle": False}, {"groupby": ("kind",)}], ids=str)
def test_parts_of_rows_in_any_order_are_as_small_as_their_heaviest_rows_need(options):
    kind = ColumnSchema("kind", "categorical", categories=Categories(("x", "y"), "str"))
    sources = [source([10] * 60_000, [kind]), source([10_000] * 6000, [kind], "b.h5ad")]
    budget = Budget(RESERVED_NBYTES + 600 * MIB)
    plan = build_plan(sources, Options(seed=0, **options), budget=budget)
    assert plan.layout.part_rows * 10_000 * 8 <= plan.peak_nbytes[1] / 2.2
    shuffled = build_plan(sources, Options(seed=0), budget=budget)
    assert shuffled.layout.part_rows > 5 * plan.layout.part_rows
    assert isinstance(plan.layout, Layout)


def barcodes(n, values, *, ordered=False, n_obs=None, **fields):
    categories = Categories(tuple(f"{i:09d}" for i in range(values)), "str", ordered)
    column = ColumnSchema("barcode", "categorical", categories=categories)
    return source([1] * (n if n_obs is None else n_obs), [column], **fields)


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        ([barcodes(30_000, 20_000)], "string"),
        ([barcodes(50_000, 20_000)], "categorical"),
        ([barcodes(9000, 9000)], "categorical"),
        ([barcodes(30_000, 20_000, ordered=True)], "categorical"),
        ([barcodes(30_000, 20_000, is_dataset=True), barcodes(10, 5, path="b")], "categorical"),
        ([source([1] * 10, is_dataset=True), barcodes(30_000, 20_000, path="b")], "string"),
    ],
    ids=["nearly one a row", "more rows", "few", "ordered", "kept", "new"],
)
def test_a_category_for_nearly_each_row_is_a_string(found, kind):
    [column] = texts_of(unite_columns(found), found)
    assert column.kind == kind
    assert len(column.code_maps) == len(found)
    assert column.nullable == (kind == "string")


def test_the_plan_says_which_categories_become_strings():
    few = ColumnSchema("kind", "categorical", categories=Categories(("x",), "str"))
    [sources] = [[source([1] * 30_000, [few, *barcodes(30_000, 20_000).columns])]]
    plan = build_plan(sources, Options(seed=0), budget=Budget(2**33))
    assert dict(figures(plan))["strings"] == "barcode: categories in the inputs, nearly one a cell"


def test_counts_are_less_work_for_a_disk_than_fractions():
    counts, fractions = (
        SourceSchema("a", 10, np.zeros(0, object), (replace(source([5] * 10).x, integral=whole),), ())
        for whole in (True, False)
    )
    few, many = bounds_of([counts], 600_000_000), bounds_of([fractions, counts], 600_000_000)
    assert few.inflate_s == many.inflate_s == pytest.approx(1)
    assert few.spill_nbytes <= 2 * 50
    assert many.spill_nbytes > 3 * few.spill_nbytes
    assert many.write_nbytes > 3 * few.write_nbytes
