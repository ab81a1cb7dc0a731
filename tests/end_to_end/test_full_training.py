"""Training of all weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

from t5tune.commands.export import export
from t5tune.commands.merge import merge
from t5tune.commands.train import train
from t5tune.errors import CheckpointError
from t5tune.runs.result import TrainResult
from t5tune.settings import ExportSettings, MergeSettings
from tests.end_to_end.lora_runs import loss_of, make_settings
from tests.support.models.adapters import load_stock_base, make_stock_adapter
from tests.support.models.bases import make_base
from tests.support.processes.command_line import CommandResult


def full(base: Path, data: Path, run: Path, **changes: Any) -> TrainResult:
    return train(make_settings(base, data, run, train_mode="full", **{"learning_rate": 1e-3, **changes}))


@pytest.mark.slow
def test_full_training_writes_a_checkpoint_that_stock_transformers_loads(
    base: Path, conversations: Path, tmp_path: Path
) -> None:
    before = load_file(base / "model.safetensors")
    result = full(base, conversations, tmp_path / "run", report_samples=2)
    after = load_file(tmp_path / "run" / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(not torch.equal(after[name], before[name]) for name in before)
    assert result.trainable_parameters == result.total_parameters
    assert result.eval["loss"] == pytest.approx(loss_of(tmp_path / "run", conversations, tmp_path / "out"), rel=1e-5)
    stock = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run").state_dict()
    assert all(torch.equal(stock[name], value) for name, value in after.items())
    tied = json.loads((tmp_path / "run" / "config.json").read_text())["tie_word_embeddings"]
    assert tied is ("lm_head.weight" not in before)


@pytest.mark.slow
@pytest.mark.parametrize("merged", [False, True])
def test_stock_transformers_loads_a_fully_trained_bf16_base_unrounded(
    merged: bool, conversations: Path, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", tied=True, dtype=torch.bfloat16)
    full(base, conversations, model := tmp_path / "run", max_steps=1, eval_data_path=None)
    expected = load_file(model / "model.safetensors")
    assert any(not torch.equal(value, value.bfloat16().float()) for value in expected.values())
    if merged:
        adapter = make_stock_adapter(model, tmp_path / "adapter")
        expected = PeftModel.from_pretrained(load_stock_base(model), adapter).merge_and_unload().state_dict()
        model = tmp_path / "merged"
        merge(MergeSettings(model_name_or_path=str(tmp_path / "run"), adapter=adapter, output_dir=model, verify=False))
    stock = AutoModelForSeq2SeqLM.from_pretrained(model).state_dict()
    names = load_file(model / "model.safetensors").keys()
    assert all(torch.equal(stock[name], expected[name]) for name in names)


@pytest.mark.slow
@pytest.mark.distributed
def test_full_training_gives_the_same_weights_under_zero3(
    untied_base: Path, conversations: Path, tmp_path: Path, on_ranks: Callable[..., CommandResult]
) -> None:
    common = (
        "train", "--model-name-or-path", untied_base, "--data-path", conversations, "--train-mode", "full",
        "--max-steps", "2", "--learning-rate", "1e-3", "--lora-dropout", "0", "--json", "--no-group-by-length",
        "--report-samples", "0",
    )  # fmt: skip
    ranks = on_ranks(2, *common, "--output-dir", tmp_path / "ranks", "--deepspeed", "zero3")
    alone = on_ranks(2, *common, "--output-dir", tmp_path / "ddp")
    assert ranks.code == alone.code == 0, ranks.stderr
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("ranks", "ddp"))
    assert a.keys() == b.keys()
    # dropout of 0.1 draws the same masks in both, but sums over ranks are rounded differently
    assert all(torch.allclose(a[name], b[name], atol=2e-3) for name in a)


def test_export_and_merge_refuse_a_run_of_full_training(untied_base: Path, conversations: Path, tmp_path: Path) -> None:
    full(untied_base, conversations, tmp_path / "run", max_steps=1)
    with pytest.raises(CheckpointError, match="no adapter"):
        export(ExportSettings(checkpoint=tmp_path / "run", output_dir=tmp_path / "out"))
    values = {"model_name_or_path": str(untied_base), "adapter": tmp_path / "run", "output_dir": tmp_path / "out"}
    with pytest.raises(CheckpointError, match="a whole model without an adapter"):
        merge(MergeSettings(**values))
