import numpy as np
import pytest
from scipy.special import comb

from annbatch_dask.mixing import batch_entropy, expected_entropy, measure_mixing, plot_mixing, sampled_batches
from annbatch_dask.samplers import RandomSampler, SequentialSampler
from tests.samplers.tools import rows


def simulated_entropy(counts, n, *, n_draws=4000, seed=0):
    draws = np.random.default_rng(seed).multivariate_hypergeometric(counts, n, size=n_draws)
    return np.mean([batch_entropy(np.repeat(np.arange(len(counts)), d)) for d in draws])


@pytest.mark.parametrize(
    ("codes", "bits"),
    [([], 0), ([3], 0), ([1, 1, 1], 0), ([0, 1], 1), ([0, 1, 2, 3], 2), ([0, 0, 0, 1], 0.8112781244591328)],
)
def test_entropy_of_a_batch(codes, bits):
    assert batch_entropy(np.array(codes, dtype=np.int64)) == pytest.approx(bits)


@pytest.mark.parametrize(("counts", "n"), [([5, 3, 2], 4), ([100, 1, 1], 50), ([7, 7, 7, 7], 1), ([40, 60], 99)])
def test_expectation_agrees_with_simulation(counts, n):
    assert expected_entropy(np.array(counts), n) == pytest.approx(simulated_entropy(counts, n), abs=0.02)


def test_expectation_is_exact_for_a_case_small_enough_to_enumerate():
    # 2 of {3 a, 2 b}: one bit where the two differ, none otherwise.
    assert expected_entropy(np.array([3, 2]), 2) == pytest.approx(3 * 2 / comb(5, 2))


def test_expectation_of_everything_is_its_entropy():
    counts = np.array([5, 0, 11, 16])
    whole = np.repeat(np.arange(4), counts)
    assert expected_entropy(counts, 32) == pytest.approx(batch_entropy(whole))
    assert expected_entropy(counts, 1000) == pytest.approx(batch_entropy(whole))


def test_one_class_has_nothing_to_mix():
    mixing = measure_mixing([np.zeros(4, int), np.zeros(3, int)])
    assert (mixing.ideal_entropy, mixing.share, mixing.mean_classes) == (0.0, 1.0, 1.0)


def test_no_batches():
    assert measure_mixing([]).n_batches == 0
    assert measure_mixing([np.zeros(0, int)]).entropies == ()


def test_shuffled_batches_reach_the_ideal_and_sorted_ones_do_not():
    codes = np.repeat(np.arange(10), 1000)
    sizes = np.arange(256, len(codes), 256)
    shuffled = measure_mixing(np.split(np.random.default_rng(0).permutation(codes), sizes))
    in_order = measure_mixing(np.split(codes, sizes))
    assert shuffled.share == pytest.approx(1, abs=0.01)
    assert shuffled.mean_classes > 9.9
    assert in_order.share < 0.1
    assert in_order.mean_classes < 1.5


def test_a_sampler_is_asked_for_an_epoch_and_stays_where_it_is():
    codes = np.repeat(np.arange(10), 100)
    sampler = RandomSampler(10, 20, 50, rng=np.random.default_rng(0))
    asked = [[b.tolist() for b in sampled_batches(sampler, codes, epoch=e)] for e in (0, 1)]
    drawn = [
        codes[rows(request)[split]].tolist()
        for _ in range(2)
        for request in sampler.sample(1000)
        for split in request["splits"]
    ]
    assert asked[0] + asked[1] == drawn
    with pytest.raises(ValueError, match="exceeds loader n_obs"):
        list(sampled_batches(SequentialSampler(10, 2, 5, mask=slice(0, 2000)), codes))


def test_more_chunks_mix_better():
    codes = np.repeat(np.arange(10), 100)
    shares = [
        measure_mixing(sampled_batches(RandomSampler(10, n, 50, rng=np.random.default_rng(0)), codes)).share
        for n in (5, 20, 100)
    ]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1, abs=0.02)


def test_each_batch_and_the_ideal_are_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    batches = [np.arange(4), np.zeros(4, int), np.array([0, 0, 1, 1])]
    mixing = measure_mixing(batches)
    assert mixing.entropies == pytest.approx([2, 0, 1])
    plot_mixing(mixing, tmp_path / "m.svg", title="three batches")
    drawn = (tmp_path / "m.svg").read_text()
    for words in ("three batches", "batches, 1.000 bits on average", "drawn at random, 1.096 bits"):
        assert f"<!-- {words} -->" in drawn
