"""Attention for packed rows in one kernel per layer, with torch's FlexAttention, for GPUs.

    packing = Segments(sources, targets, rows=divide_rows(sources, targets))
    blocks = packing.rows.blocks["encoder"]
    attended_BQHD = attend(query_BHQD, key_BHKD, value_BHKD, blocks, table_HR, False, dropout=0.1)

The loop over segments (attention/segments.py) launches a kernel for each segment in each layer, which on a GPU takes
longer than the attention itself. Here, a whole row is one kernel:

- T5's position bias depends only on the distance between two tokens, and is constant from `max_distance` on. So the
  kernel reads it from a small table, and no matrix of the row's length squared is stored.
- A row is divided into blocks of 128 tokens, and the kernel visits only pairs of blocks with a segment in common. The
  collator computes these pairs from the segments' lengths, in the data loader's processes.
- Rows are filled up to whole blocks with a segment of padding, whose labels are ignored.

FlexAttention has no dropout. With a hash of (seed, head, query, key) as its random number, dropout after the softmax is
computed exactly: attention over the kept keys alone is normalized by their own sum, which is then replaced with the sum
over all keys.

B batch (always 1), Q query tokens, K key tokens, H heads, D head width, R entries of the table: 2·max_distance + 1.
Dong et al. 2024, "Flex Attention: A Programming Model for Generating Optimized Attention Kernels".
"""

import math
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

BLOCK = 128  # tokens: FlexAttention's default, which its kernels' own tiles must divide
MIN_LENGTH = 2 * BLOCK  # torch.compile specializes dimensions of 1, so it would compile again for rows of one block
MIN_HEAD_WIDTH = 16  # Triton's minimum in a matrix product
BUFFER_ALIGNMENT = 4  # elements of the buffer: 16 bytes
HASH_SIZE = 2**24
SMALL_TILES = {f"bwd_BLOCK_{name}": 32 for name in ("M1", "N1", "M2", "N2")}  # tokens, in the backward pass
MAX_COMPILATIONS = 64

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Blocks:
    """The pairs of query and key blocks that a kernel visits.

    Args:
        query_segments, key_segments: the number of the segment of each token, int32.
        tensors: the eight tensors of torch's BlockMask, int32: the counts and indices of the key blocks that each query
            block sees in part and as a whole, and then of the query blocks that see each key block.
        num_stages: see PackedRows.
    """

    query_segments: Tensor
    key_segments: Tensor
    tensors: tuple[Tensor, ...]
    num_stages: int | None


