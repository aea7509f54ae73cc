"""Collections are read by zarr implementations that share no code with ours: TensorStore, in C++."""

import dask
import numpy as np
import pytest
import tensorstore
import zarr

from annbatch_dask import DatasetCollection
from tests.etl.everything import make, write


def arrays_of(group):
    return [
        (name, a) for name, a in group.members(max_depth=None) if isinstance(a, zarr.Array) and a.dtype.kind in "biuf"
    ]


@pytest.mark.parametrize("sizes", [{}, {"dataset_size": 30, "shard_size": 12, "n_obs_per_chunk": 5}])
def test_tensorstore_reads_the_same_numbers(sizes, tmp_path):
    inputs = write(tmp_path, [make(0), make(1)])
    with dask.config.set(scheduler="synchronous"):
        DatasetCollection(tmp_path / "a.zarr").add_adatas(
            inputs, elements=["X", "raw", "layers", "obsm", "obs"], stats=True, **sizes
        )
    arrays = arrays_of(zarr.open_group(tmp_path / "a.zarr", mode="r"))
    assert {"dataset_0/X/data", "dataset_0/X/indices", "dataset_0/layers/plain"} <= {name for name, _ in arrays}
    for name, array in arrays:
        kvstore = {"driver": "file", "path": f"{tmp_path / 'a.zarr' / name}/"}
        read = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result().read().result()
        np.testing.assert_array_equal(read, array[...], err_msg=name)
        assert read.dtype == array.dtype, name
