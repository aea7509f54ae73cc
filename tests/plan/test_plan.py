"""The planner's parts: dtypes lose nothing, layouts tile the rows, columns and genes unite, memory bounds hold."""

import functools
import pickle
from dataclasses import make_dataclass

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from annbatch_dask.errors import MemoryBudgetError, SchemaError
from annbatch_dask.kernels.values import range_of
from annbatch_dask.plan.build import build_plan
from annbatch_dask.plan.columns import unite_columns
from annbatch_dask.plan.dtypes import NOTHING, ValueRange, index_dtype, merge_ranges, signed_dtype, smallest_dtype
from annbatch_dask.plan.genes import GeneSpace, join_genes, unite_names
from annbatch_dask.plan.layout import Block, Layout, cut_blocks
from annbatch_dask.plan.memory import MIB, Budget
from annbatch_dask.plan.options import Options
from annbatch_dask.plan.permutation import Permutation
from annbatch_dask.plan.schema import Categories, ColumnSchema, MatrixSchema, SourceSchema

FLOATS = st.one_of(
    st.integers(-(2**40), 2**40).map(float),
    st.floats(allow_nan=True),
    st.sampled_from([0.0, -0.0, 255.0, 65535.0, np.inf]),
)


@given(st.lists(FLOATS, max_size=20), st.sampled_from(["float32", "float64"]))
def test_smallest_dtype_loses_nothing(values, source):
    with np.errstate(over="ignore"):
        exact = np.array(values, source)
    stored = exact.astype(smallest_dtype(ValueRange(*range_of(exact)), exact.dtype))
    back = stored.astype(source)
    np.testing.assert_array_equal(back, exact)
    np.testing.assert_array_equal(np.signbit(back[~np.isnan(back)]), np.signbit(exact[~np.isnan(exact)]))


@given(st.lists(st.lists(FLOATS, max_size=5), max_size=5))
def test_ranges_merge_like_their_values(pieces):
    arrays = [np.array(p, np.float64) for p in pieces]
    whole = ValueRange(*range_of(np.concatenate([*arrays, np.zeros(0)])))
    merged = merge_ranges(ValueRange(*range_of(a)) for a in arrays)
    assert smallest_dtype(merged, np.dtype("f8")) == smallest_dtype(whole, np.dtype("f8"))
    assert (merged.n_nan, merged.n_inf) == (whole.n_nan, whole.n_inf)


@pytest.mark.parametrize(
    ("low", "high", "source", "want"),
    [
        (0, 255, "float32", "uint8"),
        (0, 256, "float32", "uint16"),
        (-1, 127, "int64", "int8"),
        (0, 2**20, "float32", "float32"),  # four bytes either way: the source's own
        (0, 2**20, "float64", "float32"),
        (0, 2**20, "int64", "uint32"),
        (0, 1, "bool", "bool"),
    ],
)
def test_smallest_dtype(low, high, source, want):
    assert smallest_dtype(ValueRange(integral=True, low=low, high=high, single=True), np.dtype(source)) == want


def test_no_values_need_one_byte():
    assert smallest_dtype(NOTHING, np.dtype("float64")) == np.uint8


