"""Columns of obs of pandas' own dtypes, from files and from memory."""

import anndata as ad
import dask
import pandas as pd
import pytest

from annbatch_dask import DatasetCollection, Loader, concat_lazy
from annbatch_dask.testing import make_adata

CATEGORIES = {
    "Int64": [7, 3, None, 2**60 + 1],
    "UInt8": [200, None],
    "boolean": [True, False, None],
    "string": ["b", None, "a"],
}


@pytest.mark.parametrize("dtype", CATEGORIES)
@pytest.mark.parametrize("in_memory", [False, True], ids=["file", "memory"])
def test_categories_of_a_dtype_that_has_missing_values(tmp_path, dtype, in_memory):
    a = make_adata(12, ["g0", "g1"], seed=0)
    values = CATEGORIES[dtype] * (12 // len(CATEGORIES[dtype]))
    a.obs["x"] = pd.Categorical(pd.array(values, dtype=dtype))
    path, load = tmp_path / "a.h5ad", None
    if in_memory:
        path.touch()
        load = lambda _: a  # noqa: E731
    else:
        with ad.settings.override(allow_write_nullable_strings=True):
            a.write_h5ad(path)
    with dask.config.set(scheduler="synchronous"):
        collection = DatasetCollection(tmp_path / "o.zarr").add_adatas([path], load_adata=load, shuffle=False)
    frames = [collection.obs(), next(iter(Loader(batch_size=12).use_collection(collection)))["obs"]]
    if not in_memory:
        frames.append(concat_lazy([path]).obs.to_memory())
    for frame in frames:
        assert [None if pd.isna(v) else v for v in frame["x"]] == values
        assert sorted(frame["x"].cat.categories) == sorted(set(values) - {None})
    assert collection.verify().ok
