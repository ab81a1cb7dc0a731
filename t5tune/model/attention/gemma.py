"""Attention of T5Gemma and T5Gemma 2: over packed rows by a loop over the segments, and with T5Gemma's soft cap.

    register_soft_capped_attention()  # then transformers can use it for padded batches and generation

Queries and keys are rotated by their positions, which start again in each segment. Keys of the encoder aren't rotated.
Layers that don't see the whole text have the windows of transformers' mask functions.

B batch (1 if packed), Q query tokens, K key tokens, H heads, G heads of keys and values, D head width.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from t5tune.compat.transformers_patches import register_attention
from t5tune.families.t5gemma import SOFT_CAPPED_ATTENTION
from t5tune.model.attention.segments import Segments

SLIDING = "sliding_attention"
Forward = Callable[..., Any]
MaskFunction = Callable[[int, int, Tensor, Tensor], Tensor]


class Kind(NamedTuple):
    """Differences between the attention of T5Gemma and T5Gemma 2.

    Args:
        normalizes: whether queries and keys are normalized.
        caps: whether scores are capped softly. T5Gemma 2 has the setting, but doesn't use it.
        make_window: makes the encoder's mask function for a window.
    """

    normalizes: bool
    caps: bool
    make_window: Callable[[int], MaskFunction]


def _make_window(window: int) -> MaskFunction:
    """A token sees `window` tokens on each side."""
    from transformers.masking_utils import sliding_window_bidirectional_mask_function

    return sliding_window_bidirectional_mask_function(window)  # type: ignore[no-any-return]


def _make_window_of_both_sides(window: int) -> MaskFunction:
    """A token sees `window` tokens on both sides together."""
    from transformers.models.t5gemma2.modeling_t5gemma2 import sliding_window_mask_function

    return sliding_window_mask_function(window, is_causal=False)  # type: ignore[no-any-return]


T5GEMMA = Kind(normalizes=False, caps=True, make_window=_make_window)
T5GEMMA_2 = Kind(normalizes=True, caps=False, make_window=_make_window_of_both_sides)


def forward_self(
    kind: Kind, module: Any, original_forward: Forward, *args: Any, packing: Segments | None = None, **kwargs: Any
) -> Any:
    """Forward of self-attention in either encoder, and in T5Gemma's decoder."""
    if packing is None:
        return original_forward(*args, **kwargs)
    hidden_BQ, is_decoder = kwargs["hidden_states"], bool(module.is_causal)
    lengths = packing.targets if is_decoder else packing.sources
    see = _choose_mask_function(kind, module, is_decoder)
    masks = {} if see is None else {length: _make_mask(see, length, hidden_BQ.device) for length in set(lengths)}
    states = _project_and_rotate(kind, module, hidden_BQ, kwargs["position_embeddings"])
    segments = zip(*_split(lengths, *states), map(masks.get, lengths), strict=True)
    return _attend_to_segments(kind, module, segments), None


def forward_cross(
    kind: Kind, module: Any, original_forward: Forward, *args: Any, packing: Segments | None = None, **kwargs: Any
) -> Any:
    """Forward of T5Gemma's cross-attention."""
    if packing is None:
        return original_forward(*args, **kwargs)
    hidden_BQ, memory_BK = kwargs["hidden_states"], kwargs["encoder_hidden_states"]
    inputs = (module.q_proj, hidden_BQ), (module.k_proj, memory_BK), (module.v_proj, memory_BK)
    query, key, value = (_split_heads(module, layer(states)) for layer, states in inputs)
    masks = [None] * len(packing.sources)
    segments = zip(*_split(packing.targets_by_source, query), *_split(packing.sources, key, value), masks, strict=True)
    return _attend_to_segments(kind, module, segments), None


def forward_merged(
    kind: Kind, module: Any, original_forward: Forward, *args: Any, packing: Segments | None = None, **kwargs: Any
) -> Any:
    """Forward of T5Gemma 2's decoder layers, which attend to the decoder's keys and to the encoder's at once."""
    if packing is None:
        return original_forward(*args, **kwargs)
    hidden_BQ, memory_BK = kwargs["hidden_states"], kwargs["encoder_hidden_states"]
    states = _project_and_rotate(kind, module, hidden_BQ, kwargs["position_embeddings"])
    memory_key = module.k_norm(_split_heads(module, module.k_proj(memory_BK)))
    memory = memory_key, _split_heads(module, module.v_proj(memory_BK))
    see = _choose_mask_function(kind, module, is_decoder=True)
    assert see is not None, "a decoder doesn't see later tokens"
    lengths = list(zip(packing.repeat_for_targets(packing.sources), packing.targets, strict=True))
    masks = {
        (source, target): functional.pad(_make_mask(see, target, hidden_BQ.device), (0, source), value=True)
        for source, target in set(lengths)
    }
    targets = zip(*_split(packing.targets, *states), strict=True)
    sources = zip(*map(packing.repeat_for_targets, _split(packing.sources, *memory)), strict=True)
    segments = (  # a generator, so that without gradients only one segment's joined keys and values are in memory
        (query, torch.cat([key, source_key], 2), torch.cat([value, source_value], 2), masks[each])
        for (query, key, value), (source_key, source_value), each in zip(targets, sources, lengths, strict=True)
    )
    return _attend_to_segments(kind, module, segments), None, None


