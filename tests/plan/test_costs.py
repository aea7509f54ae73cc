"""What rows weigh: bounds that no choice of rows exceeds, and shapes that must not be under-counted."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from annbatch_dask.plan.build import Options, build_plan
from annbatch_dask.plan.costs import Weight, heaviest_rows
from annbatch_dask.plan.layout import Layout
from annbatch_dask.plan.memory import MIB, RESERVED_NBYTES, Budget
from annbatch_dask.plan.schema import Categories, ColumnSchema, MatrixSchema, SourceSchema, heaviest_at
from annbatch_dask.storage.matrices import counted


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
