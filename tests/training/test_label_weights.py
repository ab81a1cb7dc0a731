"""Checkpoints of models with labels: a head that learns standardized numbers is saved for the user's numbers."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForTokenClassification

from t5tune.commands.train.run_plan import make_run_plan
from t5tune.data.labels import LabelTask
from t5tune.errors import CheckpointError
from t5tune.progress import silent
from t5tune.training.build_model import BuiltModel, build_model
from tests.support.models.adapters import make_stock_adapter, randomize
from tests.support.models.label_models import NAMES, TASKS, load_stock_labels, make_label_adapter
from tests.support.train_runs import make_settings

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8, 1]])
SCALE = (8.0, 20.0)


def build(base: Path, task: LabelTask | None, scale: tuple[float, float] = SCALE, **changes: Any) -> BuiltModel:
    """Build the model of a run on data with these labels."""
    manifest = {"added_token_ids": [], "examples": 1, "conversations": 1, "source_tokens": 5, "target_tokens": 0}
    examples = SimpleNamespace(
        manifest=manifest, label_task=task, compute_label_scale=lambda: scale, tokenizer_folder=base
    )
    loaded: Any = SimpleNamespace(base=base, base_metadata={}, examples=examples, files={}, deepspeed=None)
    objective = {"objective": task.objective} if task is not None else {}
    settings = make_settings(base, Path("-"), Path("run"), bf16=False, **objective, **changes)
    return build_model(make_run_plan(settings).model, loaded, settings.model_dump(), CPU, silent)


def save(built: BuiltModel, folder: Path) -> Path:
    built.weights.write(folder, built.weights.collect(built.model, built.model, keeps=True))
    return folder


def predict(built: BuiltModel) -> torch.Tensor:
    with torch.inference_mode():
        return built.model.eval()(IDS)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_numbers_are_saved_in_the_units_of_the_user(mode: str, untied_base: Path, tmp_path: Path) -> None:
    built = build(untied_base, TASKS["regress"], train_mode=mode)
    assert predict(built).tolist() == [[20 / 8]]
    randomize(built.model)
    saved = save(built, tmp_path / "saved")
    if mode == "lora":
        stock = PeftModel.from_pretrained(load_stock_labels(untied_base, TASKS["regress"]), saved).eval()
    else:
        stock = AutoModelForTokenClassification.from_pretrained(saved).eval()
        assert json.loads((saved / "config.json").read_text())["problem_type"] == "regression"
    with torch.inference_mode():
        torch.testing.assert_close(8 * predict(built), stock(IDS).logits.mean(1), rtol=1e-4, atol=1e-4)
    again = build(untied_base, TASKS["regress"], train_mode=mode)
    again.weights.load(saved, again.model)
    found = dict(again.model.named_parameters())
    assert all(torch.equal(value, found[name]) for name, value in built.model.named_parameters())


def test_an_initial_adapter_predicts_the_same_numbers(untied_base: Path, tmp_path: Path) -> None:
    first = build(untied_base, TASKS["regress"])
    randomize(first.model)
    saved = save(first, tmp_path / "saved")
    second = build(untied_base, TASKS["regress"], scale=(0.25, -3.0), adapter=saved)
    torch.testing.assert_close(predict(second) * 0.25, predict(first) * 8)


def test_a_fully_trained_model_is_trained_further(untied_base: Path, tmp_path: Path) -> None:
    first = build(untied_base, TASKS["regress"], train_mode="full")
    randomize(first.model)
    saved = save(first, tmp_path / "saved")
    second = build(saved, TASKS["regress"], scale=(0.25, -3.0), train_mode="full")
    torch.testing.assert_close(predict(second) * 0.25, predict(first) * 8)


@pytest.mark.slow
def test_an_initial_adapter_needs_the_labels_of_the_data(untied_base: Path, tmp_path: Path) -> None:
    labels = make_label_adapter(untied_base, tmp_path / "labels", TASKS["classify"])
    texts = make_stock_adapter(untied_base, tmp_path / "texts")
    changes = {"lora_r": 4, "lora_alpha": 16}
    kept = build(untied_base, TASKS["tag"], adapter=labels, **changes).model.classifier.weight
    assert kept.any()
    other = replace(TASKS["classify"], names=("Golgi", *NAMES[:3]))
    for task, adapter, problem in (
        (other, labels, "its labels are Nucleus, Cytoplasm, Membrane, .*but the data's are Golgi, Nucleus"),
        (TASKS["classify"], texts, "it predicts texts, but this run learns Nucleus"),
        (None, labels, "it predicts Nucleus, .*but this run learns texts"),
    ):
        with pytest.raises(CheckpointError, match=f"adapter: {adapter}: {problem}"):
            build(untied_base, task, adapter=adapter, **changes)
