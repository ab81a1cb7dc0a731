"""When a run evaluates its model, by which metrics, and what follows from them."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from t5tune.settings.affects import Affects, select_settings
from t5tune.settings.field_types import NoneIfUnset, OptionalCount
from t5tune.settings.groups.base import MetricSettings
from t5tune.settings.groups.steps import SCHEDULES_BY_METRIC


def _strip_eval_prefix(value: Any) -> Any:
    """Accept Hugging Face's metric names: `eval_loss` is `loss`."""
    return value.removeprefix("eval_") if isinstance(value, str) else value


class EvaluationSettings(MetricSettings):
    panel: ClassVar[str] = "Evaluation and checkpoints"

    eval_strategy: Annotated[Literal["no", "steps", "epoch"] | None, Affects.EVALUATION] = Field(
        default=None, description="When to evaluate; default: every epoch if there is held-out data, otherwise never."
    )
    eval_steps: Annotated[OptionalCount, Affects.EVALUATION | Affects.TRAINER] = Field(
        default=None, description="Evaluate every N steps; sets eval_strategy to steps."
    )
    eval_generate: Annotated[OptionalCount, Affects.EVALUATION] = Field(
        default=None,
        description="Generate predictions for this many held-out examples at each evaluation, and score them (see "
        "metrics and metric).",
    )
    metric_for_best_model: Annotated[
        str | None, BeforeValidator(_strip_eval_prefix), NoneIfUnset, Affects.FINAL_WEIGHTS | Affects.EVALUATION
    ] = Field(
        default=None,
        description="Keep the checkpoint that is best by this held-out metric, and use its weights as the final ones: "
        "loss, perplexity, with eval_generate one of metrics or metric, or for objective dpo and orpo one such as "
        "rewards/accuracies; default: use the last checkpoint.",
        json_schema_extra={"metavar": "NAME"},
    )
    early_stopping_patience: Annotated[OptionalCount, Affects.FINAL_WEIGHTS | Affects.EVALUATION] = Field(
        default=None,
        description="Early stopping: stop after this many evaluations without a better metric_for_best_model "
        "(default: loss).",
    )
    early_stopping_threshold: Annotated[float | None, NoneIfUnset, Affects.FINAL_WEIGHTS | Affects.EVALUATION] = Field(
        default=None,
        ge=0,
        description="Early stopping: count an evaluation as better only if the metric improves by more than this; "
        "default: by any amount.",
    )
    per_device_eval_batch_size: Annotated[OptionalCount, Affects.ALL_RANKS] = Field(
        default=None,
        description="Maximum batch size of evaluations per process (examples); default: as many as fit a budget of "
        "tokens.",
    )

    def list_needing_evaluation(self, schedule: str) -> dict[str, Any]:
        """Return the given settings that can't be followed without evaluations, and the schedule if it can't."""
        values = {name: getattr(self, name) for name in select_settings(EvaluationSettings, Affects.EVALUATION)}
        if schedule in SCHEDULES_BY_METRIC:
            values["lr_scheduler_type"] = schedule
        return {name: value for name, value in values.items() if value not in (None, "no")}
