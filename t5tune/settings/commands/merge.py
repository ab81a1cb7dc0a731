"""The settings of `merge`."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from t5tune.formatting import format_count
from t5tune.settings.field_types import ByteSize, FolderList, NoneIfUnset, NumberList, OptionalText, PathAsText
from t5tune.settings.groups.base import BaseModelSettings, ReplaceableOutputSettings
from t5tune.settings.groups.hub import HubSettings

Quantization = Literal[
    "int8", "int8_float32", "int8_float16", "int8_bfloat16", "int16", "float16", "bfloat16", "float32"
]


class MergeSettings(ReplaceableOutputSettings, HubSettings, BaseModelSettings):
    command: ClassVar[str] = "merge"
    also_positional: ClassVar[str | None] = "adapter"
    essential: ClassVar[tuple[str, ...]] = (
        "model_name_or_path", "weights", "to", "quantization", "dtype", "overwrite",
    )  # fmt: skip
    panel: ClassVar[str] = "Merge"

    model_name_or_path: Annotated[OptionalText, PathAsText] = Field(  # type: ignore[assignment]
        default=None,
        description="Base model: a folder, owner/name[@revision] on the Hugging Face Hub, or `pocket` (built in); "
        "default: the adapter's base, if it is on this machine.",
    )
    adapter: FolderList = Field(
        min_length=1,
        description="Adapter to merge: a folder, a run folder, or owner/name[@revision] on the Hub; several are "
        "summed, each multiplied by its weight. With --to, a whole model may be given to convert it.",
    )
    # not NoneIfUnset: -1 is a weight, which would become the default of 1
    weights: NumberList | None = Field(
        default=None, description="Weight of each adapter; default: 1 for a single adapter."
    )
    to: Literal["checkpoint", "ctranslate2", "onnx", "sentence-transformers"] = Field(
        default="checkpoint",
        description="Output format: a Hugging Face checkpoint, a CTranslate2 model, an ONNX model with a page that "
        "runs it in a browser, or, for a model with labels, a sentence-transformers model. CTranslate2 and ONNX models "
        "must give the merged model's replies to a few prompts, unless they are quantized.",
    )
    quantization: Annotated[Quantization | None, NoneIfUnset] = Field(
        default=None,
        description="Weight type of a CTranslate2 model (default: the merged weights' dtype), or of an ONNX model "
        "(int8 or float32; default: files of both).",
    )
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, NoneIfUnset] = Field(
        default=None,
        description="Round the merged weights to this dtype; default: each tensor keeps the base's dtype, except "
        "with --to onnx, which computes in float32.",
    )
    max_shard_size: Annotated[ByteSize | None, NoneIfUnset] = Field(
        default=None,
        gt=0,
        description="Maximum size of each weight file (bytes, or with a unit: 5GB, 500MB); default: as in the base.",
        json_schema_extra={"metavar": "SIZE"},
    )
    onto: Annotated[Literal["base", "nf4", "fp4", "int8"] | None, NoneIfUnset] = Field(
        default=None,
        description="Weights to merge into: the base, or the base as q_lora quantized and dequantized it; default: as "
        "in training.",
    )
    check: Literal["fingerprint", "full"] = Field(
        default="fingerprint",
        description="How to check that this is the base of training: sample 4 KiB per tensor, or hash everything.",
    )
    allow_other_base: bool = Field(default=False, description="Merge even if this isn't the base of training.")
    verify: Annotated[bool | None, NoneIfUnset] = Field(
        default=None,
        description="Compare the logits of base + adapter and of the merged checkpoint; default: if memory allows.",
    )
    verify_tolerance: float = Field(
        default=1e-4,
        gt=0,
        description="Maximum difference between logits, relative to the largest; at least 0.05 for rounded weights.",
    )

    @model_validator(mode="after")
    def _check_one_weight_per_adapter(self) -> "MergeSettings":
        given, wanted = len(self.weights or []), len(self.adapter)
        if self.weights is not None and given != wanted:
            raise ValueError(f"weights: {given} for {format_count(wanted, 'adapter')}; give one weight per adapter")
        if self.weights is None and wanted > 1:
            raise ValueError(f"weights: missing for {wanted} adapters; give one per adapter, such as --weights 0.7 0.3")
        return self

    @model_validator(mode="after")
    def _check_quantization_fits_the_format(self) -> "MergeSettings":
        if self.quantization is None:
            return self
        if self.to == "onnx" and self.quantization not in ("int8", "float32"):
            raise ValueError(f"quantization: {self.quantization}: --to onnx writes int8 or float32")
        if self.to not in ("ctranslate2", "onnx"):
            problem = "only with --to ctranslate2 or onnx; use --dtype to round a checkpoint"
            raise ValueError(f"quantization: {self.quantization}: {problem}")
        return self
