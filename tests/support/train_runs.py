"""Settings of short training runs on a tiny base, and what they log."""

import json
from pathlib import Path
from typing import Any

import yaml

from t5tune.settings import TrainSettings
from tests.support.processes.command_line import OnRanks


def make_settings(base: Path, data: Path, run: Path, **changes: Any) -> TrainSettings:
    """Make the settings of a run of six steps on the CPU, logged at each step, saved at each third, without samples."""
    values = {
        "model_name_or_path": str(base),
        "data_path": str(data),
        "output_dir": run,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_steps": 3,
        "use_cpu": True,
        "report_samples": 0,  # their predictions take three times as long as the steps
    }
    return TrainSettings(**{**values, **changes})


def read_metrics_lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def read_steps(run: Path) -> list[dict[str, float]]:
    """Read the lines of steps, without those of evaluations."""
    return [line for line in read_metrics_lines(run) if "loss" in line]


def read_losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_steps(run)]


def write_config(settings: TrainSettings, file: Path) -> Path:
    """Write the given settings to a YAML file for `--config`."""
    left_out = {"data_path"} if settings.data else set[str]()
    file.write_text(yaml.safe_dump(settings.model_dump(mode="json", exclude_unset=True, exclude=left_out)))
    return file


def run_recorded(on_ranks: OnRanks, ranks: int, settings: TrainSettings, folder: Path) -> dict[int, list[list[int]]]:
    """Run in this many processes, and return the targets of each step's examples."""
    from tests.support.ranks.records import read_recorded  # imports torch

    folder.mkdir()
    config = write_config(settings, folder.with_suffix(".yaml"))
    record = f"tests.support.ranks.records:record_to({str(folder)!r})"
    done = on_ranks(ranks, "train", "--config", config, calls=[record])
    assert done.code == 0, done.stderr[-3000:]
    return read_recorded(folder)
