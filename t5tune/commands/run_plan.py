"""Resolve the settings of `train` into the parts that its functions read (runs/plan.py).

run_plan = make_run_plan(settings)
"""

from t5tune.inference.precision import Precision
from t5tune.runs.plan import DistillationPlan, ModelPlan, ObjectivePlan, PreferencePlan, RunPlan, TargetPlan
from t5tune.settings import TrainSettings
from t5tune.settings.groups.base import BaseModelSettings, QuantizationSettings
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


def make_run_plan(settings: TrainSettings) -> RunPlan:
    """Divide the settings into parts, and fill in the values that follow from others."""
    quantization = settings.select_part(QuantizationSettings) if settings.q_lora else None
    # without dropout, the policy has the reference's probabilities in the first step of preference training
    has_dropout = not settings.reads_preferences if settings.dropout is None else settings.dropout
    model = ModelPlan(
        settings.select_part(BaseModelSettings),
        settings.revision,
        Precision(settings.bf16, quantization),
        settings.select_part(LayerSettings).model_copy(update={"dropout": has_dropout}),
        None if settings.train_mode == "full" else settings.select_part(InitialAdapterSettings),
    )
    return RunPlan(
        settings.select_part(TrainingDataSettings),
        model,
        _resolve_objective(settings),
        settings.select_part(StepSettings),
        settings.select_part(EvaluationSettings),
        settings.select_part(RunOutputSettings),
        settings.select_part(HubStrategySettings),
        settings.select_part(ProcessSettings),
        settings,
    )


def _resolve_objective(settings: TrainSettings) -> ObjectivePlan:
    match settings.objective:
        case "dpo" | "orpo" as objective:
            return PreferencePlan(objective, settings.select_part(PreferenceSettings))
    if settings.teacher_model_name_or_path is not None:
        return DistillationPlan(settings.label_smoothing_factor, settings.select_part(DistillationSettings))
    return TargetPlan(settings.label_smoothing_factor)
