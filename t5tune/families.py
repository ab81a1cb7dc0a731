"""The T5 model families that can be trained: a table of their differences, and the constants that they share.

    family = find_family(read_config(folder), folder)
    family.complete_config(config)["model_type"]

A model's files take precedence: the weights decide whether the head is tied, and unused embedding rows are counted.
The table adds what the files don't say: what a model type computes, the names of its layers, and which tools can read
it. docs/families.md and docs/support.md are generated from it.

This module imports nothing heavier than the errors, so every package may import it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t5tune.errors import ModelError
from t5tune.file_names import CONFIG_FILE

# what all families share
EMBEDDING_MODULES = ("encoder.embed_tokens", "decoder.embed_tokens")
HEAD_MODULE = "lm_head"
EMBEDDING_WEIGHT = "shared.weight"
HEAD_WEIGHT = f"{HEAD_MODULE}.weight"
EMBEDDING_COPIES = tuple(f"{module}.weight" for module in EMBEDDING_MODULES)  # only some files contain them
DECODER_START_TOKEN_ID = 0  # the decoder starts with the pad token
PAD_TOKEN_ID = 0
EOS_TOKEN_ID = 1
ATTENTION_IMPLEMENTATION = "sdpa"  # for padded batches; transformers' attn_implementation
FP16_OVERFLOW_LAYER = "wo"  # its output exceeds the range of fp16, so transformers keeps its weight in fp32
TARGET_MODULE_GROUPS = {  # linear layers that LoRA can adapt, by the name of their group
    "attention": ("q", "k", "v", "o"),
    "feed-forward": ("wi", "wi_0", "wi_1", "wo"),
    "all-linear": ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"),
}
# the tokens that FastChat adds to Flan-T5's
FASTCHAT_PAD = "[PAD]"
FASTCHAT_CHARACTERS = ["<", "{", "\n", "}", "`", " ", "\\", "^", "\t"]
FASTCHAT_TOKENS = [FASTCHAT_PAD, *FASTCHAT_CHARACTERS]
BYTES = "bytes"
SENTENCEPIECE = "SentencePiece"
BYTE_FALLBACK = "SentencePiece with byte fallback"
CONVERTERS = ("transformers 4", "CTranslate2", "llama.cpp")


@dataclass(frozen=True)
class Family:
    """Facts about one model family, or about two that don't differ. The defaults are those of T5 v1.1 and Flan-T5.

    Args:
        name: its common name.
        checkpoints: examples of published checkpoints, by their names on the Hugging Face Hub.
        model_type: model_type in config.json.
        tied: whether the published checkpoints tie the head to the embedding.
        feed_forward: feed_forward_proj of the published checkpoints.
        num_rows: rows of the published embeddings.
        num_tokens: tokens of the published tokenizers.
        tokenizer: kind of tokenizer.
        identified_by: values of config.json that distinguish it from other families of its type: key -> values.
        default_feed_forward: what transformers computes for this type where config.json has no feed_forward_proj.
        scales_logits: whether its type divides the logits of a tied head by √d_model.
        bias_in_each_block: whether every block has its own relative position bias, not only the first.
        attention_layer: name of transformers' attention class, which packed rows can pass through.
        converters: tools that read a merged checkpoint and compute the same logits.
    """

    name: str
    checkpoints: tuple[str, ...]
    model_type: str = "t5"
    tied: bool = False
    feed_forward: str = "gated-gelu"
    num_rows: int = 32128
    num_tokens: int = 32100
    tokenizer: str = SENTENCEPIECE
    identified_by: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    default_feed_forward: str = "relu"
    scales_logits: bool = True
    bias_in_each_block: bool = False
    attention_layer: str = "T5Attention"
    converters: tuple[str, ...] = CONVERTERS

    @property
    def num_unused_rows(self) -> int:
        """Rows of the published embeddings without a token: the number of tokens that can be added."""
        return self.num_rows - self.num_tokens

    def complete_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Fill in what a config.json leaves out: the ids of special tokens, and the model type that --family gave."""
        given = {name: value for name, value in config.items() if value is not None}
        return {
            "decoder_start_token_id": DECODER_START_TOKEN_ID,
            "pad_token_id": PAD_TOKEN_ID,
            "eos_token_id": EOS_TOKEN_ID,
            **({} if config.get("model_type") == self.model_type else {"feed_forward_proj": self.feed_forward}),
            **given,
            "model_type": self.model_type,
        }


