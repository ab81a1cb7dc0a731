"""Attention of LongT5's encoder over packed rows.

A token attends to the tokens less than a block's length away, and with transient-global attention also to one vector
for every 16 tokens of its text, the normalized sum of their hidden states (Guo et al. 2022). Both depend only on
positions within the text. In a packed row, a token sees neither tokens nor sums of other segments, and sums are counted
from the beginning of each segment. Tokens at a segment's end that don't fill a sum belong to the sum before.

transformers' blocks pass only the mask to the attention, so `compute_hidden_states` puts the segments there.

The memory grows with the row's length, and with the length times the longest segment's length divided by 16, as for
padded batches: each block of the row is compared only with the sums of its segments.

S tokens, N blocks, C tokens of a block, G sums, R sums that a block is compared with, H heads, D head width, W model
width.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from t5tune.model.attention import t5 as t5_attention
from t5tune.model.attention.segments import Segments

MASKED = -1e10  # as in transformers


def forward_decoder(
    trains_bias: bool, module: Any, original_forward: Callable[..., Any], hidden: Any, mask: Any = None, **kwargs: Any
) -> Any:
    """Forward of LongT5Attention."""
    if not isinstance(mask, Segments):
        return original_forward(hidden, mask=mask, **kwargs)
    return t5_attention.forward(trains_bias, module, original_forward, hidden, packing=mask, **kwargs)


def forward_encoder(
    trains_bias: bool,
    module: Any,
    original_forward: Callable[..., Any],
    hidden_BSW: Tensor,
    mask: Any = None,
    position_bias: Any = None,
    **kwargs: Any,
) -> Any:
    """Forward of LongT5LocalAttention and LongT5TransientGlobalAttention.

    Returns:
        The output, and the bias of the neighborhood and of the sums in all blocks, which the next layers get.
    """
    if not isinstance(mask, Segments):
        return original_forward(hidden_BSW, mask=mask, position_bias=position_bias, **kwargs)
    sums = None
    if hasattr(module, "global_block_size"):
        sums = _plan_sums(mask.sources, module.global_block_size, module.block_len)
    if position_bias is None:
        position_bias = _compute_bias(module, mask, sums, hidden_BSW)
    if not trains_bias:
        position_bias = position_bias.detach()
    split_heads = partial(_split_heads, module)
    query, key, value = (split_heads(layer(hidden_BSW[0])) for layer in (module.q, module.k, module.v))
    query_NCHD = _split_into_blocks(query, module.block_len)
    keys, values = (_join_neighbors(_split_into_blocks(each, module.block_len)) for each in (key, value))
    scores = torch.einsum("nqhd,nkhd->nhqk", query_NCHD, keys)
    if sums is not None:
        sums_GW = module.global_input_layer_norm(sums.add_up(hidden_BSW[0]))
        index_NR = _to_torch(sums.index_NR, hidden_BSW.device)
        sum_keys_NRHD, sum_values_NRHD = (split_heads(layer(sums_GW))[index_NR] for layer in (module.k, module.v))
        scores = torch.cat([scores, torch.einsum("nqhd,nrhd->nhqr", query_NCHD, sum_keys_NRHD)], -1)
    scores = scores + position_bias
    weights = functional.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    weights = functional.dropout(weights.to(scores.dtype), module.dropout, module.training)
    near, far = weights[..., : keys.shape[1]], weights[..., keys.shape[1] :]
    attended_NCHD = torch.einsum("nhqk,nkhd->nqhd", near, values)
    if sums is not None:
        attended_NCHD = attended_NCHD + torch.einsum("nhqr,nrhd->nqhd", far, sum_values_NRHD)
    attended_SW = attended_NCHD.reshape(-1, module.inner_dim)[: hidden_BSW.shape[1]]
    return module.o(attended_SW)[None], position_bias


class _Sums:
    """Which tokens of a packed row are added up, from the beginning of each segment, and which sums a block sees.

    Args:
        sources: lengths of the segments.
        size: tokens of a sum; up to 2·size - 1 in a segment's last sum. A shorter segment has no sum.
        block_len: tokens of a block of the row.

    Attributes:
        sum_numbers_S: the number of a token's sum within its segment; -1 if the segment has no sum.
        index_NR: the sums that a block is compared with, filled up with G.
        sum_numbers_NR: their numbers within their segments.
        segments_NR: their segments, filled up with -1.
    """

    def __init__(self, sources: tuple[int, ...], size: int, block_len: int) -> None:
        lengths = np.array(sources)
        counts = lengths // size
        firsts = counts.cumsum() - counts
        segments_S = np.repeat(np.arange(len(lengths)), lengths)
        positions_S = np.concatenate([np.arange(length) for length in sources])
        self.sum_numbers_S = np.minimum(positions_S // size, counts[segments_S] - 1)
        segments_G = np.append(np.repeat(np.arange(len(counts)), counts), -1)
        self._count = len(segments_G)
        begins = np.arange(0, len(segments_S), block_len)
        first, last = segments_S[begins], segments_S[np.minimum(begins + block_len, len(segments_S)) - 1]
        width = int((firsts[last] + counts[last] - firsts[first]).max())
        self.index_NR = np.minimum(firsts[first][:, None] + np.arange(width), self._count - 1)
        self.segments_NR = segments_G[self.index_NR]
        self.sum_numbers_NR = self.index_NR - firsts[self.segments_NR]
        self._places_S = np.where(self.sum_numbers_S < 0, self._count - 1, firsts[segments_S] + self.sum_numbers_S)

    def add_up(self, hidden_SW: Tensor) -> Tensor:
        """Add up hidden states: [G + 1, W]. The last row isn't a sum: it gets the tokens of segments without a sum."""
        places_S = _to_torch(self._places_S, hidden_SW.device)
        return hidden_SW.new_zeros(self._count, hidden_SW.shape[1]).index_add(0, places_S, hidden_SW)


