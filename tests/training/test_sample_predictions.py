"""Which examples report.html shows the predictions of."""

import math

import pytest

from t5tune.training.sample_predictions import choose_samples


def test_half_of_the_samples_are_the_worst_and_the_others_are_spread() -> None:
    losses = [0.1] * 20
    losses[3], losses[7], losses[12] = 5.0, 9.0, 7.0
    others, worst = choose_samples(losses, 6)
    assert worst == [7, 12, 3]
    assert others == [0, 10, 19]


@pytest.mark.parametrize(
    ("num_examples", "count", "num_others", "num_worst"), [(4, 10, 2, 2), (1, 10, 1, 0), (9, 1, 1, 0)]
)
def test_few_examples_are_shown_once_each(num_examples: int, count: int, num_others: int, num_worst: int) -> None:
    others, worst = choose_samples([float(number) for number in range(num_examples)], count)
    assert (len(others), len(worst)) == (num_others, num_worst)
    assert len({*others, *worst}) == num_others + num_worst


def test_a_loss_that_is_not_finite_is_the_worst() -> None:
    assert choose_samples([1.0, math.nan, 3.0, 2.0], 2)[1] == [1]
