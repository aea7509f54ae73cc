"""Stop anywhere, go on exactly there: in one process, in DataLoader workers, on other ranks."""

from __future__ import annotations

import json
import pickle
from itertools import islice, product

import numpy as np
import pytest

from annbatch_dask.errors import StateError
from annbatch_dask.loader import Loader
from annbatch_dask.samplers import (
    RandomSampler,
    SequentialSampler,
)
from tests.loader.every_sampler import QUIET, SAMPLERS, X, make


def rng():
    return np.random.default_rng(3)


def indices(batches):
    return [batch["index"].tolist() for batch in batches]


def saved(loader):
    """Through text: a state is plain values."""
    return json.loads(json.dumps(loader.state_dict()))


STOPS = ["start", "first", "middle", "last", "over"]


def count_before(stop, n):
    """Batches of ``n`` that are taken before the run is broken off; "over" is when the end was seen as well."""
    return {"start": 0, "first": 1, "middle": n // 2, "last": n, "over": n}[stop]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("stop", STOPS)
def test_a_run_goes_on_where_it_stopped(name, stop):
    loader = make(name)
    list(loader)  # the second epoch is the one that is broken off
    n = len(loader)
    epoch = iter(loader)
    before = indices(islice(epoch, count_before(stop, n)))
    if stop == "over":
        assert next(epoch, None) is None
    state = saved(loader)
    rest = indices(epoch)
    following = indices(loader)
    assert len(before + rest) == n

    other = make(name)
    other.load_state_dict(state)
    assert saved(other) == state or stop in ("start", "over")
    if stop != "over":
        assert indices(other) == rest
    assert indices(other) == following


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "unseeded"])
def test_a_run_may_stop_again_and_again(name):
    expected = [batch for loader in [make(name)] for _ in range(9) for batch in indices(loader)]
    state, found = None, []
    for n in (1, 2, 3, 1, 5, 4, 9, 100, 100):
        loader = make(name)
        if state is not None:
            loader.load_state_dict(state)
        found += indices(islice(iter(loader), n))
        state = saved(loader)
    assert found == expected[: len(found)]
    assert len(found) >= 3 * len(make(name))


def test_the_state_counts_what_was_consumed_not_what_was_loaded():
    loader = make("random")
    for number, _ in enumerate(loader, 1):
        assert loader.state_dict()["batch"] == number
        if number == 3:
            break
    assert loader.state_dict()["batch"] == 3
    assert len(json.dumps(loader.state_dict())) < 300


def test_nothing_is_read_of_what_was_consumed(monkeypatch):
    asked = []
    original = RandomSampler.epoch

    def epoch(self, n_obs, key):
        made = original(self, n_obs, key)
        take = made.take
        object.__setattr__(made, "take", lambda k, start, stop: asked.append(k) or take(k, start, stop))
        return made

    monkeypatch.setattr(RandomSampler, "epoch", epoch)
    loader = make("random")
    list(islice(iter(loader), 17))
    state = saved(loader)
    asked.clear()
    loader = make("random")
    loader.load_state_dict(state)
    assert len(list(loader)) == len(loader) - 17
    assert asked == [3, 4]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: make("sequential"), "another sampler"),
        (lambda: Loader(batch_sampler=RandomSampler(5, 8, 4, rng=rng())).add_dataset(X), "another sampler"),
        (lambda: Loader(batch_sampler=RandomSampler(5, 4, 4, rng=rng())).add_dataset(X[:-1]), "other data"),
        (
            lambda: Loader(batch_sampler=RandomSampler(5, 4, 4, rng=np.random.default_rng(4))).add_dataset(X),
            "saved with seed",
        ),
    ],
)
def test_a_state_of_something_else_is_refused(other, message):
    loader = make("random")
    next(iter(loader))
    with pytest.raises(StateError, match=message):
        other().load_state_dict(loader.state_dict())


def test_a_state_of_another_release_is_refused():
    with pytest.raises(StateError, match="not a state of this release"):
        make("random").load_state_dict({"version": 0})
    with pytest.raises(StateError, match=r"version 1, expected 2, and orders differ; .* begin it anew: set_epoch\(4\)"):
        make("random").load_state_dict(make("random").state_dict() | {"version": 1, "epoch": 4})


