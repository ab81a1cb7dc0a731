"""Settings of several commands: the base, its quantization, the device, metrics and the output folder."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from t5tune.custom_metrics import FORMS, names_function
from t5tune.errors import suggest_name
from t5tune.hub.names import split_revision
from t5tune.label_metrics import LABEL_METRICS, LABELS
from t5tune.metrics import METRICS
from t5tune.settings.affects import Affects
from t5tune.settings.field_types import (
    NoneIfUnset,
    OptionalPath,
    OptionalText,
    PathAsText,
    PathList,
    Settings,
    WordList,
    exists,
)

# the keys of the table in t5tune/families
FamilyName = Literal[
    "byt5", "fastchat-t5", "flan-ul2", "madlad400", "codet5", "t5", "flan-t5", "mt5", "umt5", "longt5", "t5gemma",
    "t5gemma2",
]  # fmt: skip


def _read_device(value: Any) -> Any:
    # torch takes seconds to import, and --help needs no device
    return str(value) if type(value).__module__ == "torch" else value


DeviceAsText = BeforeValidator(_read_device)
"""Reads a torch.device as its name."""


class BaseModelSettings(Settings):
    panel: ClassVar[str] = "Base model"

    model_name_or_path: Annotated[str, PathAsText, Affects.INPUT] = Field(
        min_length=1,
        description="Base model: a folder, owner/name[@revision] on the Hugging Face Hub, or `pocket` (built in).",
    )
    revision: Annotated[OptionalText, Affects.FINAL_WEIGHTS] = Field(
        default=None, description="Branch, tag or commit of a model on the Hugging Face Hub; default: its main branch."
    )
    cache_dir: Annotated[OptionalPath, Affects.NOTHING] = Field(
        default=None, description="Folder for Hugging Face Hub downloads; default: the Hub's cache."
    )
    family: Annotated[FamilyName | None, NoneIfUnset, Affects.WEIGHTS] = Field(
        default=None, description="Model family of a base whose model_type t5tune doesn't know (docs/families.md)."
    )

    @model_validator(mode="before")
    @classmethod
    def _split_revision(cls, values: Any) -> Any:
        """Read `owner/name@revision` as both settings."""
        given = values.get("model_name_or_path") if isinstance(values, dict) else None
        name, revision = split_revision(given) if isinstance(given, str) else ("", None)
        if revision is None or exists(str(given)):
            return values
        if (other := values.get("revision")) not in (None, revision):
            raise ValueError(f"revision: {other}, but model_name_or_path is {given}; give only one of them")
        return {**values, "model_name_or_path": name, "revision": revision}


class QuantizationSettings(Settings):
    """Quantization of the frozen base under the adapter (QLoRA, Dettmers et al. 2023)."""

    panel: ClassVar[str] = "Quantized base"

    q_lora: Annotated[bool, Affects.WEIGHTS] = Field(
        default=False,
        description="QLoRA: quantize the frozen base to 4 bits, and train in bf16 unless --no-bf16 is given.",
    )
    quant_type: Annotated[Literal["nf4", "fp4", "int8"], Affects.WEIGHTS] = Field(
        default="nf4",
        description="Quantized type with q_lora: 4-bit NormalFloat, 4-bit float, or LLM.int8().",
    )
    quantize_wo: Annotated[bool, Affects.WEIGHTS] = Field(
        default=True,
        description="Also quantize the feed-forward output projection (T5's `wo`, T5Gemma's `down_proj`).",
    )
    double_quant: Annotated[bool, Affects.WEIGHTS] = Field(
        default=True, description="Double quantization: also quantize the scales of the 4-bit blocks."
    )


class TrainingPrecisionSettings(QuantizationSettings):
    panel: ClassVar[str] = "Training"

    bf16: Annotated[bool, Affects.WEIGHTS | Affects.TRAINER] = Field(
        default=False, description="Compute in bfloat16, and keep the base in bfloat16."
    )
    fp16: Annotated[bool, Affects.NOTHING] = Field(
        default=False,
        description="Not supported, since T5's feed-forward layers overflow in fp16; use bf16.",
        json_schema_extra={"hidden": True},
    )
    tf32: Annotated[bool | None, Affects.WEIGHTS] = Field(
        default=None, description="Use TensorFloat-32 for fp32 matrix products; default: if the GPU supports it."
    )

    @model_validator(mode="after")
    def _turn_bf16_on_for_q_lora(self) -> Self:
        if self.q_lora:
            self._imply(bf16=True)  # unless --no-bf16 is given: fp32 is faster on a CPU without bf16
        return self

    @field_validator("fp16")
    @classmethod
    def _reject_fp16(cls, value: bool) -> bool:
        if value:
            raise ValueError("T5's feed-forward layers overflow in fp16 (loss 0 or NaN); use bf16")
        return value


class TrainedQuantizationSettings(QuantizationSettings):
    """Quantization for inference, which follows training by default."""

    q_lora: bool = Field(
        default=False,
        description="Quantize the base to 4 bits or int8; this and the quantization options default to "
        "their values in training.",
    )


class DeviceSettings(Settings):
    panel: ClassVar[str] = "Base model"

    bf16: bool | None = Field(
        default=None, description="Compute in bfloat16; default: as in training, otherwise if the GPU supports it."
    )
    use_cpu: bool = Field(default=False, description="Run on the CPU even if there is a GPU.")
    device: Annotated[OptionalText, DeviceAsText] = Field(
        default=None, description="Device to run on: cpu, cuda, cuda:1, mps, …; default: a GPU if there is one."
    )

    @model_validator(mode="after")
    def _check_one_device(self) -> Self:
        if self.use_cpu and self.device not in (None, "cpu"):
            raise ValueError(f"device: {self.device} conflicts with use_cpu; give only one of them")
        return self


class InferenceSettings(DeviceSettings, TrainedQuantizationSettings, BaseModelSettings):
    """The model that generates predictions, and its device."""

    panel: ClassVar[str] = "Base model"

    model_name_or_path: Annotated[str, PathAsText] = Field(
        min_length=1,
        description="Run, adapter or base model: a folder, owner/name[@revision] on the Hub, or `pocket` (built in).",
    )
    adapter: OptionalPath = Field(
        default=None,
        description="Adapter to apply to the base: a folder, a run, or owner/name[@revision] on the Hub; not needed if "
        "model_name_or_path is an adapter or a run.",
    )


class MetricSettings(Settings):
    panel: ClassVar[str] = "Metrics"

    metrics: Annotated[WordList | None, NoneIfUnset, Affects.EVALUATION] = Field(
        default=None,
        description=f"Metrics to compute: {', '.join(METRICS)}; {LABELS} computes the last three, whatever the "
        "targets are; default: all that fit the targets.",
        json_schema_extra={"metavar": "NAME…"},
    )
    metric: Annotated[PathList | None, NoneIfUnset, Affects.EVALUATION] = Field(
        default=None,
        description="Custom metrics: functions (predictions, references) -> dict of numbers, as module:function or "
        "path/to/file.py:function.",
        json_schema_extra={"metavar": "FUNCTION…"},
    )

    @field_validator("metrics")
    @classmethod
    def _name_label_metrics(cls, names: list[str] | None) -> list[str] | None:
        if names is None or LABELS not in names:
            return names
        return [*(name for name in names if name not in (LABELS, *LABEL_METRICS)), *LABEL_METRICS]

    @model_validator(mode="after")
    def _check_names(self) -> "MetricSettings":
        for name in self.metrics or []:
            if name not in METRICS:
                known = (*METRICS, LABELS)
                advice = suggest_name(name, known) or f"; choose from {', '.join(known)}"
                raise ValueError(f"metrics: {name}: no such metric{advice}")
        for function in self.metric or []:
            if not names_function(function):
                raise ValueError(f"metric: {function}: doesn't name a function; {FORMS}")
        return self


class OutputSettings(Settings):
    panel: ClassVar[str] = "Output"

    output_dir: Annotated[Path, Affects.NOTHING] = Field(description="Output folder.")


class ReplaceableOutputSettings(OutputSettings):
    overwrite: bool = Field(default=False, description="Replace the output folder even if it contains other files.")
