"""Attention for packed rows: the examples of a batch are concatenated into one row, without padding.

    use_packing(model)
    model(input_ids=row_1S, decoder_input_ids=row_1T, packing=Segments(sources=(7, 4), targets=(3, 2)))

Each example attends only to itself: losses and gradients equal the padded batch's. Without the argument
`packing` the model computes as before, so evaluation and generation don't have to switch anything.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from t5tune.compat.transformers_patches import replace_forwards
from t5tune.model.attention import gemma as gemma_attention
from t5tune.model.attention import longt5 as longt5_attention
from t5tune.model.attention import t5 as t5_attention
from t5tune.model.attention.t5 import trains_position_bias

# transformers' class -> the forward for packed rows; forwards with a bias also get the argument `trains_bias`
BIASED_FORWARDS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("T5Attention", "MT5Attention", "UMT5Attention"), t5_attention.forward),
    "LongT5Attention": longt5_attention.forward_decoder,
    "LongT5LocalAttention": longt5_attention.forward_encoder,
    "LongT5TransientGlobalAttention": longt5_attention.forward_encoder,
}
FORWARDS: dict[str, Callable[..., Any]] = {
    **BIASED_FORWARDS,
    "T5GemmaSelfAttention": partial(gemma_attention.forward_self, gemma_attention.T5GEMMA),
    "T5GemmaCrossAttention": partial(gemma_attention.forward_cross, gemma_attention.T5GEMMA),
    "T5Gemma2SelfAttention": partial(gemma_attention.forward_self, gemma_attention.T5GEMMA_2),
    "T5Gemma2MergedAttention": partial(gemma_attention.forward_merged, gemma_attention.T5GEMMA_2),
}


def can_pack(model: Any) -> bool:
    """Whether packing supports all attention layers of the model."""
    kinds = {type(module).__name__ for module in model.modules() if type(module).__name__.endswith("Attention")}
    return bool(kinds) and {kind for kind in kinds if "Layer" not in kind} <= FORWARDS.keys()


def use_packing(model: Any) -> None:
    """Make the attention layers of a model, with or without adapters, accept the argument `packing`.

    Call it after `requires_grad` is set on all parameters.
    """
    trains_bias = trains_position_bias(model)
    biased = {name: partial(forward, trains_bias) for name, forward in BIASED_FORWARDS.items()}
    replace_forwards(model, FORWARDS | biased)


def switch_off_dropout(model: nn.Module) -> None:
    """Set the dropout of hidden states and adapters to 0, but not the dropout of attention's probabilities."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def switch_off_attention_dropout(model: Any) -> None:
    """Set the dropout of attention's probabilities to 0, but not the dropout of hidden states."""
    for module in model.modules():
        if type(module).__name__ in FORWARDS:
            setattr(module, "attention_dropout" if hasattr(module, "attention_dropout") else "dropout", 0.0)
