"""Order as a function of (seed, epoch, position): every row as often as promised, shared out without loss."""

from __future__ import annotations

import copy
import pickle
import sys
from itertools import product
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from annbatch_dask.abc import Sampler
from annbatch_dask.errors import RankError
from annbatch_dask.loader import Loader
from annbatch_dask.order.keys import Shuffled
from annbatch_dask.order.planned import expand, plan_request, skip
from annbatch_dask.order.share import Worker, by_rank, by_worker
from annbatch_dask.samplers import (
    ClassSampler,
    DistributedSampler,
    MatchedControlSampler,
    RandomSampler,
    SequentialSampler,
    WeightedClassSampler,
)
from annbatch_dask.samplers.epoch_counter import EpochCounter
from annbatch_dask.scdataset import BlockShuffling, StrategySampler
from tests.samplers.tools import N_CLASSED, RUNS, Minimal, batches, classes_in_runs, rng, rows

# What most of these ranks are given: generators, of one seed.
pytestmark = pytest.mark.filterwarnings("ignore:rank . of . draws its seed from a generator:UserWarning")


def counted(sampler, n_obs, n_epochs):
    """How often each row is drawn in so many passes."""
    counts = np.zeros(n_obs, int)
    for _ in range(n_epochs):
        for request in sampler.sample(n_obs):
            rows = expand(request["requests"])
            counts += np.bincount(rows[np.concatenate(request["splits"])], minlength=n_obs)
    return counts


def of_classes(kind=ClassSampler, *, num_samples=240, weights=None, seed=0, **kwargs):
    return kind(
        5, 8, 4, classes=classes_in_runs(RUNS), num_samples=num_samples, class_weights=weights, rng=rng(seed), **kwargs
    )


ALL = {
    "sequential": lambda: SequentialSampler(5, 4, 4),
    "random": lambda: RandomSampler(5, 4, 4, rng=rng(1)),
    "part": lambda: RandomSampler(5, 4, 4, num_samples=111, rng=rng(1)),
    "replacement": lambda: RandomSampler(5, 4, 4, replacement=True, rng=rng(1)),
    "class": of_classes,
    "weighted class": lambda: of_classes(WeightedClassSampler),
    "matched": lambda: MatchedControlSampler(
        5, 4, 4, is_control=np.arange(N_CLASSED) % 4 > 0, match=np.arange(N_CLASSED) % 3, rng=rng(2)
    ),
    "rank": lambda: DistributedSampler(RandomSampler(5, 4, 4, rng=rng(1)), dist_info=(1, 3)),
}


@pytest.mark.parametrize("base", [SequentialSampler, RandomSampler])
def test_a_sampler_derived_from_ours_yields_what_its_own_sample_does(base):
    class Doubled(base):
        def _sample(self, n_obs):
            for request in super()._sample(n_obs):
                yield request
                yield {"requests": request["requests"], "splits": [np.arange(2)]}

    found = list(Doubled(5, 2, 5).sample(40))
    assert [len(request["splits"]) for request in found] == [2, 1] * 4


@pytest.mark.parametrize("kind", [ClassSampler, WeightedClassSampler])
def test_chunks_of_a_class_lie_in_one_run_and_are_whole(kind):
    """What wraps annbatch's samplers reads start and stop of each slice, and takes it for a chunk."""
    codes = np.asarray(classes_in_runs(RUNS).codes)
    run = np.cumsum(np.diff(codes, prepend=-1) != 0)
    found = [part for k in range(20) for r in of_classes(kind, seed=k).sample(N_CLASSED) for part in r["requests"]]
    assert {part.stop - part.start for part in found} == {5}
    assert all(run[part.start] == run[part.stop - 1] for part in found)
    assert len({run[part.start] for part in found}) == len(RUNS)
    for request in of_classes(kind, num_samples=238).sample(N_CLASSED):  # the last one is cut
        rows = expand(request["requests"])
        assert all(len(set(run[rows[i : i + 5]])) == 1 for i in range(0, len(rows), 5))


