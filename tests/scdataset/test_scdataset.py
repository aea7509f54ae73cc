"""Code written for scDataset 0.3 runs after changing the import, without the defects of the original."""

from __future__ import annotations

import copy
import json
import pickle
from functools import partial
from itertools import islice

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy.stats import chisquare

from annbatch_dask.errors import StateError
from annbatch_dask.loader import Loader
from annbatch_dask.order.rows import Blocks, WeightTable
from annbatch_dask.scdataset import (
    BlockShuffling,
    BlockWeightedSampling,
    ClassBalancedSampling,
    MultiIndexable,
    SamplingStrategy,
    StrategySampler,
    Streaming,
    adata_to_mindex,
    bionemo_to_tensor,
    estimate_sample_size,
    hf_tahoe_to_tensor,
    scDataset,
    suggest_parameters,
)
from tests.loader.data import frame, matrix, quiet

N = 203
ROWS = np.arange(N)

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
]


def dataset(strategy, batch_size=8, fetch_factor=4, collection=ROWS, seed=1, **kwargs):
    return scDataset(collection, strategy, batch_size, fetch_factor, seed=seed, **kwargs)


def epoch(*args, **kwargs):
    """The rows of each batch."""
    return [batch.tolist() for batch in dataset(*args, **kwargs)]


def flat(batches):
    return [row for batch in batches for row in batch]


STRATEGIES = {
    "streaming": Streaming,
    "streaming shuffled": lambda **k: Streaming(shuffle=True, **k),
    "blocks": lambda **k: BlockShuffling(5, **k),
    "full shuffle": lambda **k: BlockShuffling(1, **k),
    "blocks dropped": lambda **k: BlockShuffling(5, drop_last=True, **k),
    "weighted": lambda **k: BlockWeightedSampling(4, weights=1.0 + ROWS, total_size=150, **k),
    "rounds": lambda **k: BlockWeightedSampling(4, weights=1.0 + ROWS, replace=False, sampling_size=30, **k),
    "balanced": lambda **k: ClassBalancedSampling(ROWS % 7 == 0, 4, **k),
}


# --- orders


@pytest.mark.filterwarnings("ignore:.* indices were not sorted:UserWarning")
@pytest.mark.parametrize("name", ["streaming", "streaming shuffled", "blocks", "full shuffle"])
@pytest.mark.parametrize("indices", [None, np.array([7, 3, 3, 200, 50, 51, 52, 4]), ROWS % 3 == 0, np.zeros(0, int)])
def test_an_epoch_has_every_row_of_the_subset_once(name, indices):
    expected = ROWS if indices is None else np.sort(ROWS[indices])
    found = flat(epoch(STRATEGIES[name](indices=indices), 3, 2))
    assert sorted(found) == expected.tolist()
    assert (found == expected.tolist()) is (name == "streaming" or not len(expected))


def test_streaming_shuffles_within_a_fetch_only():
    found = epoch(Streaming(shuffle=True))
    assert sorted(flat(found[:4])) == list(range(32))
    assert flat(found[:4]) != list(range(32))


