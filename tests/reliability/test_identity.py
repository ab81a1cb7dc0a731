"""A run resumes with the configuration it was started with, or the error says what differs."""

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from t5tune.checkpoints import fingerprint
from t5tune.checkpoints.base_tensors import Checkpoint
from t5tune.checkpoints.fingerprint import compute_full_hash
from t5tune.commands.prepare import prepare
from t5tune.commands.train import train
from t5tune.commands.train.run_plan import make_run_plan
from t5tune.data.caches.prepared import read_examples_manifest
from t5tune.errors import CheckpointError, DataError, SettingsError, Stopped
from t5tune.progress import Advanced, Event, Note, Started
from t5tune.runs import resume_guard
from t5tune.runs.checkpoints import read_run_identity
from t5tune.runs.folder import RunFolder
from t5tune.runs.metrics_log import read_metrics
from t5tune.runs.resume_guard import SHARDING_FIELDS, check_run_identity, describe_other_ranks
from t5tune.settings import PrepareSettings
from t5tune.settings.packaged_templates import read_deepspeed_config
from tests.support.caches import find_cache
from tests.support.processes.command_line import OnRanks
from tests.support.processes.forks import ForkServer
from tests.support.processes.runs import STEPS, hash_files, make_arguments, make_settings, read_adapter, stop_at

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def begun_run(inputs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stopped run with one checkpoint, of step 7."""
    run = tmp_path_factory.mktemp("begun") / "run"
    with pytest.raises(Stopped):
        train(make_settings(*inputs, run, save_steps=1000), stop_at(Advanced("train", 6)))
    return run


PLAN = make_run_plan(make_settings(Path("pocket"), Path("pocket"), Path("run")))


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "LoRA's shape": ({"lora_r": 4}, "lora_r: 8 before, 4 now"),
    "its targets": ({"lora_target_modules": ["q"]}, r'lora_target_modules: \["q", "v"\] before, \["q"\] now'),
    "dtype": ({"bf16": True}, "bf16: false before, true now"),
    "quantization": ({"q_lora": True}, "q_lora: false before, true now"),
    "batch": ({"per_device_train_batch_size": 4}, "batch: 2 before, 4 now; per_device_train_batch_size 2 makes it 2"),
    "dropout": ({"lora_dropout": 0.1}, "lora_dropout: 0.05 before, 0.1 now"),
    "learning rate": ({"learning_rate": 5e-3}, "learning_rate: 0.01 before, 0.005 now"),
    "weight decay": ({"weight_decay": 0.5, "max_steps": 30}, "weight_decay: 0.0 before, 0.5 now"),
    "schedule": ({"lr_scheduler_type": "cosine"}, 'lr_scheduler_type: "linear" before, "cosine" now'),
    "its length": ({"max_steps": 30}, "max_steps: 24 before, 30 now"),
    "seed": ({"seed": 7}, "seed: 42 before, 7 now"),
    "order": ({"group_by_length": False}, "group_by_length: true before, false now"),
    "template": ({"conversation_template": "plain"}, 'template: "[0-9a-f]{64}" before, "[0-9a-f]{64}" now'),
    "lengths": ({"model_max_length": 16}, "model_max_length: 2048 before, 16 now"),
    "number of examples": ({"num_data": 20}, "num_data: null before, 20 now"),
    "held-out share": ({"eval_fraction": 0.2}, "eval_fraction: 0.0 before, 0.2 now"),
    "optimizer": ({"training_args": {"adam_beta2": 0.9}}, r"training_args: \{\} before, "),
    "ranks": ({"deepspeed": "zero2"}, "1 process without DeepSpeed; 1 process with ZeRO-2 can't resume"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_setting_is_refused_with_both_values(what: str, begun_run: Path, inputs: list[Path]) -> None:
    changes, message = CHANGES[what]
    before = hash_files(begun_run)
    with pytest.raises((SettingsError, CheckpointError), match=message) as refused:
        train(make_settings(*inputs, begun_run, **changes))
    assert refused.value.exit_code == 2
    hint, checkpoint = refused.value.hint or "", begun_run / "checkpoint-7"
    assert f"--adapter {checkpoint} and a new output_dir" in hint or f"t5tune export {checkpoint}" in hint
    assert ("add --allow-change max_steps; " in hint) == (what == "its length")
    assert hash_files(begun_run) == before


def test_other_data_and_another_base_are_refused_by_their_hashes(
    begun_run: Path, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    lines = conversations.read_text().splitlines()
    (tmp_path / conversations.name).write_text("\n".join(lines[:-1]) + "\n")
    before = hash_files(begun_run)
    with pytest.raises(SettingsError, match=r"data: conversations\.jsonl: the content has changed"):
        train(make_settings(untied_base, tmp_path / conversations.name, begun_run))
    shutil.copytree(untied_base, tmp_path / "base")
    weights = load_file(untied_base / "model.safetensors")
    weights["decoder.final_layer_norm.weight"][3] += 1e-3
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SettingsError, match='base: "sha256:.*" before, "sha256:.*" now'):
        train(make_settings(tmp_path / "base", conversations, begun_run))
    assert hash_files(begun_run) == before


def test_a_run_resumes_with_the_files_of_its_cache(untied_base: Path, conversations: Path, tmp_path: Path) -> None:
    """The cache has prepare's seed, and the run a different seed. This must not matter if nothing is held out."""
    cache, run = tmp_path / "cache", tmp_path / "run"
    prepare(PrepareSettings(model_name_or_path=str(untied_base), data_path=str(conversations), output_dir=cache))
    with pytest.raises(Stopped):
        train(make_settings(untied_base, cache, run), stop_at(Advanced("train", 2)))
    assert train(make_settings(untied_base, conversations, run)).resumed_from == run / "checkpoint-3"
    seeds = [json.loads((find_cache(folder) / "manifest.json").read_text())["seed"] for folder in (cache, run / "data")]
    assert seeds == [42, 0]


def test_a_base_is_hashed_again_only_after_a_change(
    untied_base: Path, conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, run, hashed = tmp_path / "base", tmp_path / "run", []

    def count(checkpoint: Checkpoint) -> str:
        hashed.append(checkpoint.folder)
        return compute_full_hash(checkpoint)

    monkeypatch.setattr(fingerprint, "compute_full_hash", count)
    shutil.copytree(untied_base, base)
    file = base / "model.safetensors"

    def resume_and_count_reads() -> int:
        """Resume the run, and count how often the whole base is read."""
        hashed.clear()
        with pytest.raises(Stopped):
            train(make_settings(base, conversations, run), stop_at(Started("train", STEPS, "steps")))
        return len(hashed)

    # not cached: the file is so new that a later change might leave its timestamp as it is
    monkeypatch.setattr(fingerprint, "SECONDS_TO_SETTLE", 3600.0)
    assert resume_and_count_reads() == 1
    assert "base" not in RunFolder(run).read_record()
    monkeypatch.setattr(fingerprint, "SECONDS_TO_SETTLE", -1.0)
    assert [resume_and_count_reads(), resume_and_count_reads()] == [1, 0]
    changed, times = bytearray(file.read_bytes()), file.stat()
    changed[-20_000] ^= 1  # in the middle of a tensor, which the fingerprint doesn't sample
    file.write_bytes(changed)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint.compute_fingerprint(Checkpoint(base)) == fingerprint.compute_fingerprint(Checkpoint(untied_base))
    with pytest.raises(SettingsError, match='base: "sha256:.*" before, "sha256:.*" now'):
        train(make_settings(base, conversations, run))
    shutil.copy2(untied_base / file.name, file)
    for damage in ("[]", '{"format": 1, "base": ', '{"format": 1, "base": 5, "commits": [], "launch": {}}'):
        (run / "run.json").write_text(damage)
        assert resume_and_count_reads() == 1
    (run / "run.json").unlink()
    assert [resume_and_count_reads(), resume_and_count_reads()] == [1, 0]


@pytest.mark.parametrize("train_mode", ["lora", "full"])
def test_the_suggested_flag_starts_a_new_run_from_the_weights(
    train_mode: str, untied_base: Path, conversations: Path, tmp_path: Path, on_ranks: OnRanks
) -> None:
    run = tmp_path / "run"
    settings = make_settings(untied_base, conversations, run, train_mode=train_mode, save_steps=1000, dropout=False)
    with pytest.raises(Stopped):
        train(settings, stop_at(Advanced("train", 2)))
    with pytest.raises(SettingsError, match="learning_rate: 0.01 before, 0.0 now") as refused:
        train(settings.replace(learning_rate=0.0))
    suggested = re.search(r"use (--\S+) (\S+) and a new output_dir", refused.value.hint or "")
    assert suggested is not None
    kept = {"--model-name-or-path": untied_base, "--learning-rate": 0, "--output-dir": tmp_path / "new"}
    flags = kept | {"--data-path": conversations, "--train-mode": train_mode, suggested[1]: suggested[2]}
    # the learning rate of 0 keeps the weights
    command = (*chain(*flags.items()), "--max-steps", 1, "--report-samples", 0, "--use-cpu")
    done = on_ranks(1, "train", *command)
    assert done.code == 0, done.stderr
    file = "adapter_model.safetensors" if train_mode == "lora" else "model.safetensors"
    before, after = (load_file(folder / file) for folder in (Path(suggested[2]), tmp_path / "new"))
    assert before.keys() == after.keys()
    assert all(after[name].equal(value) for name, value in before.items())
    # a run that has finished names a flag, too
    with pytest.raises(SettingsError, match=rf"to continue from its weights, use {suggested[1]} {tmp_path / 'new'} "):
        train(settings.replace(output_dir=tmp_path / "new"))


LINEAR, COSINE = {"max_steps": 8}, {"lr_scheduler_type": "cosine", "warmup_steps": 2.0}
PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "max_steps": 8, "eval_fraction": 0.2, "eval_steps": 8}


@pytest.mark.parametrize(
    ("first", "new", "shares"),
    [
        (LINEAR, {"max_steps": 12}, lambda step, length: 1 - step / length),
        (LINEAR, {"max_steps": 6}, lambda step, length: 1 - step / length),
        (
            {**COSINE, "max_steps": None, "num_data": 16, "num_train_epochs": 0.5},  # 8 steps in an epoch
            {"num_train_epochs": 1.5},
            lambda step, length: step / 2 if step < 2 else (1 + math.cos(math.pi * (step - 2) / (length - 2))) / 2,
        ),
        (PLATEAU, {"max_steps": 10}, lambda step, length: 1),
    ],
    ids=["longer", "shorter", "epochs", "plateau"],
)
@pytest.mark.variants("longer")
def test_resumed_steps_follow_the_schedule_of_an_allowed_length(
    first: dict[str, Any], new: dict[str, Any], shares: Callable[[int, int], float], inputs: list[Path], tmp_path: Path
) -> None:
    run, notes = tmp_path / "run", list[Event]()
    settings = make_settings(*inputs, run, logging_steps=1, save_steps=1000, **first)
    with pytest.raises(Stopped):
        train(settings, stop_at(Advanced("train", 2)))
    (name,) = new
    with pytest.raises(SettingsError, match=f"{name}: .* before, .* now"):
        train(settings.replace(**new))
    changed = settings.replace(**new, allow_change=[name])
    with pytest.raises(Stopped):
        train(changed, lambda event: [notes.append(event), stop_at(Advanced("train", 4))(event)])  # type: ignore[arg-type, func-returns-value, return-value]
    allowed = [note.text for note in notes if isinstance(note, Note) and "allowed by --allow-change" in note.text]
    before, now = (json.dumps(values.model_dump()[name]) for values in (settings, changed))
    assert allowed == [f"change allowed by --allow-change: {name}: {before} before, {now} now"]
    result = train(settings.replace(**new))  # the checkpoint has the new length
    assert result.resumed_from == run / "checkpoint-5"
    lengths = [values.max_steps or int(8 * values.num_train_epochs) for values in (settings, changed)]
    assert result.steps == lengths[1]
    rates = [line["learning_rate"] for line in read_metrics(run) if "loss" in line]
    expected = [shares(step, lengths[step >= 3]) for step in range(lengths[1])]
    assert rates == pytest.approx([1e-2 * share for share in expected])


@pytest.mark.long
@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
@pytest.mark.variants("zero3")
def test_an_allowed_length_is_used_under_deepspeed(
    stage: str, untied_base: Path, conversations: Path, tmp_path: Path, on_ranks: OnRanks
) -> None:
    run = tmp_path / "run"
    command = ("train", "--model-name-or-path", untied_base, "--data-path", conversations, "--output-dir", run)
    command += ("--save-steps", 2, "--logging-steps", 1, "--report-samples", 0, "--learning-rate", 0.01)
    command += ("--deepspeed", stage, "--max-steps")
    done = on_ranks(2, *command, 5)
    assert done.code == 0, done.stderr
    (run / "result.json").unlink()
    for step in (4, 5):
        shutil.rmtree(run / f"checkpoint-{step}")
    done = on_ranks(2, *command, 4, "--allow-change", "max_steps")
    assert done.code == 0, done.stderr
    rates = [line["learning_rate"] for line in read_metrics(run) if "loss" in line and line["step"] <= 4]
    assert rates == pytest.approx([1e-2 * share for share in (1, 4 / 5, 2 / 4, 1 / 4)])


def test_only_another_length_can_be_allowed(inputs: list[Path], tmp_path: Path) -> None:
    for name in ("learning_rate", "data", "learnin_rate"):
        message = rf"^allow_change: .*{name}: only num_train_epochs and max_steps can change"
        with pytest.raises(SettingsError, match=message):
            make_settings(*inputs, tmp_path / "run", allow_change=["max_steps", name])


def test_settings_that_do_not_affect_the_weights_may_change(
    begun_run: Path, inputs: list[Path], uninterrupted: bytes
) -> None:
    settings = make_settings(*inputs, begun_run, logging_steps=5, save_steps=3, dataloader_num_workers=1)
    assert train(settings).steps == STEPS
    assert read_adapter(begun_run) == uninterrupted


def test_shards_are_refused_without_zero_with_the_command_that_helps(
    zero3_run: Path, inputs: list[Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(zero3_run, run)
    (run / "result.json").unlink()
    settings = make_settings(*inputs, run, gradient_accumulation_steps=2)
    with pytest.raises(CheckpointError, match="2 processes with ZeRO-3; 1 process without DeepSpeed can't") as refused:
        train(settings)
    assert refused.value.exit_code == 2
    assert f"t5tune export {run / f'checkpoint-{STEPS}'}" in (refused.value.hint or "")
    assert json.loads((run / f"checkpoint-{STEPS}" / "t5tune_manifest.json").read_text())["made_of"]["batch"] == 4


@pytest.mark.long
@pytest.mark.distributed
def test_a_deepspeed_config_that_says_the_same_may_replace_another(
    fork_server: ForkServer, zero3_run: Path, uninterrupted_zero3: bytes, inputs: list[Path], tmp_path: Path
) -> None:
    run, config = shutil.copytree(zero3_run, tmp_path / "run"), tmp_path / "config.json"
    (run / "result.json").unlink()
    shutil.rmtree(run / f"checkpoint-{STEPS}")
    optimizer = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "weight_decay": 0.0}}
    config.write_text(json.dumps({**read_deepspeed_config("zero3"), "optimizer": optimizer, "steps_per_print": 1000}))
    done = fork_server.run(make_arguments(*inputs, run, f"--deepspeed={config}"), 2)
    assert done.codes == [0, 0], done.log
    assert read_adapter(run) == uninterrupted_zero3


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("absmax", torch.ones(3), "absmax doesn't have one value per weight"),  # of an optimizer in 8 bits
        ("RMS", 0.5, "RMS differs between ranks or parameter groups"),  # Adafactor's
    ],
)
def test_other_ranks_refuse_an_optimizer_state_that_cannot_be_divided(
    key: str, value: Any, reason: str, zero3_run: Path, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(zero3_run / f"checkpoint-{STEPS}", tmp_path / "checkpoint")
    for rank, path in enumerate(sorted(checkpoint.glob("global_step*/*_optim_states.pt"))):
        shard = torch.load(path, weights_only=False)
        shard["optimizer_state_dict"]["optimizer_state_dict"]["state"][0][key] = value * (rank + 1)
        torch.save(shard, path)
    now = read_run_identity(checkpoint) | {"world_size": 4}
    with pytest.raises(CheckpointError) as refused:
        check_run_identity(checkpoint, now, PLAN)
    assert f"; 4 processes with ZeRO-3 can't resume from it ({checkpoint}" in refused.value.message
    assert f"the optimizer's {reason}" in refused.value.message
    assert f"t5tune export {checkpoint}" in (refused.value.hint or "")


@pytest.mark.parametrize(
    ("tokens", "then", "now", "advice"),
    [  # (ranks, batch), now with two micro-batches per rank
        (None, (2, 8), (4, 16), "gradient_accumulation_steps 1 or per_device_train_batch_size 1 makes it 8"),
        (None, (2, 8), (1, 4), "gradient_accumulation_steps 4 or per_device_train_batch_size 4 makes it 8"),
        (None, (2, 12), (2, 32), "per_device_train_batch_size 3 makes it 12"),
        (None, (2, 6), (2, 32), "per_device_train_batch_size 1 with gradient_accumulation_steps 3 makes it 6"),
        (None, (2, 4), (3, 6), "with 3 processes no setting makes it 4"),
        (600, (2, 1200), (3, 1800), "with 3 processes no setting makes it 1200"),
        (600, (2, 2400), (1, 1200), "gradient_accumulation_steps 4 makes it 2400"),
    ],
)
def test_a_different_batch_is_refused_with_the_equalizing_setting(
    tokens: int | None, then: tuple[int, int], now: tuple[int, int], advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "batch" if tokens is None else "batch_tokens"
    common = {"deepspeed_stage": None, "training_args": {}, "tokens_per_batch": tokens}
    before, after = ({**common, "world_size": ranks, name: size} for ranks, size in (then, now))
    monkeypatch.setattr(resume_guard, "read_run_identity", lambda _: before)
    plan = make_run_plan(make_settings(Path("pocket"), Path("pocket"), Path("run"), gradient_accumulation_steps=2))
    with pytest.raises(SettingsError) as refused:
        check_run_identity(Path("run/checkpoint-1"), after, plan)
    assert refused.value.problems == (f"{name}: {then[1]} before, {now[1]} now; {advice}",)


def test_a_changed_tokens_per_batch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step would get different examples."""
    then = {"world_size": 2, "deepspeed_stage": None, "training_args": {}}
    then |= {"tokens_per_batch": 600, "batch_tokens": 1200}
    monkeypatch.setattr(resume_guard, "read_run_identity", lambda _: then)
    with pytest.raises(SettingsError, match="tokens_per_batch: 600 before, 300 now"):
        check_run_identity(Path("run/checkpoint-1"), then | {"tokens_per_batch": 300, "world_size": 4}, PLAN)
    assert check_run_identity(Path("run/checkpoint-1"), then | {"world_size": 1}, PLAN) == []


@pytest.mark.parametrize(
    ("then", "now", "text"),
    [
        ((2, 3), (1, 3), "resuming on 1 process from a checkpoint of 2; the random generators of rank 0 start"),
        ((2, 3), (4, 3), "resuming on 4 processes from a checkpoint of 2; the random generators of ranks 2 to 3 start"),
        ((1, 2), (2, 2), "resuming on 2 processes from a checkpoint of 1; the random generators of ranks 0 to 1 start"),
        ((4, None), (2, None), "resuming on 2 processes from a checkpoint of 4"),
        ((2, 2), (2, 3), "resuming on 2 processes with ZeRO-3 from a checkpoint of 2 processes with ZeRO-2"),
        ((2, 2), (2, 2), None),
    ],
)
def test_a_note_says_what_another_number_of_ranks_means(
    then: tuple[int, int], now: tuple[int, int], text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume_guard, "read_run_identity", lambda _: dict(zip(SHARDING_FIELDS, then, strict=True)))
    note = describe_other_ranks(Path("run/checkpoint-1"), dict(zip(SHARDING_FIELDS, now, strict=True)))
    assert note == (text and text + (" from the seed and the step" if "start" in text else ""))


@pytest.mark.parametrize("weight", ["", ":1"], ids=["one dataset", "a mixture"])
def test_a_run_resumes_with_its_data_after_its_cache_changed(
    weight: str, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    pairs, broken = tmp_path / "pairs.jsonl", tmp_path / "broken.jsonl"
    pairs.write_text("".join(json.dumps({"source": f"Name {n}", "target": f"ж{n}"}) + "\n" for n in range(20)))
    broken.write_text('{"text": 1}\n')
    data, other = f"{conversations}{weight}", f"{pairs}{weight}"
    shared: dict[str, Any] = {"preprocessed_path": cache, "save_steps": 1000}
    settings = make_settings(untied_base, Path(data), run, **shared)
    with pytest.raises(Stopped):
        train(settings, stop_at(Advanced("train", 2)))
    before = read_examples_manifest(cache)

    with pytest.raises(DataError, match="nothing to evaluate on"):
        train(make_settings(untied_base, Path(other), run, eval_data_path=str(broken), **shared, fresh=True))
    assert read_examples_manifest(cache)["inputs"] != before["inputs"]

    with pytest.raises(Stopped):
        train(settings, stop_at(Advanced("train", 4)))
    assert (run / "checkpoint-5").is_dir()
    assert read_examples_manifest(cache)["inputs"] == before["inputs"]
    with pytest.raises(SettingsError, match=r"data: .*conversations.* before, .*pairs.* now"):
        train(make_settings(untied_base, Path(other), run, **shared))
