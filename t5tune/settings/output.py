"""Where results are written."""

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from t5tune.settings.affects import Affects
from t5tune.settings.fields import Settings, WordList


class OutputSettings(Settings):
    panel: ClassVar[str] = "Output"

    output_dir: Annotated[Path, Affects.NOTHING] = Field(description="Output folder.")


class ReplaceableOutputSettings(OutputSettings):
    panel: ClassVar[str] = "Output"

    overwrite: bool = Field(default=False, description="Replace the output folder even if it contains other files.")


class RunOutputSettings(OutputSettings):
    panel: ClassVar[str] = "Output"

    fresh: Annotated[bool, Affects.THIS_CALL] = Field(
        default=False,
        description="Start over; an existing run in output_dir is renamed to output_dir.1, output_dir.2, …",
    )
    allow_change: Annotated[WordList, Affects.THIS_CALL] = Field(
        default=[],
        description="Resume even if these fields differ from those that the run was started with (lora_r, data, base, "
        "…).",
    )
    dry_run: Annotated[bool, Affects.THIS_CALL] = Field(
        default=False,
        description="Show all settings including defaults, the memory plan and the launch command; write nothing.",
    )
