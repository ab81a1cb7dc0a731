"""Which labels a model predicts, by the files of stock transformers and stock PEFT, or of files that contradict."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from t5tune.checkpoints.training_data import read_label_task
from t5tune.errors import CheckpointError
from tests.support.models.label_models import TASKS, encode_labels, make_stock_label_adapter

NAMES = {"0": "O", "1": "B-PER", "2": "I-PER"}


def write_config(folder: Path, **values: Any) -> Path:
    config = {"model_type": "t5", "architectures": ["T5ForTokenClassification"], "id2label": NAMES}
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


def test_a_stock_checkpoint_tags_tokens(tmp_path: Path) -> None:
    task = read_label_task(write_config(tmp_path))
    assert task is not None
    assert (task.objective, task.per_token, task.several, task.names) == ("tag", True, False, ("O", "B-PER", "I-PER"))
    numbers = read_label_task(write_config(tmp_path, id2label={"0": "LABEL_0"}, problem_type="regression"))
    assert numbers is not None
    assert (numbers.objective, numbers.names) == ("regress", ())
    assert read_label_task(write_config(tmp_path, architectures=["T5ForConditionalGeneration"])) is None
    (tmp_path / "training_data.json").write_bytes(encode_labels(TASKS["several"]))
    assert read_label_task(tmp_path) == TASKS["several"]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"model_type": "t5gemma"}, "with a decoder"),
        ({"id2label": {"0": "A", "2": "B"}}, "id2label: .*expected a name for each number from 0"),
        ({"id2label": {}}, "id2label: {}"),
        ({"id2label": "A"}, "id2label: A"),
    ],
)
def test_files_that_contradict_are_refused(values: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=problem):
        read_label_task(write_config(tmp_path, **values))


def test_the_head_of_a_stock_adapter_counts_its_labels(untied_base: Path, tmp_path: Path) -> None:
    adapter = make_stock_label_adapter(untied_base, tmp_path / "adapter", TASKS["tag"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    task = read_label_task(adapter)
    assert task is not None
    assert task.names == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3", "LABEL_4")
    save_file({"base_model.model.x": torch.ones(1)}, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="has no head of labels, although"):
        read_label_task(adapter)
