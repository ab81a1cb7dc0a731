"""Runs of LoRA and its variants."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from t5tune.commands.evaluate import evaluate
from t5tune.settings import EvaluateSettings, TrainSettings
from tests.support import train_runs

NORMS = ["layer_norm", "relative_attention_bias"]  # the first one also names every final_layer_norm


def make_settings(base: Path, data: Path, run: Path, **changes: Any) -> TrainSettings:
    """Make the settings of a run that evaluates on the data that it trains on."""
    return train_runs.make_settings(base, data, run, **{"eval_data_path": str(data), "logging_steps": 10, **changes})


def loss_of(model: Path, data: Path, output: Path, **changes: Any) -> float:
    values = {"model_name_or_path": str(model), "data_path": str(data), "output_dir": output, "use_cpu": True}
    return evaluate(EvaluateSettings(**values, max_new_tokens=1, **changes)).loss


def trained_adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter_model.safetensors")
