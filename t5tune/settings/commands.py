"""One settings model per command, joined from the groups that it uses."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from t5tune.settings.base_model import BaseModelSettings
from t5tune.settings.data import (
    ConversationSettings,
    DataSettings,
    SelectionSettings,
    SplitSettings,
    TrainingDataSettings,
)
from t5tune.settings.fields import Maybe, Paths, Settings, Words
from t5tune.settings.inference import InferenceSettings
from t5tune.settings.lora import LoraSettings, StartSettings
from t5tune.settings.merge import MergeSettings
from t5tune.settings.output import OutputSettings, ReplaceableOutputSettings, RunOutputSettings
from t5tune.settings.quantization import QuantisationSettings
from t5tune.settings.training import EvaluationSettings, ProcessSettings, TrainingSettings


def _is_true(value: Any) -> bool:
    """Whether pydantic will read the value as true."""
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        return False


def _with_bf16(values: Any) -> Any:
    """q_lora turns bf16 on, as the seed does; --no-bf16 computes in fp32: faster on a CPU that has no bf16."""
    if isinstance(values, dict) and _is_true(values.get("q_lora")):
        values = {"bf16": True, **values}
    return values


class PrepareSettings(OutputSettings, SplitSettings, SelectionSettings, DataSettings, BaseModelSettings):
    command: ClassVar[str] = "prepare"
    panel: ClassVar[str] = "Output"


class TrainSettings(
    RunOutputSettings,
    ProcessSettings,
    EvaluationSettings,
    TrainingSettings,
    QuantisationSettings,
    StartSettings,
    TrainingDataSettings,
    BaseModelSettings,
):
    command: ClassVar[str] = "train"

    @model_validator(mode="before")
    @classmethod
    def _q_lora_needs_bf16(cls, values: Any) -> Any:
        return _with_bf16(values)

    @model_validator(mode="after")
    def _agrees(self) -> "TrainSettings":
        if self.num_gpus and self.num_processes and self.num_gpus != self.num_processes:
            raise ValueError(f"num_gpus: {self.num_gpus} beside num_processes: {self.num_processes}; give one")
        for name in ("eval_steps", "eval_generate", "metric_for_best_model", "early_stopping_patience"):
            if (value := getattr(self, name)) is not None and self.eval_strategy == "no":
                raise ValueError(f"{name}: {value}, but eval_strategy is no")
        if self.metric_for_best_model not in (None, "loss", "perplexity") and self.eval_generate is None:
            raise ValueError(
                f"metric_for_best_model: {self.metric_for_best_model} scores answers; say with eval_generate of how "
                "many examples"
            )
        if self.eval_steps is not None and self.eval_strategy == "epoch":
            raise ValueError(f"eval_steps: {self.eval_steps}, but eval_strategy is epoch")
        return self

    @model_validator(mode="after")
    def _lora_agrees(self) -> "TrainSettings":
        if self.train_mode == "full":
            for name in ("q_lora", "use_dora", "use_rslora", "loraplus_lr_ratio", "modules_to_save"):
                if getattr(self, name):
                    raise ValueError(f"{name}: full training has no adapters; leave it out, or train_mode: lora")
            if self.init_lora_weights != "default":
                raise ValueError("init_lora_weights: full training has no adapters; leave it out")
            if self.adapter is not None:
                raise ValueError("adapter: full training starts from a whole model; merge it into its base first")
        if self.adapter is not None and self.init_lora_weights != "default":
            raise ValueError(f"init_lora_weights: {self.init_lora_weights} beside adapter, which is a start too")
        if self.init_lora_weights == "loftq" and not (self.q_lora and self.quant_type != "int8"):
            raise ValueError("init_lora_weights: loftq makes up for the 4 bits of q_lora, which is off or in int8")
        if self.init_lora_weights.startswith(("pissa", "olora")) and self.q_lora:
            raise ValueError(
                f"init_lora_weights: {self.init_lora_weights} takes its start out of the base's weights, which are "
                "4-bit under q_lora; loftq is the start for those"
            )
        if self.init_lora_weights.startswith(("pissa", "olora", "loftq")) and self.use_dora:
            raise ValueError(f"init_lora_weights: {self.init_lora_weights} and use_dora don't go together")
        return self


class ExportSettings(ReplaceableOutputSettings):
    command: ClassVar[str] = "export"
    panel: ClassVar[str] = "Export"

    checkpoint: Path = Field(
        description="A run folder, a checkpoint-N in it, a folder that DeepSpeed wrote, or an output of FastChat.",
        json_schema_extra={"positional": True},
    )
    model_name_or_path: Annotated[str | None, Maybe] = Field(
        default=None,
        description="Base checkpoint: shapes are checked against its config.json, and --non-lora-state full adds its "
        "weights. Unset: what adapter_config.json names.",
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
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, Maybe] = Field(
        default=None,
        description="Round the trained tensors to this, to the nearest even. Unset: as the checkpoint holds them, fp32 "
        "from DeepSpeed's shards.",
    )
    lora_r: Annotated[int | None, Maybe] = Field(
        default=None, gt=0, description="Rank of an adapter without adapter_config.json. Unset: that of its matrices."
    )
    lora_alpha: Annotated[float | None, Maybe] = Field(
        default=None, gt=0, description="lora_alpha of an adapter without adapter_config.json. Unset: FastChat's, 16."
    )
    lora_target_modules: Annotated[Words | None, Maybe] = Field(
        default=None, description="Adapted modules of an adapter without adapter_config.json. Unset: those in it."
    )


class ChatSettings(ConversationSettings, InferenceSettings):
    command: ClassVar[str] = "chat"
    panel: ClassVar[str] = "Chat"

    prompt: str | None = Field(default=None, description="Answer this one message and stop.")
    system: str | None = Field(default=None, description="System message; default: the template's own.")
    source_prefix: str | None = Field(
        default=None,
        description="Text before each message that doesn't begin with it; default: the source_prefix of training.",
    )
    max_new_tokens: int = Field(default=512, gt=0, description="Longest reply (tokens).")
    temperature: float = Field(
        default=0.0, ge=0, description="0: the likeliest reply; above: sample, flatter as it grows."
    )
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Sample from the likeliest words that hold this probability."
    )
    seed: int = Field(default=42, ge=0, description="Seed of the sampling.")


class EvaluateSettings(DataSettings, InferenceSettings):
    command: ClassVar[str] = "evaluate"
    panel: ClassVar[str] = "Evaluation"

    output_dir: Annotated[Path | None, Maybe] = Field(
        default=None,
        description="Folder for predictions.jsonl; default: `evaluation` here, or the first free of evaluation.1, …",
    )
    overwrite: bool = Field(default=False, description="Replace the folder where it holds other files.")
    num_beams: int = Field(default=1, gt=0, description="Beams of the search; 1: the likeliest token each time.")
    max_new_tokens: Annotated[int | None, Maybe] = Field(
        default=None, gt=0, description="Longest answer (tokens); default: as long as the longest true one."
    )
    per_device_eval_batch_size: int = Field(default=32, gt=0, description="Examples at a time.")


class InspectSettings(Settings):
    command: ClassVar[str] = "inspect"
    panel: ClassVar[str] = "Inspection"

    cache: Path = Field(description="A token cache.", json_schema_extra={"positional": True})
    # -1 is no way to say "unset" here: it looks like the last example
    example: int | None = Field(default=None, ge=0, description="Show this example, counted from 0.")
    worst_cut: bool = Field(default=False, description="Show the example that lost most to model_max_length.")
    unknown: bool = Field(default=False, description="Show the example with the most unknown tokens.")
    all: bool = Field(default=False, description="Show every example.")
    stats: bool = Field(default=False, description="Show histograms of the lengths, padding, and the longest examples.")
    html: Annotated[Path | None, Maybe] = Field(
        default=None, description="Write the examples and the histograms into this HTML file."
    )
    per_device_train_batch_size: int = Field(
        default=8, gt=0, description="Examples of a batch, for the padding's share."
    )


class PlanSettings(ProcessSettings, TrainingSettings, QuantisationSettings, LoraSettings, BaseModelSettings):
    command: ClassVar[str] = "plan"
    panel: ClassVar[str] = "Plan"

    data_path: Annotated[Paths | None, Maybe] = Field(
        default=None, description="A token cache: its real lengths are planned for."
    )
    num_data: Annotated[int | None, Maybe] = Field(
        default=None, gt=0, description="Plan for the cache's first N examples."
    )
    source_length: int = Field(default=512, gt=0, description="Tokens of each source, where there is no cache.")
    target_length: int = Field(default=128, gt=0, description="Tokens of each target, where there is no cache.")
    gpu_memory: Annotated[str | None, Maybe] = Field(
        default=None, description="Memory of each GPU, such as 24GiB; default: that of the GPUs found here."
    )
    seed: int = Field(default=42, ge=0, description="Seed of the order in which a cache's examples are taken.")

    @model_validator(mode="before")
    @classmethod
    def _q_lora_needs_bf16(cls, values: Any) -> Any:
        return _with_bf16(values)


class DoctorSettings(Settings):
    command: ClassVar[str] = "doctor"
    panel: ClassVar[str] = "Doctor"

    timeout: float = Field(default=120.0, gt=0, description="Give up on a check after this long (seconds).")


class TemplatesSettings(Settings):
    command: ClassVar[str] = "templates"
    panel: ClassVar[str] = "Templates"

    action: Literal["list", "show", "copy"] = Field(
        default="list", description="What to do.", json_schema_extra={"positional": True}
    )
    name: Annotated[str | None, Maybe] = Field(
        default=None,
        description="Its name, such as pocket, zero3 or conversations/plain.",
        json_schema_extra={"positional": True},
    )
    to: Path = Field(
        default=Path("."), description="File or folder of the copy.", json_schema_extra={"positional": True}
    )


class SchemaSettings(Settings):
    command: ClassVar[str] = "schema"
    panel: ClassVar[str] = "Schema"

    of: str = Field(
        default="train", description="The command whose YAML is described.", json_schema_extra={"positional": True}
    )


COMMANDS: tuple[type[Settings], ...] = (
    PrepareSettings,
    TrainSettings,
    ExportSettings,
    MergeSettings,
    ChatSettings,
    EvaluateSettings,
    InspectSettings,
    PlanSettings,
    DoctorSettings,
    TemplatesSettings,
    SchemaSettings,
)
