"""LongT5 (Guo et al. 2022): T5 with an encoder whose tokens attend to their neighborhood, and to sums of 16 tokens."""

from typing import Any

from t5tune.families.architecture import Shapes
from t5tune.families.t5 import T5

TRANSIENT_GLOBAL = "transient-global"


class LongT5(T5):
    """`tie_word_embeddings: false` in its config.json means only that logits aren't divided by √d_model.

    The published files contain no head, so it is tied. transformers 5 reads the flag the same way.
    """

    model_type = "longt5"
    block_classes = ("LongT5Block",)
    attention_implementation = "eager"
    has_flex_attention = False
    accepts_4d_masks = False
    trainable_modules = (*T5.trainable_modules, "global_relative_attention_bias", "global_input_layer_norm")

    @classmethod
    def set_tied(cls, config: dict[str, Any], tied: bool) -> None:
        """Leave config.json as it is."""

    @property
    def is_tied(self) -> bool:
        return True

    @property
    def _is_global(self) -> bool:
        return bool(self.config.get("encoder_attention_type", "local") == TRANSIENT_GLOBAL)

    def _name_self_attention(self, stack: str) -> str:
        if stack == "decoder":
            return "SelfAttention"
        return "TransientGlobalSelfAttention" if self._is_global else "LocalSelfAttention"

    def _derive_attention_layers(self, stack: str, block: int, width: int, inner: int, heads: int) -> list[Shapes]:
        layers = super()._derive_attention_layers(stack, block, width, inner, heads)
        if stack == "encoder" and self._is_global:
            attention = self._name_self_attention(stack)
            bias = layers[0].get(f"{attention}.relative_attention_bias")
            if bias is not None:
                layers[0][f"{attention}.global_relative_attention_bias"] = bias
            layers[0][f"{attention}.global_input_layer_norm"] = (width,)
        return layers

    def compute_hidden_states(
        self, model: Any, input_ids: Any, decoder_input_ids: Any, attention_mask: Any = None, packing: Any = None
    ) -> Any:
        if packing is None:
            return super().compute_hidden_states(model, input_ids, decoder_input_ids, attention_mask)
        encoded_BSD = _run_packed(model.encoder, input_ids, packing, None)
        return self._scale(model, _run_packed(model.decoder, decoder_input_ids, packing, encoded_BSD))


def _run_packed(stack: Any, ids: Any, packing: Any, encoded_BSD: Any) -> Any:
    """Run an encoder or decoder on a packed row, with the segments in place of the mask (model/attention/longt5.py).

    transformers' loop over the blocks doesn't pass on other arguments.
    """
    hidden = stack.dropout(stack.embed_tokens(ids))
    bias = None
    for block in stack.block:
        hidden, bias = block(hidden, packing, bias, encoded_BSD, packing, use_cache=False)[:2]
    return stack.dropout(stack.final_layer_norm(hidden))