def test_blocks_stay_together_but_for_one_that_changes_places_with_the_short_one():
    last = set()
    for seed in range(60):
        order = Blocks(23, 5, (seed, 0)).take(0, 23)
        assert sorted(order.tolist()) == list(range(23))
        blocks = [order[k : k + 5].tolist() for k in range(0, 20, 5)]
        whole = [block for block in blocks if block == list(range(block[0] // 5 * 5, block[0] // 5 * 5 + 5))]
        assert len(whole) == 4 if order[20:].tolist() == [20, 21, 22] else 3
        assert {int(row) // 5 for row in order[20:]} <= {0, 1, 2, 3} or len(whole) == 4
        last |= set(order[20:].tolist())
    assert last == set(range(23))


def test_dropping_leaves_out_all_rows_equally_often():
    counts = np.zeros(23)
    for seed in range(600):
        left = Blocks(23, 5, (seed, 0), drop_last=True)
        found = left.take(0, len(left))
        assert len(set(found.tolist())) == len(left) == 20
        counts += np.bincount(found, minlength=23)
    assert chisquare(600 - counts).pvalue > 1e-3


def test_dropping_works_with_repeated_indices():
    assert len(flat(epoch(BlockShuffling(4, indices=[1, 1, 1, 2, 2, 3], drop_last=True)))) == 4


@pytest.mark.filterwarnings("ignore:.* indices were not sorted:UserWarning")
@pytest.mark.parametrize("order", ["ascending", "shuffled", "descending"])
@pytest.mark.parametrize("length", ["of the subset", "of all rows"])
def test_weights_stay_with_their_rows_whatever_the_order_of_indices(order, length):
    indices = np.random.default_rng(0).choice(N, 60, replace=False)
    indices = {"ascending": np.sort(indices), "shuffled": indices, "descending": np.sort(indices)[::-1]}[order]
    weight_of = np.random.default_rng(1).random(N) * (ROWS % 5 > 0)
    strategy = BlockWeightedSampling(
        4, indices=indices, weights=weight_of[indices] if length == "of the subset" else weight_of, total_size=997
    )
    data = dataset(strategy)
    counts = np.zeros(N)
    for _ in range(20):
        counts += np.bincount(flat(batch.tolist() for batch in data), minlength=N)
    inside = np.isin(ROWS, indices) & (weight_of > 0)
    expected = 20 * 997 * weight_of[inside] / weight_of[inside].sum()
    assert not counts[~inside].any()
    assert np.abs(counts[inside] - expected).max() < 20
    assert chisquare(counts[inside], expected).pvalue > 0.01


@pytest.mark.filterwarnings("ignore:.* indices were not sorted:UserWarning")
@pytest.mark.parametrize("subset", [False, True])
def test_classes_are_balanced_with_unsorted_subset_labels(subset):
    labels = np.where(ROWS % 10 == 0, "rare", "common")
    indices = np.random.default_rng(0).permutation(N)[:150]
    strategy = ClassBalancedSampling(labels[indices] if subset else labels, 4, indices=indices, total_size=3000)
    drawn = labels[flat(epoch(strategy))]
    share = {
        True: 0.5,
        False: (indices % 10 == 0).sum() / 21 / ((indices % 10 == 0).sum() / 21 + (indices % 10 > 0).sum() / 182),
    }
    assert np.mean(drawn == "rare") == pytest.approx(share[subset], abs=0.01)


def test_a_round_has_no_row_twice_and_favours_the_heavy():
    weights = np.where(ROWS < 100, 1.0, 5.0)
    weights[:3] = 0
    strategy = BlockWeightedSampling(4, weights=weights, replace=False, sampling_size=50, total_size=175)
    counts = np.zeros(N)
    for number in range(60):
        rows = strategy.order(N, (3, number)).take(0, 175)
        for first in (0, 50, 100, 150):
            part = rows[first : first + 50]
            assert len(set(part.tolist())) == len(part)
        counts += np.bincount(rows, minlength=N)
    assert not counts[:3].any()
    assert 3 < counts[100:].mean() / counts[3:100].mean() < 5  # heavy ones run out within a round
    first = np.array([np.bincount(strategy.order(N, (s, 0)).take(0, 50), minlength=N) for s in range(400)]).mean(0)
    plain = np.random.default_rng(0)
    simulated = np.mean(
        [np.isin(ROWS, plain.choice(N, 50, replace=False, p=weights / weights.sum())) for _ in range(400)], axis=0
    )
    assert first[100:].mean() == pytest.approx(simulated[100:].mean(), abs=0.01)


def test_rounds_need_a_size_that_can_be_filled():
    with pytest.raises(ValueError, match="sampling_size, the rows of a round, is needed"):
        BlockWeightedSampling(replace=False)
    with pytest.raises(ValueError, match="a round of 30 rows without replacement"):
        epoch(BlockWeightedSampling(weights=ROWS < 20, replace=False, sampling_size=30))
    with pytest.warns(UserWarning, match="sampling_size is ignored"):
        BlockWeightedSampling(sampling_size=30)


def test_weights_of_other_dtypes_are_taken():
    for dtype in ("float16", ">f8", "bool"):
        given = epoch(BlockWeightedSampling(4, weights=(ROWS < 100).astype(dtype), total_size=60))
        assert given == epoch(BlockWeightedSampling(4, weights=(ROWS < 100).astype(float), total_size=60))


def test_a_table_of_weights_never_finds_a_row_without_one():
    weights = np.zeros(2000)
    weights[[0, 700, 701, 1999]] = [1, 1e-9, 3, 1e-12]
    found = WeightTable(weights).find(np.concatenate([np.linspace(0, 1, 5001)[:-1], [np.nextafter(1, 0), 1.0]]))
    assert set(found.tolist()) <= {0, 700, 701, 1999}
    assert np.mean(found == 0) == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("name", STRATEGIES)
def test_any_stretch_of_an_order_is_part_of_the_whole(name):
    order = STRATEGIES[name]().order(N, (5, 2))
    whole = order.take(0, len(order))
    for start, stop in ((0, 1), (13, 57), (30, 30), (len(order) - 1, len(order))):
        assert order.take(start, stop).tolist() == whole[start:stop].tolist()


@pytest.mark.parametrize("name", STRATEGIES)
def test_get_indices_and_get_len(name):
    strategy = STRATEGIES[name]()
    one, two = strategy.get_indices(ROWS, seed=3), strategy.get_indices(ROWS, seed=3)
    assert one.tolist() == two.tolist()
    assert len(one) == strategy.get_len(ROWS)
    by_rng = [strategy.get_indices(ROWS, seed=9, rng=np.random.default_rng(4)).tolist() for _ in range(2)]
    assert by_rng[0] == by_rng[1]


def test_a_strategy_of_the_users_needs_get_indices_only():
    class Odd(SamplingStrategy):
        def get_indices(self, data_collection, seed=None, rng=None):
            return self._get_rng(seed, rng).permutation(np.arange(1, len(data_collection), 2))

    data = dataset(Odd())
    first, second = list(data), list(data)
    assert len(data) == len(first) == -(-101 // 8)
    assert sorted(flat(b.tolist() for b in first)) == list(range(1, N, 2))
    assert [b.tolist() for b in first] != [b.tolist() for b in second]
    with pytest.raises(NotImplementedError):
        SamplingStrategy().get_indices(ROWS)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BlockShuffling(0), ValueError, "block_size must be 1 or more"),
        (lambda: BlockWeightedSampling(weights=[1, -1]), ValueError, "0 or more and have a positive sum"),
        (lambda: BlockWeightedSampling(weights=[0, 0]), ValueError, "positive sum"),
        (lambda: BlockWeightedSampling(weights=[[1, 1]]), ValueError, r"an array of shape \(1, 2\)"),
        (lambda: BlockWeightedSampling(total_size=2.5), TypeError, "must be a whole number"),
        (lambda: BlockWeightedSampling(total_size=-1), ValueError, "total_size must be 0 or more, got -1"),
        (lambda: BlockWeightedSampling(replace=False, sampling_size=-3), ValueError, "sampling_size must be 1 or more"),
        (
            lambda: BlockWeightedSampling(weights=["1", "2"]),
            ValueError,
            r"a list of numbers, got .*shape \(2,\) of <U1",
        ),
        (lambda: epoch(BlockWeightedSampling(indices=[], total_size=4)), ValueError, "no rows to draw 4 from"),
        (lambda: epoch(BlockWeightedSampling(weights=[1, 1])), ValueError, "2 weights for 203 rows"),
        (lambda: epoch(BlockWeightedSampling(indices=[3, 4], weights=ROWS < 3)), ValueError, "have weight 0"),
        (lambda: ClassBalancedSampling([]), ValueError, "labels is empty"),
        (lambda: ClassBalancedSampling([0], indices=[0, 1]), ValueError, "1 labels for 2 indices"),
        (lambda: Streaming(indices=[0.5]), TypeError, "must be integers or a mask"),
        (lambda: Streaming(indices=[-1]), ValueError, "0 or more, got -1"),
        (lambda: epoch(Streaming(indices=[300])), ValueError, "indices go up to 300, the collection has 203"),
        (lambda: scDataset(ROWS, "streaming", 4), TypeError, "must be a SamplingStrategy"),
        (lambda: scDataset(ROWS, Streaming(), 0), ValueError, "batch_size must be 1 or more"),
        (lambda: scDataset(ROWS, Streaming(), 4, 0), ValueError, "fetch_factor must be 1 or more"),
        (lambda: scDataset(ROWS, Streaming(), 4, rank=2, world_size=2, seed=0), ValueError, "rank 2 of 2"),
        (lambda: scDataset(ROWS, Streaming(), 4, rank=0, world_size=2), RuntimeError, "2 ranks need one seed"),
    ],
)
def test_what_cannot_work_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


# --- the dataset


@pytest.mark.filterwarnings("ignore:no batch comes. 203 rows do not fill one of 500:UserWarning")
@pytest.mark.parametrize("drop_last", [False, True])
def test_len_and_the_last_batch(drop_last):
    for batch_size in (1, 7, 8, 203, 500):
        data = dataset(Streaming(), batch_size, drop_last=drop_last)
        found = list(data)
        assert len(found) == len(data)
        assert sum(map(len, found)) == (N // batch_size * batch_size if drop_last else N)


def test_hooks_at_their_four_places():
    calls = []

    def hook(name, result):
        def call(*args):
            calls.append((name, *(type(a).__name__ for a in args)))
            return result(*args)

        return call

    data = dataset(
        Streaming(),
        collection="anything at all",
        fetch_callback=hook("fetch", lambda _, rows: rows * 10),
        fetch_transform=hook("chunk", lambda chunk: chunk + 1),
        batch_callback=hook("pick", lambda chunk, positions: chunk[positions]),
        batch_transform=hook("batch", list),
        batch_size=4,
        fetch_factor=2,
    )
    assert list(islice(data, 3)) == [[1, 11, 21, 31], [41, 51, 61, 71], [81, 91, 101, 111]]
    names = [name for name, *_ in calls]
    assert names == ["fetch", "chunk", "pick", "batch", "pick", "batch", "fetch", "chunk", "pick", "batch"]
    assert calls[0] == ("fetch", "str", "ndarray")


X = sp.csr_matrix(matrix(40))


def backed(tmp_path):
    with quiet():
        ad.AnnData(X, obs=frame(40)).write_h5ad(tmp_path / "a.h5ad")
    return ad.read_h5ad(tmp_path / "a.h5ad", backed="r")


@pytest.mark.parametrize(
    "collection",
    [
        X.toarray(),
        X,
        sp.csr_array(X),
        ad.AnnData(X, obs=frame(40)),
        pd.DataFrame(X.toarray()),
        MultiIndexable(X=X.toarray(), y=np.arange(40)),
        "memmap",
        "backed",
        "torch",
    ],
    ids=lambda c: c if isinstance(c, str) else type(c).__name__,
)
def test_any_collection(collection, tmp_path):
    if collection == "torch" if isinstance(collection, str) else False:
        collection = pytest.importorskip("torch").from_numpy(X.toarray())
    elif collection == "memmap" if isinstance(collection, str) else False:
        collection = np.memmap(tmp_path / "m", np.float32, "w+", shape=X.shape)
        collection[:] = X.toarray()
    elif isinstance(collection, str):
        collection = backed(tmp_path)
    first_column = []
    for batch in dataset(BlockShuffling(4), collection=collection):
        part = batch["X"] if isinstance(batch, MultiIndexable) else getattr(batch, "X", batch)
        part = part.toarray() if sp.issparse(part) else np.asarray(part[:] if hasattr(part, "file") else part)
        first_column += part[:, 0].astype(int).tolist()
    assert sorted(first_column) == list(range(1, 41))


def test_huggingface_datasets_and_lists_of_cells():
    class Rows:
        """As HuggingFace's: rows by a list come as a dictionary of lists."""

        def __len__(self):
            return 10

        def __getitem__(self, rows):
            return {"genes": [[r, 3] for r in rows], "expressions": [[1.0, 2.0] for _ in rows]}

    pytest.importorskip("torch")
    data = dataset(
        Streaming(),
        batch_size=4,
        fetch_factor=2,
        collection=Rows(),
        fetch_transform=lambda batch: hf_tahoe_to_tensor(batch, num_genes=12),
    )
    found = np.concatenate([batch.numpy() for batch in data])
    assert found.shape == (10, 12)
    assert found[:, 3].tolist() == [2.0] * 10  # a gene that comes twice: the last value
    assert found[5, 5] == 1
    cells = [{"genes": [1], "expressions": [4.0]}]
    assert hf_tahoe_to_tensor(cells, num_genes=2).tolist() == [[0, 4]]
    for bad in ([], {"genes": [], "expressions": []}, 3):
        with pytest.raises(ValueError, match=r"empty|expected a dictionary"):
            hf_tahoe_to_tensor(bad)


def test_adata_to_mindex(tmp_path):
    adata = ad.AnnData(X, obs=frame(40))
    for source in (adata, adata[:40], backed(tmp_path)):
        found = adata_to_mindex(source[np.arange(5)], columns=["kind", "row"])
        assert isinstance(found["X"], np.ndarray)
        np.testing.assert_array_equal(found["X"], X[:5].toarray())
        assert found["kind"].tolist() == ["a", "b", "c", "a", "b"]
        assert isinstance(found["kind"], np.ndarray)
        assert found["row"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore")
def test_an_anncollection_goes_through_adata_to_mindex():
    from anndata.experimental import AnnCollection

    parts = [ad.AnnData(X[:25], obs=frame(25)), ad.AnnData(X[25:], obs=frame(15, first=25))]
    both = AnnCollection(parts, join_vars="inner")
    data = dataset(Streaming(), collection=both, fetch_transform=lambda view: adata_to_mindex(view, ["row"]))
    batches = list(data)
    assert np.concatenate([b["row"] for b in batches]).tolist() == list(range(40))
    assert np.concatenate([b["X"] for b in batches])[:, 0].tolist() == list(range(1, 41))


def test_bionemo_is_asked_for_by_name():
    pytest.importorskip("torch")
    with pytest.raises(ImportError, match="bionemo-scdl"):
        bionemo_to_tensor([], 0)


# --- epochs, workers, ranks: what the original gets wrong


def test_epochs_differ_and_no_seed_repeats_anothers_epoch():
    data = dataset(BlockShuffling(4), seed=0)
    epochs = [[b.tolist() for b in data] for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epoch(BlockShuffling(4), seed=1000) not in epochs
    data.set_epoch(1)
    assert [b.tolist() for b in data] == epochs[1]
    data._epoch = 2
    assert [b.tolist() for b in data] == epochs[2]
    assert data._base_seed == 0


def loaded(data, n_workers, kind=None, **kwargs):
    kind = kind or pytest.importorskip("torch").utils.data.DataLoader
    return kind(data, batch_size=None, num_workers=n_workers, collate_fn=np.ndarray.tolist, **kwargs)


@pytest.mark.parametrize("name", ["blocks", "rounds"])
@pytest.mark.parametrize("persistent", [False, True])
def test_worker_processes_do_not_repeat_epochs(name, persistent):
    alone = dataset(STRATEGIES[name]())
    expected = [sorted(b.tolist() for b in alone) for _ in range(3)]
    workers = loaded(dataset(STRATEGIES[name]()), 2, persistent_workers=persistent)
    assert [sorted(workers) for _ in range(3)] == expected


def test_streaming_is_in_order_with_any_workers():
    for n_workers in (0, 1, 2):
        assert flat(loaded(dataset(Streaming()), n_workers)) == ROWS.tolist()


def test_batches_do_not_depend_on_ranks():
    alone = sorted(epoch(BlockShuffling(4)))
    shared = [epoch(BlockShuffling(4), rank=rank, world_size=3, even=None) for rank in range(3)]
    assert sorted(batch for part in shared for batch in part) == alone


def test_every_fetch_is_mixed_in_its_own_way():
    """Not every rank and worker with the same permutations."""
    batches = epoch(Streaming(shuffle=True), 8, 4)
    mixes = [tuple(np.array(flat(batches[4 * k : 4 * k + 4])) - 32 * k) for k in range(6)]
    assert len(set(mixes)) == 6


def test_ranks_get_equal_numbers_of_batches():
    for even in ("drop", "pad"):
        ranks = [dataset(BlockShuffling(4), 64, 4, np.arange(1000), rank=r, world_size=3, even=even) for r in range(3)]
        lengths = [[len(batch) for batch in rank] for rank in ranks]
        assert lengths[0] == lengths[1] == lengths[2] == [64] * len(ranks[0])


def test_a_backed_anndata_goes_to_spawned_and_forked_workers(tmp_path):
    data = dataset(Streaming(), collection=backed(tmp_path), fetch_transform=lambda a: a.obs["row"].to_numpy())
    assert flat(loaded(data, 2)) == list(range(40))  # forked: each opens the file anew
    data.fetch_transform = None
    other = pickle.loads(pickle.dumps(data))  # what spawn does
    assert sum(len(batch) for batch in other) == 40


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_goes_on_where_it_stopped(name):
    data = dataset(STRATEGIES[name]())
    list(data)
    running = iter(data)
    list(islice(running, 5))
    state = json.loads(json.dumps(data.state_dict()))
    other = dataset(STRATEGIES[name]())
    other.load_state_dict(state)
    rest = [b.tolist() for b in running]
    assert [b.tolist() for b in other] == rest
    assert [b.tolist() for b in other] == [b.tolist() for b in data]
    with pytest.raises(StateError, match="another sampler"):
        dataset(STRATEGIES[name](), batch_size=4).load_state_dict(state)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata 0.11 with torch 2.13
@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("name", ["blocks", "rounds"])
def test_a_run_under_a_stateful_dataloader_goes_on_where_it_stopped(name, n_workers):
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    run, resumed = (loaded(dataset(STRATEGIES[name]()), n_workers, stateful) for _ in range(2))
    list(run)
    running = iter(run)
    list(islice(running, 5))
    resumed.load_state_dict(run.state_dict())
    rest = list(running)
    assert rest
    assert list(resumed) == rest
    assert list(resumed) == list(run)


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))])
def test_copies(clone):
    data = dataset(BlockShuffling(4))
    assert [b.tolist() for b in clone(data)] == epoch(BlockShuffling(4))


@pytest.mark.filterwarnings("ignore:.* indices were not sorted:UserWarning")
def test_nothing_passed_in_is_changed():
    indices, weights = np.array([9, 3, 5]), np.array([1.0, 2.0, 3.0])
    epoch(BlockWeightedSampling(indices=indices, weights=weights))
    assert (indices.tolist(), weights.tolist()) == ([9, 3, 5], [1, 2, 3])


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_orders_a_loader_too(name):
    sampler = StrategySampler(STRATEGIES[name](), 8, 4, rng=np.random.default_rng(0))
    x = matrix(N)
    loader = Loader(batch_sampler=sampler, return_index=True, preload_to_gpu=False).add_dataset(x)
    found = list(loader)
    assert len(found) == len(loader)
    for batch in found:
        np.testing.assert_array_equal(batch["X"], x[batch["index"]])


def test_the_seed_comes_from_torch():
    torch = pytest.importorskip("torch")
    torch.manual_seed(5)
    one = scDataset(ROWS, BlockShuffling(4), 8)
    torch.manual_seed(5)
    assert scDataset(ROWS, BlockShuffling(4), 8)._base_seed == one._base_seed


# --- MultiIndexable


def test_members_and_rows():
    m = MultiIndexable(X=np.arange(12).reshape(6, 2), y=list("abcdef"), unstructured={"genes": ["g", "h"]})
    assert (len(m), m.count, m.names, m.keys()) == (6, 2, ["X", "y"], ["X", "y"])
    assert m[0] is m["X"] is m[np.int64(0)]
    assert m[-1] is m["y"]
    for rows in (slice(1, 3), [1, 2], np.array([1, 2]), np.arange(6) // 3 * 0 + np.isin(np.arange(6), [1, 2]) > 0):
        part = m[rows]
        assert part["X"].tolist() == [[2, 3], [4, 5]]
        assert part["y"] == ["b", "c"]
        assert part.names == ["X", "y"]
        assert part.unstructured == {"genes": ["g", "h"]}
    assert [name for name, _ in m.items()] == ["X", "y"]
    assert list(m)[1] == m.values()[1]
    assert repr(m) == "MultiIndexable(names=['X', 'y'], samples=6, unstructured_keys=['genes'])"
    assert (m.unstructured_keys, MultiIndexable([1], [2]).keys()) == (["genes"], [0, 1])


def test_names_survive_whatever_they_are():
    m = MultiIndexable({"names": np.arange(3), "unstructured": np.arange(3), 5: np.arange(3)})
    assert m[[0, 1]].names == ["names", "unstructured", 5]
    assert m[[0, 2]]["names"].tolist() == [0, 2]


PAIRS = MultiIndexable(np.zeros((4, 2, 2)), np.zeros((4, 3)))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (MultiIndexable, TypeError, "at least one member"),
        (lambda: MultiIndexable([1], X=[1]), TypeError, "not both"),
        (lambda: MultiIndexable([1], [1, 2]), ValueError, "the same length"),
        (lambda: MultiIndexable([1], names=["a", "b"]), ValueError, "2 names for 1 members"),
        (lambda: MultiIndexable([1], [1], names=["a", "a"]), ValueError, "a name of its own"),
        (lambda: MultiIndexable(3), TypeError, "type int has no length"),
        (lambda: MultiIndexable([1], unstructured=3), TypeError, "must be a dictionary"),
        (lambda: MultiIndexable(a=[1])["b"], KeyError, "no member is called"),
        (lambda: MultiIndexable([1])["b"], KeyError, "members have no names"),
        (lambda: MultiIndexable([1])[1], IndexError, "out of range"),
        *(
            (partial(PAIRS.__getitem__, key), IndexError, "rows are given by")
            for key in ((0, 1), None, ..., [[0, 1]], True)
        ),
        (lambda: MultiIndexable(np.arange(2))[[5]], IndexError, "cannot take rows"),
    ],
)
def test_what_a_multiindexable_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_members_move_and_are_pinned():
    class Part(list):
        moved = ""

        def to(self, device):
            part = Part(self)
            part.moved = device
            return part

        def pin_memory(self):
            return self.to("pinned")

    m = MultiIndexable(x=Part([1, 2]), y=[3, 4])
    assert (m.to("gpu")["x"].moved, m.pin_memory()["x"].moved, m.to("gpu")["y"]) == ("gpu", "pinned", [3, 4])


