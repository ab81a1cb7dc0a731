"""Read and write training_data.json: how a model's training examples were made, as far as inference depends on it.

`prepare` writes it into the token cache. It is copied along with template.yaml: into the adapter, where `train` adds
its json_schema, and by export and merge into the checkpoint. `chat`, `evaluate` and `serve` read it.

    {"format": 1, "has_earlier_turns": false, "data_format": "auto", "source_column": "dialogue", ...}
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from t5tune.checkpoints.tensor_files.safetensors import SafetensorsFile, TensorEntry
from t5tune.checkpoints.tensor_files.tensors import Tensor
from t5tune.checkpoints.tensor_files.torch_file import read_state_dict
from t5tune.data.labels import LabelTask
from t5tune.errors import CheckpointError
from t5tune.families.encoder import ENCODERS
from t5tune.file_names import (
    ADAPTER_BIN_FILE,
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    CONFIG_FILE,
    TRAINING_DATA_FILE,
)
from t5tune.formatting import shorten
from t5tune.io.atomic import encode_json, write_file
from t5tune.io.reasons import join_first
from t5tune.io.untrusted import has_file, read_json_object
from t5tune.settings.groups.record_format import DataFormat, Objective, ReadingSettings
from t5tune.settings.messages import shorten_file_value

TRAINING_DATA_FORMAT = 1
TOKEN_CLASSIFICATION = "TOKEN_CLS"  # PEFT's name of the task of a model with labels
CLASS_SUFFIX = "ForTokenClassification"
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
        labels: None: the targets are texts.
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
        labels=made[0].labels,
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
        detail = error.errors()[0]
        problem = detail["msg"].partition(" at line")[0]  # a lone surrogate; the place isn't in the file
        if detail["loc"]:
            key = str(detail["loc"][0])
            problem = f"{key}: invalid value {shorten_file_value(values[key])}" if key in values else f"{key}: missing"
        raise CheckpointError(f"{path}: {problem}", hint="copy the file from the run folder again") from None


def read_label_task(folder: Path) -> LabelTask | None:
    """Read a model's labels; None: it has no head of labels.

    A model of a different tool labels each token. Its adapter has no names of labels, so they are LABEL_0, LABEL_1, …,
    as in transformers.

    Raises:
        CheckpointError: the files contradict each other, or the model predicts labels with its decoder.
    """
    if (data := read_training_data(folder)) is not None and data.labels is not None:
        return data.labels
    if has_file(folder, CONFIG_FILE):
        return _read_from_config(folder)
    if has_file(folder, ADAPTER_CONFIG_FILE):
        return _read_from_adapter(folder)
    return None


def _read_from_config(folder: Path) -> LabelTask | None:
    config = read_json_object(folder, CONFIG_FILE)
    architectures, kind = config.get("architectures"), config.get("model_type")
    if not isinstance(architectures, list) or not str([*architectures, ""][0]).endswith(CLASS_SUFFIX):
        return None
    # config.json of transformers' T5 may say so, too, although its class has no decoder
    if kind == "t5gemma" and config.get("is_encoder_decoder", True):
        problem = f"{folder / CONFIG_FILE}: {architectures[0]} with a decoder (is_encoder_decoder isn't false)"
        raise CheckpointError(problem, hint="t5tune predicts labels with the encoder alone")
    names = config.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})  # transformers' default
    if not isinstance(names, dict) or sorted(names) != sorted(map(str, range(len(names)))) or not names:
        problem = f"{folder / CONFIG_FILE}: id2label: {shorten(str(names))}: expected a name for each number from 0"
        raise CheckpointError(problem)
    return _make_task([str(names[str(number)]) for number in range(len(names))], config.get("problem_type"))


def _read_from_adapter(folder: Path) -> LabelTask | None:
    """Count the labels of an adapter that a different tool trained."""
    in_file = has_file(folder, ADAPTER_WEIGHTS_FILE)
    has_labels = read_json_object(folder, ADAPTER_CONFIG_FILE).get("task_type") == TOKEN_CLASSIFICATION
    if not has_labels or not (in_file or has_file(folder, ADAPTER_BIN_FILE)):
        return None
    tensors: Mapping[str, TensorEntry | Tensor] = (
        SafetensorsFile(folder / ADAPTER_WEIGHTS_FILE).entries
        if in_file
        else read_state_dict(folder / ADAPTER_BIN_FILE)
    )
    heads = tuple(f".{encoder.head}.weight" for encoder in ENCODERS.values())
    counts = [tensor.shape[0] for name, tensor in tensors.items() if name.endswith(heads) and tensor.shape]
    if len(counts) != 1:
        problem = f"{folder}: has no head of labels, although {ADAPTER_CONFIG_FILE} says {TOKEN_CLASSIFICATION}"
        raise CheckpointError(problem, hint="save it with PEFT's save_pretrained")
    return _make_task([f"LABEL_{number}" for number in range(counts[0])], None)


def _make_task(names: list[str], problem: Any) -> LabelTask:
    if problem == "regression" or len(names) == 1:
        return LabelTask("regress", True, False, (), "text")
    # other problem types have no effect: the loss of this class of transformers is for one label per token
    return LabelTask("tag", True, False, tuple(names), "text")


def check_same_labels(folder: Path, task: LabelTask | None, setting: str) -> None:
    """Check that an adapter or a base has a run's labels, in the same order. Errors name the `setting`.

    Of transformers' placeholders (LABEL_0, …), only the number is compared.

    Args:
        task: None: the run learns texts.
    """
    found = read_label_task(folder)
    if found == task or (found is not None and task is not None and _fit(found.names, task.names)):
        return
    theirs, ours = (describe_labels(each) for each in (found, task))
    problem = f"{setting}: {folder}: its labels are {theirs}, but the data's are {ours}"
    if found is None or task is None:
        problem = f"{setting}: {folder}: it predicts {theirs}, but this run learns {ours}"
    raise CheckpointError(problem, hint="use the labels in the same order (setting labels), or start from the base")


def _fit(names: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    return names in (wanted, tuple(f"LABEL_{number}" for number in range(len(wanted))))


def describe_labels(task: LabelTask | None) -> str:
    """Describe the outputs of a model: the names of its labels, `numbers` or `texts`."""
    return "texts" if task is None else join_first(task.names) if task.names else "numbers"
