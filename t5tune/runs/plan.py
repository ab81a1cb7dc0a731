"""The settings of a run in parts: each function gets the parts that it reads.

    run_plan = make_run_plan(settings)     # commands/train/run_plan.py
    run_plan.steps.learning_rate
    run_plan.model.adapter                          # None: all weights are trained

A part is a group of settings; values that follow from other settings are filled in.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from t5tune.constraints import Constraint
from t5tune.data.caches.mixing import Mixing
from t5tune.file_names import EVAL_CACHE_FOLDER, RUN_CACHE_FOLDER
from t5tune.inference.precision import Precision
from t5tune.settings.affects import Affects, select_settings
from t5tune.settings.dataset_spec import DatasetSpec
from t5tune.settings.field_types import Settings
from t5tune.settings.groups.base import BaseModelSettings
from t5tune.settings.groups.data import TrainingDataSettings
from t5tune.settings.groups.distillation import DistillationSettings
from t5tune.settings.groups.evaluation import EvaluationSettings
from t5tune.settings.groups.hub import HubStrategySettings
from t5tune.settings.groups.layers import LayerSettings
from t5tune.settings.groups.lora import InitialAdapterSettings
from t5tune.settings.groups.preferences import PreferenceSettings
from t5tune.settings.groups.processes import ProcessSettings
from t5tune.settings.groups.run_output import RunOutputSettings
from t5tune.settings.groups.steps import StepSettings

EXAMPLE_SETTINGS = {
    "objective",  # train applies it, too, but a cache has the examples of one objective
    *set(select_settings(TrainingDataSettings, Affects.CACHE))
    - {*select_settings(TrainingDataSettings, Affects.STEPS)},
}
"""The settings that determine a token cache's examples, without those that train also applies later, like num_data."""


@dataclass(frozen=True)
class TargetPlan:
    """The objective is to give the targets a high probability."""

    label_smoothing_factor: float


@dataclass(frozen=True)
class PreferencePlan:
    """The objective is to prefer the better of two answers."""

    objective: Literal["dpo", "orpo"]
    options: PreferenceSettings


@dataclass(frozen=True)
class DistillationPlan:
    """The objective is to give tokens the probabilities that a teacher gives them."""

    label_smoothing_factor: float
    teacher: DistillationSettings


@dataclass(frozen=True)
class LabelPlan:
    """The objective is to predict the labels of texts or tokens with the encoder alone."""


ObjectivePlan = TargetPlan | PreferencePlan | DistillationPlan | LabelPlan


@dataclass(frozen=True)
class ModelPlan:
    """How the model to train is built.

    Args:
        revision: of the base, as the user gave it.
        layers: their `dropout` is true or false.
        adapter: None: all weights are trained.
    """

    base: BaseModelSettings
    revision: str | None
    precision: Precision
    layers: LayerSettings
    adapter: InitialAdapterSettings | None

    @property
    def initial_adapter(self) -> Path | None:
        """The adapter that training starts from."""
        return None if self.adapter is None else self.adapter.adapter


@dataclass(frozen=True)
class RunPlan:
    """The settings of a run, in parts.

    Once `pin_commits` has seen it, models on the Hub are named with the commit that the run uses.

    Args:
        data: if all datasets are token caches, with the values that the caches were made with.
        datasets: to train on.
        eval_datasets: to evaluate on; none: the held-out examples of `datasets`, if there are any.
        mixing: of `datasets`.
        steps: their `learning_rate` is a number.
        json_schema: of the targets; replies must follow it by default.
        given: all settings, to be saved, and to be compared with an earlier start's. Code that uses a value takes it
            from a part.
    """

    data: TrainingDataSettings
    datasets: tuple[DatasetSpec, ...]
    eval_datasets: tuple[DatasetSpec, ...]
    mixing: Mixing
    json_schema: Constraint | None
    model: ModelPlan
    objective: ObjectivePlan
    steps: StepSettings
    evaluation: EvaluationSettings
    output: RunOutputSettings
    hub: HubStrategySettings
    processes: ProcessSettings
    given: Settings

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.output.output_dir

    @property
    def data_folder(self) -> Path:
        """The folder of the examples to train on."""
        return self.data.preprocessed_path or self.folder / RUN_CACHE_FOLDER

    @property
    def eval_data_folder(self) -> Path:
        """The folder of the examples of `eval_datasets`."""
        return self.folder / EVAL_CACHE_FOLDER

    @property
    def uses_autocast(self) -> bool:
        """Whether training computes in mixed precision. Under DeepSpeed all weights are bf16, and it doesn't."""
        return self.model.precision.bf16 and self.processes.deepspeed is None

    @property
    def best_metric(self) -> str | None:
        """The metric that decides which checkpoint is best; None if the last checkpoint is used."""
        return self.evaluation.metric_for_best_model or ("loss" if self.evaluation.early_stopping_patience else None)

    @property
    def reference_adapter(self) -> Path | None:
        """The adapter of the reference model, if the objective has one."""
        return self.objective.options.reference_adapter if isinstance(self.objective, PreferencePlan) else None

    @property
    def teacher(self) -> DistillationSettings | None:
        """The teacher, if the objective has one."""
        return self.objective.teacher if isinstance(self.objective, DistillationPlan) else None

    def list_adapters(self) -> dict[str, Path]:
        """Return the settings that name an adapter, with their values."""
        found = {
            "adapter": self.model.initial_adapter,
            "reference_adapter": self.reference_adapter,
            "teacher_adapter": None if self.teacher is None else self.teacher.teacher_adapter,
        }
        return {name: path for name, path in found.items() if path is not None}

    def list_needing_evaluation(self) -> dict[str, Any]:
        """Return the given settings that can't be followed without evaluations."""
        return self.evaluation.list_needing_evaluation(self.steps.lr_scheduler_type)

    def list_affecting(self, affects: Affects) -> dict[str, Any]:
        """Return the given settings that affect all of `affects`, as JSON."""
        names = set(select_settings(type(self.given), affects))
        return self.given.model_dump(mode="json", include=names)
