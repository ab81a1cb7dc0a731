"""The settings of `plan`."""

from typing import Annotated, ClassVar

from pydantic import Field

from t5tune.settings.commands.train import TrainSettings
from t5tune.settings.field_types import DataList, GpuMemory, NoneIfUnset
from t5tune.settings.groups.base import BaseModelSettings
from t5tune.settings.groups.data import TrainingDataSettings
from t5tune.settings.groups.distillation import TEACHER
from t5tune.settings.groups.evaluation import EvaluationSettings
from t5tune.settings.groups.memory import MemorySettings
from t5tune.settings.groups.processes import ProcessSettings
from t5tune.settings.groups.run_output import SavingSettings


class PlanSettings(
    SavingSettings, ProcessSettings, EvaluationSettings, MemorySettings, TrainingDataSettings, BaseModelSettings
):
    command: ClassVar[str] = "plan"
    also_positional: ClassVar[str | None] = "config"
    essential: ClassVar[tuple[str, ...]] = (
        "train_mode", "lora_r", "q_lora", "bf16", "data_path", "source_length", "target_length",
        "per_device_train_batch_size", "num_gpus", "gpu_memory",
    )  # fmt: skip
    panel: ClassVar[str] = "Plan"
    # a plan leaves out the memory of a teacher, which is noted
    unused_quietly: ClassVar[frozenset[str]] = frozenset(TrainSettings.model_fields.keys() - {TEACHER})

    data_path: Annotated[DataList | None, NoneIfUnset] = Field(  # type: ignore[assignment]
        default=None,
        description="Data or token cache that has the example lengths; default: source_length and target_length.",
        json_schema_extra={"metavar": "PATH…"},
    )
    source_length: int = Field(default=512, gt=0, description="Length of each source if no data is given (tokens).")
    target_length: int = Field(default=128, gt=0, description="Length of each target if no data is given (tokens).")
    gpu_memory: Annotated[GpuMemory | None, NoneIfUnset] = Field(
        default=None,
        description="Memory of each GPU, such as 24GiB (without a unit: GiB); default: this machine's GPU memory.",
        json_schema_extra={"metavar": "SIZE"},
    )
    time_run: bool = Field(
        default=True, description="Run the first steps, to estimate how long the run takes on this machine."
    )
