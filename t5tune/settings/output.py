"""Where results go."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from t5tune.settings.fields import Settings, Words


class OutputSettings(Settings):
    panel: ClassVar[str] = "Output"

    output_dir: Path = Field(description="Folder for the result.")


class ReplaceableOutputSettings(OutputSettings):
    panel: ClassVar[str] = "Output"

    overwrite: bool = Field(default=False, description="Replace the folder where it holds other files.")


class RunOutputSettings(OutputSettings):
    panel: ClassVar[str] = "Output"

    fresh: bool = Field(
        default=False,
        description="Begin anew: move a run that stands in output_dir aside, to output_dir.1, …",
    )
    allow_change: Words = Field(
        default=[],
        description="Resume although these fields differ from those that the run began with (lora_r, data, base, …).",
    )
    dry_run: bool = Field(
        default=False,
        description="Only show the settings with all defaults, the plan and the launcher's command; make nothing.",
    )
