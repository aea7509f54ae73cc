"""Any files, extended in any way: statistics and pseudobulk are those of the rows, as numpy and pandas find them."""

import tempfile
from pathlib import Path

import dask
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from annbatch_dask import DatasetCollection
from annbatch_dask.errors import CollectionError, SchemaError
from tests.etl.inputs import adatas, dense_x, exact_or_refused, read, write
from tests.statistics.reference import sums_by, sums_of


def rows_of(collection):
    """X of all rows, and their obs."""
    found = [read(group) for group in collection]
    return np.concatenate([dense_x(a) for a in found]), collection.obs(names=False)


def assert_sums(frame, want):
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(frame["n_nonzero"], want[:, 0])
        for k, name in ((1, "sum"), (2, "sum_of_squares"), (5, "log_sum"), (6, "log_sum_of_squares")):
            np.testing.assert_allclose(frame[name], want[:, k], rtol=1e-10, atol=1e-300)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    inputs=st.tuples(adatas(0), adatas(1), adatas(2)).map(list),
    stats=st.sampled_from([{}, {"stats": True}, {"stats_by": "src_path"}]),
    mode=st.sampled_from(["extend", "append", "reshuffle"]),
    dataset_size=st.sampled_from([4, 1000]),
)
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_what_numpy_and_pandas_find(inputs, stats, mode, dataset_size):
    if not inputs[0].n_obs or not inputs[1].n_obs + inputs[2].n_obs:
        return
    options = {"dataset_size": dataset_size, "seed": 0, "allow_mixed_counts": True}
    with tempfile.TemporaryDirectory() as tmp, exact_or_refused(), dask.config.set(scheduler="synchronous"):
        paths = [Path(tmp, f"{i}.h5ad") for i in range(3)]
        for a, path in zip(inputs, paths, strict=True):
            write(a, path, "gzip")
        collection = DatasetCollection(Path(tmp, "c.zarr")).add_adatas(paths[:1], **options, **stats)
        try:
            collection.add_adatas(paths[1:], **options, mode=mode)
        except SchemaError as e:
            known = ("is dense in the collection", "no dtype holds", "none of its")  # genes is in the collection
            assert any(said in str(e) for said in known)  # noqa: PT017
            return
        X, obs = rows_of(collection)
        assert_sums(collection.gene_stats(), sums_of(X))
        for by in ("src_path", "label"):
            if by not in obs:
                with pytest.raises(CollectionError, match="obs has no column"):
                    collection.gene_stats(by)
                continue
            want = sums_by(X, obs[by])
            want.pop(None, None)
            found = collection.gene_stats(by)
            for name, sums in want.items():
                assert_sums(found.loc[name], sums)
            assert found["n_cells"].sum() == obs[by].notna().sum() * collection.n_vars
            bulk = collection.aggregate(by, ["sum", "mean", "count_nonzero"])
            groups = pd.DataFrame(X).groupby(obs[by].astype(object).to_numpy(), sort=False)
            assert set(bulk.obs[by]) == set(want)
            for k, name in enumerate(bulk.obs[by]):
                rows = groups.get_group(name).to_numpy()
                with np.errstate(all="ignore"):
                    np.testing.assert_allclose(bulk.layers["sum"][k], rows.sum(0), rtol=1e-10)
                    np.testing.assert_allclose(bulk.layers["mean"][k], rows.mean(0), rtol=1e-10)
                np.testing.assert_array_equal(bulk.layers["count_nonzero"][k], (rows != 0).sum(0))
