"""Attention for packed rows: the examples of a batch are concatenated into one row, without padding.

    use_packing(model)
    model(input_ids=row_1S, decoder_input_ids=row_1T, packing=Segments(sources=(7, 4), targets=(3, 2)))

T5's position bias depends only on the distance between two tokens, so each example can attend to itself at any offset
of the row: losses and gradients equal those of the padded batch. Without the argument `packing` the model computes as
before, so evaluation and generation don't have to switch anything.

B batch (1 if packed), Q query tokens, K key tokens, H heads, D head width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from t5tune.compat.transformers_patches import replace_forward
from t5tune.families import FAMILIES

PACKABLE_ATTENTION = tuple({family.attention_layer for family in FAMILIES.values()})


@dataclass(frozen=True)
class Segments:
    """Lengths of the examples in a packed row, in order, in tokens: of their sources, and of their targets."""

    sources: tuple[int, ...]
    targets: tuple[int, ...]


def can_pack(model: Any) -> bool:
    """Whether packing supports every attention layer of the model."""
    kinds = {type(module).__name__ for module in model.modules() if type(module).__name__.endswith("Attention")}
    attention = {kind for kind in kinds if "Layer" not in kind}
    return bool(attention) and attention <= set(PACKABLE_ATTENTION)


def use_packing(model: Any) -> None:
    """Make the attention layers of a T5, mT5 or umT5, with or without adapters, accept the argument `packing`.

    Call it after `requires_grad` is set on all parameters.
    """
    trains_bias = any(
        parameter.requires_grad for name, parameter in model.named_parameters() if "relative_attention_bias" in name
    )
    replace_forward(model, PACKABLE_ATTENTION, partial(_forward, trains_bias))


def _forward(
    trains_bias: bool,
    module: Any,
    original_forward: Callable[..., Any],
    hidden_BQ: torch.Tensor,
    *args: Any,
    packing: Segments | None = None,
    **kwargs: Any,
) -> Any:
    """Forward of an attention layer. T5 and mT5 pass on the position bias of block 0, umT5 has one in each block."""
    if packing is None:
        return original_forward(hidden_BQ, *args, **kwargs)
    memory_BK = kwargs.get("key_value_states", kwargs.get("encoder_hidden_states"))
    queries = packing.targets if module.is_decoder else packing.sources
    keys = queries if memory_BK is None else packing.sources
    bias_1HQK = kwargs.get("position_bias")
    if bias_1HQK is None and module.has_relative_attention_bias:
        bias_1HQK = _compute_position_bias(module, max(queries))
    if bias_1HQK is not None and not trains_bias:
        # reentrant checkpointing sets requires_grad on all outputs of a block; with a mask that requires a gradient,
        # torch would not choose the fused attention kernels
        bias_1HQK = bias_1HQK.detach()
    source_BK = hidden_BQ if memory_BK is None else memory_BK
    attended_BQHD = segment_attention(
        _split_heads(module, module.q(hidden_BQ)),
        _split_heads(module, module.k(source_BK)),
        _split_heads(module, module.v(source_BK)),
        list(queries),
        list(keys),
        bias_1HQK,
        module.dropout if module.training else 0.0,
    )
    output_BQ = module.o(attended_BQHD.flatten(2))
    return (output_BQ, bias_1HQK, None) if "position_bias" in kwargs else (output_BQ, None)


def segment_attention(
    query_BHQD: torch.Tensor,
    key_BHKD: torch.Tensor,
    value_BHKD: torch.Tensor,
    queries: list[int],
    keys: list[int],
    bias_1HQK: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """Attend within each segment. The bias is that of the longest segment; shorter ones take its upper left corner.

    To use a variable-length kernel on GPUs, only this function has to change.

    Args:
        queries, keys: lengths of the segments, in tokens.

    Returns:
        [B, Q, H, D]
    """
    attended = []
    for query, key, value in zip(
        torch.split(query_BHQD, queries, 2),
        torch.split(key_BHKD, keys, 2),
        torch.split(value_BHKD, keys, 2),
        strict=True,
    ):
        bias = None if bias_1HQK is None else bias_1HQK[:, :, : query.shape[2], : key.shape[2]]
        # T5 doesn't scale the scores by 1/√D: its initialization of q includes that factor
        output = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, dropout_p=dropout, scale=1.0
        )
        attended.append(output.transpose(1, 2))
    return torch.cat(attended, 1)


def _compute_position_bias(module: Any, length: int) -> torch.Tensor:
    """Compute the position bias of a segment of `length` tokens; in a decoder, future tokens are masked."""
    bias_1HQK: torch.Tensor = module.compute_bias(length, length)
    if module.is_decoder:
        is_ahead_QK = torch.ones(length, length, dtype=torch.bool, device=bias_1HQK.device).triu(1)
        bias_1HQK = bias_1HQK.masked_fill(is_ahead_QK, torch.finfo(bias_1HQK.dtype).min)
    return bias_1HQK.contiguous()


def _split_heads(module: Any, states_B: torch.Tensor) -> torch.Tensor:
    """Reshape [B, Q, H·D] -> [B, H, Q, D]."""
    return states_B.view(*states_B.shape[:2], module.n_heads, module.key_value_proj_dim).transpose(1, 2)
