"""A run goes on with what it began with, or says what differs."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from t5tune.checkpoints import fingerprint, hash_cache
from t5tune.checkpoints.fingerprint import full_hash
from t5tune.checkpoints.safetensors import Checkpoint
from t5tune.commands.train import train
from t5tune.errors import CheckpointError, SettingsError, Stopped
from t5tune.io.atomic import sha256
from t5tune.progress import Advanced, Event, Note, Started
from tests.reliability.test_stopping import stop_at
from tests.support.runs import STEPS, adapter, settings


@pytest.fixture(scope="module")
def begun(untied_base: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint, of step 7."""
    run = tmp_path_factory.mktemp("begun") / "run"
    with pytest.raises(Stopped):
        train(settings(untied_base, conversations, run, save_steps=1000), stop_at(Advanced("train", 6)))
    return run


def files_of(run: Path) -> dict[str, str]:
    return {path.relative_to(run).as_posix(): sha256(path) for path in run.rglob("*") if path.is_file()}


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "LoRA's shape": ({"lora_r": 4}, "lora_r: 8 in .*checkpoint-7, 4 now"),
    "its targets": ({"lora_target_modules": ["q"]}, r'lora_target_modules: \["q", "v"\] in .*, \["q"\] now'),
    "dtype": ({"bf16": True}, "bf16: false in .*, true now"),
    "quantisation": ({"q_lora": True}, "q_lora: false in .*, true now"),
    "batch": ({"per_device_train_batch_size": 4}, "batch: 2 in .*, 4 now"),
    "dropout": ({"lora_dropout": 0.1}, "lora_dropout: 0.05 in .*, 0.1 now"),
    "schedule": ({"lr_scheduler_type": "cosine"}, 'lr_scheduler_type: "linear" in .*, "cosine" now'),
    "its length": ({"max_steps": 30}, "max_steps: 24 in .*, 30 now"),
    "seed": ({"seed": 7}, "seed: 42 in .*, 7 now"),
    "order": ({"group_by_length": False}, "group_by_length: true in .*, false now"),
    "template": ({"conversation_template": "plain"}, 'template: "[0-9a-f]{64}" in .*, "[0-9a-f]{64}" now'),
    "lengths": ({"model_max_length": 16}, "model_max_length: 2048 in .*, 16 now"),
    "number of examples": ({"num_data": 20}, "num_data: null in .*, 20 now"),
    "held-out share": ({"eval_fraction": 0.2}, "eval_fraction: 0.0 in .*, 0.2 now"),
    "optimizer": ({"training_args": {"adam_beta2": 0.9}}, r"training_args: \{\} in .*"),
    "ranks": ({"deepspeed": "zero2"}, "1 process without DeepSpeed; 1 process of ZeRO-2 can't go on"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_setting_is_refused_with_both_values(
    what: str, begun: Path, untied_base: Path, conversations: Path
) -> None:
    changes, told = CHANGES[what]
    before = files_of(begun)
    with pytest.raises((SettingsError, CheckpointError), match=told) as refused:
        train(settings(untied_base, conversations, begun, **changes))
    assert refused.value.exit_code == 2
    assert "--allow-change" in (refused.value.hint or "") or "t5tune export" in (refused.value.hint or "")
    assert files_of(begun) == before


def test_other_data_and_another_base_are_refused_by_their_hashes(
    begun: Path, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    lines = conversations.read_text().splitlines()
    (tmp_path / conversations.name).write_text("\n".join(lines[:-1]) + "\n")
    before = files_of(begun)
    with pytest.raises(SettingsError, match='data: .*"sha256": '):
        train(settings(untied_base, tmp_path / conversations.name, begun))
    shutil.copytree(untied_base, tmp_path / "base")
    weights = load_file(untied_base / "model.safetensors")
    weights["decoder.final_layer_norm.weight"][3] += 1e-3
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SettingsError, match='base: "sha256:.*" in .*, "sha256:.*" now'):
        train(settings(tmp_path / "base", conversations, begun))
    assert files_of(begun) == before


def test_a_base_is_hashed_once_and_again_when_a_file_of_it_was_touched(
    untied_base: Path, conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, run, hashed = tmp_path / "base", tmp_path / "run", []

    def count(checkpoint: Checkpoint) -> str:
        hashed.append(checkpoint.folder)
        return full_hash(checkpoint)

    monkeypatch.setattr(fingerprint, "full_hash", count)
    shutil.copytree(untied_base, base)
    file = base / "model.safetensors"

    def go_on() -> int:
        """How often the whole base was read."""
        hashed.clear()
        with pytest.raises(Stopped):
            train(settings(base, conversations, run), stop_at(Started("train", STEPS, "steps")))
        return len(hashed)

    assert go_on() == 1  # so new that a change might not show: not remembered
    assert not (run / "base.json").exists()
    monkeypatch.setattr(hash_cache, "SECONDS_TO_SETTLE", -1.0)
    assert [go_on(), go_on()] == [1, 0]
    changed, times = bytearray(file.read_bytes()), file.stat()
    changed[-20_000] ^= 1  # in the middle of a tensor, where the fingerprint doesn't look
    file.write_bytes(changed)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint.fingerprint(Checkpoint(base)) == fingerprint.fingerprint(Checkpoint(untied_base))
    with pytest.raises(SettingsError, match='base: "sha256:.*" in .*, "sha256:.*" now'):
        train(settings(base, conversations, run))
    shutil.copy2(untied_base / file.name, file)
    (run / "base.json").write_text("[]")
    assert [go_on(), go_on()] == [1, 0]


def test_a_change_on_purpose_is_told_and_sealed(
    begun: Path, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(begun, run)
    changed = settings(untied_base, conversations, run, learning_rate=5e-3, model_max_length=64)
    with pytest.raises(SettingsError, match="allow_change: learnin_rate: no such field.*learning_rate"):
        train(changed.model_copy(update={"allow_change": ["data", "model_max_length", "learnin_rate"]}))
    with pytest.raises(SettingsError, match=r"^learning_rate: 0.01 in [^\n]*$"):
        train(changed.model_copy(update={"allow_change": ["data", "model_max_length"]}))
    told: list[str] = []

    def report(event: Event) -> None:
        if isinstance(event, Note):
            told.append(event.text)

    with pytest.raises(Stopped):
        train(
            changed.model_copy(update={"allow_change": ["data", "model_max_length", "learning_rate"]}),
            lambda event: [report(event), stop_at(Advanced("train", 9))(event)],  # type: ignore[arg-type, return-value]
        )
    assert sum(text.startswith("changed on purpose: ") for text in told) == 3
    assert train(changed).resumed_from == run / "checkpoint-10"


def test_the_same_run_goes_on(begun: Path, untied_base: Path, conversations: Path, straight: bytes) -> None:
    # however the batch is divided, and whatever else has no part in the weights
    chosen = settings(untied_base, conversations, begun, logging_steps=5, save_steps=3, dataloader_num_workers=1)
    assert train(chosen).steps == STEPS
    assert adapter(begun) == straight


def test_shards_of_other_ranks_are_refused_with_the_command_that_helps(
    zero3_run: Path, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(zero3_run, run)
    (run / "result.json").unlink()
    chosen = settings(untied_base, conversations, run, deepspeed="zero3", gradient_accumulation_steps=2)
    with pytest.raises(CheckpointError, match="2 processes of ZeRO-3; 1 process of ZeRO-3 can't go on") as refused:
        train(chosen)
    assert refused.value.exit_code == 2
    assert f"t5tune export {run / f'checkpoint-{STEPS}'}" in (refused.value.hint or "")
    assert json.loads((run / f"checkpoint-{STEPS}" / "t5tune_manifest.json").read_text())["made_of"]["batch"] == 4
