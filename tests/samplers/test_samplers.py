from __future__ import annotations

import copy
import pickle
import sys
import types
from itertools import zip_longest

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from annbatch_dask.samplers import (
    CellSets,
    ClassSampler,
    DistributedSampler,
    MatchedControlSampler,
    RandomSampler,
    SequentialSampler,
    WeightedClassSampler,
)
from annbatch_dask.scdataset import Streaming
from annbatch_dask.scdataset.sampler import StrategySampler
from tests.samplers.tools import Minimal, batches, rng, rows


def drawn(sampler, n_obs):
    return np.concatenate(batches(sampler, n_obs))


@given(
    n_obs=st.integers(1, 300),
    chunk=st.integers(1, 20),
    per_batch=st.integers(1, 4),
    n_windows=st.integers(1, 4),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
def test_a_pass_is_a_permutation(n_obs, chunk, per_batch, n_windows, shuffle, drop_last):
    batch_size, preload = chunk * per_batch, per_batch * n_windows
    if shuffle:
        sampler = RandomSampler(chunk, preload, batch_size, drop_last=drop_last, rng=rng())
    else:
        sampler = SequentialSampler(chunk, preload, batch_size, drop_last=drop_last)
    found = batches(sampler, n_obs)
    assert len(found) == sampler.n_batches(n_obs)
    seen = np.concatenate(found) if found else np.zeros(0, int)
    assert len(set(seen.tolist())) == len(seen)
    assert len(seen) == (n_obs // batch_size * batch_size if drop_last else n_obs)
    assert all(len(batch) == batch_size for batch in found[:-1])
    if not shuffle:
        assert seen.tolist() == list(range(len(seen)))


def test_runs_lie_on_the_grid_but_for_one_that_changes_places_with_the_short_one():
    last = set()
    for seed in range(40):
        requests = list(RandomSampler(10, 2, 5, mask=slice(3, 48), rng=rng(seed)).sample(100))
        slices = [s for request in requests for s in request["requests"]]
        whole = [s.start for s in slices if s.stop - s.start == 10]
        assert sorted({3, 13, 23, 33} - set(whole)) in ([], *([start] for start in (3, 13, 23, 33)))
        assert [len(rows(request)) for request in requests] == [20, 20, 5]
        assert len(slices) <= 8  # one run in two pieces, twice
        assert (slices[-1] == slice(43, 48)) is (len(whole) == 4)
        last |= set(rows(requests[-1]).tolist())
    assert last == set(range(3, 48))


def test_rows_are_mixed_across_the_window():
    (request,) = RandomSampler(10, 10, 20, rng=rng()).sample(100)
    first = rows(request)[request["splits"][0]]
    assert len(set((first // 10).tolist())) > 4


def test_seeds_and_epochs():
    one, two, other = (RandomSampler(10, 2, 4, rng=rng(seed)) for seed in (1, 1, 2))
    first = drawn(one, 95).tolist()
    assert first == drawn(two, 95).tolist()
    assert first != drawn(other, 95).tolist()
    assert first != drawn(one, 95).tolist()  # the second epoch
    assert drawn(one, 95).tolist() != first
    assert sorted(first) == list(range(95))


def test_two_passes_at_once_do_not_disturb_each_other():
    alone, both = (RandomSampler(10, 2, 4, rng=rng(1)) for _ in range(2))
    expected = [drawn(alone, 95).tolist(), drawn(alone, 95).tolist()]
    first, second = both.sample(95), both.sample(95)
    found = [[], []]
    for requests in zip(first, second, strict=True):
        for number, request in enumerate(requests):
            found[number] += [row for split in request["splits"] for row in rows(request)[split].tolist()]
    assert found == expected


def test_splits_handed_out_are_not_changed():
    requests = RandomSampler(10, 2, 4, rng=rng()).sample(95)
    first = next(requests)["splits"]
    before = [split.copy() for split in first]
    list(requests)
    assert all((a == b).all() for a, b in zip(first, before, strict=True))


@pytest.mark.parametrize("num_samples", [1, 7, 10, 43, 44, 47, 94, 95])
@pytest.mark.parametrize("replacement", [False, True])
def test_num_samples(num_samples, replacement):
    for seed in range(10):
        sampler = RandomSampler(10, 2, 4, num_samples=num_samples, replacement=replacement, rng=rng(seed))
        found = batches(sampler, 95)
        seen = np.concatenate(found)
        assert len(seen) == num_samples
        assert len(found) == sampler.n_batches(95) == -(-num_samples // 4)
        assert all(len(batch) == 4 for batch in found[:-1])
        assert seen.min() >= 0
        assert seen.max() < 95
        if not replacement:
            assert len(set(seen.tolist())) == num_samples


def test_replacement_starts_anywhere():
    sampler = RandomSampler(10, 10, 10, replacement=True, num_samples=5000, mask=slice(5, 60), rng=rng())
    starts = {s.start for request in sampler.sample(100) for s in request["requests"]}
    assert starts == set(range(5, 60))  # near the end they go on at the start


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomSampler(10, 2, 21), "batch_size cannot exceed"),
        (lambda: RandomSampler(10, 2, 3), "must be divisible"),
        (lambda: SequentialSampler(0, 2, 1), "must be greater than 1"),
        (lambda: RandomSampler(10, 2, 5, num_samples=0), "num_samples must be greater than 1"),
        (lambda: RandomSampler(10, 2, 5, mask=slice(0, 9, 2)), "mask.step must be 1"),
        (lambda: RandomSampler(10, 2, 5, mask=slice(-1, 9)), "mask.start must be >= 0"),
        (lambda: SequentialSampler(10, 2, 5, mask=slice(9, 9)), "mask.start must be < mask.stop"),
        (lambda: list(SequentialSampler(10, 2, 5, mask=slice(0, 31)).sample(30)), r"mask.stop \(31\) exceeds loader"),
        (
            lambda: ClassSampler(2, 2, 2, classes=pd.Categorical(["a", None]), num_samples=2),
            r"1 of 2 rows have; make them a class, as in classes.add_categories\('unknown'\)",
        ),
        (
            lambda: ClassSampler(
                2, 2, 2, classes=pd.Categorical(list("aabb")), num_samples=2, class_weights=[1.7e308, 1.7e308]
            ),
            "class_weights must be finite, also in sum",
        ),
        (lambda: list(SequentialSampler(10, 2, 5, mask=slice(30, None)).sample(30)), "must be < mask.stop"),
        (lambda: list(RandomSampler(10, 2, 5, num_samples=31).sample(30)), "cannot exceed the observation range"),
        (
            lambda: list(RandomSampler(10, 2, 5, replacement=True, num_samples=9).sample(8)),
            "smaller than chunk_size",
        ),
    ],
)
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("bad", "error"), [(2.5, TypeError), ("3", TypeError), (True, TypeError), (-1, ValueError)])
def test_a_seed_and_an_epoch_are_whole_numbers(bad, error):
    sampler = RandomSampler(10, 2, 5)
    sampler.seed = 4
    with pytest.raises(error, match="seed"):
        sampler.seed = bad
    assert sampler.seed == 4
    if bad is not True:
        with pytest.raises(error):
            sampler.set_epoch(bad)
        assert sampler.epoch_counter.peek(None) == 0


@pytest.mark.parametrize("seed", [0, 255, 2**63, 2**200 + 7])
def test_a_seed_of_any_size_is_restored(seed):
    sampler, other = RandomSampler(10, 2, 5, seed=1), RandomSampler(10, 2, 5, seed=1)
    sampler.seed = seed
    other.restore_seed(seed)
    assert other.seed == other.epoch_counter.seed == seed
    assert drawn(other, 50).tolist() == drawn(sampler, 50).tolist()


GROUPS = np.repeat(["a", "b"], 20)


@pytest.mark.parametrize(
    "sampler",
    [
        CellSets(4, 2, groups=GROUPS),
        MatchedControlSampler(4, 2, 4, is_control=np.arange(40) % 2 == 0, match=GROUPS),
        StrategySampler(Streaming(), 4),
    ],
)
def test_a_mask_that_would_change_nothing_is_refused(sampler):
    sampler.mask = slice(0, None)
    with pytest.raises(ValueError, match=r"takes no mask: Loader\(where=...\) selects rows"):
        sampler.mask = slice(0, 20)
    assert sampler.mask == slice(0, None)


def test_the_mask_of_ranks_is_that_of_what_they_share():
    sampler = DistributedSampler(RandomSampler(5, 2, 5, seed=0, mask=slice(0, 90)), dist_info=(0, 2))
    assert (sampler.mask, sampler.n_batches(100)) == (slice(0, 90), 9)
    sampler.mask = slice(20, 60)
    assert (sampler.sampler.mask, sampler.n_batches(100)) == (slice(20, 60), 4)
    sampler.sampler.mask = slice(40, 60)
    assert len(batches(sampler, 100)) == sampler.n_batches(100) == 2
    assert drawn(sampler, 100).min() >= 40
    with pytest.raises(ValueError, match="before it is: then ranks compare"):
        sampler.rng = rng()


@pytest.mark.parametrize("bad", [True, 1.5, "1", np.random.RandomState(0)])
def test_rng_of_another_type(bad):
    with pytest.raises(TypeError, match=r"rng must be a numpy.random.Generator"):
        RandomSampler(10, 2, 5, rng=bad)


def test_int_seed_is_deprecated_and_works():
    with pytest.warns(FutureWarning, match="Passing a seed as rng is deprecated") as caught:
        sampler = RandomSampler(10, 2, 5, rng=3)
    assert caught[0].filename == __file__
    assert drawn(sampler, 50).tolist() == drawn(RandomSampler(10, 2, 5, rng=rng(3)), 50).tolist()


def test_samplers_copy_and_pickle():
    for make in (copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))):
        original = RandomSampler(10, 2, 5, rng=rng(3))
        expected = drawn(RandomSampler(10, 2, 5, rng=rng(3)), 50).tolist()
        assert drawn(make(original), 50).tolist() == expected


