"""The comparison of a merged model with the model that it was made from."""

import math

import torch

from t5tune.merging.verify import find_max_difference


def test_a_nan_difference_is_never_dropped() -> None:
    good, bad = torch.zeros(3), torch.tensor([0.0, math.nan, 0.0])
    for logits in ([good, bad], [bad, good]):
        assert math.isnan(find_max_difference([good, good], logits))
    assert find_max_difference([good, good], [good, good + 2]) == 2
