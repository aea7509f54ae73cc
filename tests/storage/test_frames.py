"""Frames one below the other."""

import numpy as np
import pandas as pd
import pytest

from annbatch_dask.loader.obs import ObsTable
from annbatch_dask.storage.frames import concat_obs


def test_a_categorical_column_that_some_frames_lack_stays_one():
    """As where datasets were appended whose obs has more columns than that of those before."""
    frames = [
        pd.DataFrame({"n": [1, 2]}),
        pd.DataFrame({"n": [3, 4], "label": pd.Categorical(["b", None], ["b", "a"])}),
        pd.DataFrame({"n": [5], "label": pd.Categorical(["c"])}),
    ]
    out = concat_obs(frames, names=False)
    assert list(out["label"].cat.categories) == ["b", "a", "c"]
    assert out["label"].cat.codes.tolist() == [-1, -1, 0, -1, 2]
    assert out["n"].tolist() == [1, 2, 3, 4, 5]


CAT = pd.Categorical
BIG = 2**60 + 1
"""No float64."""


@pytest.mark.parametrize(
    ("columns", "values", "dtype"),
    [
        (
            [None, CAT(["hi"], ["lo", "hi"], ordered=True)],
            [None, "hi"],
            pd.CategoricalDtype(["lo", "hi"], ordered=True),
        ),
        (
            [CAT(["lo"], ["lo", "hi"], ordered=True), CAT(["mid"], ["lo", "mid", "hi"], ordered=True)],
            ["lo", "mid"],
            pd.CategoricalDtype(["lo", "mid", "hi"], ordered=True),
        ),
        (
            [CAT(["a"], ["a", "b"], ordered=True), CAT(["b"], ["b", "a"], ordered=True)],
            ["a", "b"],
            pd.CategoricalDtype(["a", "b"]),
        ),
        ([CAT(["a"]), CAT(["b"], ordered=True)], ["a", "b"], pd.CategoricalDtype(["a", "b"])),
        ([CAT([None]), CAT(["a"])], [None, "a"], pd.CategoricalDtype(["a"])),
        ([CAT(np.array([1], "i1")), CAT([300])], [1, 300], pd.CategoricalDtype([1, 300])),
        ([CAT([1]), CAT([1.5])], [1.0, 1.5], pd.CategoricalDtype([1.0, 1.5])),
        ([CAT([None]), pd.array([BIG], "Int64")], [None, BIG], pd.Int64Dtype()),
        ([None, pd.array([BIG], "Int64")], [None, BIG], pd.Int64Dtype()),
        ([CAT([1, None]), np.array([5])], [1.0, None, 5.0], np.dtype("f8")),
        ([np.array([True]), np.array([2])], [1, 2], np.dtype("i8")),
        ([None, np.array([1.5], "f4")], [None, 1.5], np.dtype("f4")),
    ],
)
def test_what_frames_have_otherwise_is_joined_without_loss(columns, values, dtype):
    """As after append, whose new datasets know more categories than those before, or columns that these lack."""
    frames = [pd.DataFrame(index=["x"]) if c is None else pd.DataFrame({"c": c}, index=["x"] * len(c)) for c in columns]
    out = concat_obs(frames, names=True)
    tables = ObsTable.joined([ObsTable.of(frame, frame.index) for frame in frames])
    for column in (out["c"], tables.series("c")):
        assert [None if pd.isna(v) else v for v in column] == values
    assert out["c"].dtype == dtype
    assert out.index.tolist() == ["x"] * len(values)


def test_codes_of_ordered_categories_stay_when_a_dataset_knows_more():
    """Models may have been trained on them."""
    frames = [
        pd.DataFrame({"c": CAT(["hi"], ["lo", "hi"], ordered=True)}),
        pd.DataFrame({"c": CAT(["mid"], ["lo", "mid", "hi"], ordered=True)}),
    ]
    joined = ObsTable.joined([ObsTable.of(frame, frame.index) for frame in frames]).series("c")
    assert joined.cat.categories.tolist() == ["lo", "hi", "mid"]
