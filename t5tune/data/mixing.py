"""How many examples of each dataset an epoch has, and which ones.

An epoch has as many examples as the datasets together. With weights, a small dataset may be used up before the epoch
ends: it starts over, in another order. So over several epochs all examples of a dataset are used equally often, but for
one time more or less.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from t5tune.data.batching import Integers
from t5tune.settings.data import MixingSettings
from t5tune.settings.datasets import DatasetSettings

MixingKind = Literal["weights", "proportional", "concatenate"]


@dataclass(frozen=True)
class Mixing:
    """How datasets are mixed.

    `proportional` is the examples-proportional mixing of T5, with a limit K on the size of a dataset and a temperature
    T: a dataset of n examples has the weight min(n, K) ** (1 / T) (Raffel et al. 2020, section 3.5.2).

    Args:
        temperature, cap: T and K; None: no limit.
    """

    kind: MixingKind = "concatenate"
    temperature: float = 1.0
    cap: int | None = None

    def compute_shares(self, sizes: Sequence[int], weights: Sequence[float]) -> list[float]:
        """Compute each dataset's share of an epoch's examples; they add up to 1.

        Args:
            sizes: numbers of examples.
            weights: used by the kind `weights` alone.
        """
        if self.kind == "weights":
            relative = np.array(weights, np.float64)
        elif self.kind == "proportional":
            counted = np.minimum(sizes, self.cap or max(sizes))
            relative = (counted / counted.max()) ** (1 / self.temperature)
        else:
            relative = np.array(sizes, np.float64)
        relative = relative / relative.max()  # so that their sum is finite
        return [float(share) for share in relative / relative.sum()]


def choose_mixing(settings: MixingSettings) -> Mixing | None:
    """Choose how the datasets of `settings.data` are mixed; None if the settings don't say it, and name none."""
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


def count_examples(sizes: Sequence[int], shares: Sequence[float]) -> list[int]:
    """Count an epoch's examples of each dataset: its share of the examples of all datasets with a share.

    The counts are rounded so that they add up to that number (largest remainders).
    """
    total = sum(size for size, share in zip(sizes, shares, strict=True) if share)
    exact = [share * total for share in shares]
    counts = [int(number) for number in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def draw_epoch(sizes: Sequence[int], counts: Sequence[int], seed: int, epoch: int) -> tuple[Integers, Integers]:
    """Draw an epoch's examples of datasets whose examples are numbered one dataset after the other.

    Returns:
        Indices by dataset, and how often each example was drawn before, in this epoch and all earlier ones.
    """
    indices, repeats = [], []
    offset = 0
    for number, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        start, end = epoch * count, (epoch + 1) * count
        for repeat in range(start // size, -(-end // size)) if count else ():
            order = np.random.default_rng([seed, number, repeat]).permutation(size)
            drawn = np.sort(order[max(start - repeat * size, 0) : end - repeat * size])
            indices.append(offset + drawn)
            repeats.append(np.full(len(drawn), repeat))
        offset += size
    return np.concatenate(indices), np.concatenate(repeats)
