"""Nothing is lost, repeated or changed: every input row is in the output exactly once."""

import tempfile
from pathlib import Path

import dask
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from annbatch_dask import DatasetCollection
from tests.etl.inputs import adatas, assert_conserved, exact_or_refused, write


def build(folder, inputs, hows, **options):
    paths = [
        folder / f"in{i}.{'zarr' if how in ('zarr', 'zarr2') else 'h5ad'}" for i, how in enumerate(hows[: len(inputs)])
    ]
    for a, path, how in zip(inputs, paths, hows, strict=False):
        write(a, path, how)
    with dask.config.set(scheduler="synchronous"):
        collection = DatasetCollection(folder / "out.zarr").add_adatas(paths, allow_mixed_counts=True, **options)
    return collection, paths


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    inputs=st.tuples(adatas(0), adatas(1), adatas(2)).flatmap(lambda xs: st.integers(1, 3).map(lambda n: list(xs[:n]))),
    hows=st.lists(st.sampled_from(["gzip", "lzf", None, "zarr", "zarr2"]), min_size=3, max_size=3),
    dataset_size=st.sampled_from([5, 9, 1000]),
    n_obs_per_chunk=st.sampled_from([1, 4, 64]),
    shard_size=st.sampled_from([2, 10, "1GB", "100B"]),
    seed=st.integers(0, 2**63 - 1),
    shuffle=st.booleans(),
)
def test_every_row_is_there_once(inputs, hows, dataset_size, n_obs_per_chunk, shard_size, seed, shuffle):
    if not sum(a.n_obs for a in inputs):
        return
    with tempfile.TemporaryDirectory() as tmp, exact_or_refused():
        collection, paths = build(
            Path(tmp),
            inputs,
            hows,
            dataset_size=dataset_size,
            n_obs_per_chunk=n_obs_per_chunk,
            shard_size=shard_size,
            seed=seed,
            shuffle=shuffle,
        )
        assert_conserved(collection, paths, inputs)
        assert collection.n_obs == sum(a.n_obs for a in inputs)
        if not shuffle:
            rows = collection.obs(columns=["row"])["row"].tolist()
            assert rows == [r for a in inputs for r in range(a.n_obs)]
