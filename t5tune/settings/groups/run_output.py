"""A run's output: checkpoints, logs and reports."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from t5tune.settings.affects import Affects
from t5tune.settings.field_types import OptionalCount, OptionalText, Settings, WordList
from t5tune.settings.groups.base import OutputSettings

CHANGEABLE = ("num_train_epochs", "max_steps")
"""Settings that affect the weights, but may change when a run resumes."""


class SavingSettings(Settings):
    panel: ClassVar[str] = "Evaluation and checkpoints"

    save_strategy: Annotated[Literal["no", "steps", "epoch"], Affects.TRAINER | Affects.ALL_RANKS] = Field(
        default="steps", description="When to save a checkpoint; the last step always saves one."
    )
    save_steps: Annotated[int, Affects.TRAINER | Affects.ALL_RANKS] = Field(
        default=500, gt=0, description="Save a checkpoint every N steps."
    )
    save_total_limit: Annotated[OptionalCount, Affects.NOTHING] = Field(
        default=None,
        description="Keep only the newest N checkpoints, and the best if metric_for_best_model is set; default: all.",
    )
    logging_steps: Annotated[int, Affects.TRAINER | Affects.ALL_RANKS] = Field(
        default=10, gt=0, description="Log metrics to metrics.jsonl every N steps."
    )
    report_to: Annotated[WordList, Affects.NOTHING] = Field(
        default=["none"], description="Experiment trackers: tensorboard, wandb, mlflow, trackio, … or none."
    )
    run_name: Annotated[OptionalText, Affects.NOTHING] = Field(
        default=None, description="Name of the run in experiment trackers; default: the run folder's name."
    )
    report_samples: Annotated[int, Affects.ALL_RANKS] = Field(
        default=10,
        ge=0,
        description="Number of examples in report.html with predictions from before and after training (at most 64 "
        "tokens each); half of them are the worst of a sample. 0: none.",
    )


class RunOutputSettings(OutputSettings, SavingSettings):
    panel: ClassVar[str] = "Output"

    fresh: Annotated[bool, Affects.THIS_CALL | Affects.ALL_RANKS] = Field(
        default=False, description="Start over; an existing run in output_dir is renamed to output_dir.1, …"
    )
    allow_change: Annotated[WordList, Affects.THIS_CALL] = Field(
        default=[],
        description="Settings that may change when a run resumes: num_train_epochs, max_steps, or both.",
    )
    dry_run: Annotated[bool, Affects.THIS_CALL] = Field(
        default=False,
        description="Show all settings (with their defaults), the memory plan and the launch command; write nothing.",
    )

    @field_validator("allow_change")
    @classmethod
    def _check_changes(cls, value: list[str]) -> list[str]:
        if refused := [name for name in value if name not in CHANGEABLE]:
            raise ValueError(
                f"{refused[0]}: only {' and '.join(CHANGEABLE)} can change; for other changes, start a new run with "
                "--adapter RUN/checkpoint-N, or after full training with the checkpoint as the base"
            )
        return value
