"""The members of the family that can be trained: what differs between them, in one table, and what they share.

    family = family_of(read_config(folder), folder)
    family.completed(config)["model_type"]

Files win: whether a head is tied is what the weights say, and the rows that are free are counted. The table tells what
files don't: what a type computes, names of layers, what other tools take. docs/families.md is written from it.

Facts alone, which import nothing heavier than the errors: so `data` and `weights` may read them too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t5tune.errors import ModelError

# what all members share
START_TOKEN_ID = 0  # the decoder begins with the pad token
PAD_TOKEN_ID = 0
EOS_TOKEN_ID = 1
ATTENTION = "sdpa"  # transformers' name of how padded rows attend
OVERFLOWS_FP16 = "wo"  # the layer whose output leaves fp16's range: transformers keeps its weight in fp32
GROUPS = {  # of linear layers, which LoRA may target
    "attention": ("q", "k", "v", "o"),
    "feed-forward": ("wi", "wi_0", "wi_1", "wo"),
    "all-linear": ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"),
}
BYTES = "bytes"
SENTENCEPIECE = "SentencePiece"
BYTE_FALLBACK = "SentencePiece, bytes for what has no piece"
CONVERTERS = ("transformers 4", "CTranslate2", "llama.cpp")


@dataclass(frozen=True)
class Family:
    """Facts of one member, or of two that don't differ.

    Args:
        name: what people call it.
        model_type: of config.json.
        checkpoints: examples, by their names on the hub.
        tied: whether the published checkpoints' head is the embedding.
        feed_forward: feed_forward_proj of the published checkpoints.
        rows, entries: of their embedding, and of their tokenizer.
        tokenizer: its kind.
        tells: what of config.json tells it from other members of its type: key -> values.
        default_feed_forward: what its type computes where config.json doesn't say.
        scales_logits: whether its type divides the logits of a tied head by √d.
        bias_in_each_block: whether each block has position biases of its own, not the first alone.
        attention_layer: transformers' class of its attention, through which packed rows can go.
        converters: tools that read a merged checkpoint and compute the same.
    """

    name: str
    model_type: str
    checkpoints: tuple[str, ...]
    tied: bool
    feed_forward: str
    rows: int
    entries: int
    tokenizer: str = SENTENCEPIECE
    tells: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    default_feed_forward: str = "relu"
    scales_logits: bool = True
    bias_in_each_block: bool = False
    attention_layer: str = "T5Attention"
    converters: tuple[str, ...] = CONVERTERS

    @property
    def room(self) -> int:
        """Rows of the published embeddings that no token has: so many can be added."""
        return self.rows - self.entries

    def completed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config.json with what it leaves out: its type, if --family gave it, and the control tokens."""
        given = {name: value for name, value in config.items() if value is not None}
        return {
            "decoder_start_token_id": START_TOKEN_ID,
            "pad_token_id": PAD_TOKEN_ID,
            "eos_token_id": EOS_TOKEN_ID,
            **({} if config.get("model_type") == self.model_type else {"feed_forward_proj": self.feed_forward}),
            **given,
            "model_type": self.model_type,
        }