# --- sizes


def test_estimate_sample_size():
    assert estimate_sample_size(np.zeros((30, 50), np.float32)) == 200
    assert estimate_sample_size(np.zeros((30, 50), np.float32), fetch_transform=lambda x: x.astype(np.float64)) == 400
    assert estimate_sample_size(MultiIndexable(np.zeros((3, 10)), np.zeros((3, 1)))) == 88
    wide = ad.AnnData(np.zeros((4, 5000), np.float32))
    assert 20_000 <= estimate_sample_size(wide) < 30_000  # not 5,000 genes' annotations with each cell


def test_suggest_parameters(caplog):
    found = suggest_parameters(np.zeros((30, 50), np.float32), 64, max_workers=3, verbose=False)
    assert 1 <= found["num_workers"] <= 3
    assert found["prefetch_factor"] == found["fetch_factor"] + 1
    assert found["block_size_balanced"] * 2 == found["block_size_aggressive"]
    assert found["system_info"]["estimated_sample_size_bytes"] == 200
    memory = found["system_info"]["available_ram_gb"] * 1e9
    assert found["estimated_total_memory_mb"] * 1e6 <= 0.21 * memory


# --- what the peer's users count on


def test_indices_that_are_not_sorted_are_warned_of():
    with pytest.warns(UserWarning, match="3 indices were not sorted") as caught:
        Streaming(indices=[3, 1, 2])
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("make", "n_rows"),
    [
        (lambda: BlockWeightedSampling(weights=np.ones(40), indices=np.arange(60)), None),
        (lambda: ClassBalancedSampling(np.zeros(40, int), indices=np.arange(60)), None),
        (lambda: BlockWeightedSampling(weights=np.ones(40), indices=np.arange(30, 50)), None),
        (lambda: BlockWeightedSampling(weights=np.ones(40)), 100),
        (lambda: ClassBalancedSampling(np.zeros(140, int)), 100),
        (lambda: BlockWeightedSampling(weights=np.ones(80), indices=np.arange(60)), 100),
    ],
)
def test_weights_and_labels_of_a_wrong_length_are_refused_once_it_is_known(make, n_rows):
    with pytest.raises(ValueError, match="weights|labels"):
        scDataset(np.arange(n_rows or 100), make(), 8, seed=0) if n_rows else make()