@pytest.mark.parametrize("kind", [ClassSampler, WeightedClassSampler])
def test_weights_are_those_of_the_classes_within_the_mask(kind):
    codes = np.asarray(classes_in_runs(RUNS).codes)  # A: rows 105 to 194, B: 195 to 215
    counts = np.zeros(3)
    for seed in range(40):
        sampler = of_classes(kind, num_samples=2000, weights=np.array([1.0, 5.0, 3.0]), seed=seed)
        sampler.mask = slice(105, 195 + 21)
        for request in sampler.sample(N_CLASSED):
            counts += np.bincount(codes[expand(request["requests"])], minlength=3)
    n_draws = counts.sum() / 20
    assert counts[2] == 0
    assert abs(counts[1] / counts.sum() - 5 / 6) < 4 * np.sqrt(5 / 36 / n_draws)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 1000])
def test_a_shuffled_order_is_a_permutation_looked_up_anywhere(n):
    order = Shuffled(n, (3, 1))
    whole = order.at(np.arange(n))
    assert sorted(whole.tolist()) == list(range(n))
    assert order.find(whole).tolist() == list(range(n))
    assert order.at(np.array([n - 1]))[0] == whole[n - 1]


@given(
    n_obs=st.integers(1, 120),
    chunk=st.integers(1, 12),
    preload=st.integers(1, 4),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_a_part_without_replacement_has_every_row_at_most_once(n_obs, chunk, preload, share, seed):
    num_samples = max(1, round(share * n_obs))
    found = batches(RandomSampler(chunk, preload, chunk, num_samples=num_samples, rng=rng(seed)), n_obs)
    drawn = np.concatenate(found)
    assert len(drawn) == num_samples == len(set(drawn.tolist()))
    assert drawn.max() < n_obs
    assert all(len(batch) == chunk for batch in found[:-1])


@pytest.mark.parametrize(
    "sampler",
    [
        RandomSampler(7, 4, 4, num_samples=40, rng=rng(0)),
        RandomSampler(7, 4, 4, num_samples=40, replacement=True, rng=rng(0)),
    ],
)
def test_rows_at_the_ends_are_drawn_as_often_as_others(sampler):
    """45 rows in chunks of 7: the last one has 3."""
    counts = counted(sampler, 45, 900)
    assert counts.sum() == 40 * 900
    # Rows come in runs, so counts vary more than independent draws do: compare groups of one place in the grid.
    ends = np.array([counts[:3].mean(), counts[-3:].mean(), counts[-7:-3].mean()])
    assert np.abs(ends / counts.mean() - 1).max() < 0.06


IS_CONTROL = np.arange(60) % 4 == 0
PARTIAL = {
    "drop_last": lambda: [RandomSampler(8, 2, 8, drop_last=True, rng=rng(1))],
    "short rest": lambda: [RandomSampler(20, 1, 10, drop_last=True, rng=rng(1))],
    "mask": lambda: [RandomSampler(8, 2, 8, drop_last=True, mask=slice(0, 45), rng=rng(1))],
    "num_samples": lambda: [RandomSampler(8, 2, 8, num_samples=40, rng=rng(1))],
    "num_samples, all whole": lambda: [RandomSampler(9, 2, 9, num_samples=32, drop_last=True, rng=rng(1))],
    "ranks": lambda: ranks(RandomSampler(8, 2, 8, rng=rng(1))),
    "ranks, drop_last": lambda: ranks(RandomSampler(8, 2, 8, drop_last=True, rng=rng(1))),
    "global batches": lambda: ranks(RandomSampler(6, 2, 6, drop_last=True, rng=rng(1)), global_batches=True),
    "blocks": lambda: [StrategySampler(BlockShuffling(8), 8, 2, drop_last=True, rng=rng(1))],
    "blocks, dropped": lambda: [StrategySampler(BlockShuffling(8, drop_last=True), 8, 2, rng=rng(1))],
    "blocks, indices": lambda: [
        StrategySampler(BlockShuffling(8, indices=np.arange(45)), 8, 2, drop_last=True, rng=rng(1))
    ],
    "blocks, ranks": lambda: ranks(StrategySampler(BlockShuffling(8), 8, 2, rng=rng(1))),
    "matched": lambda: [
        MatchedControlSampler(
            8, 2, 16, is_control=IS_CONTROL, match=np.zeros(60), drop_last=True, rng=np.random.default_rng(1)
        )
    ],
}


def ranks(sampler, **kwargs):
    return [DistributedSampler(sampler, dist_info=(rank, 3), **kwargs) for rank in range(3)]


@pytest.mark.parametrize("name", PARTIAL)
def test_what_a_pass_leaves_out_is_any_row_with_the_same_chance(name):
    """45 rows, mostly in runs of 8 and batches of 8, two to a window: 5 rows are short of a run."""
    n_obs = 60 if name == "matched" else 47 if name in ("mask", "blocks, indices") else 45
    may_come = ~IS_CONTROL if name == "matched" else np.arange(n_obs) < 45
    parts, pick, left_out = PARTIAL[name](), rng(9), np.zeros(n_obs, int)
    for epoch in range(2000):
        counts = np.zeros(n_obs, int)
        for part in parts:
            for request in (planned.make() for planned in part.plan_requests(n_obs, epoch)):
                drawn = expand(request["requests"])[np.concatenate(request["splits"])]
                counts += np.bincount(drawn, minlength=n_obs)
        assert counts[may_come].max() == 1
        left_out[pick.choice(np.flatnonzero(may_come & (counts == 0)))] += 1  # one: those of an epoch lie together
    assert chisquare(left_out[may_come]).pvalue > 1e-4


@pytest.mark.parametrize("kind", [ClassSampler, WeightedClassSampler])
@pytest.mark.parametrize("weights", [None, (1, 0, 3)])
def test_classes_are_drawn_by_weight_and_their_rows_alike_whatever_their_runs(kind, weights):
    sampler = of_classes(kind, weights=weights)
    counts, codes = counted(sampler, N_CLASSED, 300), np.asarray(classes_in_runs(RUNS).codes)
    share = np.array(weights or (1, 1, 1)) / sum(weights or (1, 1, 1))
    n_together = 20 if kind is ClassSampler else 5
    drawn = np.bincount(codes, weights=counts, minlength=3) / n_together
    assert chisquare(drawn[share > 0], drawn.sum() * share[share > 0]).pvalue > 1e-3
    assert not drawn[share == 0].any()
    for code in np.flatnonzero(share):
        of_class = counts[codes == code]
        edges = of_class[[0, -1]]  # the first row of a run and the last of one
        assert np.abs(edges / of_class.mean() - 1).max() < 0.25


def test_a_class_batch_has_one_class_and_a_weighted_one_several():
    codes = np.asarray(classes_in_runs(RUNS).codes)
    assert all(len(set(codes[batch])) == 1 for batch in batches(of_classes(), N_CLASSED))
    mixed = [len(set(codes[batch])) for batch in batches(of_classes(WeightedClassSampler), N_CLASSED)]
    assert max(mixed) == 3


def test_a_class_pass_has_exactly_num_samples_rows():
    for num_samples in (1, 4, 39, 41, 240):
        sampler = of_classes(num_samples=num_samples)
        found = batches(sampler, N_CLASSED)
        assert sum(map(len, found)) == num_samples
        assert len(found) == sampler.n_batches(0)
    assert all(len(batch) == 4 for batch in batches(of_classes(num_samples=41, drop_last=True), N_CLASSED))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"classes": ["A"]}, TypeError, r"pandas\.Categorical"),
        ({"classes": pd.Categorical(["A", None])}, ValueError, "NA values"),
        ({"classes": classes_in_runs((20, 3, 20, 20))}, ValueError, r"at least chunk_size .*\['B'\]"),
        ({"class_weights": np.ones(2)}, ValueError, "one weight per class"),
        ({"class_weights": np.zeros(3)}, ValueError, "at least one positive"),
        ({"class_weights": np.array([0, 0, 1]), "mask": slice(0, 20)}, ValueError, "positive weight is present"),
        ({"class_weights": pd.Series([1, 1, 1])}, TypeError, "not a pandas Series"),
        ({"num_samples": 0}, ValueError, "num_samples must be greater than 1"),
        ({"num_samples": 10**30}, ValueError, "num_samples must be 281474976710656 or less, got 10"),
    ],
)
def test_classes_that_cannot_be_drawn(arguments, error, message):
    with pytest.raises(error, match=message):
        ClassSampler(5, 8, 4, **{"classes": classes_in_runs(RUNS), "num_samples": 40} | arguments)


