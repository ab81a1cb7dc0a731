"""The settings of `train`, and how they must fit together."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from t5tune.errors import suggest_name
from t5tune.label_metrics import HEAD_METRICS
from t5tune.metrics import METRICS, NOT_BEST, PREFERENCE_METRICS
from t5tune.settings.affects import Affects
from t5tune.settings.field_types import NoneIfUnset, Settings
from t5tune.settings.groups.base import BaseModelSettings, TrainingPrecisionSettings
from t5tune.settings.groups.constraints import TrainedSchemaSettings
from t5tune.settings.groups.data import TrainingDataSettings
from t5tune.settings.groups.distillation import DistillationSettings, TargetSettings
from t5tune.settings.groups.evaluation import EvaluationSettings
from t5tune.settings.groups.hub import HubStrategySettings
from t5tune.settings.groups.layers import LayerSettings
from t5tune.settings.groups.lora import BASE_CHANGING_INITIALIZATIONS, InitialAdapterSettings
from t5tune.settings.groups.preferences import PreferenceSettings
from t5tune.settings.groups.processes import ProcessSettings
from t5tune.settings.groups.run_output import RunOutputSettings
from t5tune.settings.groups.steps import StepSettings


class SweepSettings(Settings):
    panel: ClassVar[str] = "Sweep"

    sweep: Annotated[Path | dict[str, Any] | None, NoneIfUnset, Affects.THIS_CALL] = Field(
        default=None,
        description="YAML file with values to try, such as lora_r: [4, 8]: train each combination or, with trials: N, "
        "a random sample, also from ranges, such as learning_rate: {low: 1e-5, high: 1e-3, log: true}. In a run "
        "config, also a section.",
        json_schema_extra={"metavar": "FILE"},
    )
    jobs: Annotated[int, Affects.THIS_CALL] = Field(
        default=1, gt=0, description="Runs of a sweep to train at the same time, each on its own GPUs."
    )
    max_runs: Annotated[int, Affects.THIS_CALL] = Field(
        default=100, gt=0, description="Refuse a sweep with more runs than this."
    )
    median_stopping: Annotated[bool, Affects.THIS_CALL] = Field(
        default=False,
        description="Stop a run of a sweep at an evaluation if its best metric so far is worse than the median of the "
        "finished runs' best metrics up to this step; needs 5 finished runs.",
    )


class TrainSettings(
    SweepSettings,
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
    TrainedSchemaSettings,
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
    def _check_schema(self) -> "TrainSettings":
        if self.json_schema is not None and self.kind == "raw text":
            raise ValueError("json_schema: span-corruption's targets aren't JSON; leave it out")
        return self

    @model_validator(mode="after")
    def _check_evaluation_options(self) -> "TrainSettings":
        for name, value in self.list_needing_evaluation(self.lr_scheduler_type).items():
            if self.eval_strategy == "no":
                raise ValueError(f"{name}: {value}, but eval_strategy is no; set it to steps or epoch")
        if self.eval_steps is not None and self.eval_strategy == "epoch":
            advice = "set it to steps, or leave out eval_steps"
            raise ValueError(f"eval_steps: {self.eval_steps}, but eval_strategy is epoch; {advice}")
        return self

    @model_validator(mode="after")
    def _check_metrics(self) -> "TrainSettings":
        of_pairs = [name for name in PREFERENCE_METRICS if name not in NOT_BEST]
        best, losses = self.metric_for_best_model, ("loss", "perplexity", *of_pairs)
        if self.kind == "labels":  # these need no generated predictions
            losses = ("loss", *HEAD_METRICS)
        if best is not None and best.endswith(NOT_BEST):
            raise ValueError(
                f"metric_for_best_model: {best}: neither a high nor a low value is better; choose a different metric"
            )
        if best in METRICS and self.metrics is not None and best not in self.metrics:
            raise ValueError(f"metric_for_best_model: {best} isn't among metrics: {', '.join(self.metrics)}; add it")
        known = losses if self.kind == "labels" else (*losses, *METRICS)
        # `chats_loss` is the metric of a dataset; its name is checked once the datasets are known
        best = next((name for name in known if best is not None and best.endswith(f"_{name}")), best)
        if best is not None and best not in known and not self.metric:  # else checked when the functions are tried
            choices = f"; choose from {', '.join(known)}, or give the function that computes it with metric"
            raise ValueError(f"metric_for_best_model: {best}: no such metric{suggest_name(best, known) or choices}")
        generated = {"metrics": self.metrics, "metric": self.metric}
        is_generated = best is not None and best not in losses
        generated["metric_for_best_model"] = [str(self.metric_for_best_model)] if is_generated else None
        for name, value in generated.items():
            if value and self.eval_generate is None:
                advice = "set eval_generate to the number of examples to generate for"
                raise ValueError(f"{name}: {' '.join(value)} needs generated predictions; {advice}")
        if self.early_stopping_threshold is not None and self.early_stopping_patience is None:
            problem = "has no effect without early_stopping_patience; set it to a number of evaluations"
            raise ValueError(f"early_stopping_threshold: {self.early_stopping_threshold:g} {problem}")
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
                raise ValueError("adapter: full training starts from a model; merge the adapter into its base first")
        if reason := self._find_unusable_initialization():
            raise ValueError(f"init_lora_weights: {self.init_lora_weights} {reason}")
        if self.init_lora_weights == "orthogonal" and self.lora_r % 2:
            advice = f"orthogonal needs an even rank, half of it for each matrix; use {self.lora_r + 1}"
            raise ValueError(f"lora_r: {self.lora_r}: init_lora_weights {advice}")
        return self

    def _find_unusable_initialization(self) -> str | None:
        name = self.init_lora_weights
        if self.adapter is not None and name != "default":
            return "conflicts with adapter, which also sets the initial adapter weights; give only one of them"
        if name == "loftq" and not (self.q_lora and self.quant_type != "int8"):
            return "corrects the error of 4-bit quantization; it needs q_lora with quant_type nf4 or fp4"
        if name.startswith(BASE_CHANGING_INITIALIZATIONS) and self.q_lora:
            return "changes the base weights, which q_lora quantizes; use loftq with q_lora"
        if name.startswith((*BASE_CHANGING_INITIALIZATIONS, "loftq")) and self.use_dora:
            return "can't be combined with use_dora; choose one of them"
        return None