@pytest.mark.parametrize(
    ("n", "want"), [(0, "uint8"), (256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_index_dtype(n, want):
    assert index_dtype(n) == want
    assert n == 0 or np.iinfo(want).max >= n - 1


@pytest.mark.parametrize(("n", "want"), [(0, "int8"), (128, "int8"), (129, "int16")])
def test_signed_dtype(n, want):
    assert signed_dtype(n) == want


@given(st.integers(1, 500), st.integers(1, 600), st.integers(1, 600))
def test_datasets_and_parts_tile_the_rows(n_obs, dataset_rows, part_rows):
    layout = Layout.even(n_obs, dataset_rows, part_rows)
    bounds = [layout.dataset_bounds(k) for k in range(layout.n_datasets)]
    assert [r for a, b in bounds for r in range(a, b)] == list(range(n_obs))
    assert all(b - a == dataset_rows for a, b in bounds[:-1])
    part, place = layout.locate(np.arange(n_obs))
    assert (layout.part_starts[part] + place == np.arange(n_obs)).all()
    for k, (a, b) in enumerate(bounds):
        assert set(part[a:b]) == set(layout.parts_of(k))
    sizes = np.diff(layout.part_starts)
    assert sizes.min() >= 1
    assert sizes.max() <= part_rows
    np.testing.assert_array_equal(np.bincount(part), sizes)


def source(path="a.h5ad", n_obs=1000, genes=("a", "b", "c"), per_row=10, columns=(), kind="csr", **fields):
    step = 64
    edges = np.minimum(np.arange(-(-n_obs // step) + 1) * step, n_obs)
    nnz = (edges * per_row).astype(np.int64) if kind != "dense" else np.zeros(0, np.int64)
    x = MatrixSchema("X", kind, "float32", "int32" if kind != "dense" else "", len(genes), step, nnz)
    return SourceSchema(path, n_obs, np.array(genes, object), (x,), tuple(columns), **fields)


@given(
    st.lists(st.integers(0, 3000), min_size=1, max_size=4),
    st.integers(100, 10**6),
    st.sampled_from(["csr", "dense", "csc"]),
)
def test_blocks_tile_the_sources(sizes, block_nbytes, kind):
    sources = [source(f"{i}", n, kind=kind) for i, n in enumerate(sizes)]
    blocks = cut_blocks(sources, block_nbytes=block_nbytes, csc_nbytes=10 * block_nbytes, obs_nbytes=8)
    rows = [(b.source, r) for b in blocks for r in range(b.start, b.stop)]
    assert rows == [(i, r) for i, n in enumerate(sizes) for r in range(n)]
    assert [b.first for b in blocks] == np.cumsum([0, *[b.n_rows for b in blocks]])[:-1].tolist()
    limit = block_nbytes * (10 if kind == "csc" else 1)
    assert all(b.n_bytes <= limit or b.n_rows <= 64 for b in blocks)


def test_a_thousand_files_plan_in_low_thousands_of_tasks():
    sources = [source(f"{i}.h5ad", 100_000, per_row=2000) for i in range(200)]
    plan = build_plan(sources, Options(seed=0, dataset_nbytes=2**31), budget=Budget(8192 * MIB))
    assert len(plan.blocks) + plan.n_datasets < 4096 + 200 + plan.n_datasets
    assert max(plan.peak_nbytes) <= plan.budget.task_nbytes
    assert len(plan.genes["var"].maps) == 1


def test_peak_does_not_grow_with_the_atlas():
    small, large = (
        build_plan(
            [source(n_obs=n, per_row=2000)], Options(seed=0, dataset_rows=10_000), budget=Budget(2048 * MIB)
        ).peak_nbytes
        for n in (100_000, 400_000)
    )
    np.testing.assert_allclose(small, large, rtol=0.02)


def test_memory_that_is_short_makes_smaller_pieces_until_it_cannot():
    s = [source(n_obs=100_000, per_row=2000)]
    plenty = build_plan(s, Options(seed=0), budget=Budget(4096 * MIB))
    little = build_plan(s, Options(seed=0), budget=Budget(600 * MIB))
    assert len(little.blocks) > len(plenty.blocks)
    assert max(little.peak_nbytes) <= little.budget.task_nbytes
    assert little.fingerprint == plenty.fingerprint
    assert little.work_key != plenty.work_key
    with pytest.raises(MemoryBudgetError):
        build_plan(s, Options(seed=0), budget=Budget(430 * MIB))


def test_genes_join_in_the_order_of_pandas():
    names = [np.array(x, object) for x in (["b", "a"], ["c", "a"], ["b", "a"])]
    genes = join_genes(names, None)
    assert genes.tolist() == ["a", "b", "c"]
    lists = {(k, "var"): listed for k, listed in enumerate(names)}
    space = GeneSpace.of(genes, lists)
    assert list(space.which.values()) == [0, 1, 0]
    assert [m.places.tolist() for m in space.maps] == [[1, 0], [2, 0]]
    assert join_genes(names, ["c", "b"]).tolist() == ["b", "c"]
    assert GeneSpace.of(join_genes(names, ["c", "b"]), lists).map_of(0, "var").tolist() == [0, -1]
    assert join_genes([np.array(["z", "b", "a"], object)], None).tolist() == ["z", "b", "a"]


@given(st.lists(st.lists(st.sampled_from(["b", "a", "é", "a1", "Z", ""]), unique=True), max_size=4))
def test_names_unite_like_pandas(lists):
    indices = (pd.Index(names, dtype=object) for names in lists)
    want = functools.reduce(lambda a, b: a.union(b), indices, pd.Index([], dtype=object))
    assert unite_names(lists) == want.tolist()


def test_names_are_kept_once_and_the_plan_carries_none():
    one, two = (pickle.loads(pickle.dumps(source(genes=("gene_0", "gene_1")))) for _ in range(2))
    assert all(a is b for a, b in zip(one.var_names, two.var_names, strict=True))
    plan = build_plan([one], Options(seed=0), budget=Budget(4096 * MIB))
    assert plan.var.index.tolist() == ["gene_0", "gene_1"]
    assert all(len(s.var_names) == 0 for s in plan.sources)


def numeric(dtype, *, nullable=False):
    return ColumnSchema("x", "numeric", dtype=dtype, nullable=nullable)


def categorical(*values, ordered=False):
    return ColumnSchema(
        "x", "categorical", categories=Categories(values, "str" if isinstance(values[0], str) else "int64", ordered)
    )


STRING = ColumnSchema("x", "string")


@pytest.mark.parametrize(
    ("columns", "kind", "dtype", "nullable"),
    [
        ([numeric("int32"), numeric("int64")], "numeric", "int64", False),
        ([numeric("int64"), None], "numeric", "int64", True),
        ([numeric("float32"), None], "numeric", "float32", False),
        ([numeric("bool"), numeric("bool", nullable=True)], "numeric", "bool", True),
        ([numeric("int64", nullable=True), numeric("float64")], "numeric", "float64", False),
        ([categorical(1, 2), numeric("int64")], "numeric", "int64", True),
        ([STRING, STRING], "string", "", False),
        ([STRING, None], "string", "", True),
        ([categorical("a"), STRING], "string", "", True),
    ],
)
def test_columns_unite(columns, kind, dtype, nullable):
    sources = [source(str(i), columns=[] if c is None else [c]) for i, c in enumerate(columns)]
    (spec,) = unite_columns(sources)
    assert (spec.kind, spec.dtype, spec.nullable) == (kind, dtype, nullable)


def test_categories_unite_and_codes_are_mapped():
    sources = [source(str(i), columns=[c]) for i, c in enumerate((categorical("c", "a", "b"), categorical("d", "a")))]
    (spec,) = unite_columns([*sources, source("2")])
    assert spec.categories.values == ("a", "b", "c", "d")
    assert [None if m is None else m.tolist() for m in spec.code_maps] == [[2, 0, 1], [3, 0], None]


@pytest.mark.parametrize(
    ("old", "new", "expected", "maps"),
    [
        ([("x", "z")], ("a", "x"), ("x", "z", "a"), [[0, 1], [2, 0]]),
        ([("x", "z"), ("x", "z", "m")], ("b", "a", "m"), ("x", "z", "m", "a", "b"), [[0, 1], [0, 1, 2], [4, 3, 2]]),
        ([(7, 3)], (5, 3), (7, 3, 5), [[0, 1], [2, 1]]),
    ],
)
def test_categories_of_a_collection_keep_their_codes(old, new, expected, maps):
    is_dataset = [source(f"dataset_{k}", columns=[categorical(*c)], is_dataset=True) for k, c in enumerate(old)]
    (spec,) = unite_columns([*is_dataset, source(columns=[categorical(*new)])])
    assert spec.categories.values == expected
    assert [m.tolist() for m in spec.code_maps] == maps


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (numeric("int64"), STRING),
        (categorical("a"), numeric("int64")),
        (categorical(1), categorical("a")),
        (categorical(1), STRING),
    ],
)
def test_kinds_that_clash(a, b):
    with pytest.raises(SchemaError, match="make them one kind in load_adata"):
        unite_columns([source("0", columns=[a]), source("1", columns=[b])])


def test_the_plan_is_frozen_and_pure():
    one, two = (build_plan([source()], Options(seed=0), budget=Budget(4096 * MIB)) for _ in range(2))
    assert one.fingerprint == two.fingerprint
    with pytest.raises(AttributeError):
        one.seed = 3
    other = build_plan([source(identity="changed")], Options(seed=0), budget=Budget(4096 * MIB))
    assert other.fingerprint == one.fingerprint
    assert other.work_key != one.work_key
    assert isinstance(one.var, pd.DataFrame)


def test_a_field_that_a_later_release_adds_changes_no_identity(monkeypatch):
    """Its records have more fields, with defaults, and other reprs."""

    def made():
        columns = [numeric("int64"), categorical("b", "a")]
        sources = [source("1", columns=columns, identity="then"), source("2", n_obs=300, columns=columns)]
        return build_plan(sources, Options(seed=0), budget=Budget(4096 * MIB))

    def grown(kind):
        later = make_dataclass(kind.__name__, [("later", int, 0)], bases=(kind,), frozen=True, repr=False)
        later.__repr__ = lambda self: f"<{kind.__name__}>"
        return later

    before = made()
    for kind in (MatrixSchema, ColumnSchema, Categories, SourceSchema):
        monkeypatch.setitem(globals(), kind.__name__, grown(kind))
    for room, kind in (("options", Options), ("sizing", Layout), ("layout", Block), ("build", Permutation)):
        monkeypatch.setattr(f"annbatch_dask.plan.{room}.{kind.__name__}", grown(kind))
    monkeypatch.setitem(globals(), "Options", grown(Options))
    after = made()
    assert (after.fingerprint, after.work_key) == (before.fingerprint, before.work_key)
    assert repr(after.sources) != repr(before.sources)
