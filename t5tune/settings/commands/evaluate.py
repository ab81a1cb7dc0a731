"""The settings of `evaluate`."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from t5tune.settings.field_types import OptionalCount, OptionalPath
from t5tune.settings.groups.base import InferenceSettings, MetricSettings
from t5tune.settings.groups.constraints import ConstraintSettings
from t5tune.settings.groups.data import DataSettings
from t5tune.settings.groups.processes import PartitionSettings

MAX_CHOICES = 1000  # that are scored for each source


class EvaluateSettings(ConstraintSettings, MetricSettings, DataSettings, PartitionSettings, InferenceSettings):
    command: ClassVar[str] = "evaluate"
    also_positional: ClassVar[str | None] = "model_name_or_path"
    essential: ClassVar[tuple[str, ...]] = (
        "adapter", "output_dir", "source_column", "target_column", "num_data", "metrics", "choices", "compare_base",
        "bf16", "num_gpus",
    )  # fmt: skip
    panel: ClassVar[str] = "Evaluation"

    output_dir: OptionalPath = Field(
        default=None,
        description="Folder for scores.json and predictions.jsonl; default: evaluation, evaluation.1, …",
    )
    overwrite: bool = Field(
        default=False, description="Replace the output folder (default: evaluation) even if it contains other files."
    )
    choices_by: Literal["sum", "mean"] = Field(
        default="sum", description="Compare choices by the sum of their tokens' log-probabilities, or by their mean."
    )
    compare_base: bool = Field(default=False, description="Also score the base without the adapter.")
    num_beams: int = Field(default=1, gt=0, description="Number of beams for beam search; 1 decodes greedily.")
    max_new_tokens: OptionalCount = Field(
        default=None, description="Maximum length of a prediction (tokens); default: the length of the longest target."
    )
    per_device_eval_batch_size: OptionalCount = Field(
        default=None,
        description="Maximum batch size (examples); default: limited by a token budget.",
    )

    @model_validator(mode="after")
    def _check_objective_of_evaluation(self) -> "EvaluateSettings":
        if self.kind == "pairs":
            problem = "evaluate compares predictions with the chosen answers; leave it out"
            raise ValueError(f"objective: {self.objective}: {problem}")
        return self

    @model_validator(mode="after")
    def _check_choices(self) -> "EvaluateSettings":
        if self.choices_by != "sum" and not self.choices:
            raise ValueError(f"choices_by: {self.choices_by}: has no effect without choices")
        if self.choices and self.num_beams > 1:
            raise ValueError(f"num_beams: {self.num_beams}: has no effect with choices, which are scored")
        if (count := len(self.choices)) > MAX_CHOICES:
            raise ValueError(f"choices: {count:,}: evaluate scores at most {MAX_CHOICES:,}; use choices_file")
        return self

    @model_validator(mode="after")
    def _check_device_of_ranks(self) -> "EvaluateSettings":
        for name in ("num_gpus", "num_processes"):
            fits = self.device is None or (self.device == "cpu" and name == "num_processes")
            if (count := getattr(self, name)) not in (None, 1) and not fits:
                raise ValueError(f"device: {self.device} conflicts with {name}: {count}; leave out device")
        return self