def test_a_class_mask_is_resolved_and_fixed_during_a_pass():
    sampler = of_classes(mask=slice(20, None), weights=(1, 1, 0))
    assert sampler.mask == slice(20, N_CLASSED)
    with pytest.raises(ValueError, match="does not match loader n_obs"):
        list(sampler.sample(5))
    requests = sampler.sample(N_CLASSED)
    next(requests)
    sampler.mask = slice(20, N_CLASSED)
    with pytest.raises(ValueError, match="while a pass is being iterated"):
        sampler.mask = slice(0, 100)
    requests.close()
    sampler.mask = slice(0, 20)
    assert counted(sampler, N_CLASSED, 1)[20:].sum() == 0


@pytest.mark.parametrize("name", ALL)
def test_an_epoch_is_a_function_of_its_number(name):
    sampler = ALL[name]()
    epochs = [[b.tolist() for b in batches(sampler, N_CLASSED)] for _ in range(3)]
    for number in (2, 0, 1):
        sampler.set_epoch(number)
        assert [b.tolist() for b in batches(sampler, N_CLASSED)] == epochs[number]
    assert (epochs[0] != epochs[1]) is (name != "sequential")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_go_on_alike_and_apart(name, clone):
    sampler = ALL[name]()
    list(sampler.sample(N_CLASSED))
    twin = clone(sampler)
    twin_epochs = [[b.tolist() for b in batches(twin, N_CLASSED)] for _ in range(2)]
    assert [[b.tolist() for b in batches(sampler, N_CLASSED)] for _ in range(2)] == twin_epochs