def test_ranks_that_read_in_order_have_every_row_once():
    """Validation and inference: drop_last=False means that nothing is left out."""
    found = [list(scDataset(np.arange(1000), Streaming(), 64, 4, rank=r, world_size=3, seed=0)) for r in range(3)]
    assert sorted(np.concatenate([row for rank in found for row in rank])) == list(range(1000))
    found = [list(scDataset(np.arange(1000), Streaming(), 64, 4, True, rank=r, world_size=3, seed=0)) for r in range(3)]
    assert {len(batches) for batches in found} == {5}


def _as_dask(x):
    import dask.array as da

    return da.from_array(sp.csr_matrix(x), chunks=(1, 3), asarray=False)


class Duck:
    """Anything with X and obs, and nothing else."""

    def __init__(self, X):
        self.X, self.obs, self.layers = X, {"kind": ["a", "b"]}, None


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix, sp.csc_array, lambda x: x.tolist(), _as_dask])
def test_adata_to_mindex_takes_anything_with_x_and_obs(form):
    x = np.arange(6.0).reshape(2, 3)
    found = adata_to_mindex(Duck(form(x)), columns=["kind"])
    np.testing.assert_array_equal(found["X"], x)
    assert found["kind"].tolist() == ["a", "b"]


def test_sizes_of_lists_and_of_what_has_no_layers():
    assert estimate_sample_size([[1, 2], [3, 4]]) > 0
    assert estimate_sample_size(["abc", "d"], n_samples=1) > 0
    with_x = [Duck(np.zeros((1, 50)))]
    assert estimate_sample_size(with_x, fetch_transform=lambda chunk: chunk[0]) >= 400
    assert suggest_parameters([[1, 2]] * 50, 8, verbose=True)["num_workers"] >= 1


@pytest.mark.parametrize(
    ("rows", "error"), [([-1, 2], ValueError), ([1.5, 2.7], TypeError), (np.array([True, False, True]), TypeError)]
)
def test_what_a_strategy_of_ones_own_returns_is_rows(rows, error):
    class Own(SamplingStrategy):
        def get_indices(self, data_collection, seed=None, rng=None):
            return rows

    with pytest.raises(error, match="mask|integers|0 or more"):
        list(scDataset(np.arange(3), Own(), 2, seed=0))


@pytest.mark.parametrize("sizes", [(0, 1), (-4, 2), (4, 0), (4, -1)])
def test_a_sampler_of_a_strategy_needs_sizes(sizes):
    with pytest.raises(ValueError, match="must be 1 or more"):
        StrategySampler(Streaming(), *sizes)


@pytest.mark.parametrize("n_rows", [1, 5])
def test_a_mask_has_a_value_for_every_row_of_a_list(n_rows):
    with pytest.raises(IndexError, match=f"a mask of {n_rows} rows"):
        MultiIndexable(list("abcd"))[np.ones(n_rows, bool)]