# --- torch workers, seen through a stand-in for torch


@pytest.fixture
def as_worker(monkeypatch):
    def pose(worker_id, n_workers, seed=100):
        info = types.SimpleNamespace(id=worker_id, num_workers=n_workers, seed=seed + worker_id)
        data = types.SimpleNamespace(get_worker_info=lambda: info)
        fake = types.SimpleNamespace(utils=types.SimpleNamespace(data=data))
        monkeypatch.setitem(sys.modules, "torch", fake)

    return pose


def test_workers_share_the_rows(as_worker):
    parts = []
    for worker in range(3):
        as_worker(worker, 3)
        parts.append(drawn(RandomSampler(10, 2, 5, drop_last=True, rng=rng(1)), 100))
    assert sorted(np.concatenate(parts).tolist()) == list(range(100))
    assert len({len(part) for part in parts}) == 2


def test_workers_of_a_sequential_pass_come_in_order(as_worker):
    parts = []
    for worker in range(3):
        as_worker(worker, 3)
        parts.append(batches(SequentialSampler(10, 2, 5), 98))
    in_turn = [batch for turn in zip_longest(*parts) for batch in turn if batch is not None]
    assert np.concatenate(in_turn).tolist() == list(range(98))


def test_workers_that_start_anew_share_epochs(as_worker):
    """As forked from one parent: each pass has a base seed, each worker of a pass the same."""
    sampler, alone = RandomSampler(10, 2, 1, rng=rng()), RandomSampler(10, 2, 1, rng=rng())
    expected = [set(map(tuple, batches(alone, 95))) for _ in range(3)]
    counter = sampler.epoch_counter
    for epoch, seed in enumerate((100, 200, 300)):
        found = []
        for worker in range(2):
            as_worker(worker, 2, seed)
            forked = copy.copy(sampler)
            forked._epochs = counter  # what fork leaves shared
            counter._who, counter._n_passes = (-1, 0), 0  # a process of its own
            found += [tuple(batch) for batch in batches(forked, 95)]
        assert len(found) == 95
        assert set(found) == expected[epoch]


