"""Arguments that are True or False, sizes and functions: what is none of these is refused where it is given."""

import numpy as np
import pandas as pd
import pytest

from annbatch_dask import Loader
from annbatch_dask.flags import check_flag
from annbatch_dask.samplers import (
    CellSets,
    ClassSampler,
    DistributedSampler,
    MatchedControlSampler,
    RandomSampler,
    SequentialSampler,
)
from annbatch_dask.scdataset import (
    BlockShuffling,
    BlockWeightedSampling,
    ClassBalancedSampling,
    StrategySampler,
    Streaming,
    scDataset,
)
from annbatch_dask.transforms import BinnedExpression, NormalizeLog1p, RankTokens, Scale

N = 40
CLASSES = pd.Categorical(["B", "T"] * (N // 2))
STATS = pd.DataFrame({"log_mean": [0.0], "log_variance": [1.0]}, index=["GENE0"])
TOKENS = {"<pad>": 0, "<cls>": 1, "GENE0": 2}


def classes(**given):
    return ClassSampler(1, 8, 4, classes=CLASSES, **{"num_samples": 8} | given)


def matched(**given):
    return MatchedControlSampler(
        *(2, 8), **{"batch_size": 4, "is_control": np.arange(N) % 2 == 0, "match": [0] * N} | given
    )


def sets(**given):
    return CellSets(**{"set_size": 2, "sets_per_batch": 2, "groups": [0] * N} | given)


def shared(**given):
    return DistributedSampler(**{"sampler": RandomSampler(2, 8, 4, seed=0), "dist_info": (0, 2)} | given)


def strategy(**given):
    return StrategySampler(**{"strategy": BlockShuffling(4), "batch_size": 4} | given)


def hooked(**given):
    return scDataset(**{"data_collection": np.arange(N), "strategy": Streaming(), "batch_size": 4, "seed": 0} | given)


def binned(**given):
    return BinnedExpression(TOKENS, max_length=4, **given)


FLAGS = [
    *((Loader, name) for name in ("shuffle", "drop_last", "return_index", "preload_to_gpu", "to_torch")),
    (lambda **given: RandomSampler(2, 8, 4, **given), "replacement"),
    (lambda **given: RandomSampler(2, 8, 4, **given), "drop_last"),
    (lambda **given: SequentialSampler(2, 8, 4, **given), "drop_last"),
    *((of, "drop_last") for of in (classes, matched, sets, strategy, hooked, BlockShuffling)),
    (shared, "enforce_equal_batches"),
    (shared, "global_batches"),
    (Streaming, "shuffle"),
    (BlockWeightedSampling, "replace"),
    (lambda **given: ClassBalancedSampling(CLASSES, **given), "replace"),
    (lambda **given: Scale(STATS, **given), "zero_center"),
    (binned, "sample"),
]


@pytest.mark.parametrize(("of", "name"), FLAGS)
def test_a_flag_is_true_or_false(of, name):
    for value in ("False", "", 2, 0.0, [], pd.NA):
        with pytest.raises(TypeError, match=f"{name} is .*; it must be True or False"):
            of(**{name: value})


def test_flags_of_numpy_and_numbers_count():
    assert [check_flag("x", value) for value in (True, np.True_, 1, np.int8(1))] == [True] * 4
    assert [check_flag("x", value) for value in (False, np.False_, 0, np.uint8(0))] == [False] * 4
    loader = Loader(batch_size=4, shuffle=np.True_, drop_last=np.int64(1), dense=np.True_, return_index=np.False_)
    assert loader.batch_sampler.shuffle
    assert loader.batch_sampler.drops_last is True


@pytest.mark.parametrize(
    ("of", "given", "message"),
    [
        (Loader, {"dense": "yes"}, "dense must be True, False, 'cpu' or 'gpu'"),
        (Loader, {"dense": np.array([True, False])}, "dense must be True"),
        (Loader, {"even": "foo"}, "even must be 'drop', 'pad', None or 'auto', got 'foo'"),
        (hooked, {"even": "foo"}, "even must be"),
        (Loader, {"batch_size": True}, "batch_size is True; it must be a whole number"),
        (Loader, {"max_requests": None}, "max_requests is None; it must be a whole number"),
        (Loader, {"prefetch_bytes": float("inf")}, "prefetch_bytes is inf; give a number of bytes"),
        (Loader, {"prefetch_bytes": True}, "prefetch_bytes is True"),
        (Loader, {"dtype": "float31"}, "dtype is 'float31'; give one of numpy's"),
        (Loader, {"dtype": "datetime64[s]"}, r"dtype is 'datetime64\[s\]', which holds no numbers"),
        (Loader, {"var_names": 5}, "var_names is 5; give a list of names"),
        (Loader, {"obs_codes": {"cell_type": "BT"}}, "obs_codes gives 'BT' as the categories of 'cell_type'"),
        (Loader, {"obs_codes": {"cell_type": 5}}, "obs_codes gives 5 as the categories"),
        (Loader, {"obs_tables": ["cell_type"]}, "obs_tables must be a mapping"),
        (Loader, {"transform": NormalizeLog1p}, r"transform is the class NormalizeLog1p; .*NormalizeLog1p\(...\)"),
        (Loader, {"transform": [Scale]}, "transform is the class Scale"),
        (Loader, {"dist_info": (0, 2.5)}, r"dist_info says \(0, 2.5\); it must be a pair of whole numbers"),
        (Loader, {"dist_info": ("0", "2")}, "dist_info says"),
        (Loader, {"dist_info": (0, 2, 3)}, "dist_info says"),
        (Loader, {"dist_info": lambda: None}, "dist_info says None"),
        (Loader, {"dist_info": [0, 2]}, r"Unknown dist_info \[0, 2\]"),
        (Loader, {"batch_sampler": "random"}, "batch_sampler must be a Sampler, .*, got 'random'"),
        (Loader, {"batch_sampler": []}, "batch_sampler must be a Sampler"),
        (Loader, {"batch_sampler": RandomSampler}, "batch_sampler must be a Sampler"),
        (Loader, {"seed": "1"}, "seed must be a non-negative integer"),
        (Loader, {"seed": -1}, "seed is -1; it must be 0 or more"),
        (Loader, {"rng": "1"}, "rng must be a numpy.random.Generator"),
        (Loader, {"seed": 1, "rng": np.random.default_rng(0)}, "give one"),
        (Loader, {"cache_dir": ""}, "cache_dir is ''; give the path of a folder, or None"),
        (Loader, {"cache_dir": 5}, "cache_dir is 5"),
        (shared, {"sampler": "random"}, "sampler must be a Sampler"),
        (shared, {"sampler": RandomSampler}, "sampler must be a Sampler"),
        (lambda **given: RandomSampler(2, 8, 4, **given), {"mask": (0, 5)}, r"mask is \(0, 5\); give a range of rows"),
        (lambda **given: RandomSampler(2, 8, 4, **given), {"mask": slice(0.0, 5.0)}, "mask is slice"),
        (classes, {"class_weights": ["1", "a"]}, "class_weights must be an array of numbers"),
        (classes, {"class_weights": {"B": 1}}, "class_weights must be an array of numbers"),
        (matched, {"n_controls": "1"}, "n_controls is '1'; it must be a whole number"),
        (matched, {"batch_size": "4"}, "batch_size is '4'; it must be a whole number"),
        (matched, {"match": np.zeros((N, 2))}, "has several values a row; give a frame"),
        (sets, {"groups": np.zeros((N, 2))}, "has several values a row; give a frame"),
        (sets, {"min_cells": "2"}, "min_cells is '2'; it must be a whole number"),
        (strategy, {"strategy": "random"}, "strategy must be a SamplingStrategy, got 'random'"),
        (strategy, {"fetch_factor": 1.5}, "fetch_factor is 1.5; it must be a whole number"),
        (hooked, {"batch_size": "4"}, "batch_size is '4'; it must be a whole number"),
        (hooked, {"fetch_callback": "read"}, "fetch_callback must be a function, got 'read'"),
        (hooked, {"batch_transform": 5}, "batch_transform must be a function, got 5"),
        (hooked, {"rank": "0"}, "dist_info says"),
        (hooked, {"strategy": Streaming(np.ones(N - 1, bool))}, f"indices is a mask of {N - 1} rows, .* has {N}"),
        (Streaming, {"indices": True}, "indices must be integers or a mask"),
        (BlockShuffling, {"block_size": "8"}, "block_size is '8'; it must be a whole number"),
        (NormalizeLog1p, {"target_sum": "1e4"}, "target_sum is '1e4'; it must be a number"),
        (lambda **given: Scale(STATS, **given), {"max_value": "10"}, "max_value is '10'; it must be a number, or None"),
        (Scale, {"stats": {"log_mean": 0}}, "stats must be a DataFrame"),
        (RankTokens, {"vocabulary": ["GENE0"]}, "vocabulary must be a mapping, a series or the path of a file"),
        (lambda **given: RankTokens(TOKENS, **given), {"medians": 5}, "medians must be a mapping"),
    ],
)
def test_what_an_argument_cannot_be_is_refused_where_it_is_given(of, given, message):
    with pytest.raises((TypeError, ValueError), match=message):
        of(**given)


def test_a_mask_of_all_rows_selects_them():
    mask = np.arange(N) % 2 == 0
    assert np.concatenate(list(hooked(strategy=Streaming(mask)))).tolist() == list(range(0, N, 2))


def test_a_sampler_that_is_false_is_a_sampler():
    class Empty(SequentialSampler):
        def __len__(self):
            return 0

    loader = Loader(batch_sampler=Empty(2, 8, 4))
    assert isinstance(loader.batch_sampler, Empty)
