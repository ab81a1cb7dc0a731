"""The order of examples: whole epochs, alike in length within a step, from seed and epoch alone."""

import numpy as np
import pytest

from t5tune.training.batches import BucketSampler


@pytest.mark.parametrize("count", [1, 7, 64, 1000, 4099])
def test_every_example_comes_once_an_epoch(count: int) -> None:
    lengths = np.random.default_rng(0).integers(5, 500, count)
    sampler = BucketSampler(lengths, step_size=16, seed=1)
    assert len(sampler) == count
    assert sorted(sampler) == list(range(count))


def test_order_follows_from_seed_and_epoch() -> None:
    lengths = np.random.default_rng(0).integers(5, 500, 500)
    orders = {}
    for seed in (1, 2):
        sampler = BucketSampler(lengths, step_size=8, seed=seed)
        for epoch in (0, 1, 0):
            sampler.set_epoch(epoch)
            order = list(sampler)
            assert orders.setdefault((seed, epoch), order) == order
    assert len({tuple(order) for order in orders.values()}) == 4


def test_a_step_holds_examples_of_like_length_and_steps_are_shuffled() -> None:
    lengths = np.random.default_rng(0).integers(5, 500, 4096)
    order = np.array(list(BucketSampler(lengths, step_size=32, seed=3)))
    steps = lengths[order].reshape(-1, 32)
    useful = steps.sum() / (steps.max(1) * 32).sum()
    shuffled = lengths.reshape(-1, 32)
    assert useful > 0.97
    assert shuffled.sum() / (shuffled.max(1) * 32).sum() < 0.6
    means = steps.mean(1)
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3
