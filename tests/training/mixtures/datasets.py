"""Datasets that tests mix."""

from pathlib import Path
from typing import Any

from t5tune.settings import PrepareSettings, TrainSettings

SIZES = {"sums": 40, "notes": 12, "chats": 16}  # examples; a chat has two


def list_datasets(data: Path, weights: tuple[float, ...] | None = (2, 1, 1)) -> list[dict[str, Any]]:
    columns = {"source_column": "text", "target_column": "summary", "source_prefix": "summarize: "}
    datasets = [
        {"path": str(data / "sums.jsonl")},
        {"path": str(data / "notes.csv"), **columns, "conversation_template": "plain"},
        {"path": str(data / "talk.json"), "name": "chats", "conversation_template": "fastchat-t5"},
    ]
    if weights is None:
        return datasets
    return [{**dataset, "weight": weight} for dataset, weight in zip(datasets, weights, strict=True)]


def make_settings(base: Path, data: Path, run: Path, /, **changes: Any) -> TrainSettings:
    values = {
        "model_name_or_path": str(base), "output_dir": run, "num_train_epochs": 2,
        "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 5, "report_samples": 0,
        "use_cpu": True, "conversation_template": None if "data_path" in changes else "plain",
    }  # fmt: skip
    datasets = {} if "data_path" in changes else {"data": list_datasets(data)}
    return TrainSettings(**{**values, **datasets, **changes})


def make_prepare_settings(base: Path, data: Path, folder: Path, /, **changes: Any) -> PrepareSettings:
    datasets = {} if "data_path" in changes else {"data": list_datasets(data)}
    return PrepareSettings(**{"model_name_or_path": str(base), **datasets, "output_dir": folder, **changes})


def read_tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
