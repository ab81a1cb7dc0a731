"""What a model was trained on, as far as talking to it depends on that: training_data.json.

`prepare` writes it into the token cache, and it goes wherever template.yaml goes: into the adapter, and through export
and merge into the checkpoint. `chat` and `evaluate` read it.

    {"format": 1, "has_earlier_turns": false, "data_format": "auto", "source_column": "dialogue", ...}
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from t5tune.errors import CheckpointError
from t5tune.io.atomic import write_json
from t5tune.io.untrusted import holds, read_object
from t5tune.settings.data import DataFormat

TRAINING_DATA = "training_data.json"
FORMAT = 1
COLUMNS = ("data_format", "source_column", "target_column")
READING = (*COLUMNS, "source_prefix")
"""The settings of how records are read that come into the file."""


@dataclass(frozen=True)
class TrainingData:
    """How the examples were made.

    Args:
        has_earlier_turns: in at least one example an exchange came before the question.
        data_format, source_column, target_column, source_prefix: as in the settings of that name.
    """

    has_earlier_turns: bool
    data_format: DataFormat
    source_column: str | None
    target_column: str | None
    source_prefix: str


def write_training_data(folder: Path, data: TrainingData) -> None:
    """Write training_data.json into a folder.

    Raises:
        WriteError: it can't be written.
    """
    write_json(folder / TRAINING_DATA, {"format": FORMAT, **asdict(data)})


def read_training_data(folder: Path) -> TrainingData | None:
    """What a folder's training_data.json says; None where there is none: t5tune didn't train what is in it.

    Raises:
        CheckpointError: it is broken, or of another format.
    """
    path = folder / TRAINING_DATA
    if not holds(folder, TRAINING_DATA):
        return None
    values = read_object(folder, TRAINING_DATA)
    if (version := values.pop("format", None)) != FORMAT:
        raise CheckpointError(f"{path}: format {version!r:.40}, this release reads {FORMAT}")
    try:
        # as JSON: in strict mode a dataclass is made of nothing else
        return TypeAdapter(TrainingData).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        found = f"found {values[key]!r:.80}" if key in values else "missing"
        raise CheckpointError(f"{path}: {key}: {found}", hint="copy the file from the run's folder again") from None
