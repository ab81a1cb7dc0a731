"""Mixing: how many examples of each dataset an epoch has, and which ones."""

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest

from t5tune.data.caches.mixing import EpochCounts, Mixing, choose_mixing, compute_rates, draw_epoch
from t5tune.settings import TrainSettings

SIZES = [400, 30, 7]


def test_weights_are_shares_of_the_examples_however_large_they_are() -> None:
    by_weights = Mixing("weights")
    assert by_weights.compute_shares(SIZES, [2, 1, 1]) == [0.5, 0.25, 0.25]
    assert by_weights.compute_shares(SIZES, [2e300, 1e300, 1e300]) == [0.5, 0.25, 0.25]
    assert by_weights.compute_shares(SIZES, [1.5e308, 1.5e308, 0]) == [0.5, 0.5, 0.0]
    assert by_weights.compute_shares(SIZES, [0, 5e-324, 0]) == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(("temperature", "cap"), [(1.0, None), (1.0, 50), (2.0, None), (3.5, 20)])
def test_proportional_mixing_follows_t5(temperature: float, cap: int | None) -> None:
    rates = [min(size, cap or size) ** (1 / temperature) for size in SIZES]
    shares = Mixing("proportional", temperature, cap).compute_shares(SIZES, [1.0] * 3)
    assert [*map(float, shares)] == pytest.approx([rate / sum(rates) for rate in rates])


def make_counts(weights: Sequence[float], sizes: Sequence[int] = SIZES) -> EpochCounts:
    return EpochCounts(compute_rates(sizes, Mixing("weights").compute_shares(sizes, weights)))


def draw(counts: EpochCounts, epoch: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    return draw_epoch(SIZES, counts.sum_epochs(epoch), counts.sum_epochs(epoch + 1), seed)


def test_concatenated_datasets_have_every_example_once_in_each_epoch() -> None:
    rates = compute_rates(SIZES, Mixing().compute_shares(SIZES, [1.0] * 3))
    assert rates == [400, 30, 7]
    counts = EpochCounts(rates)
    for epoch in range(3):
        indices, repeats = draw(counts, epoch)
        assert indices.tolist() == list(range(437))
        assert set(repeats.tolist()) == {epoch}


def test_the_counts_of_epochs_add_up_to_the_shares() -> None:
    """Weights 1 : 3 : 0.2 of 54 examples are 12.86, 38.57 and 2.57 an epoch."""
    counts = make_counts((1, 3, 0.2), (14, 37, 3))
    sums = np.array([counts.sum_epochs(count) for count in range(43)])
    assert np.diff(sums, axis=0)[:3].tolist() == [[13, 38, 3], [13, 39, 2], [13, 38, 3]]
    assert sums[7::7].tolist() == [[90 * number, 270 * number, 18 * number] for number in range(1, 7)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "weights",
    [
        (1, 1, 1), (2, 1, 0), (0.1, 7, 3), (1, 1e-9, 1), (1, 3, 1000), (1, 1e-3, 2e-3), (1, *[0.001] * 12),
        (7, 0.31, 0.07, 0.02, 0.013, 0.5, 0.5, 0.5), (1.5e308, 5e-324, 1.5e308),
    ],
    ids=str,
)  # fmt: skip
def test_counts_differ_from_shares_by_less_than_an_example(weights: tuple[float, ...]) -> None:
    sizes = [*SIZES, *[11] * len(weights)][: len(weights)]
    counts = make_counts(weights, sizes)
    total = sum(size for size, weight in zip(sizes, weights, strict=True) if weight)
    before = [0] * len(weights)
    for epochs in range(1, 1500):
        drawn = counts.sum_epochs(epochs)
        assert sum(drawn) == epochs * total
        assert all(now >= then for now, then in zip(drawn, before, strict=True))
        for number, weight in zip(drawn, weights, strict=True):
            assert abs(number - epochs * total * Fraction(weight) / sum(map(Fraction, weights))) < 1
        before = drawn


def test_an_epoch_s_counts_don_t_depend_on_earlier_epochs() -> None:
    in_order, alone = make_counts((1, 3, 0.2)), make_counts((1, 3, 0.2))
    expected = [in_order.sum_epochs(count) for count in range(51)]
    assert alone.sum_epochs(50) == expected[50]
    assert alone.sum_epochs(7) == expected[7]


@pytest.mark.parametrize("weights", [(5, 200, 3), (1, 0, 0), (0, 60, 14), (1, 1, 1), (1, 0.001, 2)])
def test_all_examples_of_a_dataset_are_drawn_equally_often(weights: tuple[float, ...]) -> None:
    counts = make_counts(weights)
    drawn = Counter[int]()
    starts = np.cumsum([0, *SIZES])
    for epoch in range(9):
        indices, repeats = draw(counts, epoch, seed=5)
        for index, repeat in zip(indices.tolist(), repeats.tolist(), strict=True):
            assert drawn[index] == repeat  # how often it was drawn before
            drawn[index] += 1
        bounds = zip(starts, starts[1:], strict=False)
        assert [sum(drawn[index] for index in range(a, b)) for a, b in bounds] == counts.sum_epochs(epoch + 1)
    for size, start in zip(SIZES, starts, strict=False):
        times = [drawn[index] for index in range(start, start + size)]
        assert max(times) - min(times) <= 1


def test_seed_and_epoch_determine_the_sampled_examples() -> None:
    draws = {
        (epoch, seed): draw(make_counts((100, 45, 3)), epoch, seed)[0].tolist()
        for seed in (1, 2)
        for epoch in (0, 1, 3)
    }
    assert all(draw(make_counts((100, 45, 3)), *key)[0].tolist() == found for key, found in draws.items())
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
