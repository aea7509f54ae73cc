"""Global batches dealt to lanes: the same on any number of ranks, and each rank reads its share."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from annbatch_dask.order.lanes import MAX_LANES, count_lanes
from annbatch_dask.order.planned import as_runs, expand
from annbatch_dask.samplers import DistributedSampler, RandomSampler, SequentialSampler


def sampler(n_chunk, n_preload, size, rank, world, *, even=None, drop_last=False, kind=RandomSampler):
    own = kind(n_chunk, n_preload, size, drop_last=drop_last)
    if kind is RandomSampler:
        own.seed = 5
    return DistributedSampler(own, dist_info=(rank, world), even=even, global_batches=True)


def of_rank(sampler, n_rows, epoch=0):
    """Batches of a rank, as rows; and all rows it reads."""
    batches, read = [], []
    for planned in sampler.plan_requests(n_rows, epoch):
        request = planned.make()
        rows = expand(request["requests"])
        assert tuple(map(len, request["splits"])) == planned.sizes
        read.append(rows)
        batches += [rows[split] for split in request["splits"]]
    return batches, np.concatenate(read) if read else np.zeros(0, np.int64)


@st.composite
def settings(draw):
    n_chunk, n_preload = draw(st.integers(1, 9)), draw(st.integers(1, 12))
    window = n_chunk * n_preload
    size = draw(st.sampled_from([k for k in range(1, window + 1) if window % k == 0]))
    return n_chunk, n_preload, size, draw(st.integers(1, 7 * window))


@given(settings(), st.booleans())
def test_batches_are_the_same_on_any_number_of_ranks(setting, drop_last):
    *form, n_rows = setting
    size = form[2]
    alone, _ = of_rank(sampler(*form, 0, 1, drop_last=drop_last), n_rows)
    rows = np.concatenate([*alone, np.zeros(0, np.int64)])
    assert len(np.unique(rows)) == len(rows) == (n_rows // size * size if drop_last else n_rows)
    assert [len(batch) for batch in alone[:-1]] == [size] * (len(alone) - 1)
    for world in (k for k in range(2, size + 1) if size % k == 0):
        parts = [of_rank(sampler(*form, rank, world, drop_last=drop_last), n_rows)[0] for rank in range(world)]
        assert {len(part) for part in parts} <= {len(alone)}
        for together, batch in zip(zip(*parts, strict=True), alone, strict=True):
            assert sorted(np.concatenate(together)) == sorted(batch)
            if len(batch) == size:
                assert {len(part) for part in together} == {size // world}


@given(settings(), st.sampled_from(["drop", "pad"]))
def test_ranks_have_batches_of_the_same_sizes(setting, even):
    *form, n_rows = setting
    for world in (k for k in range(2, form[2] + 1) if form[2] % k == 0):
        found = [of_rank(sampler(*form, rank, world, even=even), n_rows)[0] for rank in range(world)]
        assert len({tuple(map(len, batches)) for batches in found}) == 1
        rows = np.concatenate([batch for batches in found for batch in batches] or [np.zeros(0, int)])
        if even == "drop":
            assert len(np.unique(rows)) == len(rows) > n_rows - form[2]
        else:
            assert set(rows) == set(range(n_rows))


@pytest.mark.parametrize("world", [1, 4, 8, 32])
def test_a_rank_reads_its_share(world):
    n_rows = 400_000
    for rank in {0, world // 3, world - 1}:
        batches, read = of_rank(sampler(512, 8, 2048, rank, world), n_rows)
        assert len(read) == len(np.unique(read)) == sum(map(len, batches))
        assert abs(len(read) - n_rows / world) <= 2048 / world + 1
        # Whole chunks, or stretches of neighbouring rows: the files' own chunks are read by few ranks.
        stretches = 1 + np.count_nonzero(np.diff(np.sort(read)) != 1)
        assert stretches <= len(read) / 512 + 8


def test_a_batch_has_rows_of_all_lanes_in_an_order_of_the_epochs():
    found = [of_rank(sampler(16, 8, 64, 0, 1), 10_000, epoch)[0] for epoch in (0, 0, 1)]
    assert all(np.array_equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not np.array_equal(found[0][0], found[2][0])
    chunks = {row // 16 for row in found[0][0]}
    assert len(chunks) >= MAX_LANES
    # A row's place among the batches of its lane is uniform: the first 64 rows of a file come anywhere.
    places = np.concatenate(
        [[b for b, batch in enumerate(found[k]) if row in batch] for k in (0, 2) for row in range(64)]
    )
    assert len(np.unique(places)) > 20


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(1, 9)), max_size=20))
def test_runs_are_the_rows(runs):
    rows = np.concatenate([np.arange(first, first + n) for first, n in runs] or [np.zeros(0, int)])
    found = as_runs(rows)
    assert expand(found).tolist() == rows.tolist()
    if len(rows) >= 4 * max(len(runs), 1) > 4:
        assert all(isinstance(part, slice) for part in found)


def test_rows_that_come_in_their_order_are_not_dealt_to_lanes():
    found = [of_rank(sampler(16, 8, 64, rank, 2, kind=SequentialSampler), 1000)[0] for rank in range(2)]
    batches = [np.concatenate(pair) for pair in zip(*found, strict=True)]
    np.testing.assert_array_equal(np.concatenate(batches), np.arange(1000))


@given(st.integers(1, 100_000))
def test_lanes_divide_a_batch(size):
    n_lanes = count_lanes(size)
    assert size % n_lanes == 0
    assert n_lanes <= MAX_LANES
    assert n_lanes >= min(size & -size, MAX_LANES), "all powers of 2 that divide it"


def test_lanes_of_usual_batches():
    assert [count_lanes(n) for n in (4096, 1024, 1000, 100, 3072, 96, 7, 1, 67)] == [64, 64, 40, 20, 64, 32, 7, 1, 1]