_plan_sums = lru_cache(2)(_Sums)  # for all layers; not tensors, since training can't use inference tensors


def _to_torch(array: npt.NDArray[np.int64], device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device)


def _compute_bias(module: Any, packing: Segments, sums: _Sums | None, hidden_BSW: Tensor) -> Tensor:
    """Compute the position bias with the mask, in the first layer: [N, H, C, 3C + R]."""
    device, dtype, size = hidden_BSW.device, hidden_BSW.dtype, module.block_len
    segments_S = _to_torch(np.repeat(np.arange(len(packing.sources)), packing.sources), device)
    segments_NC = _split_into_blocks(segments_S + 1, size)  # 0 where the last block is filled up
    distance_CK = torch.arange(3 * size, device=device) - size - torch.arange(size, device=device)[:, None]
    is_seen_NCK = (segments_NC[:, :, None] == _join_neighbors(segments_NC)[:, None]) & (distance_CK.abs() < size)
    mask_NCK = torch.where(is_seen_NCK, 0.0, MASKED).to(dtype)
    bias: Tensor = module.compute_bias(size)[0].to(dtype) + mask_NCK[:, None]
    if sums is None:
        return bias
    sum_numbers_NC = _split_into_blocks(_to_torch(sums.sum_numbers_S, device), size)
    segments_NR, sum_numbers_NR = (_to_torch(array, device) for array in (sums.segments_NR, sums.sum_numbers_NR))
    buckets_NCR = module._relative_position_bucket(
        sum_numbers_NR[:, None] - sum_numbers_NC[:, :, None],
        bidirectional=True,
        num_buckets=module.relative_attention_num_buckets,
        max_distance=module.relative_attention_max_distance,
    )
    is_own_NCR = segments_NC[:, :, None] == segments_NR[:, None] + 1
    mask_NCR = torch.where(is_own_NCR, 0.0, MASKED).to(dtype)
    side_NCRH = module.global_relative_attention_bias(buckets_NCR).to(dtype) + mask_NCR[..., None]
    return torch.cat([bias, side_NCRH.permute(0, 3, 1, 2)], -1)


def _split_heads(module: Any, states_SW: Tensor) -> Tensor:
    return states_SW.view(-1, module.n_heads, module.key_value_proj_dim)


def _split_into_blocks(values: Tensor, size: int) -> Tensor:
    """Reshape [S, …] -> [N, size, …], filled up with zeros."""
    missing = -len(values) % size
    filled = torch.cat([values, values.new_zeros(missing, *values.shape[1:])]) if missing else values
    return filled.view(-1, size, *values.shape[1:])


def _join_neighbors(blocks: Tensor) -> Tensor:
    """Join each block with its neighbors: [N, C, …] -> [N, 3C, …]; zeros beyond the ends."""
    empty = torch.zeros_like(blocks[:1])
    around = torch.cat([empty, blocks, empty])
    return torch.cat([around[:-2], around[1:-1], around[2:]], 1)