# --- the base class


def test_base_class_defaults():
    sampler = Minimal([])
    assert sampler.mask == slice(0, None)
    assert sampler.rng is None
    sampler.mask = slice(2, 5)
    assert sampler.mask == slice(2, 5)
    with pytest.raises(ValueError, match="mask.step"):
        sampler.mask = slice(0, 4, 2)
    with pytest.raises(TypeError, match="rng must be"):
        sampler.rng = False


@pytest.mark.parametrize("asked", [[slice(0, 5), slice(8, 10)], np.array([3, 1, 1, 9, 0, 2, 2])])
def test_splits_are_made_where_missing(asked):
    (ordered,) = Minimal([{"requests": asked}], 3, shuffle=False).sample(10)
    assert [split.tolist() for split in ordered["splits"]] == [[0, 1, 2], [3, 4, 5], [6]]
    (mixed,) = Minimal([{"requests": asked}], 3, shuffle=True).sample(10)
    assert sorted(np.concatenate(mixed["splits"]).tolist()) == list(range(7))


def test_splits_need_batch_size_and_shuffle():
    with pytest.raises(ValueError, match="batch_size must be set"):
        list(Minimal([{"requests": [slice(0, 5)]}], None, shuffle=True).sample(10))
    with pytest.raises(ValueError, match="shuffle must be set"):
        list(Minimal([{"requests": [slice(0, 5)]}], 3, None).sample(10))


