"""How many examples of each dataset an epoch has, and which ones.

An epoch has as many examples as all datasets together. A dataset's share of them is rarely a whole number: later epochs
make up for the rounding of earlier ones. With weights, a small dataset may be used up before the epoch ends. Then it
starts over, in a different order. So over several epochs all examples of a dataset are used equally often, give or take
one.
Everything is computed from seed and epoch alone, so that a resumed run continues exactly where it stopped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from pydantic import ConfigDict

from t5tune.data.caches.batching import Integers
from t5tune.settings.dataset_list import DatasetSettings
from t5tune.settings.field_types import OptionalCount
from t5tune.settings.groups.data import MixingKind, MixingSettings, Temperature


@dataclass(frozen=True)
class Mixing:
    """How datasets are mixed.

    `proportional` is the examples-proportional mixing of T5, with a limit K (`cap`) on the size of a dataset and a
    temperature T: a dataset of n examples has the weight min(n, K) ** (1 / T) (Raffel et al. 2020, section 3.5.2).
    """

    __pydantic_config__ = ConfigDict(extra="forbid")  # when it is read from mixture.json

    kind: MixingKind = "concatenate"
    temperature: Temperature = 1.0
    cap: OptionalCount = None

    def compute_shares(self, sizes: Sequence[int], weights: Sequence[float]) -> list[Fraction]:
        """Compute each dataset's share of an epoch; they add up to 1. Only the kind `weights` uses `weights`."""
        if self.kind == "weights":
            relative = [Fraction(weight) for weight in weights]
        elif self.kind == "proportional":
            counted = [min(size, self.cap or size) for size in sizes]
            relative = [Fraction((size / max(counted)) ** (1 / self.temperature)) for size in counted]
        else:
            relative = [Fraction(size) for size in sizes]
        return [each / sum(relative) for each in relative]


def choose_mixing(settings: MixingSettings) -> Mixing | None:
    """Choose how the datasets of `settings.data` are mixed; None if the settings have neither mixing nor datasets."""
    datasets: Sequence[DatasetSettings] = getattr(settings, "data", None) or []
    temperature, cap = settings.mixing_temperature, settings.mixing_cap
    if settings.mixing is not None:
        kind: MixingKind = settings.mixing
    elif temperature is not None or cap is not None:
        kind = "proportional"
    elif datasets:
        kind = "weights" if any("weight" in each.model_fields_set for each in datasets) else "concatenate"
    else:
        return None
    return Mixing(kind, 1.0 if temperature is None else temperature, cap)


def compute_rates(sizes: Sequence[int], shares: Sequence[Fraction]) -> list[Fraction]:
    """Compute how many examples of each dataset an epoch has on average.

    The sum is the number of examples of all datasets with a share, in every epoch.
    """
    total = sum(size for size, share in zip(sizes, shares, strict=True) if share)
    return [share * total for share in shares]


class EpochCounts:
    """How many examples of each dataset epochs have: whole numbers that follow the rates.

    After any number of epochs, the number of a dataset's samples differs from its rate times the number of epochs by
    less than one. Each epoch has the whole part of each rate. The remaining examples go, one by one, to the dataset
    whose next example is due first, if part of it is due already (the quota method, Balinski and Young 1975).

        counts = EpochCounts([Fraction("2.5"), Fraction("0.5")])
        counts.sum_epochs(1), counts.sum_epochs(2)      # [3, 0], [5, 1]

    Args:
        rates: examples per epoch; their sum is a whole number.
    """

    def __init__(self, rates: Sequence[Fraction]) -> None:
        self._whole = [int(rate) for rate in rates]
        self._rests = [float(rate % 1) for rate in rates]
        self._rests_per_epoch = round(sum(self._rests))
        self._sums = [[0] * len(rates)]

    def sum_epochs(self, count: int) -> list[int]:
        """Return how many examples of each dataset the first `count` epochs have together."""
        while len(self._sums) <= count:
            self._sums.append(self._add_rests(len(self._sums), self._sums[-1]))
        return [count * whole + rest for whole, rest in zip(self._whole, self._sums[count], strict=True)]

    def _add_rests(self, epochs: int, before: Sequence[int]) -> list[int]:
        """Divide the remaining examples of an epoch, counted from 1, among the datasets."""
        drawn, steps = list(before), self._rests_per_epoch
        for step in range(1, steps + 1):
            elapsed = epochs - 1 + step / steps
            begun = [index for index, rest in enumerate(self._rests) if drawn[index] < elapsed * rest]
            drawn[min(begun, key=lambda index: (drawn[index] + 1) / self._rests[index])] += 1
        return drawn


def bound_epoch_sum(largest: Sequence[Integers], starts: Sequence[int], ends: Sequence[int]) -> int:
    """Bound the sum of a number over an epoch's examples, as `draw_epoch` draws them.

    Args:
        largest: for each dataset the sum of the n largest numbers of its examples, from n = 0.
    """
    bound = 0
    for sums, start, end in zip(largest, starts, ends, strict=True):
        size = len(sums) - 1
        for first in range(start - start % size, end, size):
            bound += int(sums[min(end - first, size) - max(start - first, 0)])
    return bound


def draw_epoch(
    sizes: Sequence[int], starts: Sequence[int], ends: Sequence[int], seed: int
) -> tuple[Integers, Integers]:
    """Draw an epoch's examples. Examples are numbered through all datasets.

    Args:
        starts, ends: how many examples of each dataset were sampled before the epoch, and until its end.

    Returns:
        Indices by dataset, and how many times each example was sampled before, in this epoch and all earlier ones.
    """
    indices, repeats = [], []
    offset = 0
    for number, (size, start, end) in enumerate(zip(sizes, starts, ends, strict=True)):
        for repeat in range(start // size, -(-end // size)) if end > start else ():
            first, last = max(start - repeat * size, 0), min(end - repeat * size, size)
            drawn = np.arange(size, dtype=np.int64)
            if last - first < size:
                drawn = np.sort(np.random.default_rng([seed, number, repeat]).permutation(size)[first:last])
            indices.append(offset + drawn)
            repeats.append(np.full(len(drawn), repeat))
        offset += size
    return np.concatenate(indices), np.concatenate(repeats)
