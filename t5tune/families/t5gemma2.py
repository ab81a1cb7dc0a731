"""T5Gemma 2 (Zhang et al. 2025): an encoder and a decoder of Gemma 3's layers, with a vision tower that is only copied.

One embedding serves the encoder, the decoder and the head. A decoder layer attends to the decoder's keys and to the
encoder's at once, with the same weights. Every sixth layer sees the whole text, all other layers a window.
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from t5tune.errors import CheckpointError
from t5tune.families.architecture import Shapes
from t5tune.families.t5gemma import T5Gemma

# In the files, the text's modules are next to the vision tower. `save_pretrained` of some releases writes the model's
# own names.
_TEXT_MODULE = re.compile(r"^(model\.encoder\.)(?=(embed_tokens|norm|layers)\.)")


class T5Gemma2(T5Gemma):
    """T5Gemma 2, for text."""

    model_type = "t5gemma2"
    encoder = "model.encoder.text_model"
    tied_to = f"{encoder}.embed_tokens.weight"
    always_shared: ClassVar[Mapping[str, str]] = {
        f"{T5Gemma.decoder}.embed_tokens.weight": f"{encoder}.embed_tokens.weight",
        f"{T5Gemma.decoder}.embed_tokens.eoi_embedding": f"{encoder}.embed_tokens.eoi_embedding",
    }
    block_classes = ("T5Gemma2EncoderLayer", "T5Gemma2DecoderLayer")
    skipped_modules = ("model.encoder.vision_tower", "model.encoder.multi_modal_projector")
    attention_implementation = "sdpa"
    trainable_modules = (
        *(name for name in T5Gemma.trainable_modules if name.endswith("_layernorm") and "cross" not in name),
        "q_norm",
        "k_norm",
        f"{encoder}.norm",
        f"{T5Gemma.decoder}.norm",
    )
    default_logit_cap: ClassVar[float | None] = None

    def list_shared(self, tied: bool) -> dict[str, str]:
        if not tied:  # then transformers doesn't share the embeddings either
            problem = "the base's head isn't tied, and t5tune trains T5Gemma 2 only with a tied head"
            raise CheckpointError(problem, hint="give a checkpoint without lm_head.out_proj.weight")
        return super().list_shared(tied)

    def to_model_name(self, file_name: str) -> str:
        return _TEXT_MODULE.sub(r"\1text_model.", file_name)

    def restrict_target_modules(self, layers: list[str]) -> list[str] | str:
        # the vision tower's layers have the same names
        stacks = "|".join(stack.removeprefix("model.").replace(".", r"\.") for stack in (self.encoder, self.decoder))
        return rf".*\.({stacks})\.layers\.\d+\.\w+\.({'|'.join(layers)})"

    @property
    def _stacks(self) -> dict[str, Mapping[str, Any]]:
        return {self.encoder: self._read_part("encoder", "text_config"), self.decoder: self._read_part("decoder")}

    def derive_shapes(self) -> Shapes:
        shapes = super().derive_shapes()
        for stack, config in self._stacks.items():
            shapes[f"{stack}.embed_tokens.eoi_embedding"] = (self.read_size(config, "hidden_size"),)
        return shapes

    def _derive_layer(self, config: Mapping[str, Any], width: int, encoder_width: int | None) -> Shapes:
        head_width = self.read_size(config, "head_dim")
        norms: Shapes = {f"self_attn.{name}": (head_width,) for name in ("q_norm", "k_norm")}
        return super()._derive_layer(config, width, None) | norms
