"""Export, and read and compare the adapter folders that it writes."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from t5tune.commands.export import ExportResult, export
from t5tune.progress import Note
from t5tune.settings import ExportSettings


def run_export(checkpoint: Path, output: Path, notes: list[Note] | None = None, **changes: Any) -> ExportResult:
    settings = ExportSettings(checkpoint=checkpoint, output_dir=output, **changes)
    kept = [] if notes is None else notes
    return export(settings, lambda event: kept.append(event) if isinstance(event, Note) else None)


def assert_same(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(state) == sorted(expected)
    for name, value in expected.items():
        assert state[name].dtype == value.dtype, name
        assert torch.equal(state[name].view(torch.uint8), value.contiguous().view(torch.uint8)), name


def read_adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def list_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
