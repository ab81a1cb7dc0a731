"""The settings of commands with few settings."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from t5tune.settings.field_types import FolderList, OptionalPath, OptionalText, Settings


class InspectSettings(Settings):
    command: ClassVar[str] = "inspect"
    essential: ClassVar[tuple[str, ...]] = ("example", "worst_cut", "unknown", "all", "stats", "html")
    panel: ClassVar[str] = "Inspection"

    cache: Path = Field(
        description="Token cache to inspect: its folder, or a run folder that contains it.",
        json_schema_extra={"positional": True},
    )
    # not NoneIfUnset: a user who writes -1 may mean the last example, so it is rejected rather than read as None
    example: int | None = Field(default=None, ge=0, description="Show the example with this index, counted from 0.")
    worst_cut: bool = Field(default=False, description="Show the example that model_max_length truncates most.")
    unknown: bool = Field(default=False, description="Show the example with the most unknown tokens.")
    all: bool = Field(default=False, description="Show all examples.")
    stats: bool = Field(
        default=False, description="Show length histograms, the share of padding, and the longest examples."
    )
    html: OptionalPath = Field(
        default=None,
        description="HTML file to write length histograms and examples to (default: 50 spread over the cache).",
    )
    per_device_train_batch_size: int = Field(
        default=8, gt=0, description="Batch size for computing the share of padding (examples)."
    )


class CompareSettings(Settings):
    command: ClassVar[str] = "compare"
    essential: ClassVar[tuple[str, ...]] = ("sort_by", "csv", "html")
    panel: ClassVar[str] = "Comparison"

    runs: FolderList = Field(
        min_length=1,
        description="Run folders, or patterns such as 'runs/*'; output folders of evaluate add their scores.",
        json_schema_extra={"positional": True},
    )
    sort_by: OptionalText = Field(
        default=None, description="Metric to sort by; default: the metric that chose the runs' best step."
    )
    csv: OptionalPath = Field(default=None, description="CSV file to write the table to.")
    html: OptionalPath = Field(default=None, description="HTML file to write the table and the curves to.")


class PushSettings(Settings):
    command: ClassVar[str] = "push"
    essential: ClassVar[tuple[str, ...]] = ("hub_private_repo",)
    panel: ClassVar[str] = "Push"

    folder: Path = Field(
        description="Folder to upload: a run, one of its checkpoint-N folders, or the output of export or merge.",
        json_schema_extra={"positional": True},
    )
    hub_model_id: str = Field(
        min_length=1,
        description="Repository to upload to: owner/name, or a name in your account.",
        json_schema_extra={"positional": True},
    )
    hub_private_repo: bool = Field(
        default=False, description="Create a private repository; an existing one must be private."
    )


class DoctorSettings(Settings):
    command: ClassVar[str] = "doctor"
    essential: ClassVar[tuple[str, ...]] = ("timeout",)
    panel: ClassVar[str] = "Doctor"

    timeout: float = Field(default=120.0, gt=0, description="Time limit for each check (seconds).")


class TemplatesSettings(Settings):
    command: ClassVar[str] = "templates"
    essential: ClassVar[tuple[str, ...]] = ("action", "name", "to")
    panel: ClassVar[str] = "Templates"

    action: Literal["list", "show", "copy"] = Field(
        default="list",
        description="List all templates, print one, or copy one.",
        json_schema_extra={"positional": True},
    )
    name: OptionalText = Field(
        default=None,
        description="Name of the template to show or copy, such as pocket, zero3 or conversations/plain.",
        json_schema_extra={"positional": True},
    )
    to: Path = Field(
        default=Path("."), description="File or folder to copy the template to.", json_schema_extra={"positional": True}
    )


class SchemaSettings(Settings):
    command: ClassVar[str] = "schema"
    essential: ClassVar[tuple[str, ...]] = ("of",)
    panel: ClassVar[str] = "Schema"

    of: str = Field(
        default="train",
        description="Command whose settings the schema describes.",
        json_schema_extra={"positional": True},
    )


class DocsSettings(Settings):
    command: ClassVar[str] = "docs"
