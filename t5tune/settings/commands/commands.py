"""One settings model per command, composed of the groups of settings that it uses."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from t5tune.errors import suggest_name
from t5tune.metrics import METRICS, NOT_BEST, PREFERENCE_METRICS
from t5tune.settings.commands.merge import MergeSettings
from t5tune.settings.commands.serve import ServeSettings
from t5tune.settings.field_types import GpuMemory, NoneIfUnset, OptionalCount, PathAsText, PathList, Settings, WordList
from t5tune.settings.groups.base import (
    BaseModelSettings,
    InferenceSettings,
    MetricSettings,
    OutputSettings,
    ReplaceableOutputSettings,
    TrainingPrecisionSettings,
)
from t5tune.settings.groups.data import (
    DataSettings,
    EvaluationDataSettings,
    MixingSettings,
    SplitSettings,
    TrainingDataSettings,
)
from t5tune.settings.groups.distillation import TEACHER, DistillationSettings, TargetSettings
from t5tune.settings.groups.evaluation import EvaluationSettings
from t5tune.settings.groups.hub import HubSettings, HubStrategySettings
from t5tune.settings.groups.layers import LayerSettings
from t5tune.settings.groups.lora import InitialAdapterSettings
from t5tune.settings.groups.memory import MemorySettings
from t5tune.settings.groups.preferences import PreferenceSettings
from t5tune.settings.groups.processes import PartitionSettings, ProcessSettings
from t5tune.settings.groups.record_format import ConversationSettings, SelectionSettings
from t5tune.settings.groups.run_output import RunOutputSettings
from t5tune.settings.groups.shard import ShardSettings
from t5tune.settings.groups.steps import StepSettings

SAMPLING_TEMPERATURE = 1.0  # for two replies that differ


class PrepareSettings(
    OutputSettings, SplitSettings, MixingSettings, SelectionSettings, ShardSettings, BaseModelSettings
):
    command: ClassVar[str] = "prepare"
    essential: ClassVar[tuple[str, ...]] = (
        "source_column", "target_column", "source_prefix", "conversation_template", "model_max_length", "num_data",
        "eval_fraction",
    )  # fmt: skip


class TrainSettings(
    RunOutputSettings,
    HubStrategySettings,
    ProcessSettings,
    EvaluationSettings,
    TargetSettings,
    LayerSettings,
    TrainingPrecisionSettings,
    StepSettings,
    PreferenceSettings,
    DistillationSettings,
    InitialAdapterSettings,
    TrainingDataSettings,
    BaseModelSettings,
):
    command: ClassVar[str] = "train"
    also_positional: ClassVar[str | None] = "config"
    essential: ClassVar[tuple[str, ...]] = (
        "source_column", "target_column", "eval_fraction", "train_mode", "lora_r", "q_lora", "num_train_epochs",
        "per_device_train_batch_size", "learning_rate", "bf16", "dry_run",
    )  # fmt: skip
    notes_on_implied: ClassVar[Mapping[str, str]] = {
        "bf16": "q_lora turns bf16 on: the quantized base computes in bfloat16"
    }

    @model_validator(mode="after")
    def _check_evaluation_options(self) -> "TrainSettings":
        for name, value in self.list_needing_evaluation(self.lr_scheduler_type).items():
            if self.eval_strategy == "no":
                raise ValueError(f"{name}: {value}, but eval_strategy is no")
        if self.eval_steps is not None and self.eval_strategy == "epoch":
            raise ValueError(f"eval_steps: {self.eval_steps}, but eval_strategy is epoch")
        return self

    @model_validator(mode="after")
    def _check_metrics(self) -> "TrainSettings":
        of_pairs = [name for name in PREFERENCE_METRICS if name not in NOT_BEST]
        best, losses = self.metric_for_best_model, ("loss", "perplexity", *of_pairs)
        if best is not None and best.endswith(NOT_BEST):
            raise ValueError(f"metric_for_best_model: {best}: neither a high nor a low value is better")
        if best in METRICS and self.metrics is not None and best not in self.metrics:
            raise ValueError(f"metric_for_best_model: {best} isn't among metrics: {', '.join(self.metrics)}; add it")
        known = (*losses, *METRICS)
        # the metric of one of several datasets, `chats_loss`, whose name is checked once they are known
        best = next((name for name in known if best is not None and best.endswith(f"_{name}")), best)
        if best is not None and best not in known and not self.metric:  # else checked when the functions are tried
            choices = f"; choose from {', '.join(known)}, or give the function that computes it with metric"
            raise ValueError(f"metric_for_best_model: {best}: no such metric{suggest_name(best, known) or choices}")
        generated = {"metrics": self.metrics, "metric": self.metric}
        is_generated = best is not None and best not in losses
        generated["metric_for_best_model"] = [str(self.metric_for_best_model)] if is_generated else None
        for name, value in generated.items():
            if value and self.eval_generate is None:
                raise ValueError(
                    f"{name}: {' '.join(value)} needs generated predictions; set eval_generate to the number of "
                    "examples to generate for"
                )
        if self.early_stopping_threshold is not None and self.early_stopping_patience is None:
            raise ValueError(
                f"early_stopping_threshold: {self.early_stopping_threshold:g} has no effect without "
                "early_stopping_patience; set it to a number of evaluations"
            )
        return self

    @model_validator(mode="after")
    def _check_lora_options(self) -> "TrainSettings":
        if self.train_mode == "full":
            for name in ("q_lora", "use_dora", "use_rslora", "loraplus_lr_ratio", "modules_to_save"):
                if getattr(self, name):
                    raise ValueError(f"{name}: full training has no adapters; remove it, or set train_mode: lora")
            if self.init_lora_weights != "default":
                raise ValueError("init_lora_weights: full training has no adapters; remove it")
            if self.adapter is not None:
                raise ValueError(
                    "adapter: full training starts from a model, not an adapter; merge the adapter into its base first"
                )
        if self.adapter is not None and self.init_lora_weights != "default":
            raise ValueError(
                f"init_lora_weights: {self.init_lora_weights} conflicts with adapter, which also sets the initial "
                "adapter weights; give only one of them"
            )
        if self.init_lora_weights == "orthogonal" and self.lora_r % 2:
            raise ValueError(
                f"lora_r: {self.lora_r}: init_lora_weights orthogonal needs an even rank, half of it for each matrix; "
                f"use {self.lora_r + 1}"
            )
        if self.init_lora_weights == "loftq" and not (self.q_lora and self.quant_type != "int8"):
            raise ValueError(
                "init_lora_weights: loftq corrects the error of 4-bit quantization; it needs q_lora with quant_type "
                "nf4 or fp4"
            )
        if self.init_lora_weights.startswith(("pissa", "olora")) and self.q_lora:
            raise ValueError(
                f"init_lora_weights: {self.init_lora_weights} subtracts its initialization from the base weights, "
                "which q_lora quantizes; use loftq with q_lora"
            )
        if self.init_lora_weights.startswith(("pissa", "olora", "loftq")) and self.use_dora:
            raise ValueError(
                f"init_lora_weights: {self.init_lora_weights} can't be combined with use_dora; choose one of them"
            )
        return self


class ExportSettings(ReplaceableOutputSettings, HubSettings):
    command: ClassVar[str] = "export"
    essential: ClassVar[tuple[str, ...]] = ("model_name_or_path", "non_lora_state", "format", "dtype", "overwrite")
    panel: ClassVar[str] = "Export"

    checkpoint: Path = Field(
        description="Checkpoint to export: a run folder, one of its checkpoint-N folders, a DeepSpeed checkpoint, a "
        "FastChat output folder, or an adapter on the Hugging Face Hub (owner/name, owner/name@revision).",
        json_schema_extra={"positional": True},
    )
    model_name_or_path: Annotated[str | None, NoneIfUnset, PathAsText] = Field(
        default=None,
        description="Base checkpoint: its config.json is used to check tensor shapes, and --non-lora-state full copies "
        "its weights; default: the base that adapter_config.json names.",
    )
    revision: Annotated[str | None, NoneIfUnset] = Field(
        default=None, description="Branch, tag or commit of the base on the Hugging Face Hub; default: its main branch."
    )
    cache_dir: Annotated[Path | None, NoneIfUnset] = Field(
        default=None, description="Folder for Hugging Face Hub downloads; default: the Hub's own cache."
    )
    non_lora_state: Literal["trained", "full", "none"] = Field(
        default="trained",
        description="Which tensors to write in addition to the LoRA matrices: those that were trained, the full base "
        "as well, or none.",
    )
    format: Literal["safetensors", "bin"] = Field(
        default="safetensors",
        description="Format of the adapter weights; bin also writes adapter_model.bin, as FastChat does.",
    )
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, NoneIfUnset] = Field(
        default=None,
        description="Round the trained tensors to this dtype (to nearest, ties to even); default: the dtype in the "
        "checkpoint, which is float32 for DeepSpeed shards.",
    )
    lora_r: OptionalCount = Field(
        default=None,
        description="LoRA rank, for an adapter without adapter_config.json; default: the rank of its matrices.",
    )
    lora_alpha: Annotated[float | None, NoneIfUnset] = Field(
        default=None,
        gt=0,
        description="LoRA alpha (scaling numerator), for an adapter without adapter_config.json; default: 16, as in "
        "FastChat.",
    )
    lora_target_modules: Annotated[WordList | None, NoneIfUnset] = Field(
        default=None,
        description="Modules with LoRA matrices, for an adapter without adapter_config.json; default: those that the "
        "checkpoint contains.",
    )


class ChatSettings(ConversationSettings, InferenceSettings):
    command: ClassVar[str] = "chat"
    also_positional: ClassVar[str | None] = "model_name_or_path"
    essential: ClassVar[tuple[str, ...]] = (
        "prompt", "adapter", "system", "conversation_template", "max_new_tokens", "temperature", "q_lora", "bf16",
        "device",
    )  # fmt: skip
    panel: ClassVar[str] = "Chat"
    notes_on_implied: ClassVar[Mapping[str, str]] = {
        "temperature": f"save_preferences samples replies, with temperature {SAMPLING_TEMPERATURE}"
    }

    prompt: str | None = Field(
        default=None, description="Reply to this one message and exit; default: start an interactive chat."
    )
    system: str | None = Field(default=None, description="System message; default: the conversation template's own.")
    source_prefix: str | None = Field(
        default=None,
        description="Text to put before each message, unless it already starts with it; default: the source_prefix "
        "used in training.",
    )
    max_new_tokens: int = Field(default=512, gt=0, description="Maximum length of a reply (tokens).")
    temperature: float = Field(
        default=0.0,
        ge=0,
        description="Sampling temperature; 0 decodes greedily, higher values give more varied replies.",
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Nucleus sampling (top-p): sample from the smallest set of tokens with this total probability.",
    )
    seed: int = Field(default=42, ge=0, lt=1 << 63, description="Random seed for sampling.")
    save_preferences: Annotated[Path | None, NoneIfUnset] = Field(
        default=None,
        description="Sample two replies to each message, ask which one is better, and append the pair to this JSON "
        "Lines file, from which objective dpo and orpo learn.",
    )

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: str | None) -> str | None:
        if prompt is not None and not prompt.strip():
            raise ValueError("no text to reply to")
        return prompt

    @model_validator(mode="after")
    def _check_preferences(self) -> "ChatSettings":
        if self.save_preferences is None:
            return self
        if self.prompt is not None:
            raise ValueError("save_preferences: asks which reply is better, in an interactive chat; leave out prompt")
        self._imply(temperature=SAMPLING_TEMPERATURE)
        if self.temperature == 0:
            raise ValueError("save_preferences: temperature 0 gives the same reply twice; set it to 1, for example")
        return self


class EvaluateSettings(MetricSettings, DataSettings, PartitionSettings, InferenceSettings):
    command: ClassVar[str] = "evaluate"
    also_positional: ClassVar[str | None] = "model_name_or_path"
    essential: ClassVar[tuple[str, ...]] = (
        "adapter", "output_dir", "source_column", "target_column", "num_data", "metrics", "compare_base", "bf16",
        "num_gpus",
    )  # fmt: skip
    panel: ClassVar[str] = "Evaluation"

    output_dir: Annotated[Path | None, NoneIfUnset] = Field(
        default=None,
        description="Folder for scores.json and predictions.jsonl; default: a new one (evaluation, evaluation.1, …).",
    )
    overwrite: bool = Field(
        default=False, description="Replace the output folder (default: evaluation) even if it contains other files."
    )
    compare_base: bool = Field(default=False, description="Also score the base alone, on the same texts.")
    num_beams: int = Field(default=1, gt=0, description="Number of beams for beam search; 1 decodes greedily.")
    max_new_tokens: OptionalCount = Field(
        default=None, description="Maximum length of a prediction (tokens); default: the length of the longest target."
    )
    per_device_eval_batch_size: OptionalCount = Field(
        default=None,
        description="Maximum batch size for the loss and for generation (examples); default: as many as fit a budget "
        "of tokens.",
    )

    @model_validator(mode="after")
    def _check_objective_of_evaluation(self) -> "EvaluateSettings":
        if self.reads_preferences:
            raise ValueError(
                f"objective: {self.objective}: evaluate compares predictions with the chosen answers; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _check_device_of_ranks(self) -> "EvaluateSettings":
        for name in ("num_gpus", "num_processes"):
            fits = self.device is None or (self.device == "cpu" and name == "num_processes")
            if getattr(self, name) not in (None, 1) and not fits:
                raise ValueError(
                    f"device: {self.device} conflicts with {name}: {getattr(self, name)}; leave out device"
                )
        return self


class InspectSettings(Settings):
    command: ClassVar[str] = "inspect"
    essential: ClassVar[tuple[str, ...]] = ("example", "worst_cut", "unknown", "all", "stats", "html")
    panel: ClassVar[str] = "Inspection"

    cache: Path = Field(
        description="Token cache to inspect (a folder), or a run folder, whose token cache it is.",
        json_schema_extra={"positional": True},
    )
    # not NoneIfUnset: a user who writes -1 may mean the last example, so it is rejected rather than read as None
    example: int | None = Field(default=None, ge=0, description="Show the example with this index, counted from 0.")
    worst_cut: bool = Field(
        default=False, description="Show the example from which model_max_length cut the most tokens."
    )
    unknown: bool = Field(default=False, description="Show the example with the most unknown tokens.")
    all: bool = Field(default=False, description="Show all examples.")
    stats: bool = Field(
        default=False, description="Show length histograms, the share of padding, and the longest examples."
    )
    html: Annotated[Path | None, NoneIfUnset] = Field(
        default=None,
        description="Write the length histograms and the chosen examples (default: 50 from all parts of the cache) to "
        "this HTML file.",
    )
    per_device_train_batch_size: int = Field(
        default=8, gt=0, description="Batch size for which the share of padding is computed (examples)."
    )


class PlanSettings(
    ProcessSettings,
    MemorySettings,
    EvaluationDataSettings,
    MixingSettings,
    SplitSettings,
    BaseModelSettings,
):
    command: ClassVar[str] = "plan"
    also_positional: ClassVar[str | None] = "config"
    essential: ClassVar[tuple[str, ...]] = (
        "train_mode", "lora_r", "q_lora", "bf16", "data_path", "source_length", "target_length",
        "per_device_train_batch_size", "num_gpus", "gpu_memory",
    )  # fmt: skip
    panel: ClassVar[str] = "Plan"
    # a plan leaves out the lengths of several datasets and the memory of a teacher, which is noted
    unused_quietly: ClassVar[frozenset[str]] = frozenset(TrainSettings.model_fields.keys() - {"data", TEACHER})

    data_path: Annotated[PathList | None, NoneIfUnset] = Field(
        default=None,
        description="Token cache or mixture to take example lengths from; default: assume source_length and "
        "target_length for every example.",
        json_schema_extra={"metavar": "PATH…"},
    )
    num_data: OptionalCount = Field(
        default=None,
        description="Plan for the first N examples of the cache, of a mixture for those of each dataset; default: all.",
    )
    source_length: int = Field(default=512, gt=0, description="Length of each source if no cache is given (tokens).")
    target_length: int = Field(default=128, gt=0, description="Length of each target if no cache is given (tokens).")
    gpu_memory: Annotated[GpuMemory | None, NoneIfUnset] = Field(
        default=None,
        description="Memory of each GPU, such as 24GiB (a number without a unit is in GiB); default: that of this "
        "machine's GPUs.",
        json_schema_extra={"metavar": "SIZE"},
    )


class PushSettings(Settings):
    command: ClassVar[str] = "push"
    essential: ClassVar[tuple[str, ...]] = ("hub_private_repo",)
    panel: ClassVar[str] = "Push"

    folder: Path = Field(
        description="Folder to upload: a run folder, one of its checkpoint-N folders, or what export or merge wrote.",
        json_schema_extra={"positional": True},
    )
    hub_model_id: str = Field(
        min_length=1,
        description="Repository to upload to: owner/name, or a name in your account.",
        json_schema_extra={"positional": True},
    )
    hub_private_repo: bool = Field(
        default=False, description="Create a private repository. If it exists already, it must be private."
    )


class DoctorSettings(Settings):
    command: ClassVar[str] = "doctor"
    essential: ClassVar[tuple[str, ...]] = ("timeout",)
    panel: ClassVar[str] = "Doctor"

    timeout: float = Field(default=120.0, gt=0, description="Time limit for each check (seconds).")


class TemplatesSettings(Settings):
    command: ClassVar[str] = "templates"
    essential: ClassVar[tuple[str, ...]] = ("action", "name", "to")
    panel: ClassVar[str] = "Templates"

    action: Literal["list", "show", "copy"] = Field(
        default="list",
        description="List all templates, print one, or copy one.",
        json_schema_extra={"positional": True},
    )
    name: Annotated[str | None, NoneIfUnset] = Field(
        default=None,
        description="Name of the template to show or copy, such as pocket, zero3 or conversations/plain.",
        json_schema_extra={"positional": True},
    )
    to: Path = Field(
        default=Path("."), description="File or folder to copy the template to.", json_schema_extra={"positional": True}
    )


class SchemaSettings(Settings):
    command: ClassVar[str] = "schema"
    essential: ClassVar[tuple[str, ...]] = ("of",)
    panel: ClassVar[str] = "Schema"

    of: str = Field(
        default="train",
        description="Command whose settings the schema describes.",
        json_schema_extra={"positional": True},
    )


class DocsSettings(Settings):
    command: ClassVar[str] = "docs"


COMMANDS: tuple[type[Settings], ...] = (
    PrepareSettings,
    TrainSettings,
    ExportSettings,
    MergeSettings,
    ChatSettings,
    ServeSettings,
    EvaluateSettings,
    InspectSettings,
    PlanSettings,
    PushSettings,
    DoctorSettings,
    TemplatesSettings,
    SchemaSettings,
    DocsSettings,
)
