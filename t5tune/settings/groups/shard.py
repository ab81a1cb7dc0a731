"""The part of the data that a process prepares: `--shard 0/3` is the first of three parts."""

import re
from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

from pydantic import AfterValidator, Field, model_validator

from t5tune.settings.affects import Affects
from t5tune.settings.field_types import NoneIfUnset
from t5tune.settings.groups.data import DataSettings

AUTO = "auto"
_PATTERN = re.compile(r"(\d{1,6})/(\d{1,6})")


@dataclass(frozen=True, order=True)
class Shard:
    """Part `index`, from 0, of `count` parts."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def parse_shard(text: str) -> Shard:
    """Parse `I/N`, where I is less than N; anything else raises a ValueError."""
    match = _PATTERN.fullmatch(text)
    shard = Shard(int(match[1]), int(match[2])) if match else Shard(0, 0)
    if shard.index >= shard.count:
        example = f", so 0/{shard.count} to {shard.count - 1}/{shard.count}" if shard.count else ""
        raise ValueError(f"expected auto, or I/N where I counts the N parts from 0{example}")
    return shard


def _check_shard(text: str) -> str:
    return text if text == AUTO else str(parse_shard(text))


ShardText = Annotated[str, AfterValidator(_check_shard)]
"""A part as text: `0/3`, or `auto`."""


class ShardSettings(DataSettings):
    panel: ClassVar[str] = "Many nodes"

    shard: Annotated[ShardText | None, NoneIfUnset, Affects.NOTHING] = Field(
        default=None,
        description="Prepare part I (from 0) of N; default: all data. The process that completes the last part joins "
        "them. `auto` takes I and N from torchrun, srun or a SLURM job array.",
        json_schema_extra={"metavar": "I/N"},
    )
    join: Annotated[bool, Affects.NOTHING] = Field(
        default=False,
        description="Only join the parts that `--shard` prepared, for example after joining was interrupted.",
    )

    @model_validator(mode="after")
    def _check_data_can_be_shared(self) -> Self:
        if self.join and self.shard is not None:
            raise ValueError(f"join: conflicts with shard: {self.shard}: the last part joins all parts; give only one")
        if (self.join or self.shard is not None) and "-" in self.data_path:
            name = "join" if self.join else f"shard: {self.shard}"
            raise ValueError(f"{name}: each part would read standard input (`-`); write the data to a file")
        return self
