"""The number of processes, their devices, and how they share a model."""

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from t5tune.settings.affects import Affects
from t5tune.settings.field_types import OptionalCount, OptionalText, PathAsText, Settings


class RankSettings(Settings):
    panel: ClassVar[str] = "Processes"

    num_gpus: Annotated[OptionalCount, Affects.NOTHING] = Field(
        default=None, description="Start this many processes on this machine, one per GPU."
    )
    num_processes: Annotated[OptionalCount, Affects.NOTHING] = Field(
        default=None, description="Start this many processes on this machine, on the CPU."
    )
    process_group_timeout: Annotated[int, Affects.NOTHING] = Field(
        default=1800, gt=0, description="Stop if another rank doesn't respond within this time (seconds)."
    )

    @model_validator(mode="after")
    def _check_number_of_processes(self) -> Self:
        if self.num_gpus and self.num_processes:
            raise ValueError(
                f"num_gpus: {self.num_gpus} conflicts with num_processes: {self.num_processes}; "
                "leave one of them out, or give it as none"
            )
        return self

    @property
    def process_count(self) -> int:
        return self.num_gpus or self.num_processes or 1


class PartitionSettings(RankSettings):
    deepspeed: Annotated[OptionalText, PathAsText] = Field(
        default=None,
        description="ZeRO-3 config for a base that doesn't fit on one GPU: zero3, zero3-offload, or a JSON file.",
    )


class ProcessSettings(RankSettings):
    use_cpu: Annotated[bool, Affects.ALL_RANKS] = Field(
        default=False, description="Train on the CPU even if there is a GPU."
    )
    deepspeed: Annotated[OptionalText, PathAsText, Affects.NOTHING] = Field(
        default=None,
        description="DeepSpeed config: zero0, zero1, zero2, zero3, zero2-offload, zero3-offload, or a JSON file.",
    )
    max_restarts: Annotated[int, Affects.NOTHING] = Field(
        default=0,
        ge=0,
        description="How many times to restart the processes of num_gpus or num_processes after one is lost.",
    )
