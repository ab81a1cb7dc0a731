"""The steps of a run: their number, their batches, and the optimizer.

Names and defaults follow Hugging Face's.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from t5tune.settings.affects import Affects
from t5tune.settings.field_types import OptionalCount, Settings

SCHEDULES_BY_METRIC = {"reduce_lr_on_plateau", "greedy"}  # the learning rate depends on metric_for_best_model
ADAPTER_LEARNING_RATE = 3e-4  # an adapter has few weights, which start at zero
FULL_LEARNING_RATE = 5e-5  # Hugging Face's default, also for an adapter that learns preferences with dpo


class StepSettings(Settings):
    panel: ClassVar[str] = "Training"

    num_train_epochs: Annotated[float, Affects.WEIGHTS | Affects.TRAINER] = Field(
        default=3.0, gt=0, description="Training epochs (passes over the data)."
    )
    max_steps: Annotated[OptionalCount, Affects.WEIGHTS] = Field(
        default=None, description="Total optimizer steps, overriding num_train_epochs; default: from num_train_epochs."
    )
    per_device_train_batch_size: Annotated[int, Affects.TRAINER | Affects.ALL_RANKS] = Field(
        default=8, gt=0, description="Batch size per GPU or process (examples)."
    )
    tokens_per_batch: Annotated[OptionalCount, Affects.ALL_RANKS] = Field(
        default=None,
        description="Maximum size of a micro-batch in tokens (source + target, including padding), instead of "
        "per_device_train_batch_size.",
    )
    gradient_accumulation_steps: Annotated[int, Affects.TRAINER | Affects.ALL_RANKS] = Field(
        default=1, gt=0, description="Micro-batches to accumulate per optimizer step."
    )
    group_by_length: Annotated[bool, Affects.WEIGHTS] = Field(
        default=True,
        description="Batch examples of similar length, sorted within random windows of 64 steps, to reduce padding; "
        "no effect with tokens_per_batch.",
    )
    learning_rate: Annotated[float | None, Affects.WEIGHTS | Affects.TRAINER] = Field(
        default=None,
        ge=0,
        description="Peak learning rate; default: 3e-4 for adapters, 5e-5 for full training and for objective dpo.",
    )
    lr_scheduler_type: Annotated[str, Affects.WEIGHTS | Affects.TRAINER] = Field(
        default="linear", description="Learning-rate schedule, by its transformers name (linear, cosine, …)."
    )
    warmup_steps: Annotated[float, Affects.WEIGHTS | Affects.TRAINER] = Field(
        default=0, ge=0, description="Warmup steps; a value below 1 is a fraction of all steps."
    )
    weight_decay: Annotated[float, Affects.WEIGHTS | Affects.TRAINER] = Field(
        default=0.0, ge=0, description="Decoupled weight decay (as in AdamW)."
    )
    max_grad_norm: Annotated[float, Affects.WEIGHTS | Affects.TRAINER] = Field(
        default=1.0, ge=0, description="Gradient clipping: maximum norm of the gradient; 0 turns clipping off."
    )
    optim: Annotated[str, Affects.WEIGHTS | Affects.TRAINER] = Field(
        default="adamw_torch",
        description="Optimizer, by its transformers name; a paged optimizer's state isn't paged after resuming.",
    )
    on_non_finite: Annotated[Literal["stop", "skip"], Affects.WEIGHTS] = Field(
        default="stop",
        description="What to do if the loss or a gradient is NaN or infinite: stop training, or skip the step.",
    )
    max_skipped_steps: Annotated[int, Affects.WEIGHTS] = Field(
        default=10,
        ge=0,
        description="Maximum number of skipped steps in a run with on_non_finite: skip; the next non-finite step stops "
        "training.",
    )
    dataloader_num_workers: Annotated[int, Affects.TRAINER] = Field(
        default=0, ge=0, description="Data-loading processes per rank."
    )
    training_args: Annotated[dict[str, Any], Affects.WEIGHTS] = Field(
        default={},
        description="Additional fields of transformers' TrainingArguments; YAML only.",
        json_schema_extra={"yaml_only": True},
    )


def choose_learning_rate(given: float | None, train_mode: str, objective: str) -> float:
    """Return the given peak learning rate, or the default of the train_mode and the objective."""
    if given is not None:
        return given
    return ADAPTER_LEARNING_RATE if train_mode == "lora" and objective != "dpo" else FULL_LEARNING_RATE