def test_a_pickled_loader_goes_on_from_a_loaded_state():
    loader = make("random")
    epoch = iter(loader)
    next(epoch)
    other = make("random")
    other.load_state_dict(saved(loader))
    assert indices(pickle.loads(pickle.dumps(other))) == indices(epoch)


def test_any_epoch_can_be_gone_to():
    loader = make("random")
    epochs = [indices(loader) for _ in range(3)]
    loader.set_epoch(1)
    assert [indices(loader), indices(loader)] == epochs[1:]


@pytest.mark.parametrize("name", ["random", "user", "rank"])
def test_the_epoch_one_is_in_may_be_named_after_a_state_is_loaded(name):
    """As torch's ``for epoch in range(start, n): sampler.set_epoch(epoch)`` does it."""
    loader = make(name)
    list(loader)
    epoch = iter(loader)
    list(islice(epoch, 3))
    state, rest = saved(loader), indices(epoch)
    following = indices(loader)

    other = make(name)
    other.load_state_dict(state)
    other.set_epoch(1)
    assert indices(other) == rest
    other.set_epoch(2)
    assert indices(other) == following
    other.load_state_dict(state)
    other.set_epoch(0)  # another one: from its start
    if name != "user":  # whose generator tells no epochs
        assert indices(other) == indices(make(name))
    other.load_state_dict(state)
    other.load_state_dict(state | {"batch": 0})
    assert len(indices(other)) == len(other)


def test_one_rank_may_save_for_all():
    """Lightning does: the state of rank 0 is every rank's."""

    def ranks():
        return [
            Loader(batch_size=4, chunk_size=4, preload_nchunks=2, shuffle=True, seed=1, dist_info=(rank, 3), **QUIET)
            for rank in range(3)
        ]

    stopped = [loader.add_dataset(X) for loader in ranks()]
    epochs = [iter(loader) for loader in stopped]
    for epoch in epochs:
        list(islice(epoch, 3))
    states, rest = [saved(loader) for loader in stopped], [indices(epoch) for epoch in epochs]
    assert states[1:] == states[:1] * 2
    for loader, expected in zip(ranks(), rest, strict=True):
        loader.add_dataset(X).load_state_dict(states[0])
        assert indices(loader) == expected
        assert expected


def test_another_number_of_ranks_goes_on_with_the_same_global_batches():
    def ranks(world_size):
        return [
            Loader(
                global_batch_size=24,
                chunk_size=4,
                preload_nchunks=6,
                shuffle=True,
                seed=1,
                dist_info=(rank, world_size),
                return_index=True,
                preload_to_gpu=False,
            ).add_dataset(X)
            for rank in range(world_size)
        ]

    whole = [sorted(batch) for batch in indices(ranks(1)[0])]
    for before, after in ((8, 2), (3, 2), (1, 4)):
        stopped = ranks(before)
        first = [[next(epoch) for epoch in map(iter, stopped)]]
        states = [saved(loader) for loader in stopped]
        assert all(state == states[0] for state in states)
        resumed = ranks(after)
        for loader in resumed:
            loader.load_state_dict(states[0])
        rest = list(zip(*resumed, strict=True))
        together = [sorted(np.concatenate([b["index"] for b in step]).tolist()) for step in (*first, *rest)]
        assert together == whole[:3]


def test_a_loader_with_ranks_says_what_cannot_be():
    with pytest.raises(ValueError, match=r"batch_size \(8\) and global_batch_size \(24\)"):
        Loader(batch_size=8, global_batch_size=24)
    with pytest.raises(ValueError, match="Cannot specify global_batch_size"):
        Loader(batch_sampler=SequentialSampler(5, 4, 4), global_batch_size=24)
    loader, other = (Loader(batch_sampler=SequentialSampler(5, 4, 4), dist_info=(0, n)).add_dataset(X) for n in (2, 3))
    next(iter(loader))
    with pytest.raises(StateError, match="another sampler"):
        other.load_state_dict(loader.state_dict())


# --- DataLoader workers

