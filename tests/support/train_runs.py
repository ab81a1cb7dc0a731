"""Settings of short training runs on a tiny base, and what they log."""

import json
from pathlib import Path
from typing import Any

from t5tune.settings import TrainSettings


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
