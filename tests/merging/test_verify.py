"""The comparison of a merged model with the model that it was made from."""

import math

import torch

from t5tune.merging import ctranslate2, verify


def test_a_difference_that_is_not_a_number_is_never_the_smaller_one() -> None:
    good, bad = torch.zeros(3), torch.tensor([0.0, math.nan, 0.0])
    for logits in ([good, bad], [bad, good]):
        assert math.isnan(verify._find_max_difference([good, good], logits))
    for pairs in ([(0.5, 0.0), (math.nan, 0.0)], [(math.nan, 0.0), (0.5, 0.0)]):
        assert math.isnan(ctranslate2._find_max_difference(iter(pairs)))
    assert verify._find_max_difference([good, good], [good, good + 2]) == 2
    assert ctranslate2._find_max_difference(iter([(0.5, 1.0), (1.0, 1.25)])) == 0.5
