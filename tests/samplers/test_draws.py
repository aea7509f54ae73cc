"""Rows are drawn as often as they should be, through a loader of several datasets; what was passed in stays as it was."""

from __future__ import annotations

import copy
import pickle

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from scipy.stats import chisquare

from annbatch_dask.loader import Loader
from annbatch_dask.samplers import ClassSampler, DistributedSampler, MatchedControlSampler, WeightedClassSampler
from annbatch_dask.scdataset import (
    BlockWeightedSampling,
    ClassBalancedSampling,
    MultiIndexable,
    StrategySampler,
    scDataset,
)
from annbatch_dask.transforms import NormalizeLog1p
from tests.loader.data import dense, frame, genes, matrix
from tests.loader.every_sampler import SAMPLERS
from tests.loader.every_sampler import make as make_loader
from tests.samplers.tools import N_CLASSED, RUNS, classes_in_runs, rng

pytestmark = [
    pytest.mark.filterwarnings("ignore:rank . of . draws its seed from a generator:UserWarning"),
    pytest.mark.filterwarnings("ignore:.* indices were not sorted:UserWarning"),
]

CODES = np.asarray(classes_in_runs(RUNS).codes)
BORDERS = [47, 48, 200]  # of datasets, in the middle of runs
WEIGHTS = np.array([1.0, 0.0, 3.0])
SUBSET = np.random.default_rng(5).permutation(N_CLASSED)[:150]  # in no order
CHUNK = 5


def by_class(kind, **kwargs):
    return kind(
        CHUNK, 8, 4, classes=classes_in_runs(RUNS), num_samples=2000, class_weights=WEIGHTS, rng=rng(), **kwargs
    )


def of_strategy(strategy):
    return StrategySampler(strategy, 20, 5, rng=rng())


def share_of_class(codes):
    return 1 / np.bincount(codes)[codes]


def share_in_chunks():
    """How often each row is drawn where chunks are whole: in a run of q and some rows over, these are rarer."""
    found = []
    for n_rows in RUNS:
        n_chunks, n_over = divmod(n_rows, CHUNK)
        found += [1 / (n_chunks + (place % CHUNK < n_over)) * n_rows / CHUNK for place in range(n_rows)]
    return np.array(found) * share_of_class(CODES)


def in_subset(weights):
    found = np.zeros(N_CLASSED)
    found[SUBSET] = weights
    return found


# A sampler, how often each row should be drawn in proportion, and how many neighbours are drawn together.
DRAWS = {
    "classes": lambda: (by_class(ClassSampler), WEIGHTS[CODES] * share_in_chunks(), 20),
    "mixed classes": lambda: (by_class(WeightedClassSampler), WEIGHTS[CODES] * share_in_chunks(), CHUNK),
    "weights of a subset": lambda: (
        of_strategy(BlockWeightedSampling(4, indices=SUBSET, weights=SUBSET + 1.0, total_size=2000)),
        in_subset(SUBSET + 1.0),
        1,
    ),
    "weights of all rows": lambda: (
        of_strategy(BlockWeightedSampling(4, indices=SUBSET, weights=np.arange(N_CLASSED) + 1.0, total_size=2000)),
        in_subset(SUBSET + 1.0),
        1,
    ),
    "balanced subset": lambda: (
        of_strategy(ClassBalancedSampling(CODES[SUBSET], 4, indices=SUBSET, total_size=2000)),
        in_subset(share_of_class(CODES[SUBSET])),
        1,
    ),
}


