"""One settings model per command, joined from the groups that it uses."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from t5tune.settings.base_model import BaseModelSettings
from t5tune.settings.data import ConversationSettings, DataSettings, TrainingDataSettings
from t5tune.settings.fields import Maybe, Settings
from t5tune.settings.lora import LoraSettings
from t5tune.settings.output import OutputSettings, ReplaceableOutputSettings, RunOutputSettings
from t5tune.settings.training import EvaluationSettings, ProcessSettings, TrainingSettings


def _is_true(value: Any) -> bool:
    """Whether pydantic will read the value as true."""
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        return False


class PrepareSettings(OutputSettings, DataSettings, BaseModelSettings):
    command: ClassVar[str] = "prepare"
    panel: ClassVar[str] = "Output"


class TrainSettings(
    RunOutputSettings,
    ProcessSettings,
    EvaluationSettings,
    TrainingSettings,
    LoraSettings,
    TrainingDataSettings,
    BaseModelSettings,
):
    command: ClassVar[str] = "train"

    @model_validator(mode="before")
    @classmethod
    def _q_lora_needs_bf16(cls, values: Any) -> Any:
        # as the seed does; --no-bf16 computes in fp32, which is faster on a CPU that has no bf16
        if isinstance(values, dict) and _is_true(values.get("q_lora")):
            values = {"bf16": True, **values}
        return values

    @model_validator(mode="after")
    def _agrees(self) -> "TrainSettings":
        if self.num_gpus and self.num_processes and self.num_gpus != self.num_processes:
            raise ValueError(f"num_gpus: {self.num_gpus} beside num_processes: {self.num_processes}; give one")
        evaluates = self.eval_fraction > 0 or self.eval_data_path is not None
        if self.eval_strategy in {"steps", "epoch"} and not evaluates:
            raise ValueError(
                f"eval_strategy: {self.eval_strategy} has nothing to evaluate on; give eval_data_path or eval_fraction"
            )
        return self


class ExportSettings(ReplaceableOutputSettings):
    command: ClassVar[str] = "export"
    panel: ClassVar[str] = "Export"

    checkpoint: Path = Field(
        description="A run folder, a checkpoint-N in it, or a folder that DeepSpeed wrote.",
        json_schema_extra={"positional": True},
    )
    model_name_or_path: Annotated[str | None, Maybe] = Field(
        default=None, description="Base checkpoint, where --non-lora-state full is to add its weights."
    )
    revision: Annotated[str | None, Maybe] = Field(default=None, description="Revision of a hub base model.")
    cache_dir: Annotated[Path | None, Maybe] = Field(default=None, description="Folder for hub downloads.")
    non_lora_state: Literal["trained", "full", "none"] = Field(
        default="trained",
        description="Tensors beside the LoRA matrices: those that were trained, the whole base too, or none.",
    )
    format: Literal["safetensors", "bin"] = Field(
        default="safetensors", description="bin also writes adapter_model.bin, as FastChat does."
    )


class MergeSettings(ReplaceableOutputSettings, BaseModelSettings):
    command: ClassVar[str] = "merge"
    panel: ClassVar[str] = "Merge"

    adapter: Path = Field(description="Adapter folder, or a run folder.")
    verify: bool = Field(
        default=True,
        description="Load base + adapter and the merged checkpoint, and compare their logits on a few examples.",
    )
    verify_tolerance: float = Field(
        default=1e-4,
        gt=0,
        description="Largest difference of logits allowed in fp32, relative to the largest logit.",
    )


class ChatSettings(ConversationSettings, BaseModelSettings):
    command: ClassVar[str] = "chat"
    panel: ClassVar[str] = "Chat"

    adapter: Annotated[Path | None, Maybe] = Field(
        default=None, description="Adapter folder or run folder to put on the base."
    )
    prompt: str | None = Field(default=None, description="Answer this one message and stop.")
    system: str | None = Field(default=None, description="System message; default: the template's own.")
    # None: the template of the adapter or the merged checkpoint, else fastchat-t5
    conversation_template: Annotated[str | None, Maybe] = Field(  # type: ignore[assignment]
        default=None,
        description="Layout of the conversation; default: the one that the model was trained with.",
    )
    q_lora: bool = Field(default=False, description="Load the base in 4 bits, as --q-lora trains it.")
    bf16: bool = Field(default=False, description="Compute in bfloat16.")
    max_new_tokens: int = Field(default=512, gt=0, description="Longest reply (tokens).")
    temperature: float = Field(
        default=0.0, ge=0, description="0: the likeliest reply; above: sample, flatter as it grows."
    )
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Sample from the likeliest words that hold this probability."
    )
    seed: int = Field(default=42, ge=0, description="Seed of the sampling.")
    use_cpu: bool = Field(default=False, description="Stay on the CPU even where there is a GPU.")


COMMANDS: tuple[type[Settings], ...] = (
    PrepareSettings,
    TrainSettings,
    ExportSettings,
    MergeSettings,
    ChatSettings,
)
