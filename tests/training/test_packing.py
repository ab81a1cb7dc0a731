"""Training with packed rows and with batches of a budget: the same step, whatever its layout, and exact resuming."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSeq2SeqLM, LongT5Config

from t5tune.commands.train import train
from t5tune.data.cache import open_cache
from t5tune.errors import SettingsError
from t5tune.progress import Event
from t5tune.settings import TrainSettings
from t5tune.training.build_model import _packs
from tests.conftest import Finished, make_base

NUM_DATA = 10


@pytest.fixture(scope="module")
def still_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with no dropout, so that steps can be compared."""
    folder = make_base(tmp_path_factory.mktemp("bases") / "still", tied=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dropout_rate": 0.0}))
    return folder


def settings(base: Path, data: Path, run: Path, **changes: Any) -> TrainSettings:
    values = {
        "model_name_or_path": str(base),
        "data_path": str(data),
        "output_dir": run,
        "max_steps": 2,
        "num_data": NUM_DATA,
        "per_device_train_batch_size": NUM_DATA,
        "lora_dropout": 0.0,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "use_cpu": True,
    }
    return TrainSettings(**{**values, **changes})


def steps(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def padded(still_base: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """(a run of two steps over all its examples, padded; the examples' tokens)"""
    run = tmp_path_factory.mktemp("runs") / "padded"
    train(settings(still_base, conversations, run, packing="off"))
    sources, targets = open_cache(run / "data").first(NUM_DATA).lengths()
    return run, int(sources.sum() + targets.sum())


LAYOUTS: dict[str, dict[str, Any]] = {
    "packed": {"packing": "on"},
    "packed accumulated": {"packing": "on", "tokens_per_batch": 0.75, "gradient_accumulation_steps": 2},
    "padded budget accumulated": {"packing": "off", "tokens_per_batch": 0.6, "gradient_accumulation_steps": 4},
    "packed checkpointed": {"packing": "on", "tokens_per_batch": 1.0, "gradient_checkpointing": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_the_same_in_every_layout(
    layout: str, still_base: Path, conversations: Path, padded: tuple[Path, int], tmp_path: Path
) -> None:
    changes = dict(LAYOUTS[layout])
    if "tokens_per_batch" in changes:
        changes["tokens_per_batch"] = int(changes["tokens_per_batch"] * padded[1])
    train(settings(still_base, conversations, tmp_path / "run", **changes))
    for found, expected in zip(steps(tmp_path / "run"), steps(padded[0]), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert found["epoch"] == expected["epoch"]


@pytest.mark.parametrize("way", [(), ("--deepspeed", "zero2"), ("--deepspeed", "zero3", "--gradient-checkpointing")])
def test_a_step_is_the_same_on_two_ranks(
    way: tuple[str, ...],
    still_base: Path,
    conversations: Path,
    padded: tuple[Path, int],
    tmp_path: Path,
    on_ranks: Callable[..., Finished],
) -> None:
    done = on_ranks(
        2, "train", "--model-name-or-path", still_base, "--data-path", conversations, "--output-dir", tmp_path / "run",
        "--num-data", NUM_DATA, "--max-steps", 2, "--learning-rate", 1e-3, "--lora-dropout", 0, "--logging-steps", 1,
        "--report-samples", 0, "--packing", "on", "--tokens-per-batch", int(0.75 * padded[1]), *way,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    for found, expected in zip(steps(tmp_path / "run"), steps(padded[0]), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


def test_every_step_of_an_epoch_is_the_same_on_one_rank_and_on_two(
    still_base: Path, conversations: Path, tmp_path: Path, on_ranks: Callable[..., Finished]
) -> None:
    """Packed by a budget: two micro-batches a step, behind each other or on two ranks."""
    common: dict[str, Any] = {"num_data": 24, "max_steps": 6, "packing": "on", "tokens_per_batch": 600}
    common |= {"optim": "sgd", "learning_rate": 0.1}  # Adam would make much of what is rounded otherwise
    train(settings(still_base, conversations, tmp_path / "alone", **common, gradient_accumulation_steps=2))
    flags = [word for name, value in common.items() for word in (f"--{name}", value)]
    done = on_ranks(
        2, "train", "--model-name-or-path", still_base, "--data-path", conversations, "--output-dir",
        tmp_path / "ranks", "--lora-dropout", 0, "--logging-steps", 1, "--report-samples", 0, *flags,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    alone, ranks = steps(tmp_path / "alone"), steps(tmp_path / "ranks")
    assert len(alone) == 6
    assert alone[1]["epoch"] < 1 <= alone[-1]["epoch"]
    for found, expected in zip(ranks, alone, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert found["epoch"] == expected["epoch"]


def test_label_smoothing_raises_the_loss_it_trains_on(
    still_base: Path, conversations: Path, padded: tuple[Path, int], tmp_path: Path
) -> None:
    train(settings(still_base, conversations, tmp_path / "run", max_steps=1, label_smoothing_factor=0.2))
    assert steps(tmp_path / "run")[0]["loss"] != pytest.approx(steps(padded[0])[0]["loss"], rel=1e-3)


@pytest.mark.parametrize("packing", ["on", "off"])
def test_budget_batches_resume_in_a_later_epoch_to_the_same_bits(
    packing: str, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    chosen = settings(
        untied_base, conversations, run, num_data=None, tokens_per_batch=1500, packing=packing, num_train_epochs=2,
        max_steps=None, save_strategy="no",
    )  # fmt: skip
    count = train(chosen).steps
    assert count % 2 == 0
    straight = (run / "adapter_model.safetensors").read_bytes()
    middle = count // 2 + 2
    chosen = chosen.model_copy(update={"save_strategy": "steps", "save_steps": middle, "fresh": True})
    train(chosen)
    _lose_the_end(run, middle)
    resumed = train(chosen.model_copy(update={"fresh": False}))
    assert resumed.resumed_from == run / f"checkpoint-{middle}"
    assert (run / "adapter_model.safetensors").read_bytes() == straight


def test_two_ranks_resume_in_a_later_epoch_to_the_same_bits(
    untied_base: Path, conversations: Path, tmp_path: Path, on_ranks: Callable[..., Finished]
) -> None:
    """Batches of a number of examples: accelerate wraps their sampler so often that Trainer can't tell it its epoch."""
    run = tmp_path / "run"
    arguments = [
        "train", "--model-name-or-path", untied_base, "--data-path", conversations, "--output-dir", run, "--num-data",
        24, "--per-device-train-batch-size", 4, "--max-steps", 6, "--save-steps", 4, "--json",
        "--learning-rate", 1e-2,
    ]  # fmt: skip
    assert on_ranks(2, *arguments).code == 0
    straight = (run / "adapter_model.safetensors").read_bytes()
    _lose_the_end(run, 4)
    again = on_ranks(2, *arguments)
    assert again.json["resumed_from"] == str(run / "checkpoint-4"), again.stderr
    assert (run / "adapter_model.safetensors").read_bytes() == straight


def _lose_the_end(run: Path, step: int) -> None:
    """As if the run had ended after a step's checkpoint."""
    for path in run.glob("checkpoint-*"):
        if path.name != f"checkpoint-{step}":
            shutil.rmtree(path)
    for name in ("result.json", "adapter_model.safetensors"):
        (run / name).unlink()


def test_a_family_that_cannot_pack_is_padded_and_told_so(tmp_path: Path) -> None:
    shape = {"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = AutoModelForSeq2SeqLM.from_config(LongT5Config(**shape))
    events: list[Event] = []
    chosen = settings(tmp_path, tmp_path, tmp_path)
    assert not _packs(chosen, model, events.append)
    (note,) = events
    assert "longt5 can't go through packed rows; batches are padded" in note.text
    with pytest.raises(SettingsError, match="packing: the attention of longt5"):
        _packs(chosen.model_copy(update={"packing": "on"}), model, events.append)
