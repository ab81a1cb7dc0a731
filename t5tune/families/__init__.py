"""The model families that can be trained: a table of the published checkpoints, and their architectures.

    family = find_family(read_config(folder), folder)
    architecture = family.bind(config)

A model's files take precedence: the weights decide whether the head is tied, and unused embedding rows are counted.
The table adds facts that the files lack, and the tools that can read a merged checkpoint. docs/families.md and
docs/support.md are generated from it. A model's computation and the names of its layers are in one module for each
architecture (see architecture.py).

This package imports nothing heavier than the errors, so every package may import it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t5tune.errors import ModelError
from t5tune.families.architecture import Architecture
from t5tune.families.longt5 import LongT5
from t5tune.families.t5 import MT5, T5, UMT5
from t5tune.families.t5gemma import T5Gemma
from t5tune.families.t5gemma2 import T5Gemma2
from t5tune.file_names import CONFIG_FILE
from t5tune.formatting import shorten

# the tokens that FastChat adds to Flan-T5's
FASTCHAT_PAD = "[PAD]"
FASTCHAT_CHARACTERS = ["<", "{", "\n", "}", "`", " ", "\\", "^", "\t"]
FASTCHAT_TOKENS = [FASTCHAT_PAD, *FASTCHAT_CHARACTERS]
BYTES = "bytes"
SENTENCEPIECE = "SentencePiece"
BYTE_FALLBACK = "SentencePiece with byte fallback"
BYTE_LEVEL_BPE = "byte-level BPE"
GEMMA = "BPE with byte fallback"
CTRANSLATE2 = "CTranslate2"
ONNX = "ONNX"
CONVERTERS = ("transformers 4", CTRANSLATE2, ONNX, "llama.cpp")


@dataclass(frozen=True)
class Family:
    """Facts about one model family, or about two that don't differ. T5 v1.1 and Flan-T5 have the defaults.

    Args:
        checkpoints: examples of published checkpoints, by their names on the Hugging Face Hub.
        tied: whether the published checkpoints tie the head to the embedding.
        feed_forward: feed_forward_proj of the published checkpoints.
        num_rows: rows of the published embeddings.
        num_tokens: tokens of the published tokenizers.
        identified_by: values of config.json that distinguish it from other families of its type: key -> values.
        converters: tools that read a merged checkpoint (see docs/serving.md).
    """

    name: str
    checkpoints: tuple[str, ...]
    architecture: type[Architecture] = T5
    tied: bool = False
    feed_forward: str = "gated-gelu"
    num_rows: int = 32128
    num_tokens: int = 32100
    tokenizer: str = SENTENCEPIECE
    identified_by: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    converters: tuple[str, ...] = CONVERTERS

    @property
    def num_unused_rows(self) -> int:
        """Rows of the published embeddings without a token. Tokens can be added there, if rows can be trained."""
        return self.num_rows - self.num_tokens

    @property
    def model_type(self) -> str:
        return self.architecture.model_type

    def complete_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Fill in values that a config.json leaves out: the ids of special tokens, and the model type from --family.

        A config.json with this model_type lacks feed_forward_proj only if it has the architecture's default.
        """
        key = self.architecture.feed_forward_key
        is_own_type = config.get("model_type") == self.model_type
        return {
            **self.architecture.default_config,
            **{name: values[0] for name, values in self.identified_by.items()},
            **({} if key is None or is_own_type else {key: self.feed_forward}),
            **{name: value for name, value in config.items() if value is not None},
            "model_type": self.model_type,
        }

    def bind(self, config: Mapping[str, Any]) -> Architecture:
        """Return the architecture with the sizes of a config.json."""
        return self.architecture(self.complete_config(config))


