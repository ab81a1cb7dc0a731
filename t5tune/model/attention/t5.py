"""Attention of T5 and its siblings over packed rows.

T5's position bias depends only on the distance between two tokens, so each example can attend to itself at any offset
of the row.

On a GPU, one kernel attends to all segments (flex_attention.py), if the collator divided the rows for it. Otherwise a
loop attends to one segment after the other.

B batch (1 if packed), Q query tokens, K key tokens, H heads, D head width, R entries of a bias table.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from t5tune.model.attention.segments import Segments, segment_attention
from t5tune.model.kernels.flex_attention import attend as flex_attend

BIAS_ALIGNMENT = 8  # elements


def forward(
    trains_bias: bool,
    module: Any,
    original_forward: Callable[..., Any],
    hidden_BQ: Tensor,
    *args: Any,
    packing: Segments | None = None,
    **kwargs: Any,
) -> Any:
    """Forward of an attention layer. T5 and mT5 pass on the position bias of block 0, umT5 has one in each block."""
    if packing is None:
        return original_forward(hidden_BQ, *args, **kwargs)
    memory_BK = kwargs.get("key_value_states", kwargs.get("encoder_hidden_states"))
    bias = kwargs.get("position_bias")
    if bias is None and module.has_relative_attention_bias:
        bias = _compute_bias(module, packing)
    if bias is not None and not trains_bias:
        # reentrant checkpointing sets requires_grad on all outputs of a block; with a mask that requires a gradient,
        # torch would not choose the fused attention kernels
        bias = bias.detach()
    source_BK = hidden_BQ if memory_BK is None else memory_BK
    states = module.q(hidden_BQ), module.k(source_BK), module.v(source_BK)
    query_BHQD, key_BHKD, value_BHKD = (_split_heads(module, states_B) for states_B in states)
    dropout = module.dropout if module.training else 0.0
    if packing.rows is not None:
        kind = "cross" if memory_BK is not None else "decoder" if module.is_decoder else "encoder"
        blocks = packing.rows.blocks[kind]
        attended_BQHD = flex_attend(query_BHQD, key_BHKD, value_BHKD, blocks, bias, kind == "decoder", dropout)
    else:
        keys = packing.targets if module.is_decoder and memory_BK is None else packing.sources
        queries = keys if memory_BK is None else packing.targets_by_source  # a query's place has no effect there
        attended_BQHD = segment_attention(query_BHQD, key_BHKD, value_BHKD, list(queries), list(keys), bias, dropout)
    output_BQ = module.o(attended_BQHD.flatten(2))
    return (output_BQ, bias, None) if "position_bias" in kwargs else (output_BQ, None)


def trains_position_bias(model: Any) -> bool:
    return any(value.requires_grad for name, value in model.named_parameters() if "relative_attention_bias" in name)


def _compute_bias(module: Any, packing: Segments) -> Tensor:
    """Compute the position bias, once for all layers: a table for the kernel [H, R], or a matrix for the loop."""
    if packing.rows is not None:
        distance = module.relative_attention_max_distance
        table_1H1R: Tensor = module.compute_bias(1, 2 * distance + 1, past_seen_tokens=distance)
        return table_1H1R[0, :, 0].to(torch.promote_types(table_1H1R.dtype, torch.float32)).contiguous()
    length = max(packing.targets if module.is_decoder else packing.sources)
    # torch's memory-efficient kernel on GPUs copies a bias whose rows aren't aligned, for each segment in each layer
    width = -(-length // BIAS_ALIGNMENT) * BIAS_ALIGNMENT
    bias_1HQK: Tensor = module.compute_bias(length, width)
    if module.is_decoder:
        is_ahead_QK = torch.ones(length, width, dtype=torch.bool, device=bias_1HQK.device).triu(1)
        bias_1HQK = bias_1HQK.masked_fill(is_ahead_QK, torch.finfo(bias_1HQK.dtype).min)
    return bias_1HQK.contiguous()[..., :length]


def _split_heads(module: Any, states_B: Tensor) -> Tensor:
    """Reshape [B, Q, H·D] -> [B, H, Q, D]."""
    return states_B.view(*states_B.shape[:2], module.n_heads, module.key_value_proj_dim).transpose(1, 2)
