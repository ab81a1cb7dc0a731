"""How long a cache's examples are, as bars."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NUM_BARS = 20

Lengths = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Histogram:
    """How many lengths lie from edges[i] up to, without, edges[i + 1] (tokens); the last edge counts too."""

    edges: list[int]
    counts: list[int]


def length_histogram(lengths: Lengths) -> Histogram:
    """About NUM_BARS bars of whole numbers of tokens from the shortest to the longest."""
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(high - low + 1) // NUM_BARS))
    edges = list(range(low, high + width + 1, width))
    counts, _ = np.histogram(lengths, edges)
    return Histogram(edges, counts.tolist())
