"""Histograms of example lengths."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NUM_BARS = 20

LengthArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Histogram:
    """counts[i] is the number of lengths (tokens) in [edges[i], edges[i + 1]); the last bar includes its upper edge."""

    edges: list[int]
    counts: list[int]


def build_histogram(lengths: LengthArray) -> Histogram:
    """Count lengths in about NUM_BARS bars of equal integer width, from the shortest length to the longest."""
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(high - low + 1) // NUM_BARS))
    edges = list(range(low, high + width + 1, width))
    counts, _ = np.histogram(lengths, edges)
    return Histogram(edges, counts.tolist())