def test_nothing_passed_in_is_changed():
    classes, weights = classes_in_runs(RUNS), np.array([1.0, 2.0, 0.0])
    sampler = ClassSampler(5, 8, 4, classes=classes, num_samples=40, class_weights=weights, rng=rng())
    wrapped = RandomSampler(5, 4, 4, rng=rng(3))
    before = pickle.dumps((classes, weights, wrapped))
    ranked = DistributedSampler(wrapped, dist_info=(0, 2))
    for one in (sampler, ranked):
        list(one.sample(N_CLASSED))
        assert one.n_batches(N_CLASSED) > 0
    assert pickle.dumps((classes, weights, wrapped)) == before
    weights[:] = 0  # nor does a later change get in
    assert counted(sampler, N_CLASSED, 1).sum() == 40


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("n_workers", [1, 2, 3, 7])
def test_workers_have_the_same_batches_together(name, n_workers):
    sampler = ALL[name]()
    expected = sorted(b.tolist() for b in batches(sampler, N_CLASSED))
    found = []
    for worker in range(n_workers):
        stream = by_worker(
            sampler.plan_requests(N_CLASSED, 0), Worker(worker, n_workers, 0), in_order=not sampler.shuffle
        )
        for request in (planned.make() for planned in stream):
            found += [expand(request["requests"])[split].tolist() for split in request["splits"]]
    assert sorted(found) == expected


def test_a_counter_gives_all_workers_of_a_pass_one_epoch():
    counter = EpochCounter()
    assert [counter.start(None), counter.start(None)] == [0, 1]
    assert [counter.start(Worker(w, 3, 77)) for w in (2, 0)] == [2, 3]  # one process, persistent: a pass each
    counter._who = (-1, 0)  # another process
    assert counter.peek(Worker(1, 3, 77)) == 2
    assert counter.is_elsewhere
    assert counter.start(None) == 4
    counter.set(1)
    assert [counter.start(None), EpochCounter(9).start(None)] == [1, 9]


def test_a_counter_tells_passes_of_one_seed_apart():
    """As where torch is seeded before each: their workers are other processes, with a higher number."""
    counter = EpochCounter()
    epochs = []
    for first_process in (1, 4, 8, 30):
        # The third is started while another thread starts a process, the fourth is another number of workers.
        counter._who = (-1, 0)
        others = (first_process, first_process, first_process + (first_process == 8))
        epochs.append([])
        for worker, first in enumerate(others if first_process < 30 else others[:2]):
            counter._who = (-1, 0)  # each in a process of its own
            epochs[-1].append(counter.start(Worker(worker, len(others) - (first_process == 30), 77, first)))
    assert epochs == [[0] * 3, [1] * 3, [2] * 3, [3] * 2]


# --- ranks


