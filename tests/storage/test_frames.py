"""Frames one below the other."""

import pandas as pd

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
