"""T5Gemma (Zhang et al. 2025): an encoder and a decoder of Gemma 2's layers, of the same or of different sizes.

Encoder and decoder have separate embeddings, and the head is tied to the decoder's. Attention is soft-capped, and so
are the logits. The layers of both alternate between a window of the neighborhood and the whole text. Queries and keys
of self-attention are rotated by their positions, which in a packed row start again in each segment.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from t5tune.errors import CheckpointError, ModelError
from t5tune.families.architecture import (
    MAX_LAYERS,
    Architecture,
    Dimensions,
    Shapes,
    get_layer_name,
    repeat_for_targets,
)
from t5tune.formatting import shorten

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD_OUTPUT = "down_proj"  # T5's `wo`
FEED_FORWARD = ("gate_proj", "up_proj", FEED_FORWARD_OUTPUT)
MOVING_ROPES = ("dynamic", "longrope")  # their frequencies follow the longest text of a call
SOFT_CAPPED_ATTENTION = "t5tune_soft_capped"  # see model/attention/gemma.py: transformers' sdpa has no soft cap
NORMED = ("self_attn", "cross_attn", "feedforward")


class T5Gemma(Architecture):
    """T5Gemma (Zhang et al. 2025).

    Attributes:
        encoder, decoder: paths of the modules with the layers.
        default_logit_cap: the final soft cap if config.json doesn't set it.
    """

    model_type = "t5gemma"
    encoder: ClassVar[str] = "model.encoder"
    decoder: ClassVar[str] = "model.decoder"
    head = "lm_head.out_proj"
    tied_to = f"{decoder}.embed_tokens.weight"
    block_classes = ("T5GemmaEncoderLayer", "T5GemmaDecoderLayer")
    encoder_module = "model.encoder"
    attention_implementation = SOFT_CAPPED_ATTENTION
    accepts_4d_masks = False
    linear_layers: ClassVar[Mapping[str, tuple[str, ...]]] = {
        # T5's names for the default, q and v
        **{name[0]: (name,) for name in ATTENTION},
        "attention": ATTENTION,
        "feed-forward": FEED_FORWARD,
        "all-linear": (*ATTENTION, *FEED_FORWARD),
    }
    trainable_modules: ClassVar[tuple[str, ...]] = (
        *(f"{place}_{part}_layernorm" for part in NORMED for place in ("pre", "post")),
        f"{encoder}.norm",
        f"{decoder}.norm",
    )
    default_logit_cap: ClassVar[float | None] = 30.0

    def __init__(self, config: Mapping[str, Any]) -> None:
        """
        Raises:
            ModelError: config.json asks for a feature that packing or quantization can't handle, and that no published
                checkpoint has.
        """
        super().__init__(config)
        for part in self._stacks.values():
            if part.get("attention_bias"):
                raise ModelError(
                    "the base's config.json: attention_bias: true: projections with biases can't be trained",
                    hint="no published checkpoint has them: is this a T5Gemma?",
                )
            rope = part.get("rope_parameters") or part.get("rope_scaling") or {}
            for parameters in (rope, *(rope.values() if isinstance(rope, dict) else ())):
                kind = parameters.get("rope_type") if isinstance(parameters, dict) else None
                if kind in MOVING_ROPES:
                    problem = f"the base's config.json: rope_type: {kind}: it depends on other texts in a batch"
                    raise ModelError(problem, hint="only types whose frequencies are fixed can be packed and padded")

    @classmethod
    def set_tied(cls, config: dict[str, Any], tied: bool) -> None:
        """Write the flag only if the file contradicts `tied`; without the flag, the head is tied."""
        if config.get("tie_word_embeddings", True) != tied:
            config["tie_word_embeddings"] = tied

    @property
    def _stacks(self) -> dict[str, Mapping[str, Any]]:
        """The parts of config.json by the paths of their modules."""
        return {self.encoder: self._read_part("encoder"), self.decoder: self._read_part("decoder")}

    def _read_part(self, *keys: str) -> Mapping[str, Any]:
        part: Mapping[str, Any] = self.config
        for count, key in enumerate(keys, 1):
            part = part.get(key, {})
            if not isinstance(part, dict):
                location = ".".join(keys[:count])
                raise CheckpointError(f"the base's config.json: {location}: {shorten(str(part))}: expected an object")
        return part

    @property
    def start_token_id(self) -> int:
        return self.read_id(self._stacks[self.decoder], "bos_token_id", default=2)

    @property
    def dimensions(self) -> Dimensions:
        encoder, decoder = self._stacks.values()
        return Dimensions(
            num_rows=self.read_size(decoder, "vocab_size"),
            num_heads=self.read_size(encoder, "num_attention_heads"),
            num_decoder_layers=self.read_size(decoder, "num_hidden_layers", MAX_LAYERS),
            cache_width=self.read_size(decoder, "num_key_value_heads") * self.read_size(decoder, "head_dim"),
        )

    @property
    def logit_cap(self) -> float | None:
        cap: float | None = self._stacks[self.decoder].get("final_logit_softcapping", self.default_logit_cap)
        return cap

    def derive_shapes(self) -> Shapes:
        shapes: Shapes = {}
        encoder_width = self.read_size(self._stacks[self.encoder], "hidden_size")
        for stack, config in self._stacks.items():
            width, rows = self.read_size(config, "hidden_size"), self.read_size(config, "vocab_size")
            shapes |= {f"{stack}.embed_tokens.weight": (rows, width), f"{stack}.norm.weight": (width,)}
            layer = self._derive_layer(config, width, encoder_width if stack == self.decoder else None)
            for number in range(self.read_size(config, "num_hidden_layers", MAX_LAYERS)):
                shapes |= {f"{stack}.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
        shapes[self.head_weight] = shapes[self.tied_to]
        return shapes

    def _derive_layer(self, config: Mapping[str, Any], width: int, encoder_width: int | None) -> Shapes:
        """`encoder_width` is the width of the cross-attention's input; None for a layer without cross-attention."""
        inner = self.read_size(config, "intermediate_size")
        layer: Shapes = {}
        memory_widths = {"self_attn": width} | ({} if encoder_width is None else {"cross_attn": encoder_width})
        for name, memory_width in memory_widths.items():
            layer |= self._derive_attention(name, config, width, memory_width)
        layer |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
        normed = (*memory_widths, "feedforward")
        return layer | {f"{place}_{part}_layernorm": (width,) for part in normed for place in ("pre", "post")}

    def _derive_attention(self, name: str, config: Mapping[str, Any], width: int, memory_width: int) -> Shapes:
        head_width = self.read_size(config, "head_dim")
        queries = self.read_size(config, "num_attention_heads") * head_width
        keys = self.read_size(config, "num_key_value_heads") * head_width
        return {
            f"{name}.q_proj": (queries, width),
            f"{name}.k_proj": (keys, memory_width),
            f"{name}.v_proj": (keys, memory_width),
            f"{name}.o_proj": (width, queries),
        }

    def is_quantizable(self, name: str, quantize_wo: bool) -> bool:
        layer = get_layer_name(name)
        in_text = any(f"{stack}.layers." in name for stack in (self.encoder, self.decoder))
        return in_text and layer in (*ATTENTION, *FEED_FORWARD) and (quantize_wo or layer != FEED_FORWARD_OUTPUT)

    def classify(self, name: str) -> str:
        if name.startswith("lm_head."):
            return "head"
        if ".embed_tokens." in name:
            return "embedding"
        if "norm." in name:
            return "rest"
        return "feed-forward" if ".mlp." in name else "attention"

    def make_encoder_inputs(self, input_ids: Any, attention_mask: Any, packing: Any) -> dict[str, Any]:
        if packing is None:
            # without masks, transformers would take each pad token in a text for padding
            mask = input_ids.new_ones(input_ids.shape) if attention_mask is None else attention_mask
            return {"input_ids": input_ids, "attention_mask": mask}
        return {"input_ids": input_ids, **_describe_packed_row(input_ids, packing, packing.sources)}

    def compute_hidden_states(
        self, model: Any, input_ids: Any, decoder_input_ids: Any, attention_mask: Any = None, packing: Any = None
    ) -> Any:
        encoder, decoder = map(model.get_submodule, (self.encoder, self.decoder))
        inputs = self.make_encoder_inputs(input_ids, attention_mask, packing)
        cross_mask = inputs["attention_mask"]
        if packing is None:
            cross_mask = repeat_for_targets(cross_mask, decoder_input_ids)
            options = {"attention_mask": decoder_input_ids.new_ones(decoder_input_ids.shape)}
        else:
            options = _describe_packed_row(decoder_input_ids, packing, packing.targets)
        return decoder(
            input_ids=decoder_input_ids,
            encoder_hidden_states=repeat_for_targets(encoder(**inputs)[0], decoder_input_ids),
            encoder_attention_mask=cross_mask,
            use_cache=False,
            **options,
        )[0]


def _describe_packed_row(ids: Any, packing: Any, lengths: tuple[int, ...]) -> dict[str, Any]:
    """Make the arguments of an encoder or decoder for a packed row, besides its ids."""
    # attention finds the segments in `packing` (model/attention/gemma.py): no mask of the row's length squared
    unused = {kind: ids.new_zeros(1, 1, 1, 0) for kind in ("full_attention", "sliding_attention")}
    positions = packing.number_positions(lengths, ids.device)
    return {"attention_mask": unused, "position_ids": positions, "packing": packing}