def parts(sampler, n_obs, world_size, **kwargs):
    """The batches of each rank."""
    ranked = [DistributedSampler(sampler, dist_info=(rank, world_size), **kwargs) for rank in range(world_size)]
    found = [batches(one, n_obs) for one in ranked]
    assert [len(part) for part in found] == [one.n_batches(n_obs) for one in ranked]
    return found


@pytest.mark.parametrize("even", ["drop", "pad", None])
def test_ranks_share_the_rows_of_every_size(even):
    """Sizes to 200, worlds 1 to 8; windows of 12 rows, batches of 3. After two windows for all ranks, every third."""
    sampler = RandomSampler(3, 4, 3, rng=rng(5))
    for n_obs in (*range(100), *range(100, 201, 3)):
        stream = [plan_request(item.make()) for item in sampler.plan_requests(n_obs, 0)] if n_obs else []
        for world_size in range(1, 9):
            found = [drawn_by(by_rank(stream, rank, world_size, even=even)) for rank in range(world_size)]
            check_shares(found, n_obs, even if world_size > 1 else None)


def drawn_by(stream):
    return [
        rows(request)[split].tolist() for request in (item.make() for item in stream) for split in request["splits"]
    ]


def check_shares(found, n_obs, even):
    world_size = len(found)
    drawn = [row for part in found for batch in part for row in batch]
    sizes = [[len(batch) for batch in part] for part in found]
    if even is None:
        assert sorted(drawn) == list(range(n_obs))
        assert max(map(len, sizes)) - min(map(len, sizes)) <= 1
        return
    assert all(part == sizes[0] for part in sizes)
    assert len(set(sizes[0])) <= 1
    if even == "drop":
        assert len(set(drawn)) == len(drawn) > n_obs - 3 * world_size
    else:
        assert set(drawn) == set(range(n_obs))
        assert len(drawn) < n_obs + 3 * world_size


KINDS = {
    "random": lambda *sizes, **kwargs: RandomSampler(*sizes, rng=rng(5), **kwargs),
    "sequential": SequentialSampler,
    "blocks": lambda chunk, preload, size, **kwargs: StrategySampler(
        BlockShuffling(chunk), size, preload, rng=rng(5), **kwargs
    ),
}


@settings(max_examples=200)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    n_obs=st.integers(1, 200),
    chunk=st.integers(1, 15),
    preload=st.integers(1, 5),
    world_size=st.integers(1, 6),
    even=st.sampled_from(["drop", "pad", None]),
    drop_last=st.booleans(),
    is_global=st.booleans(),
    n_workers=st.integers(1, 4),
    n_before=st.integers(0, 30),
)
def test_nothing_is_lost_or_comes_twice_whoever_shares_it_and_wherever_it_goes_on(  # noqa: PLR0913
    kind, n_obs, chunk, preload, world_size, even, drop_last, is_global, n_workers, n_before
):
    times = world_size if is_global else 1
    sampler = KINDS[kind](chunk, preload * times, chunk * times, drop_last=drop_last)
    whole = drawn_by(sampler.plan_requests(n_obs, 3))
    assert len(whole) == sampler.n_batches(n_obs)
    rows_of_pass = sorted(sum(whole, []))
    assert len(set(rows_of_pass)) == len(rows_of_pass)
    assert drop_last or rows_of_pass == list(range(n_obs))

    places = [(rank, world_size) for rank in range(world_size)]
    ranked = [DistributedSampler(sampler, dist_info=p, even=even, global_batches=is_global) for p in places]
    found = [drawn_by(one.plan_requests(n_obs, 3)) for one in ranked]
    assert [one.n_batches(n_obs) for one in ranked] == [len(part) for part in found]
    drawn = sorted(sum((sum(part, []) for part in found), []))
    assert even is None or len({tuple(len(batch) for batch in part) for part in found}) == 1
    assert even == "pad" or len(set(drawn)) == len(drawn)
    assert even is not None or drawn == rows_of_pass
    assert even != "pad" or set(drawn) == set(rows_of_pass)
    assert even != "drop" or len(whole) - sum(map(len, found)) / times <= world_size

    one, part = ranked[0], found[0]
    workers = [Worker(number, n_workers, 0) for number in range(n_workers)]
    shared = [by_worker(one.plan_requests(n_obs, 3), worker, in_order=not one.shuffle) for worker in workers]
    assert sorted(map(sorted, sum(map(drawn_by, shared), []))) == sorted(map(sorted, part))
    assert drawn_by(skip(one.plan_requests(n_obs, 3), n_before)) == part[n_before:]


