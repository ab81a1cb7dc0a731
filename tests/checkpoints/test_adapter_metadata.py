"""The description of the base in an adapter's file."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from t5tune.checkpoints.adapter import read_base_metadata, read_training_precision
from t5tune.errors import CheckpointError


def write(folder: Path, metadata: dict[str, str]) -> Path:
    save_file({"lora_A": torch.ones(1)}, folder / "adapter_model.safetensors", metadata)
    return folder


def test_an_adapter_of_a_different_tool_has_no_metadata(tmp_path: Path) -> None:
    assert read_base_metadata(tmp_path) == {}
    assert read_base_metadata(write(tmp_path, {"format": "pt"})) == {}


def test_metadata_by_t5tune_is_read(tmp_path: Path) -> None:
    found = {"base": "google/flan-t5-base", "bf16": True, "onto": "nf4"}
    text = '{"base": "google/flan-t5-base", "bf16": true, "onto": "nf4"}'
    assert read_base_metadata(write(tmp_path, {"format": "pt", "t5tune": text})) == found


@pytest.mark.parametrize("text", ["{", "[]", '{"base": 1}', '{"onto": "nf5"}', '{"base": "a", "base": "b"}'])
def test_broken_metadata_is_refused(tmp_path: Path, text: str) -> None:
    """Otherwise merge wouldn't compare the base with the trained base."""
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: metadata about its base: "):
        read_base_metadata(write(tmp_path, {"t5tune": text}))


def test_invalid_metadata_of_the_precision_is_ignored(tmp_path: Path) -> None:
    write(tmp_path, {"t5tune": '{"onto": "fp4", "double_quant": false, "quantize_wo": "no"}'})
    assert read_training_precision(tmp_path) == {"q_lora": True, "quant_type": "fp4", "double_quant": False}