@pytest.mark.parametrize("name", DRAWS)
def test_rows_of_several_datasets_are_drawn_as_often_as_their_weights_say(name):
    sampler, weights, n_together = DRAWS[name]()
    loader = Loader(batch_sampler=sampler, return_index=True, preload_to_gpu=False)
    loader.add_datasets(np.split(matrix(N_CLASSED), BORDERS))
    counts = np.zeros(N_CLASSED)
    for _ in range(8):
        for batch in loader:
            np.testing.assert_array_equal(batch["X"][:, 0], batch["index"] + 1)
            counts += np.bincount(batch["index"], minlength=N_CLASSED)
    expected = weights / weights.sum() * counts.sum()
    assert counts.sum() == 8 * 2000
    assert not counts[weights == 0].any()
    of_class = np.array([np.bincount(CODES, weights=values) for values in (counts, expected)]) / n_together
    assert chisquare(*of_class[:, of_class[1] > 0]).pvalue > 1e-3
    for code in np.unique(CODES[weights > 0]):
        rows = np.flatnonzero((CODES == code) & (weights > 0))
        rows = rows[::CHUNK] if n_together > 1 else rows  # rows of one chunk come together
        assert chisquare(counts[rows], expected[rows] / expected[rows].sum() * counts[rows].sum()).pvalue > 1e-3


# --- nothing passed in is changed


def test_a_loader_changes_none_of_what_it_is_given():
    given = {
        "X": sp.csr_matrix(matrix(60)),
        "obs": frame(60),
        "var": genes(),
        "where": np.random.default_rng(0).permutation(60)[:40],
        "var_names": ["g3", "g0", "g9"],
        "transform": [NormalizeLog1p(1e4)],
        "obs_columns": ["row"],
        "obs_codes": ["kind"],
    }
    before = pickle.dumps(given)
    chosen = {name: given[name] for name in ("where", "var_names", "transform", "obs_columns", "obs_codes")}
    for as_dense in (False, True):
        loader = Loader(
            batch_size=8, chunk_size=4, preload_nchunks=4, shuffle=True, dense=as_dense, preload_to_gpu=False, **chosen
        )
        loader.add_dataset(given["X"], obs=given["obs"], var=given["var"])
        assert len(list(loader)) == 5
        loader.load_state_dict(loader.state_dict())
    assert pickle.dumps(given) == before


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix, sp.csr_array])
def test_who_changes_a_batch_does_not_change_the_data(form):
    x, obs = form(matrix(60)), frame(60)
    before = pickle.dumps((x, obs))
    loader = Loader(batch_size=20, chunk_size=20, preload_nchunks=1, preload_to_gpu=False, return_index=True)
    loader.add_adata(ad.AnnData(x, obs=obs, var=genes()))
    for _ in range(2):
        for batch in loader:
            np.testing.assert_array_equal(dense(batch["X"]), matrix(60)[batch["index"]])
            getattr(batch["X"], "data" if sp.issparse(batch["X"]) else "real")[:] = -1
            batch["obs"].loc[:, "row"] = -1
            batch["index"][:] = 0
    assert pickle.dumps((x, obs)) == before


def test_samplers_and_strategies_change_none_of_what_they_are_given():
    is_control, labels, indices = np.arange(90) % 3 > 0, np.arange(90) % 4, np.random.default_rng(0).permutation(90)
    weights, members = np.arange(90.0), {"x": np.arange(90), "y": np.arange(90)}
    given = (is_control, labels, indices, weights, members)
    before = pickle.dumps(given)
    matched = MatchedControlSampler(5, 4, 4, is_control=is_control, match=labels, rng=rng())
    list(DistributedSampler(matched, dist_info=(0, 2)).sample(90))
    for strategy in (
        ClassBalancedSampling(labels, 4, indices=indices),
        BlockWeightedSampling(4, indices=indices, weights=weights),
        BlockWeightedSampling(4, indices=indices, weights=weights, replace=False, sampling_size=9, total_size=40),
    ):
        assert len(list(scDataset(MultiIndexable(members), strategy, 8, 2, seed=0))) == len(
            range(0, strategy.get_len(labels), 8)
        )
    assert pickle.dumps(given) == before


# --- copies


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda loader: pickle.loads(pickle.dumps(loader))])
def test_copies_of_a_loader_go_on_alike_whatever_its_sampler(name, clone):
    loader = make_loader(name)
    list(loader)
    twin = clone(loader)
    epochs = [[[b["index"].tolist() for b in one] for _ in range(2)] for one in (twin, loader)]
    assert epochs[0] == epochs[1]
