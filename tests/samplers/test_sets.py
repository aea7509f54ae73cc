"""CellSets: sets of cells of one group, each beside its controls."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from annbatch_dask.errors import SelectionError
from annbatch_dask.samplers import CellSets, DistributedSampler, MatchedControlSampler
from tests.samplers.tools import batches, rng

N_OBS = 300
TYPES = np.repeat(["a", "b", "c"], [150, 90, 60])
GENES = np.random.default_rng(0).choice(["x", "y", "none"], N_OBS, p=[0.45, 0.25, 0.3])
OBS = pd.DataFrame({"type": TYPES, "gene": GENES})
IS_CONTROL = GENES == "none"
GIVEN = {"groups": OBS, "is_control": IS_CONTROL, "match": TYPES}


def sets_of(sampler, n_obs=N_OBS):
    """(n, n_together) rows of the sets of a pass."""
    return np.concatenate(batches(sampler, n_obs)).reshape(-1, sampler.n_together)


@settings(max_examples=60, deadline=None)
@given(
    n_obs=st.integers(2, 120),
    n_groups=st.integers(1, 6),
    set_size=st.integers(1, 9),
    sets_per_batch=st.integers(1, 3),
    n_windows=st.integers(1, 3),
    chunk_size=st.integers(1, 5),
    has_controls=st.booleans(),
    fills=st.booleans(),
    seed=st.integers(0, 9),
)
def test_each_cell_once_but_for_what_fills_sets(
    n_obs, n_groups, set_size, sets_per_batch, n_windows, chunk_size, has_controls, fills, seed
):
    rng_ = np.random.default_rng(seed)
    groups = rng_.integers(0, n_groups, n_obs)
    is_control = rng_.random(n_obs) < 0.3
    is_control[0] = True
    given_ = {"is_control": is_control, "match": np.zeros(n_obs)} if has_controls else {}
    options = {"chunk_size": chunk_size, "preload_nsets": sets_per_batch * n_windows, "seed": seed, "min_cells": 1}
    try:
        sampler = CellSets(
            set_size,
            sets_per_batch,
            groups=groups,
            small="drop",
            short="fill" if fills else "drop",
            **given_,
            **options,
        )
    except SelectionError as error:
        assert "no group has" in str(error)  # noqa: PT017
        return
    found = batches(sampler, n_obs)
    assert len(found) == sampler.n_batches(n_obs)
    assert all(len(batch) == sampler.batch_size for batch in found[:-1])
    sets = np.concatenate(found).reshape(sampler.n_sets, -1)
    cells, controls = sets[:, :set_size], sets[:, set_size:]
    assert (groups[cells] == groups[cells[:, :1]]).all()
    if has_controls:
        assert not is_control[cells].any()
        assert is_control[controls].all()
        assert controls.shape == cells.shape
    for group in range(n_groups):
        own = np.flatnonzero((groups == group) & ~(is_control & has_controls))
        times = np.bincount(cells[groups[cells[:, 0]] == group].ravel(), minlength=n_obs)[own]
        if fills:
            n_over = -len(own) % set_size
            assert times.sum() == len(own) + n_over
            assert (times >= 1).all()
            if len(own) >= 2 * set_size:  # those that fill the last set are others, each once
                assert times.max(initial=0) <= 2
        else:
            assert times.sum() == len(own) // set_size * set_size
            assert times.max(initial=0) <= 1


def test_no_cell_stands_twice_in_a_set_where_its_group_has_enough():
    for cells in (part[:16] for part in sets_of(CellSets(16, 2, **GIVEN, rng=rng()))):
        n_own = int((TYPES == TYPES[cells[0]])[(GENES == GENES[cells[0]])].sum())
        assert n_own < 16 or len(set(cells.tolist())) == 16


def test_controls_match_and_are_drawn_alike():
    sampler = CellSets(10, 3, **GIVEN, rng=rng())
    drawn = np.zeros(N_OBS)
    for _ in range(60):
        sets = sets_of(sampler)
        assert (TYPES[sets[:, :10]] == TYPES[sets[:, 10:]]).all()
        np.add.at(drawn, sets[:, 10:], 1)
    for name in "abc":
        assert chisquare(drawn[IS_CONTROL & (TYPES == name)]).pvalue > 1e-3


def test_controls_may_match_cell_by_cell():
    plate = np.arange(N_OBS) % 3
    for part in sets_of(CellSets(10, 3, groups=OBS, is_control=IS_CONTROL, match=plate, rng=rng())):
        np.testing.assert_array_equal(plate[part[:10]], plate[part[10:]])


def test_epochs_differ_and_a_seed_fixes_them():
    first, second = (CellSets(8, 2, **GIVEN, seed=3) for _ in range(2))
    orders = [sets_of(first).tolist() for _ in range(2)]
    assert orders[0] != orders[1]
    assert orders == [sets_of(second).tolist() for _ in range(2)]
    assert sorted(orders[0][0][:8]) not in [sorted(part[:8]) for part in orders[1]]


def test_short_runs_of_neighbours_are_read_together():
    groups = np.repeat(np.arange(4), 64)
    sets = sets_of(CellSets(16, 1, groups=groups, chunk_size=8, rng=rng()), 256)
    assert {int(step) for step in np.diff(sets.reshape(-1, 8), axis=1).ravel()} == {1}


def test_a_global_batch_is_cut_between_sets():
    sampler = CellSets(5, 4, **GIVEN, seed=1)
    whole = sets_of(sampler).tolist()
    parts = [sets_of(DistributedSampler(sampler, dist_info=(k, 2), global_batches=True)).tolist() for k in range(2)]
    n_batches = len(parts[0]) // 2
    mixed = [row for b in range(n_batches) for part in parts for row in part[2 * b : 2 * b + 2]]
    assert len(whole) % 4 == 1  # of a last batch, which neither rank gets
    assert mixed == whole[:-1]
    padded = DistributedSampler(sampler, dist_info=(1, 2), global_batches=True, even="pad")
    assert sets_of(padded).tolist()[-2:] == whole[1:3]  # behind the last one and the first
    for inner in (CellSets(5, 3, **GIVEN), MatchedControlSampler(4, 3, 6, is_control=IS_CONTROL, match=TYPES)):
        with pytest.raises(
            ValueError, match=r"rows, of which \d+ belong together each, cannot be cut between these for 2"
        ):
            DistributedSampler(inner, dist_info=(0, 2), global_batches=True)
    with pytest.raises(ValueError, match="even=None"):
        DistributedSampler(sampler, dist_info=(0, 2), global_batches=True, even=None)


SMALL = np.array(["a"] * 20 + ["b", "c", "c"])
BAD = [
    (
        {"groups": SMALL},
        SelectionError,
        r"1 of 3 groups have fewer than 2 cells: 'b' \(1\); leave them out with small='drop', or, where cells may",
    ),
    (
        {"groups": SMALL, "short": "drop"},
        SelectionError,
        r"2 of 3 groups have fewer than 4 cells: 'b' \(1\), 'c' \(2\)",
    ),
    ({"groups": ["a", "b"], "small": "drop"}, SelectionError, "no group has 2 cells or more, of 2 rows"),
    ({"groups": SMALL, "is_control": SMALL == "a"}, ValueError, "give both, or none"),
    (
        {"groups": SMALL, "is_control": SMALL == "a", "match": SMALL},
        SelectionError,
        r"2 groups have perturbed cells and no control, such as \['b', 'c'\]",
    ),
    *[
        (
            {"groups": SMALL, "is_control": what, "match": SMALL},
            SelectionError,
            f"is_control holds .*{shown}.*; give True",
        )
        for what, shown in (
            (np.where(SMALL == "a", "True", "False"), "'False'"),
            (pd.Categorical(SMALL), "'a'"),
            (np.where(SMALL == "a", 1.0, np.nan), "nan"),
            (np.where(SMALL == "a", True, None), "None"),
            (pd.array(np.where(SMALL == "a", True, None), "boolean"), "<NA>"),
            (np.where(SMALL == "a", 2, 0), "2"),
        )
    ],
    ({"groups": SMALL, "is_control": [True], "match": [0]}, SelectionError, "groups has 23 rows, match 1"),
    ({"groups": SMALL, "preload_nsets": 3}, ValueError, "must be divisible by sets_per_batch: 3 % 2 = 1"),
    ({"groups": SMALL, "small": "repeat"}, ValueError, "small must be 'error' or 'drop', got 'repeat'"),
    ({"groups": SMALL, "short": "pad"}, ValueError, "short must be 'fill' or 'drop', got 'pad'"),
    ({"groups": SMALL, "chunk_size": 0}, ValueError, "chunk_size"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_what_cannot_be_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        CellSets(4, 2, **options)


def test_a_group_of_one_cell_may_be_dropped_or_fill_its_set():
    n_sets = [CellSets(4, 2, groups=SMALL, **more).n_sets for more in ({"small": "drop"}, {"min_cells": 1})]
    assert n_sets == [6, 7]
    alone = [part for part in sets_of(CellSets(4, 2, groups=SMALL, min_cells=1, rng=rng()), 23) if 20 in part]
    assert [part.tolist() for part in alone] == [[20] * 4]


def test_rows_of_another_loader_are_refused():
    with pytest.raises(ValueError, match=r"groups has 23 rows, which does not match loader n_obs \(24\)"):
        CellSets(4, 2, groups=SMALL, min_cells=1).validate(24)
