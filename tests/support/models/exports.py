"""Read and compare the adapter folders that export writes."""

from pathlib import Path

import torch
from safetensors.torch import load_file


def assert_same(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(state) == sorted(expected)
    for name, value in expected.items():
        assert state[name].dtype == value.dtype, name
        assert torch.equal(state[name].view(torch.uint8), value.contiguous().view(torch.uint8)), name


def read_adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def list_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