# of one type, the first whose `tells` are all met is meant
FAMILIES: dict[str, Family] = {
    "byt5": Family(
        name="ByT5",
        model_type="t5",
        checkpoints=("google/byt5-small",),
        tied=False,
        feed_forward="gated-gelu",
        rows=384,
        entries=384,
        tokenizer=BYTES,
        tells={"vocab_size": (384,)},
        converters=CONVERTERS[:2],  # llama.cpp knows no tokenizer of bytes
    ),
    "fastchat-t5": Family(
        name="fastchat-t5",
        model_type="t5",
        checkpoints=("lmsys/fastchat-t5-3b-v1.0",),
        tied=False,
        feed_forward="gated-gelu",
        rows=32110,
        entries=32110,  # Flan-T5's and ten of FastChat's, braces and newline among them
        tells={"vocab_size": (32110,)},
    ),
    "flan-ul2": Family(
        name="Flan-UL2",
        model_type="t5",
        checkpoints=("google/flan-ul2",),
        tied=False,
        feed_forward="gated-silu",
        rows=32128,
        entries=32100,
        tells={"feed_forward_proj": ("gated-silu",)},
        converters=CONVERTERS[:2],  # llama.cpp's T5 computes GELU, whatever config.json says
    ),
    "t5": Family(
        name="T5",
        model_type="t5",
        checkpoints=("google-t5/t5-base",),
        tied=True,
        feed_forward="relu",
        rows=32128,
        entries=32100,
        tells={"feed_forward_proj": ("relu", None)},
    ),
    "flan-t5": Family(
        name="T5 v1.1, Flan-T5",
        model_type="t5",
        checkpoints=("google/t5-v1_1-base", "google/flan-t5-base"),
        tied=False,
        feed_forward="gated-gelu",
        rows=32128,
        entries=32100,
    ),
    "mt5": Family(
        name="mT5",
        model_type="mt5",
        checkpoints=("google/mt5-base",),
        tied=False,
        feed_forward="gated-gelu",
        rows=250112,
        entries=250100,
        tokenizer=BYTE_FALLBACK,
        default_feed_forward="gated-gelu",
        scales_logits=False,
        attention_layer="MT5Attention",
    ),
    "umt5": Family(
        name="umT5",
        model_type="umt5",
        checkpoints=("google/umt5-base",),
        tied=False,
        feed_forward="gated-gelu",
        rows=256384,
        entries=256300,
        tokenizer=BYTE_FALLBACK,
        default_feed_forward="gated-gelu",
        bias_in_each_block=True,
        attention_layer="UMT5Attention",
    ),
}

# encoder-decoders of T5's line that t5tune will take, and does not yet
LATER = {
    "longt5": "LongT5",
    "t5gemma": "T5Gemma",
    "t5gemma2": "T5Gemma 2",
    "switch_transformers": "Switch Transformers",
}
MODEL_TYPES = {family.model_type for family in FAMILIES.values()}


def family_of(config: Mapping[str, Any], folder: Path, asked: str | None = None) -> Family:
    """The family of a config.json.

    Args:
        asked: the key of FAMILIES that --family names, for a model_type that isn't known here.

    Raises:
        ModelError: it is another kind of model, or not the one that was asked for.
    """
    place, model_type = folder / "config.json", config.get("model_type")
    if model_type in LATER:
        raise ModelError(f"{place}: {LATER[str(model_type)]} comes later: it can't be trained yet", hint=_known())
    if model_type in MODEL_TYPES:
        found = of_type(config)
        if asked is not None and _named(asked).model_type != model_type:
            raise ModelError(
                f"family: {asked}: {place} says model_type {model_type!r}, which is {found.name}",
                hint="leave --family out: it is for a model_type that t5tune doesn't know",
            )
        return found
    if config.get("is_encoder_decoder") is not True:
        raise ModelError(
            f"{place}: model_type {model_type!r}: no encoder-decoder, by its is_encoder_decoder", hint=_known()
        )
    if asked is None:
        raise ModelError(
            f"{place}: model_type {model_type!r} can't be trained: t5tune doesn't know it",
            hint=f"{_known()}; if it is built as one of these, try --family {'|'.join(FAMILIES)}",
        )
    return _named(asked)


def of_type(config: Mapping[str, Any]) -> Family:
    """The member that a config means whose model_type is one of MODEL_TYPES."""
    return next(f for f in FAMILIES.values() if f.model_type == config.get("model_type") and _is_told(f, config))


def target_modules(names: list[str]) -> list[str]:
    """The layers that names and groups of names mean, each once: attention -> q, k, v, o."""
    return list(dict.fromkeys(layer for name in names for layer in GROUPS.get(name.replace("_", "-"), (name,))))


def _is_told(family: Family, config: Mapping[str, Any]) -> bool:
    return all(config.get(key) in values for key, values in family.tells.items())


def _named(asked: str) -> Family:
    if str(asked) not in FAMILIES:  # an adapter's file may say anything
        raise ModelError(f"family: {asked}: not in the table of families", hint=f"one of {', '.join(FAMILIES)}")
    return FAMILIES[str(asked)]


def _known() -> str:
    return f"what can be trained: {', '.join(family.name for family in FAMILIES.values())}"
