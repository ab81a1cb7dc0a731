"""When a run evaluates its model, by which metrics, and how it uses them."""

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
        description="Generate and score predictions for this many held-out examples at each evaluation.",
    )
    metric_for_best_model: Annotated[
        str | None, BeforeValidator(_strip_eval_prefix), NoneIfUnset, Affects.FINAL_WEIGHTS | Affects.EVALUATION
    ] = Field(
        default=None,
        description="Keep the checkpoint with the best value of this held-out metric as the result: loss, perplexity, "
        "a metric of generated predictions (eval_generate), or with dpo and orpo rewards/accuracies, …; default: "
        "use the last checkpoint.",
        json_schema_extra={"metavar": "NAME"},
    )
    early_stopping_patience: Annotated[OptionalCount, Affects.FINAL_WEIGHTS | Affects.EVALUATION] = Field(
        default=None,
        description="Stop early after this many evaluations without a better metric_for_best_model (default: loss).",
    )
    early_stopping_threshold: Annotated[float | None, NoneIfUnset, Affects.FINAL_WEIGHTS | Affects.EVALUATION] = Field(
        default=None,
        ge=0,
        description="Minimum improvement that early stopping counts; default: any.",
    )
    per_device_eval_batch_size: Annotated[OptionalCount, Affects.ALL_RANKS] = Field(
        default=None,
        description="Maximum batch size of evaluations per process (examples); default: limited by a token budget.",
    )

    def list_needing_evaluation(self, schedule: str) -> dict[str, Any]:
        """Return the settings, and the schedule, that have no effect without evaluations."""
        values = {name: getattr(self, name) for name in select_settings(EvaluationSettings, Affects.EVALUATION)}
        if schedule in SCHEDULES_BY_METRIC:
            values["lr_scheduler_type"] = schedule
        return {name: value for name, value in values.items() if value not in (None, "no")}
