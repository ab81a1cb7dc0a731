"""Steps: every example once per epoch, similar lengths within a step, determined by seed and epoch alone."""

import tracemalloc

import numpy as np
import pytest

from t5tune.data.caches.batching import make_count_batches
from t5tune.errors import SettingsError
from t5tune.training.steps import Draw, EpochDraws, StepSampler, make_budget_sampler, make_count_sampler


def make_draws(lengths: np.ndarray, seed: int) -> EpochDraws:
    """Make draws of examples with targets of one token."""
    return EpochDraws(lengths - 1, np.ones_like(lengths), seed)


def list_batches(sampler: StepSampler) -> list[list[int]]:
    """List the examples of each micro-batch, without fillers."""
    return [[draw.example for draw in batch if not draw.is_filler] for batch in sampler]


def list_indices(sampler: StepSampler) -> list[int]:
    return [index for batch in list_batches(sampler) for index in batch]


@pytest.mark.parametrize("count", [1, 7, 64, 1000, 4099])
def test_every_example_is_used_once_per_epoch(count: int) -> None:
    lengths = np.random.default_rng(0).integers(5, 500, count)
    sampler = make_count_sampler(make_draws(lengths, seed=1), batch_size=4, step_size=4, group_by_length=True)
    batches = list(sampler)
    assert len(sampler) == len(batches) == -(-count // 16) * 4
    assert all(1 <= len(batch) <= 4 for batch in batches)
    assert sorted(list_indices(sampler)) == list(range(count))


@pytest.mark.parametrize("count", [3, 43, 64])
def test_a_step_has_the_same_examples_however_it_is_divided(count: int) -> None:
    lengths = np.random.default_rng(0).integers(5, 500, count)
    steps = []
    for batch_size, step_size in ((8, 1), (4, 2), (1, 8)):
        batches = list_batches(
            make_count_sampler(make_draws(lengths, seed=1), batch_size, step_size, group_by_length=True)
        )
        steps.append(
            [
                [index for batch in batches[start : start + step_size] for index in batch]
                for start in range(0, len(batches), step_size)
            ]
        )
    assert steps[0] == steps[1] == steps[2]


def test_micro_batches_without_examples_are_empty_and_get_a_filler() -> None:
    lengths = np.arange(5, 16)
    batches = [*make_count_batches(lengths, batch_size=2, step_size=4, seed=1, epoch=0)]
    assert [len(batch) for batch in batches] == [2, 2, 2, 2, 1, 1, 1, 0]
    sampled = list(make_count_sampler(make_draws(lengths, seed=1), batch_size=2, step_size=4, group_by_length=True))
    assert sampled[:7] == [[Draw(int(index), repeat=0) for index in batch] for batch in batches[:7]]
    assert sampled[7] == [Draw(int(batches[4][0]), repeat=0, is_filler=True)]  # the step's first example


def test_seed_and_epoch_determine_the_order() -> None:
    lengths = np.random.default_rng(0).integers(5, 500, 500)
    orders = {}
    for seed in (1, 2):
        sampler = make_count_sampler(make_draws(lengths, seed), batch_size=8, step_size=1, group_by_length=True)
        for epoch in (0, 1, 0):
            sampler.set_epoch(epoch)
            order = list_indices(sampler)
            assert orders.setdefault((seed, epoch), order) == order
    assert len({tuple(order) for order in orders.values()}) == 4


def test_steps_are_shuffled_and_have_examples_of_similar_length() -> None:
    lengths = np.random.default_rng(0).integers(5, 500, 4096)
    order = np.array(
        list_indices(make_count_sampler(make_draws(lengths, seed=3), batch_size=32, step_size=1, group_by_length=True))
    )
    steps = lengths[order].reshape(-1, 32)
    useful = steps.sum() / (steps.max(1) * 32).sum()
    shuffled = lengths.reshape(-1, 32)
    assert useful > 0.97
    assert shuffled.sum() / (shuffled.max(1) * 32).sum() < 0.6
    means = steps.mean(1)
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3


# --- batches with a token budget -----------------------------------------------------------------------------


def sample_lengths(count: int, longest: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return (source, target) lengths distributed like those of real conversations."""
    rng = np.random.default_rng(seed)
    sources = np.clip(rng.lognormal(np.log(350), 1.1, count).astype(np.int64), 8, longest)
    return sources, np.clip(rng.lognormal(np.log(150), 1.0, count).astype(np.int64), 4, longest)


def list_epoch(sampler: StepSampler, epoch: int) -> list[list[int]]:
    sampler.set_epoch(epoch)
    return list_batches(sampler)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("count", "step_size"), [(40, 1), (40, 16), (1000, 3), (5003, 8)])
def test_each_epoch_has_every_example_once_within_the_budget(count: int, step_size: int, packed: bool) -> None:
    sources, targets = sample_lengths(count, 512)
    sampler = make_budget_sampler(EpochDraws(sources, targets, seed=1), 2048, packed, step_size)
    assert len(sampler) % step_size == 0
    orders = [list_epoch(sampler, epoch) for epoch in range(6)]
    for batches in orders:
        assert len(batches) == len(sampler)
        assert sorted(index for batch in batches for index in batch) == list(range(count))
        if packed:
            sizes = [(sources + targets)[batch].sum() for batch in batches]
        else:
            sizes = [len(batch) * (sources[batch].max() + targets[batch].max()) for batch in batches]
        assert max(sizes) <= 2048
    assert len({str(batches) for batches in orders}) == 6
    assert list_epoch(sampler, 2) == orders[2]
    assert (
        list_epoch(make_budget_sampler(EpochDraws(sources, targets, seed=2), 2048, packed, step_size), 2) != orders[2]
    )


@pytest.mark.parametrize(("longest", "tokens"), [(512, 8192), (2048, 16384)])
def test_padded_batches_are_full_and_have_similar_lengths(longest: int, tokens: int) -> None:
    sources, targets = sample_lengths(20_000, longest)
    batches = list_epoch(make_budget_sampler(EpochDraws(sources, targets, seed=0), tokens, False, 4), 1)
    padded = sum(len(batch) * (sources[batch].max() + targets[batch].max()) for batch in batches)
    assert (sources + targets).sum() / padded > 0.92
    assert padded / len(batches) / tokens > 0.9


@pytest.mark.parametrize("packed", [False, True])
def test_the_batches_of_a_step_cost_about_the_same(packed: bool) -> None:
    sources, targets = sample_lengths(20_000, 2048)
    batches = list_epoch(make_budget_sampler(EpochDraws(sources, targets, seed=0), 8192, packed, 8), 0)
    costs = []
    for batch in batches:
        source, target = sources[batch], targets[batch]
        if not packed:
            source, target = np.full(len(batch), source.max()), np.full(len(batch), target.max())
        costs.append((source + target).sum() + (source**2 + target**2 + source * target).sum() / 4096)
    steps = np.reshape(costs, (-1, 8))
    assert (steps.mean(1) / steps.max(1)).mean() > 0.99
    means = steps.mean(1)
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.15


def test_impossible_budgets_are_refused() -> None:
    sources, targets = np.array([5, 60, 7]), np.array([3, 41, 2])
    with pytest.raises(
        SettingsError, match="tokens_per_batch: 100: the longest example has 101 source and target tokens"
    ):
        make_budget_sampler(EpochDraws(sources, targets, seed=0), 100, True, 1)
    with pytest.raises(SettingsError, match=r"too few examples \(3\) for a step of 4 batches"):
        make_budget_sampler(EpochDraws(sources, targets, seed=0), 101, True, 4)


@pytest.mark.parametrize("group_by_length", [True, False])
def test_the_first_batch_takes_few_bytes_per_example(group_by_length: bool) -> None:
    lengths = np.random.default_rng(0).integers(5, 500, 100_000)
    sampler = make_count_sampler(
        make_draws(lengths, seed=1), batch_size=8, step_size=1, group_by_length=group_by_length
    )
    tracemalloc.start()
    next(iter(sampler))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 * len(lengths)  # four integers per example, and no batch ahead of its turn
