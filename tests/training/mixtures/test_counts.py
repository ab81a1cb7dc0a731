"""The number of micro-batches in each epoch of a mixture, which is the most that any of its epochs needs."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t5tune.commands.prepare import prepare
from t5tune.data.caches.batching import TokenBudget
from t5tune.data.caches.examples import Examples
from t5tune.data.caches.mixing import Mixing
from t5tune.data.caches.prepared import open_examples
from t5tune.settings import PrepareSettings, TrainSettings
from t5tune.settings.groups.steps import StepSettings
from t5tune.training.steps import StepSampler, make_sampler


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    paths = []
    for name, count in (("many", 31), ("some", 13), ("few", 4)):
        lengths = rng.integers(1, 60, (count, 2)).tolist()
        rows = (
            f"{'cat ' * source}{number},{'dog ' * (1 + target // 4)}" for number, (source, target) in enumerate(lengths)
        )
        (folder / f"{name}.csv").write_text("\n".join(["source,target", *rows]))
        paths.append(str(folder / f"{name}.csv:1"))
    prepare(PrepareSettings(model_name_or_path="pocket", data_path=paths, output_dir=folder / "mixture"))
    return open_examples(folder / "mixture")


def weigh(prepared: Examples, weights: list[float]) -> Examples:
    datasets = [replace(each, weight=weight) for each, weight in zip(prepared.datasets, weights, strict=True)]
    return Examples(prepared.folder, datasets, Mixing("weights"))


def choose_steps(**values: Any) -> StepSettings:
    given = TrainSettings(model_name_or_path="pocket", data_path="pocket", output_dir=Path("run"), **values)
    return given.select_part(StepSettings)


def make_sampler_from_all_epochs(steps: StepSettings, seed: int, examples: Examples, is_packed: bool) -> StepSampler:
    """Make the sampler as it was made before epochs were bounded: count the batches of every epoch."""
    assert steps.tokens_per_batch is not None
    lengths, size = np.stack(examples.read_lengths()), steps.gradient_accumulation_steps
    budget = TokenBudget(steps.tokens_per_batch, is_packed, size, seed)

    def count(epoch: int) -> int:
        return budget.count_batches(*lengths[:, examples.draw_epoch(seed, epoch)[0]])

    largest, epoch = count(0), 1
    while epoch < math.ceil(steps.num_train_epochs if steps.max_steps is None else steps.max_steps / (largest // size)):
        largest, epoch = max(largest, count(epoch)), epoch + 1

    def make_batches(epoch: int) -> list[np.ndarray]:
        return budget.make_batches(*lengths[:, examples.draw_epoch(seed, epoch)[0]], largest, epoch)

    return StepSampler(partial(examples.draw_epoch, seed), make_batches, largest, size)


@pytest.mark.slow
def test_batches_are_those_of_counting_every_epoch(prepared: Examples) -> None:
    rng, numbers = np.random.default_rng(0), set()
    for seed in range(120):
        examples = weigh(prepared, rng.choice([0.1, 0.5, 1, 2, 3.3], 3).tolist())
        changes: dict[str, Any] = {
            "num_train_epochs": float(rng.integers(8, 50)) + 0.5,
            "max_steps": int(rng.integers(1, 60)) if seed % 3 == 0 else None,
            "tokens_per_batch": int(rng.integers(150, 1500)),
            "gradient_accumulation_steps": int(rng.integers(1, 5)),
        }
        steps, is_packed = choose_steps(**changes), seed % 2 == 0
        expected = make_sampler_from_all_epochs(steps, seed, examples, is_packed)
        sampler = make_sampler(steps, seed, examples, is_packed, num_ranks=1)
        assert len(sampler) == len(expected), changes
        numbers.add(len(sampler))
        steps_per_epoch = len(sampler) // steps.gradient_accumulation_steps
        for epoch in {0, 7 if steps.max_steps is None else (steps.max_steps - 1) // steps_per_epoch}:
            sampler.set_epoch(epoch)
            expected.set_epoch(epoch)
            assert list(sampler) == list(expected), changes
    assert len(numbers) > 10


@pytest.mark.slow
@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.variants("True")
def test_few_of_100000_short_epochs_are_drawn(
    is_packed: bool, prepared: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples, drawn = weigh(prepared, [2, 1, 0.3]), []
    draw_epoch = examples.draw_epoch
    monkeypatch.setattr(examples, "draw_epoch", lambda *given: drawn.append(given) or draw_epoch(*given))
    steps = choose_steps(num_train_epochs=100_000, tokens_per_batch=1000, gradient_accumulation_steps=8)
    assert make_sampler(steps, 1, examples, is_packed, num_ranks=1).steps_per_epoch == 1
    assert len(drawn) < 10


@pytest.mark.parametrize("is_packed", [True, False])
def test_no_examples_need_more_batches_than_bounded(is_packed: bool) -> None:
    rng = np.random.default_rng(0)
    for seed in range(2000):
        lengths = rng.integers(1, rng.integers(2, 6), (2, rng.integers(1, 8)))
        budget = TokenBudget(10, is_packed, 1, seed)
        longest = lengths.sum(0).max() if is_packed else lengths.max(1).sum()
        bound = budget.bound_batches(lengths.shape[1], int(lengths.sum()), int(longest))
        assert budget.count_batches(*lengths) <= bound, lengths