pytestmark = [
    pytest.mark.timeout(600),  # starts interpreters
    pytest.mark.filterwarnings("ignore:rank . of . draws its seed from a generator:UserWarning"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes:UserWarning"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torchdata 0.11 with torch 2.13
]


def plain(batch):
    return batch["index"].tolist()


def dataloader(loader, n_workers, kind=None, **kwargs):
    data = pytest.importorskip("torch.utils.data")
    kind = kind or data.DataLoader
    return kind(loader, batch_size=None, num_workers=n_workers, collate_fn=plain, **kwargs)


SPAWN = {"multiprocessing_context": "spawn"}


@pytest.mark.parametrize(
    ("name", "n_workers", "kwargs"),
    [
        *product(["random", "sequential", "class"], [2], [{}]),
        ("random", 1, {}),
        ("random", 4, {"persistent_workers": True}),
        ("random", 2, {"persistent_workers": True, **SPAWN}),
        *(pytest.param(name, 1, {}, marks=pytest.mark.chaos) for name in ("sequential", "class")),
        *(
            pytest.param(name, 4, {"persistent_workers": True}, marks=pytest.mark.chaos)
            for name in ("sequential", "class")
        ),
        # Slow starts.
        *(pytest.param(name, 2, SPAWN, marks=pytest.mark.chaos) for name in ("random", "sequential", "class")),
    ],
)
def test_epochs_are_the_same_with_any_workers(name, n_workers, kwargs):
    alone = make(name)
    expected = [indices(alone) for _ in range(3)]
    with_workers = dataloader(make(name), n_workers, **kwargs)
    found = [list(with_workers) for _ in range(3)]
    if name != "sequential":  # whole requests are dealt
        found, expected = ([sorted(epoch) for epoch in epochs] for epochs in (found, expected))
    assert found == expected


@pytest.mark.parametrize("kwargs", [{}, pytest.param(SPAWN, marks=[pytest.mark.chaos, pytest.mark.timeout(500)])])
def test_workers_have_another_order_in_each_epoch_whatever_the_seed_of_torch(kwargs):
    torch = pytest.importorskip("torch")
    alone = make("random")
    expected = [sorted(indices(alone)) for _ in range(3)]
    with_workers, found = dataloader(make("random"), 2, **kwargs), []
    for _ in range(3):
        torch.manual_seed(0)
        found.append(sorted(with_workers))
    assert found == expected
    # Broken off, perhaps before its second worker has begun.
    torch.manual_seed(0)
    next(iter(with_workers))
    torch.manual_seed(0)
    assert sorted(with_workers) == [sorted(indices(alone)) for _ in range(2)][1]


def test_a_broken_off_epoch_counts_and_workers_still_agree():
    alone = make("random")
    expected = [sorted(indices(alone)) for _ in range(3)]
    with_workers = dataloader(make("random"), 2)
    next(iter(with_workers))
    assert [sorted(with_workers), sorted(with_workers)] == expected[1:]


def test_what_only_workers_know_is_not_made_up():
    loader = make("random")
    list(dataloader(loader, 2))
    with pytest.raises(RuntimeError, match="StatefulDataLoader"):
        loader.state_dict()


WORKERS = {"none": (0, {}), "two": (2, {}), "two persistent": (2, {"persistent_workers": True})}


def whole_matrix():
    """All samplers, workers and stops; in the usual run those with two of "random", "two" and "middle"."""
    for name, workers, stop in product(SAMPLERS, WORKERS, STOPS):
        is_quick = (name == "random") + (workers == "two") + (stop == "middle") >= 2
        yield pytest.param(name, workers, stop, marks=() if is_quick else pytest.mark.chaos)


@pytest.mark.parametrize(("name", "workers", "stop"), list(whole_matrix()))
def test_stateful_dataloader(name, workers, stop):
    """Twice broken off: in the second epoch, and once more after that."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    n_workers, kwargs = WORKERS[workers]

    def new():
        return dataloader(make(name), n_workers, stateful, **kwargs)

    run = new()
    list(run)
    epoch = iter(run)
    before = list(islice(epoch, count_before(stop, len(make(name)))))
    if stop == "over":
        assert next(epoch, None) is None
    state = run.state_dict()
    rest = list(epoch)
    following = list(run)
    assert len(before + rest) == len(following) == len(make(name))

    resumed = new()
    resumed.load_state_dict(state)
    if stop != "over":
        epoch = iter(resumed)
        assert list(islice(epoch, min(2, len(rest)))) == rest[:2]
        again = new()
        again.load_state_dict(resumed.state_dict())
        assert list(again) == rest[2:] == list(epoch)
    assert list(resumed) == following