# Several families share a model_type: the first one whose `identified_by` matches config.json is chosen.
FAMILIES: dict[str, Family] = {
    "byt5": Family(
        name="ByT5",
        checkpoints=("google/byt5-small",),
        num_rows=384,
        num_tokens=384,
        tokenizer=BYTES,
        identified_by={"vocab_size": (384,)},
        converters=CONVERTERS[:2],  # llama.cpp has no byte tokenizer
    ),
    "fastchat-t5": Family(
        name="fastchat-t5",
        checkpoints=("lmsys/fastchat-t5-3b-v1.0",),
        num_rows=32110,
        num_tokens=32110,  # Flan-T5's tokens and ten of FastChat's, such as braces and newline
        identified_by={"vocab_size": (32110,)},
    ),
    "flan-ul2": Family(
        name="Flan-UL2",
        checkpoints=("google/flan-ul2",),
        feed_forward="gated-silu",
        identified_by={"feed_forward_proj": ("gated-silu",)},
        converters=CONVERTERS[:2],  # llama.cpp's T5 always computes GELU, whatever config.json says
    ),
    "t5": Family(
        name="T5",
        checkpoints=("google-t5/t5-base",),
        tied=True,
        feed_forward="relu",
        identified_by={"feed_forward_proj": ("relu", None)},
    ),
    "flan-t5": Family(name="T5 v1.1, Flan-T5", checkpoints=("google/t5-v1_1-base", "google/flan-t5-base")),
    "mt5": Family(
        name="mT5",
        checkpoints=("google/mt5-base",),
        model_type="mt5",
        num_rows=250112,
        num_tokens=250100,
        tokenizer=BYTE_FALLBACK,
        default_feed_forward="gated-gelu",
        scales_logits=False,
        attention_layer="MT5Attention",
    ),
    "umt5": Family(
        name="umT5",
        checkpoints=("google/umt5-base",),
        model_type="umt5",
        num_rows=256384,
        num_tokens=256300,
        tokenizer=BYTE_FALLBACK,
        default_feed_forward="gated-gelu",
        bias_in_each_block=True,
        attention_layer="UMT5Attention",
    ),
}

# model_type -> name of T5 variants that t5tune doesn't support yet
PLANNED_MODELS = {
    "longt5": "LongT5",
    "t5gemma": "T5Gemma",
    "t5gemma2": "T5Gemma 2",
    "switch_transformers": "Switch Transformers",
}
MODEL_TYPES = {family.model_type for family in FAMILIES.values()}


def find_family(config: Mapping[str, Any], folder: Path, requested: str | None = None) -> Family:
    """Find the model family of a config.json.

    Args:
        folder: where config.json is, for error messages.
        requested: the key of FAMILIES that --family gives, for a model_type that isn't in the table.

    Raises:
        ModelError: the model is of an unsupported kind, or contradicts `requested`.
    """
    place, model_type = folder / CONFIG_FILE, config.get("model_type")
    if model_type in PLANNED_MODELS:
        raise ModelError(f"{place}: {PLANNED_MODELS[str(model_type)]} is not supported yet", hint=_list_supported())
    if model_type in MODEL_TYPES:
        found = match_family(config)
        if requested is not None and _get_family(requested).model_type != model_type:
            raise ModelError(
                f"family: {requested}: {place} has model_type {model_type!r}, which is {found.name}",
                hint="omit --family: it is only for a model_type that t5tune doesn't know",
            )
        return found
    if config.get("is_encoder_decoder") is not True:
        raise ModelError(
            f"{place}: model_type {model_type!r}: not an encoder-decoder (is_encoder_decoder isn't true)",
            hint=_list_supported(),
        )
    if requested is None:
        raise ModelError(
            f"{place}: model_type {model_type!r} can't be trained: t5tune doesn't know it",
            hint=f"{_list_supported()}; if it has the architecture of one of these, try --family {'|'.join(FAMILIES)}",
        )
    return _get_family(requested)


def match_family(config: Mapping[str, Any]) -> Family:
    """Find the family of a config whose model_type is one of MODEL_TYPES."""
    return next(f for f in FAMILIES.values() if f.model_type == config.get("model_type") and _is_match(f, config))


def expand_target_modules(names: list[str]) -> list[str]:
    """Replace names of groups with their layers, each once: attention -> q, k, v, o."""
    return list(
        dict.fromkeys(layer for name in names for layer in TARGET_MODULE_GROUPS.get(name.replace("_", "-"), (name,)))
    )


def is_quantizable(name: str, quantize_wo: bool) -> bool:
    """Whether q_lora quantizes a linear layer of this name: those of the blocks, `wo` only with quantize_wo."""
    return ".block." in name and (quantize_wo or FP16_OVERFLOW_LAYER not in name.split("."))


def _is_match(family: Family, config: Mapping[str, Any]) -> bool:
    return all(config.get(key) in values for key, values in family.identified_by.items())


def _get_family(key: str) -> Family:
    if str(key) not in FAMILIES:  # an adapter's file may contain anything
        raise ModelError(f"family: {key}: unknown model family", hint=f"choose one of {', '.join(FAMILIES)}")
    return FAMILIES[str(key)]


def _list_supported() -> str:
    return f"supported models: {', '.join(family.name for family in FAMILIES.values())}"
