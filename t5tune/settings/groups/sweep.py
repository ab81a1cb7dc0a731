"""A sweep: several runs of `t5tune train` with different settings."""

from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from t5tune.settings.affects import Affects
from t5tune.settings.field_types import NoneIfUnset, Settings


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
