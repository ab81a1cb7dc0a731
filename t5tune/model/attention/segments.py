"""The examples in a packed row, and attention that loops over them.

    segments = Segments(sources=(7, 4), targets=(3, 2))
    attended_BQHD = segment_attention(query_BHQD, key_BHKD, value_BHKD, [7, 4], [7, 4], None, dropout=0.1)

B batch (1 if packed), Q query tokens, K key tokens, H heads, D head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from t5tune.model.kernels.flex_attention import PackedRows

Item = TypeVar("Item")


@dataclass(frozen=True)
class Segments:
    """The examples in a packed row.

    Args:
        sources, targets: lengths of the examples' sources and targets, in order, in tokens.
        targets_per_source: 2 for preference pairs, whose two targets follow each other; both attend to the same source.
        rows: how the rows are divided into blocks; None: attention loops over the segments.
    """

    sources: tuple[int, ...]
    targets: tuple[int, ...]
    rows: PackedRows | None = None
    targets_per_source: int = 1

    @property
    def targets_by_source(self) -> tuple[int, ...]:
        """The number of target tokens that attend to each source."""
        starts = range(0, len(self.targets), self.targets_per_source)
        return tuple(sum(self.targets[start : start + self.targets_per_source]) for start in starts)

    def repeat_for_targets(self, items: Sequence[Item]) -> list[Item]:
        """Repeat each source's item for its targets."""
        return [item for item in items for _ in range(self.targets_per_source)]

    def to(self, device: Any, non_blocking: bool = False) -> "Segments":
        """Copy the blocks to a device. accelerate calls this for a batch."""
        return self if self.rows is None else replace(self, rows=self.rows.to(device, non_blocking))

    def pin_memory(self) -> "Segments":
        """Copy the blocks to pinned memory. The data loader calls this for a batch."""
        return self if self.rows is None else replace(self, rows=self.rows.pin_memory())

    def number_positions(self, lengths: tuple[int, ...], device: torch.device) -> Tensor:
        """Number the tokens of a row, from 0 in each segment: [1, tokens]."""
        return torch.cat([torch.arange(length, device=device) for length in lengths])[None]


def segment_attention(
    query_BHQD: Tensor,
    key_BHKD: Tensor,
    value_BHKD: Tensor,
    queries: list[int],
    keys: list[int],
    bias_1HQK: Tensor | None,
    dropout: float,
) -> Tensor:
    """Attend within each segment.

    Args:
        queries, keys: lengths of the segments, in tokens.
        bias_1HQK: for the longest segment; shorter segments use its upper left corner.

    Returns:
        [B, Q, H, D]
    """
    attended = []
    states = (query_BHQD, queries), (key_BHKD, keys), (value_BHKD, keys)
    for query, key, value in zip(*(torch.split(each, lengths, 2) for each, lengths in states), strict=True):
        bias = None if bias_1HQK is None else bias_1HQK[:, :, : query.shape[2], : key.shape[2]]
        # T5 doesn't scale the scores by 1/√D: its initialization of q includes that factor
        output = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, dropout_p=dropout, scale=1.0
        )
        attended.append(output.transpose(1, 2))
    return torch.cat(attended, 1)
