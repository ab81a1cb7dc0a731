"""Adapters to merge, and how."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from t5tune.commands.merge import MergeResult, merge
from t5tune.progress import Report, silent
from t5tune.settings import MergeSettings

PREFIX = "base_model.model."


def run_merge(base: Path, adapter: Any, output: Path, report: Report = silent, **changes: Any) -> MergeResult:
    return merge(MergeSettings(model_name_or_path=str(base), adapter=adapter, output_dir=output, **changes), report)


def list_folder(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def read_weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def change_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        state = load_file(folder / "adapter_model.safetensors")
        change(state)
        save_file(state, folder / "adapter_model.safetensors")

    return apply