@dataclass(frozen=True)
class PackedRows:
    """How the source row and the target row of a batch are divided into blocks.

    Args:
        source_length, target_length: tokens of the rows, with the padding: multiples of BLOCK.
        buffer: the segment numbers and block pairs in one tensor, so that one copy moves them to a GPU. A target token
            has the numbers of its segment and of its source.
        num_stages: how many blocks a kernel loads ahead; fewer take less shared memory. With 1, the backward pass also
            has small tiles. None: FlexAttention's choice.
    """

    source_length: int
    target_length: int
    buffer: Tensor
    num_stages: int | None = None

    def to(self, device: Any, non_blocking: bool = False) -> "PackedRows":
        return replace(self, buffer=self.buffer.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedRows":
        return replace(self, buffer=self.buffer.pin_memory())

    @cached_property
    def blocks(self) -> dict[str, Blocks]:
        """Views of the buffer: of source tokens to each other (encoder), of targets (decoder), of both (cross)."""
        lengths = self.source_length, self.target_length, self.target_length
        *segments, parts = torch.split(self.buffer, [*lengths, len(self.buffer) - sum(lengths)])
        found, start = {}, 0
        for kind, (queries, keys) in {"encoder": (0, 0), "decoder": (1, 1), "cross": (2, 0)}.items():
            tensors = []
            for size in _list_sizes(lengths[queries], lengths[keys]):
                tensors.append(parts[start : start + math.prod(size)].view(1, 1, *size))
                start += _align(math.prod(size))
            found[kind] = Blocks(segments[queries], segments[keys], tuple(tensors), self.num_stages)
        return found


def divide_rows(
    sources: tuple[int, ...],
    targets: tuple[int, ...],
    targets_by_source: tuple[int, ...] | None = None,
    num_stages: int | None = None,
) -> PackedRows:
    """Divide the rows of a packed batch into blocks.

    Args:
        sources, targets: lengths of the examples, in tokens.
        targets_by_source: number of target tokens of each source; None: each source has one target.
        num_stages: see PackedRows.
    """
    target_length = _round_up(sum(targets))
    # padding of the target row attends to padding of the source row, so there must be some there
    source_length = _round_up(sum(sources) + (target_length > sum(targets)))
    by_source = targets_by_source or targets
    rows = (sources, source_length), (targets, target_length), (by_source, target_length)
    ends = [np.cumsum([*lengths, total - sum(lengths)]) for lengths, total in rows]
    source_ends, target_ends, ends_by_source = ends
    parts = [np.repeat(np.arange(len(each)), np.diff(each, prepend=0)) for each in ends]
    parts += _find_blocks(source_ends, source_ends, is_causal=False)
    parts += _find_blocks(target_ends, target_ends, is_causal=True)
    parts += _find_blocks(ends_by_source, source_ends, is_causal=False)
    buffer = np.concatenate(
        [np.pad(part.ravel(), (0, _align(part.size) - part.size)) for part in parts], dtype=np.int32
    )
    return PackedRows(source_length, target_length, torch.from_numpy(buffer), num_stages)


def _round_up(length: int) -> int:
    return max(MIN_LENGTH, -(-length // BLOCK) * BLOCK)


def _find_blocks(query_ends: Integers, key_ends: Integers, is_causal: bool) -> list[Integers]:
    """Find the blocks of keys that each block of queries sees, from the ends of the segments, padding included.

    Segments are in the same order on both sides.
    """
    num_rows, num_columns = query_ends[-1] // BLOCK, key_ends[-1] // BLOCK
    first_query = np.arange(num_rows) * BLOCK
    first, last = (np.searchsorted(query_ends, first_query + offset, "right") for offset in (0, BLOCK - 1))
    # the segments of a block of queries are consecutive, so their keys are, too
    low, high = (key_ends - np.diff(key_ends, prepend=0))[first], key_ends[last]
    whole_high = high
    if is_causal:
        high, whole_high = np.minimum(high, first_query + BLOCK), np.minimum(high, first_query)
    column = np.arange(num_columns)
    is_seen = (column >= (low // BLOCK)[:, None]) & (column < -(-high // BLOCK)[:, None])
    is_whole = (column >= -(-low // BLOCK)[:, None]) & (column < (whole_high // BLOCK)[:, None])
    is_whole &= (first == last)[:, None]
    is_partial = is_seen & ~is_whole
    masks = is_partial, is_whole, is_partial.T, is_whole.T
    # for each row, the number of its blocks, and their columns before all other columns
    return [each for is_in in masks for each in (is_in.sum(1), np.argsort(~is_in, axis=1, kind="stable"))]


def _list_sizes(query_length: int, key_length: int) -> list[tuple[int, ...]]:
    """List the sizes of the arrays that `_find_blocks` returns."""
    rows, columns = query_length // BLOCK, key_length // BLOCK
    return [(rows,), (rows, columns)] * 2 + [(columns,), (columns, rows)] * 2


def _align(count: int) -> int:
    """Round up: compiled kernels copy arrays that begin at unaligned addresses."""
    return -(-count // BUFFER_ALIGNMENT) * BUFFER_ALIGNMENT


def attend(
    query_BHQD: Tensor,
    key_BHKD: Tensor,
    value_BHKD: Tensor,
    blocks: Blocks,
    table_HR: Tensor | None,
    is_causal: bool,
    dropout: float,
) -> Tensor:
    """Attend within each segment.

    Args:
        table_HR: the position bias by distance (key - query), from -max_distance to max_distance; None: no bias.
        dropout: probability of dropping a key, after the softmax.

    Returns:
        [B, Q, H, D]
    """
    seeds_H = draw_seeds(query_BHQD) if dropout else None
    max_distance = 0 if table_HR is None else table_HR.shape[1] // 2
    kernel = _get_kernel(is_causal, max_distance, count_kept_hashes(dropout), blocks.num_stages)
    # Autocast is among torch.compile's guards: with it, training would recompile the kernel that was compiled for
    # the comparison with the loop. The states have its dtype already.
    with torch.autocast(query_BHQD.device.type, enabled=False):
        attended_BHQD: Tensor = kernel(query_BHQD, key_BHKD, value_BHKD, blocks, table_HR, seeds_H)
    return attended_BHQD.transpose(1, 2)


def draw_seeds(query_BHQD: Tensor) -> Tensor:
    """Draw the seed of each head's dropout."""
    bounds = torch.iinfo(torch.int32)
    size, device = query_BHQD.shape[1:2], query_BHQD.device
    return torch.randint(bounds.min, bounds.max, size, dtype=torch.int32, device=device)


def count_kept_hashes(dropout: float) -> int:
    """Count the hash values that keep a key."""
    return round((1 - dropout) * HASH_SIZE)


@cache
def _get_kernel(*options: Any) -> Any:
    # The three kinds of attention, with and without dropout and gradients, are more variants than torch's limit of 8.
    # The limit is set for good, because setting it for each call takes four times as long as the rest of the call.
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, MAX_COMPILATIONS)
    return torch.compile(_Kernel(*options), dynamic=True, fullgraph=True)


class _Kernel(nn.Module):
    """The function to compile.

    It is a module because torch.compile takes a module's integers for constants. FlexAttention can't use other
    integers in the functions that it calls for each score, in 2.13 not even those that never change.
    """

    def __init__(self, is_causal: bool, max_distance: int, num_kept_hashes: int, num_stages: int | None) -> None:
        super().__init__()
        self.num_stages = num_stages
        self.is_causal = is_causal
        self.max_distance = max_distance
        self.num_kept_hashes = num_kept_hashes

    def forward(
        self,
        query_BHQD: Tensor,
        key_BHKD: Tensor,
        value_BHKD: Tensor,
        blocks: Blocks,
        table_HR: Tensor | None,
        seeds_H: Tensor | None,
    ) -> Tensor:
        from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

        def see(_batch: Any, _head: Any, query: Any, key: Any) -> Any:
            is_same = blocks.query_segments[query] == blocks.key_segments[key]
            return is_same & (query >= key) if self.is_causal else is_same

        def add_bias(score: Any, _batch: Any, head: Any, query: Any, key: Any) -> Any:
            if table_HR is None:
                return score
            distance = (key - query).clamp(-self.max_distance, self.max_distance)
            return score + table_HR[head, distance + self.max_distance]

        def add_bias_or_drop(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
            assert seeds_H is not None
            is_kept = compute_hash(seeds_H[head], query, key) < self.num_kept_hashes
            return torch.where(is_kept, add_bias(score, batch, head, query, key), -torch.inf)

        lengths = query_BHQD.shape[2], key_BHKD.shape[2]
        for length in lengths:  # so that the kernel needn't compare each index with the row's length
            torch._check(length % BLOCK == 0)  # type: ignore[no-untyped-call]
        if table_HR is not None:
            torch._dynamo.mark_static(table_HR)
        options: Any = None if self.num_stages is None else {"num_stages": self.num_stages}
        if self.num_stages == 1:
            options |= SMALL_TILES
        mask = BlockMask(lengths, *blocks.tensors, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=see)  # type: ignore[misc, arg-type]
        call = partial(flex_attention, query_BHQD, key_BHKD, block_mask=mask, scale=1.0, kernel_options=options)
        if seeds_H is None:
            return call(value_BHKD, add_bias)
        call = partial(call, return_aux=AuxRequest(lse=True))
        attended_BHQD, kept = call(value_BHKD, add_bias_or_drop)
        # only the normalizer is used, so the values may be narrow
        unneeded_BHQD, every = call(value_BHKD[..., :MIN_HEAD_WIDTH], add_bias)
        scale_BHQ = (kept.lse - every.lse).exp() * (HASH_SIZE / self.num_kept_hashes)
        # an output without a gradient can't be compiled for a GPU: torch 2.13's _inductor/kernel/flex multiplies by it
        scale_BHQ = scale_BHQ + 0 * unneeded_BHQD[..., 0]
        scaled_BHQD: Tensor = (attended_BHQD * scale_BHQ[..., None]).to(attended_BHQD.dtype)
        return scaled_BHQD


def compute_hash(seed: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Compute a number below HASH_SIZE that looks random: the finalizer lowbias32 (Wellons 2018).

    Products may wrap around, and `>>` copies the sign bit, which the masks remove. So int32, which GPUs use, and int64
    give the same number.
    """
    x = seed + query * -1640531535 + key * -2048144777
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -2073254261
    return (x ^ ((x >> 16) & 0xFFFF)) & (HASH_SIZE - 1)
