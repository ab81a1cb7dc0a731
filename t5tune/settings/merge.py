"""Which adapters go into which base, and what comes out."""

import math
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from t5tune.settings.base_model import BaseModelSettings
from t5tune.settings.fields import Folders, Maybe, Numbers
from t5tune.settings.output import ReplaceableOutputSettings

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def _bytes(value: Any) -> Any:
    """ "5GB" as transformers writes sizes -> 5000000000."""
    if isinstance(value, str) and (match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B|)", value.strip().upper())):
        size = float(match[1]) * UNITS.get(match[2], 1)
        if not math.isfinite(size):
            raise ValueError("too large a size")
        return int(size)
    return value


Quantization = Literal[
    "int8", "int8_float32", "int8_float16", "int8_bfloat16", "int16", "float16", "bfloat16", "float32"
]
Size = Annotated[int, BeforeValidator(_bytes, json_schema_input_type=int | str)]


class MergeSettings(ReplaceableOutputSettings, BaseModelSettings):
    command: ClassVar[str] = "merge"
    panel: ClassVar[str] = "Merge"

    adapter: Folders = Field(
        min_length=1, description="Adapter folder, or a run folder; several are added up, each times its weight."
    )
    weights: Annotated[Numbers | None, Maybe] = Field(
        default=None, description="How much of each adapter is added; default: all of a single one."
    )
    to: Literal["checkpoint", "ctranslate2"] = Field(
        default="checkpoint",
        description="Write a checkpoint, or what CTranslate2 serves, once it gives our own replies to a few prompts; "
        "the latter loads the model.",
    )
    quantization: Annotated[Quantization | None, Maybe] = Field(
        default=None, description="With --to ctranslate2: how it stores weights; default: in the checkpoint's dtype."
    )
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, Maybe] = Field(
        default=None, description="Round the merged weights to this; default: each tensor keeps the base's."
    )
    max_shard_size: Annotated[Size | None, Maybe] = Field(
        default=None,
        gt=0,
        description="Cut the weights into files of this size (5GB, 500MB); default: as the base's.",
        json_schema_extra={"has_unit": True},
    )
    onto: Literal["base", "nf4", "fp4", "int8"] = Field(
        default="base",
        description="Fold into the base's weights, or into what q_lora made of them, which its adapters were trained "
        "on: quantised, and back to full precision.",
    )
    check: Literal["fingerprint", "full"] = Field(
        default="fingerprint",
        description="How the base is held against the one of training: 4 KiB of each tensor, or every byte.",
    )
    allow_other_base: bool = Field(default=False, description="Merge even into a base that isn't the one of training.")
    verify: Annotated[bool | None, Maybe] = Field(
        default=None,
        description="Load base + adapter and the merged checkpoint, and compare their logits on a few examples; "
        "default: where memory allows.",
    )
    verify_tolerance: float = Field(
        default=1e-4,
        gt=0,
        description="Largest difference of logits allowed, relative to the largest logit; 0.05 at least where the "
        "merged weights are rounded.",
    )

    @model_validator(mode="after")
    def _one_weight_each(self) -> "MergeSettings":
        given, wanted = len(self.weights or []), len(self.adapter)
        if self.weights is not None and given != wanted:
            raise ValueError(f"weights: {given} for {wanted} adapter(s); give one each")
        if self.weights is None and wanted > 1:
            raise ValueError(f"weights: {wanted} adapters; say how much of each, as in --weights 0.7 0.3")
        return self

    @model_validator(mode="after")
    def _quantization_has_a_reader(self) -> "MergeSettings":
        if self.quantization is not None and self.to == "checkpoint":
            raise ValueError(
                f"quantization: {self.quantization}: only with --to ctranslate2; --dtype rounds a checkpoint"
            )
        return self
