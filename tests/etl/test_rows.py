"""A row's hash depends on what the row says, not on how its column is held."""

import numpy as np
import pandas as pd
import pytest

from annbatch_dask.etl.rows import row_hashes, write_column
from annbatch_dask.plan.schema import Categories, ColumnSpec
from annbatch_dask.sources.columns import ColumnRows, describe_series, series_rows

WORDS = ["b", "a", "", "c", "a", "ä"]
MISSING = [None, "a", None, "c", "a", "ä"]
NUMBERS = [3.0, 1.0, -2.0, 0.0, 1.0, 7.5]


def hashes(values):
    series = pd.Series(values)
    schema = describe_series("k", series)
    spec = ColumnSpec("k", schema.kind, schema.dtype, schema.nullable, schema.categories)
    fixed, ragged = {}, {}
    write_column(spec, series_rows(schema, series), fixed, ragged)
    return row_hashes(len(series), [], [spec], fixed, ragged)


@pytest.mark.parametrize(
    "forms",
    [
        [
            pd.array(WORDS, "object"),
            pd.Categorical(WORDS),
            pd.Categorical(WORDS, [*sorted(set(WORDS))[::-1], "unused"]),
        ],
        [
            pd.Categorical(MISSING),
            pd.Categorical(MISSING, ["ä", "c", "x", "a"], ordered=True),
            pd.Series(MISSING, dtype="string"),
        ],
        [
            np.array(NUMBERS),
            np.array(NUMBERS, "f4"),
            pd.Categorical(NUMBERS),
            pd.Categorical(NUMBERS, NUMBERS[:4] + [7.5]),
        ],
        [np.array([1, 0, 1]), np.array([1, 0, 1], bool), np.array([1.0, 0, 1]), pd.array([True, False, True])],
        [np.array([1, np.nan, 1]), pd.array([1, None, 1], "Int8"), pd.Categorical([1, None, 1])],
    ],
    ids=["strings", "missing strings", "numbers", "booleans", "missing numbers"],
)
def test_hashes_do_not_depend_on_the_form(forms):
    first, *others = [hashes(f) for f in forms]
    for other in others:
        np.testing.assert_array_equal(other, first)
    distinct = pd.Series(list(forms[0])).nunique(dropna=False)
    assert len(set(first.tolist())) == distinct


def test_a_missing_value_hashes_like_a_column_that_is_not_there():
    np.testing.assert_array_equal(hashes(MISSING)[[0, 2]], 0)
    assert (hashes(WORDS) != 0).all()


def test_columns_are_told_apart_by_name():
    values = np.array(["a", "b"], object)
    made = []
    for name in ("k", "l"):
        spec, fixed, ragged = ColumnSpec(name, "string"), {}, {}
        write_column(spec, ColumnRows(values), fixed, ragged)
        made.append(row_hashes(2, [], [spec], fixed, ragged))
    assert (made[0] != made[1]).all()


def test_categories_by_code_are_looked_up_with_the_last_for_missing():
    spec = ColumnSpec("k", "categorical", categories=Categories(("x", "y"), "str"))
    fixed, ragged = {}, {}
    write_column(spec, ColumnRows(np.array([1, -1, 0, 1], np.int8)), fixed, ragged)
    made = row_hashes(4, [], [spec], fixed, ragged)
    assert made[0] == made[3] != made[2]
    assert made[1] == 0