@pytest.mark.parametrize("even", ["drop", "pad", None])
def test_ranks_know_how_many_batches_they_have(even):
    for n_obs in (1, 2, 7, 47, 48, 49):
        if even == "drop" and n_obs < 9:
            with pytest.raises(RankError, match="batches of up to 3 rows do not go round among 3 ranks"):
                parts(RandomSampler(3, 4, 3, rng=rng(5)), n_obs, 3, even=even)
        else:
            parts(RandomSampler(3, 4, 3, rng=rng(5)), n_obs, 3, even=even)
    with pytest.raises(ValueError, match="must be < mask.stop"):
        parts(RandomSampler(3, 4, 3, rng=rng(5)), 0, 3, even=even)


@pytest.mark.parametrize("even", ["drop", "pad", None])
def test_global_batches_are_the_same_on_any_number_of_ranks(even):
    sampler = RandomSampler(12, 4, 24, rng=rng(5))
    (alone,) = parts(sampler, 500, 1, global_batches=True, even=even)
    expected = [sorted(batch.tolist()) for batch in alone]
    for world_size in (2, 3, 4, 8):
        found = parts(sampler, 500, world_size, global_batches=True, even=even)
        together = [sorted(np.concatenate(step).tolist()) for step in zip(*found, strict=True)]
        assert together[:20] == expected[:20]
        assert all(len({len(batch) for batch in step}) == 1 for step in zip(*found, strict=True)) or even is None
        if even != "drop":
            assert set(np.concatenate(together)) == set(range(500))
    with pytest.raises(ValueError, match="24 rows cannot be cut evenly for 5 ranks"):
        DistributedSampler(sampler, dist_info=(0, 5), global_batches=True)


def test_ranks_share_what_a_sampler_of_the_user_yields():
    """Requests with different numbers of batches, and short ones in mid-stream."""
    requests = [
        {"requests": np.arange(start, start + n), "splits": np.array_split(np.arange(n), n_batches)}
        for start, n, n_batches in ((0, 8, 2), (8, 8, 2), (16, 4, 1), (20, 6, 2), (26, 8, 2), (34, 3, 3))
    ]
    for even in ("drop", "pad", None):
        found = parts(Minimal(requests, 4, shuffle=False), 37, 2, even=even)
        drawn = sorted(row for part in found for batch in part for row in batch.tolist())
        if even is None:
            assert drawn == list(range(37))
        elif even == "pad":
            assert set(drawn) == set(range(37))
        sizes = [[len(b) for b in part] for part in found]
        assert sizes[0] == sizes[1] or even is None


def test_where_ranks_come_from(monkeypatch):
    sampler = RandomSampler(5, 4, 4)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(RuntimeError, match="'WORLD_SIZE' is not set"):
        DistributedSampler(sampler, dist_info="env")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for dist_info in ("env", (1, 2), lambda: (1, 2)):
        ranked = DistributedSampler(sampler, dist_info=dist_info)
        assert (ranked.rank, ranked.world_size) == (1, 2)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        DistributedSampler(sampler, dist_info=(2, 2))
    for pair in ((True, 2), (0, 2.0), ("0", "2"), (0, 1, 2)):
        with pytest.raises(TypeError, match="must be a pair of whole numbers"):
            DistributedSampler(sampler, dist_info=pair)
    with pytest.raises(ValueError, match="Unknown dist_info"):
        DistributedSampler(sampler, dist_info="mpi")
    with pytest.raises(ValueError, match="even must be"):
        DistributedSampler(sampler, dist_info=(0, 2), even="yes")


def test_unseeded_samplers_on_several_ranks_agree():
    found = [
        batches(DistributedSampler(RandomSampler(5, 4, 4), dist_info=(rank, 3), even=None), 97) for rank in range(3)
    ]
    assert sorted(row for part in found for batch in part for row in batch.tolist()) == list(range(97))