def test_validated_first_and_closed_at_once():
    sampler = Minimal([{"requests": [slice(0, 5)], "splits": [np.arange(5)]}] * 2)
    requests = sampler.sample(10)
    assert sampler.events == []
    next(requests)
    assert sampler.events == ["validate", "start"]
    requests.close()
    assert sampler.events == ["validate", "start", "end"]


CLASSES = pd.Categorical(np.repeat(["a", "b"], 45))


@pytest.mark.parametrize("number", [np.int64, np.uint8, np.int8])
@pytest.mark.parametrize(
    "make",
    [
        lambda n: RandomSampler(n(5), n(40), n(10), mask=slice(n(3), n(80)), seed=1),
        lambda n: RandomSampler(n(5), n(4), n(10), num_samples=n(30), seed=1),
        lambda n: RandomSampler(n(5), n(4), n(10), num_samples=n(100), replacement=True, seed=n(1)),
        lambda n: SequentialSampler(n(5), n(40), n(10), mask=slice(None, n(80))),
        lambda n: ClassSampler(n(5), n(4), n(10), classes=CLASSES, num_samples=n(100), seed=1),
        lambda n: WeightedClassSampler(n(5), n(4), n(10), classes=CLASSES, num_samples=n(100), seed=1),
        lambda n: CellSets(n(5), n(4), groups=CLASSES, preload_nsets=n(8), seed=1),
    ],
)
def test_sizes_may_be_integers_of_numpys(make, number):
    """Whatever they can hold: the same batches, and states that either can resume from."""
    plain, numpys = make(int), make(number)
    assert [b.tolist() for b in batches(numpys, 90)] == [b.tolist() for b in batches(plain, 90)]
    assert repr(numpys.n_batches(90)) == repr(plain.n_batches(90))
    identities = [repr(sampler.state_identity()) for sampler in (plain, numpys)]
    assert identities[0] == identities[1]


def test_a_rank_that_is_done_before_another_begins_ends_nothing(monkeypatch):
    """The store of torch's process group lives in rank 0, and goes with it."""

    class Gone:
        def add(self, *_):
            msg = "Failed to recv, got 0 bytes. Connection was likely closed."
            raise RuntimeError(msg)

    dist = types.SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        get_world_size=lambda: 2,
        get_rank=lambda: 1,
        distributed_c10d=types.SimpleNamespace(_get_default_store=Gone),
    )
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", types.SimpleNamespace(distributed=dist))
        sampler = DistributedSampler(RandomSampler(4, 2, 8, seed=3), dist_info=(1, 2))
    assert sum(map(len, batches(sampler, 64))) == 32