def _choose_mask_function(kind: Kind, module: Any, is_decoder: bool) -> MaskFunction | None:
    """Choose transformers' function of (batch, head, query, key) for a layer; None: all tokens see each other."""
    from transformers import masking_utils

    window = module.sliding_window if module.layer_type == SLIDING else None
    if is_decoder:
        if window is None:
            return masking_utils.causal_mask_function  # type: ignore[no-any-return]
        return masking_utils.sliding_window_causal_mask_function(window)  # type: ignore[no-any-return]
    return None if window is None else kind.make_window(window)


def _make_mask(see: MaskFunction, length: int, device: torch.device) -> Tensor:
    """Make the mask of a segment, [length, length], true where a query sees a key."""
    positions = torch.arange(length, device=device)
    return see(0, 0, positions[:, None], positions).expand(length, length)


def _project_and_rotate(kind: Kind, module: Any, hidden_BQ: Tensor, rotation: Any) -> tuple[Tensor, ...]:
    """Compute queries, keys and values. T5Gemma 2 normalizes queries and keys before rotating them."""
    from transformers.models.t5gemma.modeling_t5gemma import apply_rotary_pos_emb

    query, key, value = (
        _split_heads(module, layer(hidden_BQ)) for layer in (module.q_proj, module.k_proj, module.v_proj)
    )
    if kind.normalizes:
        query, key = module.q_norm(query), module.k_norm(key)
    query, key = apply_rotary_pos_emb(query, key, *rotation)
    return query, key, value


def _split_heads(module: Any, states_B: Tensor) -> Tensor:
    """Reshape [B, Q, H·D] -> [B, H, Q, D]."""
    return states_B.view(*states_B.shape[:2], -1, module.head_dim).transpose(1, 2)


def _split(lengths: tuple[int, ...], *states_BHQD: Tensor) -> list[tuple[Tensor, ...]]:
    return [torch.split(state, list(lengths), 2) for state in states_BHQD]


def _attend_to_segments(kind: Kind, module: Any, segments: Iterable[tuple[Any, ...]]) -> Tensor:
    """Attend within each segment (its queries, keys, values and mask), and project the row's output."""
    dropout = module.attention_dropout if module.training else 0.0
    cap = module.attn_logit_softcapping if kind.caps else None
    attended = [attend(q, k, v, mask_QK, module.scaling, cap, dropout) for q, k, v, mask_QK in segments]
    output: Tensor = module.o_proj(torch.cat(attended, 1).flatten(2))
    return output


def attend(
    query_BHQD: Tensor,
    key_BGKD: Tensor,
    value_BGKD: Tensor,
    mask: Tensor | None,
    scale: float,
    cap: float | None,
    dropout: float,
) -> Tensor:
    """Attend with softly capped scores, cap · tanh(score / cap), as Gemma 2 does.

    Args:
        mask: true where a query sees a key; it can be broadcast to [B, H, Q, K]. A query that sees no key, such as a
            pad token whose window contains only pad tokens, has a finite output, on which no other token depends.
        cap: None: scores aren't capped.

    Returns:
        [B, Q, H, D]
    """
    groups = query_BHQD.shape[1] // key_BGKD.shape[1]
    # with a mask and fewer heads of keys, torch has only its slowest kernel on a GPU
    is_grouped = groups > 1 and cap is None and mask is None
    if groups > 1 and not is_grouped:
        key_BGKD, value_BGKD = (state.repeat_interleave(groups, 1) for state in (key_BGKD, value_BGKD))
    if cap is None:
        attended_BHQD = functional.scaled_dot_product_attention(
            query_BHQD, key_BGKD, value_BGKD, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=is_grouped
        )
        return attended_BHQD.transpose(1, 2)
    scores = torch.tanh(query_BHQD @ key_BGKD.mT * (scale / cap)) * cap
    if mask is not None:
        # not -inf, which would turn a fully masked row into NaN
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = functional.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    weights = functional.dropout(weights.to(value_BGKD.dtype), dropout)
    return (weights @ value_BGKD).transpose(1, 2)


def register_soft_capped_attention() -> None:
    """Make transformers compute `attend` in models with attn_implementation SOFT_CAPPED_ATTENTION.

    transformers' eager attention turns a fully masked row into NaN in fp64, and its sdpa has no soft cap.
    """
    register_attention(SOFT_CAPPED_ATTENTION, _attend_in_transformers)


def _attend_in_transformers(
    module: Any, query: Any, key: Any, value: Any, mask: Any, dropout: float = 0.0, softcap: Any = None, **_: Any
) -> tuple[Tensor, None]:
    return attend(query, key, value, mask, module.scaling, softcap, dropout), None
