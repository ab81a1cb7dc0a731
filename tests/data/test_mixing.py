"""Mixing: how many examples of each dataset an epoch has, and which ones."""

from collections import Counter

import numpy as np
import pytest

from t5tune.data.mixing import Mixing, choose_mixing, count_examples, draw_epoch
from t5tune.settings import TrainSettings

SIZES = [400, 30, 7]


def test_weights_are_shares_of_the_examples_however_large_they_are() -> None:
    by_weights = Mixing("weights")
    assert by_weights.compute_shares(SIZES, [2, 1, 1]) == [0.5, 0.25, 0.25]
    assert by_weights.compute_shares(SIZES, [2e300, 1e300, 1e300]) == [0.5, 0.25, 0.25]
    assert by_weights.compute_shares(SIZES, [1.5e308, 1.5e308, 0]) == pytest.approx([0.5, 0.5, 0.0])
    assert by_weights.compute_shares(SIZES, [0, 5e-324, 0]) == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(("temperature", "cap"), [(1.0, None), (1.0, 50), (2.0, None), (3.5, 20)])
def test_proportional_mixing_is_that_of_t5(temperature: float, cap: int | None) -> None:
    rates = [min(size, cap or size) ** (1 / temperature) for size in SIZES]
    shares = Mixing("proportional", temperature, cap).compute_shares(SIZES, [1.0] * 3)
    assert shares == pytest.approx([rate / sum(rates) for rate in rates])


def test_concatenated_datasets_have_every_example_once_in_each_epoch() -> None:
    counts = count_examples(SIZES, Mixing().compute_shares(SIZES, [1.0] * 3))
    assert counts == SIZES
    for epoch in range(3):
        indices, repeats = draw_epoch(SIZES, counts, 1, epoch)
        assert indices.tolist() == list(range(437))
        assert set(repeats.tolist()) == {epoch}


@pytest.mark.parametrize("weights", [(1, 1, 1), (2, 1, 0), (0.1, 7, 3), (1, 1e-9, 1), (1, 3, 1000)])
def test_an_epoch_has_each_share_of_the_examples_of_all_datasets_that_have_one(weights: tuple[float, ...]) -> None:
    counts = count_examples(SIZES, Mixing("weights").compute_shares(SIZES, weights))
    total = sum(size for size, weight in zip(SIZES, weights, strict=True) if weight)
    assert sum(counts) == total
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - total * weight / sum(weights)) < 1


@pytest.mark.parametrize("counts", [[5, 200, 3], [437, 0, 0], [0, 60, 14], [1, 1, 1]])
def test_all_examples_of_a_dataset_are_drawn_equally_often(counts: list[int]) -> None:
    drawn = Counter[int]()
    starts = np.cumsum([0, *SIZES])
    for epoch in range(9):
        indices, repeats = draw_epoch(SIZES, counts, 5, epoch)
        bounds = [int(((indices >= a) & (indices < b)).sum()) for a, b in zip(starts, starts[1:], strict=False)]
        assert bounds == counts
        for index, repeat in zip(indices.tolist(), repeats.tolist(), strict=True):
            assert drawn[index] == repeat  # how often it was drawn before
            drawn[index] += 1
    for size, start in zip(SIZES, starts, strict=False):
        times = [drawn[index] for index in range(start, start + size)]
        assert max(times) - min(times) <= 1


def test_what_is_drawn_follows_from_the_seed_and_the_epoch() -> None:
    counts = [100, 45, 3]
    draws = {
        (seed, epoch): draw_epoch(SIZES, counts, seed, epoch)[0].tolist() for seed in (1, 2) for epoch in (0, 1, 3)
    }
    assert all(draw_epoch(SIZES, counts, *key)[0].tolist() == found for key, found in draws.items())
    assert len({str(found) for found in draws.values()}) == 6


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"data": ["a:2", "b"]}, Mixing("weights")),
        ({"data": ["a", "b"]}, Mixing("concatenate")),
        ({"data": ["a", "b"], "mixing": "weights"}, Mixing("weights")),
        ({"data": ["a", "b"], "mixing_cap": 9}, Mixing("proportional", cap=9)),
        ({"data": ["a", "b"], "mixing": "proportional", "mixing_temperature": 2}, Mixing("proportional", 2.0)),
        ({"data_path": ["a:2", "b"]}, Mixing("weights")),
        ({"data_path": ["a", "b"]}, None),
    ],
)
def test_settings_choose_how_datasets_are_mixed(given: dict[str, object], expected: Mixing | None) -> None:
    assert choose_mixing(TrainSettings(model_name_or_path="pocket", output_dir="run", **given)) == expected
