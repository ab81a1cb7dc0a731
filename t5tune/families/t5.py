"""T5 (Raffel et al. 2020), and its siblings that differ in details: T5 v1.1, Flan-T5, ByT5, mT5 and umT5."""

from collections.abc import Mapping
from typing import Any, ClassVar

from t5tune.families.architecture import (
    MAX_LAYERS,
    Architecture,
    Dimensions,
    Shapes,
    get_layer_name,
    repeat_for_targets,
)

ATTENTION = ("q", "k", "v", "o")
FEED_FORWARD = ("wi", "wi_0", "wi_1", "wo")


class T5(Architecture):
    """T5 (Raffel et al. 2020).

    Attributes:
        embedding: path of the embedding that encoder, decoder and a tied head share.
        default_feed_forward: transformers' default for a config.json without feed_forward_proj.
        scales_logits: whether the logits of a tied head are divided by √d_model.
        bias_in_each_block: whether every block has its own relative position bias, not only the first.
    """

    model_type = "t5"
    # the decoder starts with the pad token
    default_config: ClassVar[Mapping[str, Any]] = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    feed_forward_key = "feed_forward_proj"
    head = "lm_head"
    embedding = "shared"
    tied_to = f"{embedding}.weight"
    token_row_modules: ClassVar[tuple[str, ...]] = ("encoder.embed_tokens", "decoder.embed_tokens")
    always_shared: ClassVar[Mapping[str, str]] = dict.fromkeys(
        (f"{path}.weight" for path in token_row_modules), "shared.weight"
    )
    block_classes = ("T5Block",)
    encoder_module = "encoder"
    has_flex_attention: ClassVar[bool] = True
    # T5's first release saved a position bias for the first cross-attention
    ignored_tensors = frozenset({"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"})
    linear_layers: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": ATTENTION,
        "feed-forward": FEED_FORWARD,
        "all-linear": (*ATTENTION, *FEED_FORWARD),
    }
    fp16_overflow_layer = "wo"
    trainable_modules: ClassVar[tuple[str, ...]] = ("layer_norm", "final_layer_norm", "relative_attention_bias")
    default_feed_forward: ClassVar[str] = "relu"
    scales_logits: ClassVar[bool] = True
    bias_in_each_block: ClassVar[bool] = False

    @property
    def start_token_id(self) -> int:
        return self.read_id(self.config, "decoder_start_token_id")

    @property
    def dimensions(self) -> Dimensions:
        heads = self.read_size(self.config, "num_heads")
        return Dimensions(
            num_rows=self.read_size(self.config, "vocab_size"),
            num_heads=heads,
            num_decoder_layers=self._count_layers()["decoder"],
            cache_width=heads * self.read_size(self.config, "d_kv"),
        )

    @classmethod
    def set_tied(cls, config: dict[str, Any], tied: bool) -> None:
        """Also write `scale_decoder_outputs`.

        transformers 4 scales the decoder's output if `tie_word_embeddings` is true; transformers 5 reads
        `scale_decoder_outputs`. Writing both keeps the scaling after the flag is corrected.
        """
        if cls.scales_logits:
            config.setdefault("scale_decoder_outputs", config.get("tie_word_embeddings", True) is not False)
        config["tie_word_embeddings"] = tied

    def _count_layers(self) -> dict[str, int]:
        has_own = self.config.get("num_decoder_layers") is not None
        keys = {"encoder": "num_layers", "decoder": "num_decoder_layers" if has_own else "num_layers"}
        return {stack: self.read_size(self.config, key, MAX_LAYERS) for stack, key in keys.items()}

    def derive_shapes(self) -> Shapes:
        keys = "d_model", "d_kv", "num_heads", "d_ff", "vocab_size"
        width, head_width, heads, d_ff, vocab_size = (self.read_size(self.config, key) for key in keys)
        shapes: Shapes = dict.fromkeys((self.tied_to, self.head_weight, *self.always_shared), (vocab_size, width))
        for stack, count in self._count_layers().items():
            shapes[f"{stack}.final_layer_norm.weight"] = (width,)
            for block in range(count):
                layers = self._derive_attention_layers(stack, block, width, heads * head_width, heads)
                layers.append(self._derive_feed_forward(width, d_ff))
                for index, layer in enumerate(layers):
                    prefix = f"{stack}.block.{block}.layer.{index}"
                    shapes |= {f"{prefix}.{name}.weight": shape for name, shape in layer.items()}
                    shapes[f"{prefix}.layer_norm.weight"] = (width,)
        return shapes

    def _derive_attention_layers(self, stack: str, block: int, width: int, inner: int, heads: int) -> list[Shapes]:
        key = "relative_attention_num_buckets"
        buckets = self.read_size({key: 32, **self.config}, key)
        names = [self._name_self_attention(stack), *(["EncDecAttention"] if stack == "decoder" else [])]
        layers: list[Shapes] = [
            {**{f"{name}.{part}": (inner, width) for part in "qkv"}, f"{name}.o": (width, inner)} for name in names
        ]
        if block == 0 or self.bias_in_each_block:
            layers[0][f"{names[0]}.relative_attention_bias"] = (buckets, heads)
        return layers

    def _name_self_attention(self, stack: str) -> str:
        return "SelfAttention"

    def _derive_feed_forward(self, width: int, d_ff: int) -> Shapes:
        gated = str(self.config.get("feed_forward_proj", self.default_feed_forward)).startswith("gated-")
        parts = ("wi_0", "wi_1") if gated else ("wi",)
        return {**{f"DenseReluDense.{part}": (d_ff, width) for part in parts}, "DenseReluDense.wo": (width, d_ff)}

    def is_quantizable(self, name: str, quantize_wo: bool) -> bool:
        is_linear = get_layer_name(name) in (*ATTENTION, *FEED_FORWARD)
        return is_linear and ".block." in name and (quantize_wo or self.fp16_overflow_layer not in name.split("."))

    def classify(self, name: str) -> str:
        if name.startswith(self.head):
            return "head"
        if name.startswith((f"{self.embedding}.", *self.token_row_modules)):
            return "embedding"
        if "layer_norm" in name or "relative_attention_bias" in name:
            return "rest"
        return "feed-forward" if "DenseReluDense" in name else "attention"

    def make_encoder_inputs(self, input_ids: Any, attention_mask: Any, packing: Any) -> dict[str, Any]:
        options = {} if packing is None else {"packing": packing}
        return {"input_ids": input_ids, "attention_mask": attention_mask, **options}

    def compute_hidden_states(
        self, model: Any, input_ids: Any, decoder_input_ids: Any, attention_mask: Any = None, packing: Any = None
    ) -> Any:
        options = {} if packing is None else {"packing": packing}
        encoded_BSD = model.encoder(**self.make_encoder_inputs(input_ids, attention_mask, packing))[0]
        hidden_BTD = model.decoder(
            input_ids=decoder_input_ids,
            encoder_hidden_states=repeat_for_targets(encoded_BSD, decoder_input_ids),
            encoder_attention_mask=repeat_for_targets(attention_mask, decoder_input_ids),
            use_cache=False,
            **options,
        )[0]
        return self._scale(model, hidden_BTD)

    def _scale(self, model: Any, hidden_BTD: Any) -> Any:
        scale = self.get_logit_scale(model)
        return hidden_BTD if scale == 1.0 else hidden_BTD * scale

    def get_logit_scale(self, model: Any) -> float:
        """Return the factor of the decoder's output before the head."""
        # up to transformers 5.23, umT5's config has only tie_word_embeddings
        scales = getattr(model.config, "scale_decoder_outputs", model.config.tie_word_embeddings)
        return float(model.model_dim**-0.5) if self.scales_logits and scales else 1.0


class MT5(T5):
    """mT5 (Xue et al. 2021)."""

    model_type = "mt5"
    default_feed_forward = "gated-gelu"
    scales_logits = False


class UMT5(T5):
    """umT5 (Chung et al. 2023)."""

    model_type = "umt5"
    default_feed_forward = "gated-gelu"
    bias_in_each_block = True
