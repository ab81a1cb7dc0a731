"""Packed and token-budget batches: a step is the same whatever the batch layout, and resuming is exact."""

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSeq2SeqLM, BartConfig

from t5tune.commands.train import train
from t5tune.errors import SettingsError
from t5tune.progress import Event
from t5tune.training.build_model import _enable_packing
from tests.support import train_runs
from tests.support.caches import open_only
from tests.support.processes.command_line import OnRanks
from tests.support.train_runs import read_steps

NUM_DATA = 10


make_settings = functools.partial(
    train_runs.make_settings,
    max_steps=2,
    num_data=NUM_DATA,
    per_device_train_batch_size=NUM_DATA,
    lora_dropout=0.0,
    learning_rate=1e-3,
    save_steps=500,
)


@pytest.fixture(scope="module")
def padded(
    base_without_dropout: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int]:
    """A run of two padded steps, each over all examples, and the number of the examples' tokens."""
    run = tmp_path_factory.mktemp("runs") / "padded"
    train(make_settings(base_without_dropout, conversations, run, packing="off"))
    sources, targets = open_only(run / "data").take(NUM_DATA).read_lengths()
    return run, int(sources.sum() + targets.sum())


LAYOUTS: dict[str, dict[str, Any]] = {
    "packed": {"packing": "on"},
    "packed accumulated": {"packing": "on", "tokens_per_batch": 0.75, "gradient_accumulation_steps": 2},
    "padded budget accumulated": {"packing": "off", "tokens_per_batch": 0.6, "gradient_accumulation_steps": 4},
    "packed checkpointed": {"packing": "on", "tokens_per_batch": 1.0, "gradient_checkpointing": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_the_same_in_every_batch_layout(
    layout: str, base_without_dropout: Path, conversations: Path, padded: tuple[Path, int], tmp_path: Path
) -> None:
    changes = dict(LAYOUTS[layout])
    if "tokens_per_batch" in changes:
        changes["tokens_per_batch"] = int(changes["tokens_per_batch"] * padded[1])
    train(make_settings(base_without_dropout, conversations, tmp_path / "run", **changes))
    for found, expected in zip(read_steps(tmp_path / "run"), read_steps(padded[0]), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert found["epoch"] == expected["epoch"]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("way", [(), ("--deepspeed", "zero2"), ("--deepspeed", "zero3", "--gradient-checkpointing")])
@pytest.mark.variants("way0", "way2")
def test_a_step_is_the_same_on_two_ranks(
    way: tuple[str, ...],
    base_without_dropout: Path,
    conversations: Path,
    padded: tuple[Path, int],
    tmp_path: Path,
    on_ranks: OnRanks,
) -> None:
    done = on_ranks(
        2, "train", "--model-name-or-path", base_without_dropout, "--data-path", conversations,
        "--output-dir", tmp_path / "run", "--num-data", NUM_DATA, "--max-steps", 2, "--learning-rate", 1e-3,
        "--lora-dropout", 0, "--logging-steps", 1, "--report-samples", 0, "--packing", "on",
        "--tokens-per-batch", int(0.75 * padded[1]), *way,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    for found, expected in zip(read_steps(tmp_path / "run"), read_steps(padded[0]), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


def test_label_smoothing_is_in_the_loss_it_trains_on(
    base_without_dropout: Path, conversations: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(make_settings(base_without_dropout, conversations, run, max_steps=1, label_smoothing_factor=0.2))
    model = AutoModelForSeq2SeqLM.from_pretrained(base_without_dropout, dtype=torch.float32)
    total, count = 0.0, 0
    cache = open_only(run / "data")
    for index in range(NUM_DATA):
        source, target = (torch.from_numpy(ids)[None] for ids in (cache[index].source_S, cache[index].target_T))
        logits = model(input_ids=source, labels=target).logits[0]
        total += cross_entropy(logits, target[0], reduction="sum", label_smoothing=0.2).item()
        count += target.numel()
    assert read_steps(run)[0]["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.variants("on")
def test_budget_batches_resume_in_a_later_epoch_to_equal_bits(packing: str, inputs: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    chosen = make_settings(
        *inputs, run, num_data=None, tokens_per_batch=1500, packing=packing, num_train_epochs=2,
        max_steps=None, save_strategy="no",
    )  # fmt: skip
    count = train(chosen).steps
    assert count % 2 == 0
    uninterrupted = (run / "adapter_model.safetensors").read_bytes()
    middle = count // 2 + 2
    chosen = chosen.model_copy(update={"save_strategy": "steps", "save_steps": middle, "fresh": True})
    train(chosen)
    _delete_after_step(run, middle)
    resumed = train(chosen.model_copy(update={"fresh": False}))
    assert resumed.resumed_from == run / f"checkpoint-{middle}"
    assert (run / "adapter_model.safetensors").read_bytes() == uninterrupted


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_resume_in_a_later_epoch_to_equal_bits(
    untied_base: Path, conversations: Path, tmp_path: Path, on_ranks: OnRanks
) -> None:
    """With a fixed number of examples, accelerate wraps the sampler so deeply that the Trainer can't set its epoch."""
    run = tmp_path / "run"
    arguments = [
        "train", "--model-name-or-path", untied_base, "--data-path", conversations, "--output-dir", run, "--num-data",
        24, "--per-device-train-batch-size", 4, "--max-steps", 6, "--save-steps", 4, "--json",
        "--learning-rate", 1e-2, "--report-samples", 0,
    ]  # fmt: skip
    assert on_ranks(2, *arguments).code == 0
    uninterrupted = (run / "adapter_model.safetensors").read_bytes()
    _delete_after_step(run, 4)
    again = on_ranks(2, *arguments)
    assert again.json["resumed_from"] == str(run / "checkpoint-4"), again.stderr
    assert (run / "adapter_model.safetensors").read_bytes() == uninterrupted


def _delete_after_step(run: Path, step: int) -> None:
    """Delete files as if the run had ended after a step's checkpoint."""
    for path in run.glob("checkpoint-*"):
        if path.name != f"checkpoint-{step}":
            shutil.rmtree(path)
    for name in ("result.json", "adapter_model.safetensors"):
        (run / name).unlink()


def test_a_model_without_packing_uses_padded_batches_with_a_note(tmp_path: Path) -> None:
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = AutoModelForSeq2SeqLM.from_config(BartConfig(vocab_size=64, d_model=16, **layers))
    events: list[Event] = []
    chosen = make_settings(tmp_path, tmp_path, tmp_path)
    assert not _enable_packing(chosen, model, events.append)
    (note,) = events
    assert "bart doesn't support packing; using padded batches" in note.text
    with pytest.raises(SettingsError, match="packing: on: the attention of bart"):
        _enable_packing(chosen.model_copy(update={"packing": "on"}), model, events.append)