# Several families share a model_type: the first whose `identified_by` matches config.json is chosen.
FAMILIES: dict[str, Family] = {
    "byt5": Family(
        name="ByT5",
        checkpoints=("google/byt5-small",),
        num_rows=384,
        num_tokens=384,
        tokenizer=BYTES,
        identified_by={"vocab_size": (384,)},
        converters=CONVERTERS[:2],  # llama.cpp has no byte tokenizer; transformers.js's is untested
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
    "madlad400": Family(
        name="MADLAD-400",
        checkpoints=("google/madlad400-3b-mt",),
        num_rows=256000,
        num_tokens=256000,
        identified_by={"pad_token_id": (1,), "eos_token_id": (2,)},  # the decoder starts with 0
    ),
    "codet5": Family(
        name="CodeT5",
        checkpoints=("Salesforce/codet5-base", "Salesforce/codet5p-770m"),
        tied=True,
        feed_forward="relu",
        num_rows=32100,
        num_tokens=32100,
        tokenizer=BYTE_LEVEL_BPE,
        identified_by={"bos_token_id": (1,), "eos_token_id": (2,), "pad_token_id": (0,)},
        converters=CONVERTERS[:3],  # llama.cpp reads only SentencePiece tokenizers of T5 models
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
        checkpoints=("google/mt5-base", "CohereForAI/aya-101"),
        architecture=MT5,
        num_rows=250112,
        num_tokens=250100,
        tokenizer=BYTE_FALLBACK,
        converters=CONVERTERS[:3],  # llama.cpp's tokenizer ignores byte fallback (its issue 28862)
    ),
    "umt5": Family(
        name="umT5",
        checkpoints=("google/umt5-base",),
        architecture=UMT5,
        num_rows=256384,
        num_tokens=256300,
        tokenizer=BYTE_FALLBACK,
        converters=CONVERTERS[:3],  # as for mT5
    ),
    "longt5": Family(
        name="LongT5",
        checkpoints=("google/long-t5-local-base", "google/long-t5-tglobal-base"),
        architecture=LongT5,
        tied=True,
        converters=CONVERTERS[:1],
    ),
    "t5gemma": Family(
        name="T5Gemma",
        checkpoints=("google/t5gemma-2b-2b-prefixlm", "google/t5gemma-9b-2b-ul2-it"),
        architecture=T5Gemma,
        tied=True,
        num_rows=256000,
        num_tokens=256000,
        tokenizer=GEMMA,
        converters=(),
    ),
    "t5gemma2": Family(
        name="T5Gemma 2",
        checkpoints=("google/t5gemma-2-270m-270m", "google/t5gemma-2-4b-4b"),
        architecture=T5Gemma2,
        tied=True,
        num_rows=262208,
        num_tokens=262145,
        tokenizer=GEMMA,
        converters=(),
    ),
}

# model_type -> why an encoder-decoder like T5 is refused
REFUSED_MODELS = {
    "switch_transformers": "Switch Transformers: its experts have a capacity per text, so packing changes results",
}
# the last names of modules that share a weight, or may do so
EMBEDDINGS_AND_HEADS = {
    path.rpartition(".")[2]
    for architecture in (family.architecture for family in FAMILIES.values())
    for path in (architecture.head, architecture.tied_to.removesuffix(".weight"), *architecture.token_row_modules)
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
    if not isinstance(model_type, str | None):
        raise ModelError(f"{place}: model_type: {shorten(str(model_type))}: expected a name", hint=_list_supported())
    if model_type in REFUSED_MODELS:
        raise ModelError(f"{place}: {REFUSED_MODELS[str(model_type)]}", hint=_list_supported())
    if model_type in MODEL_TYPES:
        found = next(each for each in FAMILIES.values() if each.model_type == model_type and _is_match(each, config))
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


def find_architecture(config: Mapping[str, Any], folder: Path, requested: str | None = None) -> Architecture:
    """Find the architecture of a config.json, with its sizes. See `find_family` for arguments and errors."""
    return find_family(config, folder, requested).bind(config)


def _is_match(family: Family, config: Mapping[str, Any]) -> bool:
    return all(config.get(key) in values for key, values in family.identified_by.items())


def _get_family(key: str) -> Family:
    if str(key) not in FAMILIES:  # an adapter's file may contain anything
        raise ModelError(f"family: {key}: unknown model family", hint=f"choose one of {', '.join(FAMILIES)}")
    return FAMILIES[str(key)]


def _list_supported() -> str:
    return f"supported models: {', '.join(family.name for family in FAMILIES.values())}"
