"""The settings of commands with few settings."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from t5tune.settings.field_types import (
    DataList,
    FolderList,
    NoneIfUnset,
    OptionalPath,
    OptionalText,
    PathList,
    Settings,
)
from t5tune.settings.groups.record_format import ReadingSettings

OF_CACHES = {"example", "worst_cut", "unknown", "all", "stats", "per_device_train_batch_size"}


class InspectSettings(ReadingSettings):
    command: ClassVar[str] = "inspect"
    essential: ClassVar[tuple[str, ...]] = (
        "cache", "example", "worst_cut", "unknown", "all", "stats", "html", "model_name_or_path", "data_path",
        "source_column", "target_column",
    )  # fmt: skip
    panel: ClassVar[str] = "Inspection"

    cache: OptionalPath = Field(
        default=None,
        description="Token cache to inspect: its folder, or a run folder that contains it.",
        json_schema_extra={"positional": True},
    )
    model_name_or_path: Annotated[PathList | None, NoneIfUnset] = Field(
        default=None,
        description="Models whose vocabularies to compare on data_path, without a cache and without their weights.",
        json_schema_extra={"metavar": "MODEL…"},
    )
    data_path: Annotated[DataList | None, NoneIfUnset] = Field(
        default=None,
        description="Data to split into tokens, as for prepare; its first records are read.",
        json_schema_extra={"metavar": "PATH…"},
    )
    # not NoneIfUnset: a user who writes -1 may mean the last example, so it is rejected rather than read as None
    example: int | None = Field(default=None, ge=0, description="Show the example with this index, counted from 0.")
    worst_cut: bool = Field(default=False, description="Show the example that model_max_length truncates most.")
    unknown: bool = Field(default=False, description="Show the example with the most unknown tokens.")
    all: bool = Field(default=False, description="Show all examples.")
    stats: bool = Field(
        default=False, description="Show lengths, the longest examples, padding, and how the vocabulary splits texts."
    )
    html: OptionalPath = Field(
        default=None,
        description="HTML file to write; of a cache: lengths, vocabulary and examples (default: 50 spread over it).",
    )
    per_device_train_batch_size: int = Field(
        default=8, gt=0, description="Batch size for computing the share of padding (examples)."
    )

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.cache is not None:
            self._refuse_given({"model_name_or_path", "data_path", *ReadingSettings.model_fields}, "a cache is given")
        elif not (self.model_name_or_path and self.data_path):
            raise ValueError("cache: missing; give t5tune inspect CACHE, or --model-name-or-path and --data-path")
        else:
            self._refuse_given(OF_CACHES, "it is only for a token cache")
        return self


class CompareSettings(Settings):
    command: ClassVar[str] = "compare"
    essential: ClassVar[tuple[str, ...]] = ("sort_by", "csv", "html")
    panel: ClassVar[str] = "Comparison"

    runs: FolderList = Field(
        min_length=1,
        description="Run folders, folders of runs such as a sweep's output_dir, or patterns such as 'runs/*'; output "
        "folders of evaluate add their scores.",
        json_schema_extra={"positional": True},
    )
    sort_by: OptionalText = Field(
        default=None, description="Metric to sort by; default: the metric that chose the runs' best step."
    )
    csv: OptionalPath = Field(default=None, description="CSV file to write the table to.")
    html: OptionalPath = Field(default=None, description="HTML file to write the table and the curves to.")


class MigrateSettings(Settings):
    command: ClassVar[str] = "migrate"
    panel: ClassVar[str] = "Migration"

    run_config: Path = Field(
        description="Run config of LLaMA-Factory or axolotl (YAML), or arguments of transformers' run_summarization or "
        "run_translation (JSON, or a file with the command line).",
        json_schema_extra={"positional": True, "argument": "FILE"},
    )


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
