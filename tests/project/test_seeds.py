"""One rule for seeds: builds, loaders, samplers, splits and scDataset take the same, and warn of the same."""

import inspect
import warnings

import numpy as np
import pandas as pd
import pytest

from annbatch_dask import DatasetCollection, Loader, samplers, scdataset
from annbatch_dask.etl.request import make_request
from annbatch_dask.seeds import draw_seed, resolve_seed
from annbatch_dask.splits import Splits

DEFAULTS = {n: p.default for n, p in inspect.signature(DatasetCollection.add_adatas).parameters.items()}


def of_build(**given):
    return make_request(DEFAULTS | {"adata_paths": ["a.h5ad"]} | given).options.seed


def of_loader(**given):
    return Loader(shuffle=True, **given).batch_sampler.seed


def of_sampler(**given):
    return samplers.RandomSampler(8, 4, 4, **given).seed


def of_class_sampler(**given):
    return samplers.ClassSampler(2, 4, 2, classes=pd.Categorical(["a"] * 20), num_samples=8, **given).seed


def of_matched(**given):
    return samplers.MatchedControlSampler(2, 4, 2, is_control=[True, False], match=[0, 0], **given).seed


def of_sets(**given):
    return samplers.CellSets(2, 1, groups=[0, 0, 1, 1], **given).seed


def of_strategy(**given):
    return scdataset.StrategySampler(scdataset.BlockShuffling(4), 4, **given).seed


def of_scdataset(**given):
    return scdataset.scDataset(np.arange(20), scdataset.BlockShuffling(4), 4, **given)._base_seed


@pytest.fixture
def of_split(tmp_path):
    import dask

    from annbatch_dask.testing import make_adata

    make_adata(20, ["g"]).write_h5ad(tmp_path / "a.h5ad")
    with dask.config.set(scheduler="threads"):
        collection = DatasetCollection(tmp_path / "a.zarr").add_adatas([tmp_path / "a.h5ad"])

    def of_split(**given):
        splits = collection.split({"train": 0.5, "test": 0.5}, **given)
        assert isinstance(splits, Splits)
        return splits.seed

    return of_split


BOTH = [of_build, of_loader, of_sampler, of_class_sampler, of_matched, of_sets, of_strategy]


@pytest.mark.parametrize("take", [*BOTH, of_scdataset])
def test_a_seed_is_a_number_a_generator_or_none(take):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert take(seed=3) == take(seed=np.int64(3)) != take(seed=4)
        assert (
            take(seed=np.random.default_rng(3))
            == take(seed=np.random.default_rng(3))
            == draw_seed(np.random.default_rng(3))
        )
        assert take(seed=None) >= 0


def test_a_split_takes_the_same(of_split):
    assert of_split(seed=3) == of_split(seed=np.int64(3)) == 3
    assert of_split(seed=np.random.default_rng(3)) == draw_seed(np.random.default_rng(3))
    assert of_split() == of_split(seed=None) == 0
    with pytest.raises(TypeError, match="seed must be a non-negative integer"):
        of_split(seed="3")


@pytest.mark.parametrize("take", [*BOTH, of_scdataset])
@pytest.mark.parametrize(("bad", "error"), [("3", TypeError), (1.5, TypeError), (True, TypeError), (-1, ValueError)])
def test_anything_else_is_refused(take, bad, error):
    with pytest.raises(error, match="seed .*must be"):
        take(seed=bad)


@pytest.mark.parametrize("take", BOTH)
def test_rng_is_annbatchs_name(take):
    """Until this, a Loader and a build took a number as rng without the warning that samplers give."""
    assert take(rng=np.random.default_rng(3)) == take(seed=np.random.default_rng(3))
    with pytest.warns(FutureWarning, match="Passing a seed as rng is deprecated") as said:
        assert take(rng=3) == take(seed=3)
    assert [w.filename for w in said] == [__file__]
    with pytest.raises(TypeError, match=r"rng must be a numpy.random.Generator"):
        take(rng="3")
    with pytest.raises(ValueError, match="rng is -1; give"):
        take(rng=-1)
    with pytest.raises(ValueError, match="seed=1 and rng are both given; give one"):
        take(seed=1, rng=np.random.default_rng(3))


def test_a_generator_gives_a_build_the_seed_it_gave():
    """``rng.integers(2**63)``: what a build took until this."""
    for start in range(50):
        assert resolve_seed(None, np.random.default_rng(start)) == np.random.default_rng(start).integers(2**63)
