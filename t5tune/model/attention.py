"""Attention for packed rows: the examples of a batch lie behind each other in one row, and no token is padding.

    use_packing(model)
    model(input_ids=row_1S, decoder_input_ids=row_1T, packing=Segments(sources=(7, 4), targets=(3, 2)))

T5's position bias depends on the distance of two tokens alone, so each example can be attended to where it lies, as if
it were alone: losses and gradients are those of the padded batch. Without `packing` the model computes as before, so
evaluation and generation need nothing switched.

B batch (1 where packed), Q query and K key tokens, H heads, D width of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from t5tune.families import FAMILIES

PACKABLE = {family.attention_layer for family in FAMILIES.values()}


@dataclass(frozen=True)
class Segments:
    """The examples of a packed row, in order: tokens of each one's source, and of its target."""

    sources: tuple[int, ...]
    targets: tuple[int, ...]


def can_pack(model: Any) -> bool:
    """Whether all attention of the model is of the kind that packing knows."""
    kinds = {type(module).__name__ for module in model.modules() if type(module).__name__.endswith("Attention")}
    attention = {kind for kind in kinds if "Layer" not in kind}
    return bool(attention) and attention <= PACKABLE


def use_packing(model: Any) -> None:
    """Let a T5, mT5 or umT5, adapted or not, take `packing` beside its inputs. Say before what of it trains."""
    trains_bias = any(
        parameter.requires_grad for name, parameter in model.named_parameters() if "relative_attention_bias" in name
    )
    for module in model.modules():
        if type(module).__name__ in PACKABLE:
            module.forward = partial(_forward, module, module.forward, trains_bias)


def _forward(
    module: Any,
    stock: Callable[..., Any],
    trains_bias: bool,
    hidden_BQ: torch.Tensor,
    *args: Any,
    packing: Segments | None = None,
    **kwargs: Any,
) -> Any:
    """An attention layer's forward; T5 and mT5 hand block 0's position bias on, umT5 has one in each block."""
    if packing is None:
        return stock(hidden_BQ, *args, **kwargs)
    memory_BK = kwargs.get("key_value_states", kwargs.get("encoder_hidden_states"))
    queries = packing.targets if module.is_decoder else packing.sources
    keys = queries if memory_BK is None else packing.sources
    bias_1HQK = kwargs.get("position_bias")
    if bias_1HQK is None and module.has_relative_attention_bias:
        bias_1HQK = _position_bias(module, max(queries))
    if bias_1HQK is not None and not trains_bias:
        # reentrant checkpointing marks what a block returns as trained, and the fast kernels can't have that
        bias_1HQK = bias_1HQK.detach()
    source_BK = hidden_BQ if memory_BK is None else memory_BK
    attended_BQHD = segment_attention(
        _heads(module, module.q(hidden_BQ)),
        _heads(module, module.k(source_BK)),
        _heads(module, module.v(source_BK)),
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
    """Attend segment by segment; a segment's bias is the corner of the longest one's.

    This is the one place that knows how: a fused kernel for GPUs with the same arguments belongs beside it.

    Returns: [B, Q, H, D]
    """
    attended = []
    for query, key, value in zip(
        torch.split(query_BHQD, queries, 2),
        torch.split(key_BHKD, keys, 2),
        torch.split(value_BHKD, keys, 2),
        strict=True,
    ):
        bias = None if bias_1HQK is None else bias_1HQK[:, :, : query.shape[2], : key.shape[2]]
        # T5 does not scale the scores: its initialisation took the root of D in
        output = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, dropout_p=dropout, scale=1.0
        )
        attended.append(output.transpose(1, 2))
    return torch.cat(attended, 1)


def _position_bias(module: Any, length: int) -> torch.Tensor:
    """The bias of a segment of `length` tokens, in a decoder with what lies ahead masked."""
    bias_1HQK: torch.Tensor = module.compute_bias(length, length)
    if module.is_decoder:
        is_ahead_QK = torch.ones(length, length, dtype=torch.bool, device=bias_1HQK.device).triu(1)
        bias_1HQK = bias_1HQK.masked_fill(is_ahead_QK, torch.finfo(bias_1HQK.dtype).min)
    return bias_1HQK.contiguous()


def _heads(module: Any, states_B: torch.Tensor) -> torch.Tensor:
    """[B, Q, H·D] -> [B, H, Q, D]"""
    return states_B.view(*states_B.shape[:2], module.n_heads, module.key_value_proj_dim).transpose(1, 2)
