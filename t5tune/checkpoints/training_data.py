"""Read and write training_data.json: how a model's training examples were made, as far as inference depends on it.

`prepare` writes it into the token cache. It is copied along with template.yaml: into the adapter, where `train` adds
its json_schema, and by export and merge into the checkpoint. `chat`, `evaluate` and `serve` read it.

    {"format": 1, "has_earlier_turns": false, "data_format": "auto", "source_column": "dialogue", ...}
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from t5tune.data.labels import LabelTask
from t5tune.errors import CheckpointError
from t5tune.file_names import TRAINING_DATA_FILE
from t5tune.formatting import shorten
from t5tune.io.atomic import encode_json, write_file
from t5tune.io.untrusted import has_file, read_json_object
from t5tune.settings.groups.record_format import DataFormat, Objective, ReadingSettings
from t5tune.settings.messages import shorten_file_value

TRAINING_DATA_FORMAT = 1
# settings that describe a dataset only together
READING_GROUPS = (
    ("data_format", "source_column", "target_column"), ("source_prefix",), ("objective",), ("denoisers",),
)  # fmt: skip


@dataclass(frozen=True)
class _ExampleSettings:
    has_earlier_turns: bool
    """Whether at least one example's source includes earlier exchanges of the conversation."""
    data_format: DataFormat
    source_column: list[str] | str | None
    target_column: list[str] | str | None
    source_prefix: str
    objective: Objective
    denoisers: list[str]


@dataclass(frozen=True)
class DatasetTraining(_ExampleSettings):
    """How the examples of one of several datasets were made; `share` is its part of an epoch, from 0 to 1."""

    name: str
    share: float
    conversation_template: dict[str, str]


@dataclass(frozen=True)
class TrainingData(_ExampleSettings):
    """How the examples of the main dataset were made and, if there are several, of each dataset.

    Args:
        json_schema: the schema of the targets, which replies must follow by default.
        labels: describes the labels of all datasets; None: the examples have targets.
    """

    datasets: list[DatasetTraining] = field(default_factory=list)
    json_schema: dict[str, Any] | None = None
    labels: LabelTask | None = None

    def list_reading(self) -> dict[str, Any]:
        """Return the settings for reading the records."""
        names = ("data_format", "source_column", "target_column", "source_prefix", "objective", "denoisers")
        return {name: getattr(self, name) for name in names}


def list_differences(made: Sequence[TrainingData]) -> list[str]:
    """List the fields that differ between several adapters."""
    return [each.name for each in fields(TrainingData) if not _agree(made, each.name)]


def join_training_data(made: Sequence[TrainingData]) -> TrainingData:
    """Describe the examples of several summed adapters: where their values differ, use the defaults.

    The merged model reads earlier turns if any adapter learned to.
    """
    defaults = ReadingSettings()
    return TrainingData(
        has_earlier_turns=any(data.has_earlier_turns for data in made),
        **{
            name: getattr(made[0] if _agree(made, *group) else defaults, name)
            for group in READING_GROUPS
            for name in group
        },
        datasets=made[0].datasets if _agree(made, "datasets") else [],
        json_schema=made[0].json_schema if _agree(made, "json_schema") else None,
        labels=made[0].labels if _agree(made, "labels") else None,
    )


def _agree(made: Sequence[TrainingData], *names: str) -> bool:
    return all(getattr(data, name) == getattr(made[0], name) for data in made for name in names)


def write_training_data(folder: Path, data: TrainingData) -> None:
    write_file(folder / TRAINING_DATA_FILE, encode_training_data(data))


def encode_training_data(data: TrainingData) -> bytes:
    optional = ("datasets", "json_schema", "labels")
    values = {name: value for name, value in asdict(data).items() if value or name not in optional}
    return encode_json({"format": TRAINING_DATA_FORMAT, **values})


def read_training_data(folder: Path) -> TrainingData | None:
    """Read a folder's training_data.json; None if t5tune didn't train this model."""
    path = folder / TRAINING_DATA_FILE
    if not has_file(folder, TRAINING_DATA_FILE):
        return None
    values = read_json_object(folder, TRAINING_DATA_FILE)
    if (version := values.pop("format", None)) != TRAINING_DATA_FORMAT:
        supported = f"this version of t5tune reads format {TRAINING_DATA_FORMAT}"
        raise CheckpointError(f"{path}: format {shorten(repr(version), 40)}; {supported}")
    try:
        # as JSON text: in strict mode pydantic doesn't build a dataclass from a dict
        return TypeAdapter(TrainingData).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        found = f"invalid value {shorten_file_value(values[key])}" if key in values else "missing"
        raise CheckpointError(f"{path}: {key}: {found}", hint="copy the file from the run folder again") from None
