"""The settings of `export`."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from t5tune.settings.field_types import NoneIfUnset, OptionalCount, OptionalPath, OptionalText, PathAsText, WordList
from t5tune.settings.groups.base import ReplaceableOutputSettings
from t5tune.settings.groups.hub import HubSettings


class ExportSettings(ReplaceableOutputSettings, HubSettings):
    command: ClassVar[str] = "export"
    essential: ClassVar[tuple[str, ...]] = ("model_name_or_path", "non_lora_state", "format", "dtype", "overwrite")
    panel: ClassVar[str] = "Export"

    checkpoint: Path = Field(
        description="Checkpoint to export: a run folder, one of its checkpoint-N folders, a DeepSpeed checkpoint, a "
        "FastChat output folder, or an adapter on the Hugging Face Hub (owner/name, owner/name@revision).",
        json_schema_extra={"positional": True},
    )
    model_name_or_path: Annotated[OptionalText, PathAsText] = Field(
        default=None,
        description="Base checkpoint, to check tensor shapes and for --non-lora-state full; default: the base that "
        "adapter_config.json names.",
    )
    revision: OptionalText = Field(
        default=None, description="Branch, tag or commit of the base on the Hugging Face Hub; default: its main branch."
    )
    cache_dir: OptionalPath = Field(
        default=None, description="Folder for Hugging Face Hub downloads; default: the Hub's cache."
    )
    non_lora_state: Literal["trained", "full", "none"] = Field(
        default="trained",
        description="Tensors to write besides the LoRA matrices: other trained weights, the full base, or none.",
    )
    format: Literal["safetensors", "bin"] = Field(
        default="safetensors",
        description="Format of the adapter weights; bin also writes adapter_model.bin, like FastChat.",
    )
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, NoneIfUnset] = Field(
        default=None,
        description="Round the trained tensors to this dtype (to nearest, ties to even); default: the checkpoint's "
        "dtype, which is float32 for DeepSpeed shards.",
    )
    lora_r: OptionalCount = Field(
        default=None,
        description="LoRA rank of an adapter without adapter_config.json; default: the rank of its matrices.",
    )
    lora_alpha: Annotated[float | None, NoneIfUnset] = Field(
        default=None,
        gt=0,
        description="LoRA alpha of an adapter without adapter_config.json; default: 16, as in FastChat.",
    )
    lora_target_modules: Annotated[WordList | None, NoneIfUnset] = Field(
        default=None,
        description="Adapted modules, for an adapter without adapter_config.json; default: found in the checkpoint.",
    )
