"""The first record of each key, among keys in several buckets that are alike in a half."""

import random
from pathlib import Path

import numpy as np
import pytest

from t5tune.preparing.parts.duplicates import DuplicateFinder


@pytest.mark.parametrize("num_buckets", [1, 7])
def test_later_records_of_a_key_are_found_with_the_first_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_buckets: int
) -> None:
    rng = random.Random(3)
    halves = [0, 1, 7, 2**64 - 1, *(rng.randrange(2**64) for _ in range(20))]
    keys = [(rng.choice(halves), rng.choice(halves)) for _ in range(900)]
    positions = sorted(rng.sample(range(1000), 900))  # the others are rejected and have no key
    monkeypatch.setattr("t5tune.preparing.parts.duplicates.BUCKET_RECORDS", 1 + 1000 // num_buckets)
    with DuplicateFinder(tmp_path, 1000) as finder:
        for start in range(0, 900, 100):
            part = slice(start, start + 100)
            finder.add(np.array(keys[part], np.uint64), np.array(positions[part]))
        finder.search()
        found = [*finder.find_firsts(0, 600), *finder.find_firsts(600, 400)]
    firsts: dict[tuple[int, int], int] = {}
    expected = [-1] * 1000
    for key, position in zip(keys, positions, strict=True):
        if firsts.setdefault(key, position) != position:
            expected[position] = firsts[key]
    assert found == expected
    assert not list(tmp_path.iterdir())