@pytest.mark.parametrize("even", ["drop", "pad", None])
def test_global_batches_of_any_size_are_cut_alike_for_all_ranks(even):
    """Also where all rows are fewer than one batch, and where a sampler's first batch is its smallest."""
    for n_obs, world_size in product((1, 2, 5, 6, 13, 23, 24), (2, 3, 4)):
        sampler = RandomSampler(12, 2, 12, rng=rng(5))
        if even == "drop" and n_obs < 12 and n_obs % world_size:
            continue  # refused
        found = parts(sampler, n_obs, world_size, global_batches=True, even=even)
        assert all(len({len(batch) for batch in step}) == 1 for step in zip(*found, strict=True)) or even is None
        assert even == "drop" or set(np.concatenate(sum(found, []))) == set(range(n_obs))
    growing = [{"requests": [slice(0, 10)], "splits": [np.arange(1), np.arange(1, 3), np.arange(3, 10)]}]
    for global_batches in (True, False):
        found = parts(Minimal(growing, 2, shuffle=False), 10, 2, even=even, global_batches=global_batches)
        assert [len(b) for b in found[0]] == [len(b) for b in found[1]] or even is None
        assert even == "drop" or set(np.concatenate(sum(found, []))) == set(range(10))


@pytest.mark.filterwarnings("error:rank")
def test_ranks_of_generators_are_warned_of_seeds_that_differ():
    """Who gave each rank a seed of its own lost a third of the rows."""
    with pytest.warns(UserWarning, match=r"rank 1 of 8 draws its seed from a generator.*seed=0.*compares") as caught:
        Loader(batch_size=32, chunk_size=8, preload_nchunks=32, shuffle=True, rng=rng(101), dist_info=(1, 8))
    assert caught[0].filename == __file__
    numbered = RandomSampler(5, 4, 4)
    numbered.seed = 7
    assert DistributedSampler(numbered, dist_info=(1, 8)).sampler.seed == 7
    for sampler in (RandomSampler(5, 4, 4), SequentialSampler(5, 4, 4)):
        DistributedSampler(sampler, dist_info=(1, 8))
    DistributedSampler(RandomSampler(5, 4, 4, rng=rng(101)), dist_info=(0, 1))
    by_number = Loader(shuffle=True, seed=101, dist_info=(1, 8)).batch_sampler
    assert by_number.sampler.seed == RandomSampler(5, 4, 4, rng=rng(101)).seed


def test_a_pass_without_a_batch_is_said():
    few = Loader(batch_size=20, chunk_size=20, preload_nchunks=1, shuffle=True, drop_last=True, preload_to_gpu=False)
    with pytest.warns(UserWarning, match="no batch comes: 19 rows do not fill one of 20, and drop_last") as caught:
        assert list(few.add_dataset(np.ones((19, 3)))) == []
    assert caught[0].filename == __file__


def test_ranks_of_jax_compare_seeds(monkeypatch):
    of_process_0 = RandomSampler(5, 4, 4, rng=rng(100)).seed
    utils = SimpleNamespace(
        broadcast_one_to_all=lambda _: np.array([of_process_0 >> 32, of_process_0 & 0xFFFFFFFF], np.uint32)
    )
    distributed = SimpleNamespace(is_initialized=lambda: True)
    jax = SimpleNamespace(distributed=distributed, process_index=lambda: 1, process_count=lambda: 8)
    monkeypatch.setitem(sys.modules, "jax", jax)
    monkeypatch.setitem(sys.modules, "jax.experimental", SimpleNamespace(multihost_utils=utils))
    assert DistributedSampler(RandomSampler(5, 4, 4, rng=rng(100)), dist_info="jax").rank == 1
    other = RandomSampler(5, 4, 4, rng=rng(101))
    with pytest.raises(RankError, match=f"rank 1 of 8 has seed {other.seed}, another one {of_process_0}: some rows"):
        DistributedSampler(other, dist_info="jax")


def test_annbatch_word_for_uneven_ranks():
    found = parts(RandomSampler(3, 2, 2, rng=rng(5)), 51, 4, enforce_equal_batches=False)
    assert sorted(row for part in found for batch in part for row in batch.tolist()) == list(range(51))


def test_the_base_class_has_what_subclasses_need():
    assert issubclass(DistributedSampler, Sampler)
    ranked = DistributedSampler(RandomSampler(5, 4, 4), dist_info=(0, 2))
    assert (ranked.batch_size, ranked.shuffle) == (4, True)
    assert DistributedSampler(RandomSampler(5, 4, 4), dist_info=(0, 2), global_batches=True).batch_size == 2
