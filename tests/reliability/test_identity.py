"""A run resumes with the configuration it was started with, or the error says what differs."""

import json
import math
import os
import shutil
from collections.abc import Callable
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
from t5tune.data.caches.examples import open_examples, read_examples_manifest
from t5tune.data.tokens.tokenizer import load_tokenizer
from t5tune.errors import CheckpointError, DataError, SettingsError, Stopped
from t5tune.io.atomic import hash_file
from t5tune.progress import Advanced, Event, Note, Started
from t5tune.runs import resume_guard
from t5tune.runs.checkpoints import read_run_identity
from t5tune.runs.metrics_log import read_metrics
from t5tune.runs.resume_guard import SHARDING_FIELDS, build_run_identity, check_run_identity, describe_other_ranks
from t5tune.settings import PrepareSettings
from t5tune.settings.packaged_templates import read_deepspeed_config
from tests.support.bases import make_base
from tests.support.caches import find_cache, open_only
from tests.support.command_line import CommandResult
from tests.support.forks import ForkServer
from tests.support.runs import STEPS, make_arguments, make_settings, read_adapter, stop_at

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def begun_run(untied_base: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stopped run with one checkpoint, of step 7."""
    run = tmp_path_factory.mktemp("begun") / "run"
    with pytest.raises(Stopped):
        train(make_settings(untied_base, conversations, run, save_steps=1000), stop_at(Advanced("train", 6)))
    return run


def hash_files(run: Path) -> dict[str, str]:
    return {path.relative_to(run).as_posix(): hash_file(path) for path in run.rglob("*") if path.is_file()}


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "LoRA's shape": ({"lora_r": 4}, "lora_r: 8 before, 4 now"),
    "its targets": ({"lora_target_modules": ["q"]}, r'lora_target_modules: \["q", "v"\] before, \["q"\] now'),
    "dtype": ({"bf16": True}, "bf16: false before, true now"),
    "quantization": ({"q_lora": True}, "q_lora: false before, true now"),
    "batch": ({"per_device_train_batch_size": 4}, "batch: 2 before, 4 now; per_device_train_batch_size 2 makes it 2"),
    "dropout": ({"lora_dropout": 0.1}, "lora_dropout: 0.05 before, 0.1 now"),
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
def test_a_changed_setting_is_refused_with_both_values(
    what: str, begun_run: Path, untied_base: Path, conversations: Path
) -> None:
    changes, message = CHANGES[what]
    before = hash_files(begun_run)
    with pytest.raises((SettingsError, CheckpointError), match=message) as refused:
        train(make_settings(untied_base, conversations, begun_run, **changes))
    assert refused.value.exit_code == 2
    assert "--allow-change" in (refused.value.hint or "") or "t5tune export" in (refused.value.hint or "")
    assert hash_files(begun_run) == before


def test_other_data_and_another_base_are_refused_by_their_hashes(
    begun_run: Path, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    lines = conversations.read_text().splitlines()
    (tmp_path / conversations.name).write_text("\n".join(lines[:-1]) + "\n")
    before = hash_files(begun_run)
    with pytest.raises(SettingsError, match=r"data: conversations\.jsonl: another content now"):
        train(make_settings(untied_base, tmp_path / conversations.name, begun_run))
    shutil.copytree(untied_base, tmp_path / "base")
    weights = load_file(untied_base / "model.safetensors")
    weights["decoder.final_layer_norm.weight"][3] += 1e-3
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SettingsError, match='base: "sha256:.*" before, "sha256:.*" now'):
        train(make_settings(tmp_path / "base", conversations, begun_run))
    assert hash_files(begun_run) == before


def test_a_run_resumes_with_the_files_of_its_cache(untied_base: Path, conversations: Path, tmp_path: Path) -> None:
    """prepare stores its seed in the cache, train another: it must not matter where nothing is held out."""
    cache, run = tmp_path / "cache", tmp_path / "run"
    prepare(PrepareSettings(model_name_or_path=str(untied_base), data_path=str(conversations), output_dir=cache))
    with pytest.raises(Stopped):
        train(make_settings(untied_base, cache, run), stop_at(Advanced("train", 2)))
    assert train(make_settings(untied_base, conversations, run)).resumed_from == run / "checkpoint-3"
    seeds = [json.loads((find_cache(folder) / "manifest.json").read_text())["seed"] for folder in (cache, run / "data")]
    assert seeds == [42, 0]


def test_a_base_is_hashed_once_and_again_after_one_of_its_files_was_touched(
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
    assert resume_and_count_reads() == 1
    assert not (run / "base.json").exists()
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
    (run / "base.json").write_text("[]")
    assert [resume_and_count_reads(), resume_and_count_reads()] == [1, 0]


def test_an_allowed_change_is_reported_and_stored_in_the_next_checkpoint(
    begun_run: Path, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(begun_run, run)
    changed = make_settings(untied_base, conversations, run, learning_rate=5e-3, model_max_length=64)
    for folder in (run, tmp_path / "new"):
        with pytest.raises(SettingsError, match="allow_change: learnin_rate: no such field.*learning_rate"):
            train(changed.replace(output_dir=folder, allow_change=["data", "model_max_length", "learnin_rate"]))
    with pytest.raises(SettingsError, match=r"settings or data:\nlearning_rate: 0.01 before, 0.005 now; to resume"):
        train(changed.model_copy(update={"allow_change": ["data", "model_max_length"]}))
    message: list[str] = []

    def report(event: Event) -> None:
        if isinstance(event, Note):
            message.append(event.text)

    with pytest.raises(Stopped):
        train(
            changed.model_copy(update={"allow_change": ["data", "model_max_length", "learning_rate"]}),
            lambda event: [report(event), stop_at(Advanced("train", 9))(event)],  # type: ignore[arg-type, return-value]
        )
    assert sum(text.startswith("change allowed by --allow-change: ") for text in message) == 3
    assert train(changed).resumed_from == run / "checkpoint-10"


def test_a_checkpoint_whose_tensors_have_another_shape_is_refused_and_starts_a_new_run_as_an_adapter(
    begun_run: Path, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(begun_run, tmp_path / "run")
    changed = make_settings(untied_base, conversations, run, lora_r=4, learning_rate=5e-3)
    before = hash_files(run)
    with pytest.raises(SettingsError, match=r"lora_r: 8 before, 4 now; .*can't allow lora_r, .* --adapter .*-7"):
        train(changed.model_copy(update={"allow_change": ["lora_r", "learning_rate"]}))
    assert hash_files(run) == before
    new = make_settings(untied_base, conversations, tmp_path / "new", optim="adafactor", max_steps=1)
    assert train(new.model_copy(update={"adapter": run / "checkpoint-7"})).steps == 1
    # another base can be allowed, but it must fit
    other = make_base(tmp_path / "base", tied=False, d_model=48)
    allowed = make_settings(other, conversations, run, allow_change=["base"])
    with pytest.raises(
        CheckpointError, match=r"checkpoint-7/adapter_model.safetensors: .*: shape \[.*\], but \[.*\] in"
    ):
        train(allowed)


@pytest.mark.parametrize("more", [{}, {"loraplus_lr_ratio": 4.0}], ids=str)
def test_an_allowed_learning_rate_and_weight_decay_are_used(
    more: dict[str, Any], untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    run, changes = tmp_path / "run", {"lr_scheduler_type": "constant", "logging_steps": 1, "max_steps": 8, **more}
    with pytest.raises(Stopped):
        train(make_settings(untied_base, conversations, run, **changes), stop_at(Advanced("train", 2)))
    adapters = []
    for name, new in {"as before": {}, "rate": {"learning_rate": 2e-3}, "decay": {"weight_decay": 0.5}}.items():
        shutil.copytree(run, tmp_path / name)
        settings = make_settings(untied_base, conversations, tmp_path / name, **changes, **new, allow_change=[*new])
        assert train(settings).resumed_from == tmp_path / name / "checkpoint-3"
        rates = {line["step"]: line["learning_rate"] for line in read_metrics(tmp_path / name) if "loss" in line}
        rate = settings.learning_rate
        assert [rates[step] for step in (3, 4, 8)] == pytest.approx([1e-2, rate, rate])
        adapters.append(read_adapter(tmp_path / name))
    assert len(set(adapters)) == 3


def test_a_run_with_learning_rate_0_does_not_resume_with_another_one(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    settings = make_settings(untied_base, conversations, tmp_path / "run", learning_rate=0.0)
    with pytest.raises(Stopped):
        train(settings, stop_at(Advanced("train", 2)))
    changed = settings.replace(learning_rate=1e-3, allow_change=["learning_rate"])
    with pytest.raises(SettingsError, match=r"learning_rate: 0\.0 before, 0\.001 now.* can't allow learning_rate"):
        train(changed)
    assert train(settings.replace(max_steps=4, allow_change=["max_steps"])).steps == 4


COSINE = [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]


@pytest.mark.parametrize(
    ("new", "shares"),
    [
        ({"max_steps": 12}, [1 - step / 12 for step in range(12)]),
        ({"warmup_steps": 6.0}, [*(step / 6 for step in range(6)), 1, 1 / 2]),
        ({"lr_scheduler_type": "cosine"}, COSINE),
        ({"lr_scheduler_type": "cosine", "learning_rate": 2e-3}, COSINE),
    ],
    ids=["length", "warmup", "shape", "shape and peak"],
)
def test_all_steps_after_resuming_follow_an_allowed_change_of_the_schedule(
    new: dict[str, Any], shares: list[float], untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    settings = make_settings(untied_base, conversations, tmp_path / "run", logging_steps=1, max_steps=8)
    with pytest.raises(Stopped):
        train(settings, stop_at(Advanced("train", 2)))
    changed = settings.replace(**new, allow_change=[*new])
    assert train(changed).resumed_from == tmp_path / "run" / "checkpoint-3"
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert rates[:3] == pytest.approx([1e-2 * (1 - step / 8) for step in range(3)])
    assert rates[3:] == pytest.approx([changed.learning_rate * share for share in shares[3:]])


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_by_metric_may_get_another_learning_rate_but_not_be_replaced(
    schedule: str, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"lr_scheduler_type": schedule, "max_steps": 4, "eval_fraction": 0.2, "eval_steps": 4}
    settings = make_settings(untied_base, conversations, tmp_path / "run", **changes, logging_steps=1)
    with pytest.raises(Stopped):
        train(settings, stop_at(Advanced("train", 2)))
    for name in ("linear", "greedy" if schedule != "greedy" else "reduce_lr_on_plateau"):
        other = settings.replace(lr_scheduler_type=name, allow_change=["lr_scheduler_type"])
        with pytest.raises(SettingsError, match=f'"{schedule}" before, "{name}" now.* can\'t allow lr_scheduler_type'):
            train(other)
    train(settings.replace(learning_rate=2e-3, allow_change=["learning_rate"]))
    rates = {line["step"]: line["learning_rate"] for line in read_metrics(tmp_path / "run") if "loss" in line}
    assert [rates[step] for step in (2, 3, 4)] == pytest.approx([1e-2, 1e-2, 2e-3])


@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["zero2", "zero3", "own"])
@pytest.mark.variants("zero3", "own")
def test_an_allowed_learning_rate_schedule_and_weight_decay_are_used_under_deepspeed(
    stage: str, untied_base: Path, conversations: Path, tmp_path: Path, on_ranks: Callable[..., CommandResult]
) -> None:
    run, config = tmp_path / "run", tmp_path / "own.json"
    optimizer = {"type": "AdamW", "params": {"torch_adam": True}}
    config.write_text(json.dumps({"zero_optimization": {"stage": 2}, "optimizer": optimizer}))
    command = ("train", "--model-name-or-path", untied_base, "--data-path", conversations, "--output-dir", run)
    command += ("--max-steps", "5", "--save-steps", "2", "--logging-steps", "1", "--report-samples", "0")
    command += ("--deepspeed", config if stage == "own" else stage, "--lr-scheduler-type")
    done = on_ranks(2, *command, "constant_with_warmup" if stage == "own" else "constant", "--learning-rate", "0.01")
    assert done.code == 0, done.stderr
    (run / "result.json").unlink()
    for step in (4, 5):
        shutil.rmtree(run / f"checkpoint-{step}")
    allowed = ("--allow-change", "learning_rate,weight_decay,lr_scheduler_type")
    done = on_ranks(2, *command, "linear", "--learning-rate", "0.002", "--weight-decay", "0.1", *allowed)
    assert done.code == 0, done.stderr
    rates = {line["step"]: line["learning_rate"] for line in read_metrics(run) if "loss" in line}
    shares = (2 / 5, 0) if stage == "own" else (3 / 5, 1 / 5)  # DeepSpeed has its own set to the next step's already
    assert [rates[step] for step in (2, 3, 5)] == pytest.approx([1e-2, *(2e-3 * share for share in shares)])


@pytest.mark.distributed
@pytest.mark.parametrize(
    "flags", [("zero2",), ("zero1", "--bf16"), ("zero0", "--bf16"), ("zero3",)], ids=lambda flags: flags[0]
)
@pytest.mark.variants("zero2")
def test_an_allowed_max_grad_norm_is_used_under_deepspeed(
    flags: tuple[str, ...],
    untied_base: Path,
    conversations: Path,
    tmp_path: Path,
    on_ranks: Callable[..., CommandResult],
) -> None:
    run = tmp_path / "run"
    command = ("train", "--model-name-or-path", untied_base, "--data-path", conversations, "--output-dir", run)
    command += ("--max-steps", "4", "--save-steps", "2", "--optim", "sgd", "--lr-scheduler-type", "constant")
    command += ("--learning-rate", "1", "--report-samples", "0", "--deepspeed", *flags)
    assert on_ranks(2, *command).code == 0
    before = load_file(run / "checkpoint-2" / "adapter_model.safetensors")
    last = load_file(run / "adapter_model.safetensors")
    assert not all(torch.allclose(value, last[name]) for name, value in before.items())
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoint-4")
    done = on_ranks(2, *command, "--max-grad-norm", "1e-30", "--allow-change", "max_grad_norm")
    assert done.code == 0, done.stderr
    clipped = load_file(run / "adapter_model.safetensors")
    torch.testing.assert_close(clipped, before, rtol=0, atol=1e-20)


def test_settings_that_do_not_affect_the_weights_may_change(
    begun_run: Path, untied_base: Path, conversations: Path, uninterrupted: bytes
) -> None:
    settings = make_settings(
        untied_base, conversations, begun_run, logging_steps=5, save_steps=3, dataloader_num_workers=1
    )
    assert train(settings).steps == STEPS
    assert read_adapter(begun_run) == uninterrupted


def test_shards_are_refused_without_zero_with_the_command_that_helps(
    zero3_run: Path, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(zero3_run, run)
    (run / "result.json").unlink()
    settings = make_settings(untied_base, conversations, run, gradient_accumulation_steps=2)
    with pytest.raises(CheckpointError, match="2 processes with ZeRO-3; 1 process without DeepSpeed can't") as refused:
        train(settings)
    assert refused.value.exit_code == 2
    assert f"t5tune export {run / f'checkpoint-{STEPS}'}" in (refused.value.hint or "")
    assert json.loads((run / f"checkpoint-{STEPS}" / "t5tune_manifest.json").read_text())["made_of"]["batch"] == 4


SECTIONS: dict[str, dict[str, Any]] = {
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
}


@pytest.mark.distributed
@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.variants("scheduler")
def test_another_optimizer_or_schedule_in_the_deepspeed_config_is_refused(
    section: str, fork_server: ForkServer, zero3_run: Path, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    run, config = tmp_path / "run", tmp_path / "config.json"
    shutil.copytree(zero3_run, run)
    (run / "result.json").unlink()
    values = read_deepspeed_config("zero3")
    config.write_text(json.dumps({**values, section: SECTIONS[section]}))
    command = make_arguments(untied_base, conversations, run, f"--deepspeed={config}")
    for allowed in ([], [f"--allow-change=deepspeed_{section}"]):
        done = fork_server.run([*command, *allowed], 2)
        assert done.codes == [2, 2], done.log
        assert f"deepspeed_{section}: null before, " in done.log
        assert f"--allow-change can't allow deepspeed_{section}" in done.log
    config.write_text(json.dumps({**values, "steps_per_print": 1000}))  # of the same stage, without such a section
    done = fork_server.run(command, 2)
    assert done.codes == [0, 0], done.log


def test_what_a_section_of_the_deepspeed_config_takes_from_the_settings_is_compared_there(
    conversations: Path, tmp_path: Path
) -> None:
    cache, config = tmp_path / "cache", tmp_path / "config.json"
    prepare(PrepareSettings(model_name_or_path="pocket", data_path=str(conversations), output_dir=cache))
    settings = make_settings(Path("pocket"), cache, tmp_path / "run", deepspeed=str(config))

    def identify(sections: dict[str, Any]) -> dict[str, Any]:
        config.write_text(json.dumps(read_deepspeed_config("zero2") | sections))
        return build_run_identity(settings, open_examples(cache), "0", None, world_size=1)

    optimizer = identify(SECTIONS)["deepspeed_optimizer"]
    assert optimizer == {"type": "AdamW", "params": {"torch_adam": True}}
    params = {"lr": settings.learning_rate, "weight_decay": 0.0, "torch_adam": True}
    assert identify(SECTIONS | {"optimizer": {"type": "AdamW", "params": params}}) == identify(SECTIONS)
    assert identify({}) == {**identify(SECTIONS), "deepspeed_optimizer": None, "deepspeed_scheduler": None}


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        (
            "absmax",
            torch.ones(3),
            "the optimizer's absmax isn't one value for each weight",
        ),  # of an optimizer in 8 bits
        ("RMS", 0.5, "the optimizer's RMS differs between ranks or parameter groups"),  # Adafactor's
    ],
)
def test_other_ranks_refuse_an_optimizer_whose_state_depends_on_how_it_was_divided(
    key: str, value: Any, reason: str, zero3_run: Path, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(zero3_run / f"checkpoint-{STEPS}", tmp_path / "checkpoint")
    for rank, path in enumerate(sorted(checkpoint.glob("global_step*/*_optim_states.pt"))):
        shard = torch.load(path, weights_only=False)
        shard["optimizer_state_dict"]["optimizer_state_dict"]["state"][0][key] = value * (rank + 1)
        torch.save(shard, path)
    now = read_run_identity(checkpoint) | {"world_size": 4}
    with pytest.raises(CheckpointError) as refused:
        check_run_identity(checkpoint, now, [], 1)
    assert f"; 4 processes with ZeRO-3 can't resume from it ({checkpoint}" in refused.value.message
    assert reason in refused.value.message
    assert f"t5tune export {checkpoint}" in (refused.value.hint or "")


@pytest.mark.parametrize(
    ("then", "now", "line"),
    [
        (
            {"world_size": 2, "batch": 8},
            {"world_size": 4, "batch": 16},  # 2 micro-batches of 2 examples
            "batch: 8 before, 16 now; gradient_accumulation_steps 1 or per_device_train_batch_size 1 makes it 8",
        ),
        (
            {"world_size": 2, "batch": 8},
            {"world_size": 1, "batch": 4},
            "batch: 8 before, 4 now; gradient_accumulation_steps 4 or per_device_train_batch_size 4 makes it 8",
        ),
        (
            {"world_size": 2, "batch": 12},
            {"world_size": 2, "batch": 32},  # 2 micro-batches of 8 examples
            "batch: 12 before, 32 now; per_device_train_batch_size 3 makes it 12",
        ),
        (
            {"world_size": 2, "batch": 6},
            {"world_size": 2, "batch": 32},
            "batch: 6 before, 32 now; per_device_train_batch_size 1 with gradient_accumulation_steps 3 makes it 6",
        ),
        (
            {"world_size": 2, "batch": 4},
            {"world_size": 3, "batch": 6},
            "batch: 4 before, 6 now; with 3 processes no setting makes it 4",
        ),
        (
            {"world_size": 2, "tokens_per_batch": 600, "batch_tokens": 1200},
            {"world_size": 3, "tokens_per_batch": 600, "batch_tokens": 1800},
            "batch_tokens: 1200 before, 1800 now; with 3 processes no setting makes it 1200",
        ),
        (
            {"world_size": 2, "tokens_per_batch": 600, "batch_tokens": 2400},
            {"world_size": 1, "tokens_per_batch": 600, "batch_tokens": 1200},
            "batch_tokens: 2400 before, 1200 now; gradient_accumulation_steps 4 makes it 2400",
        ),
    ],
)
def test_another_batch_is_refused_with_the_setting_that_makes_it_equal(
    then: dict[str, Any], now: dict[str, Any], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {"deepspeed_stage": None, "training_args": {}}
    monkeypatch.setattr(resume_guard, "read_run_identity", lambda _: common | then)
    with pytest.raises(SettingsError) as refused:
        check_run_identity(Path("run/checkpoint-1"), common | now, [], 2)
    assert refused.value.problems == (line,)


def test_tokens_per_batch_may_not_change_since_a_step_would_get_other_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    then = {
        "world_size": 2,
        "deepspeed_stage": None,
        "training_args": {},
        "tokens_per_batch": 600,
        "batch_tokens": 1200,
    }
    monkeypatch.setattr(resume_guard, "read_run_identity", lambda _: then)
    with pytest.raises(SettingsError, match="tokens_per_batch: 600 before, 300 now"):
        check_run_identity(Path("run/checkpoint-1"), then | {"tokens_per_batch": 300, "world_size": 4}, [], 1)
    assert check_run_identity(Path("run/checkpoint-1"), then | {"world_size": 1}, [], 2) == []


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


def test_other_data_of_a_run_keeps_the_tokens_whose_rows_are_trained(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    run, lines = tmp_path / "run", conversations.read_text().splitlines()
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    for file, character in ((first, "中"), (second, "ж")):
        values = [character + json.loads(line)["conversations"][1]["value"] for line in lines]
        file.write_text("\n".join(json.dumps({"source": "Which one?", "target": value}) for value in values))
    with pytest.raises(Stopped):
        train(make_settings(untied_base, first, run, save_steps=1000), stop_at(Advanced("train", 2)))
    tokens = load_tokenizer(run / "checkpoint-3").get_vocab()
    assert "中" in tokens

    changed = make_settings(untied_base, second, run, allow_change=["data"])
    with pytest.raises(Stopped):
        train(changed, stop_at(Advanced("train", 4)))
    cache = open_only(run / "data")
    assert cache.manifest["inputs"]["data"][0]["file"] == second.name
    assert load_tokenizer(cache.tokenizer_folder).get_vocab() == tokens
    assert load_tokenizer(run / "checkpoint-5").get_vocab() == tokens

    before = hash_files(run / "data")
    refused: list[tuple[dict[str, Any], str]] = [
        ({"learning_rate": 5e-3}, "learning_rate: 0.01 before, 0.005 now"),
        CHANGES["batch"],
    ]
    for changes, line in refused:
        with pytest.raises(SettingsError, match=line):
            train(make_settings(untied_base, first, run, allow_change=["data"], **changes))
        assert hash_files(run / "data") == before

    for added in (["{", "}", "\n", "ж"], ["none"]):  # others, and fewer
        settings = make_settings(
            untied_base, second, run, add_tokens=added, allow_change=["data", "tokenizer", "add_tokens"]
        )
        with pytest.raises(CheckpointError, match="checkpoint-5: token [0-9]+, '.+', isn't the same in"):
            train(settings)
    with pytest.raises(Stopped):
        train(changed, stop_at(Advanced("train", 6)))  # back to the tokens of the run


@pytest.mark.parametrize("changes", [{"allow_change": ["data"]}, {"fresh": True}], ids=["other data", "fresh"])
@pytest.mark.parametrize("weight", ["", ":1"], ids=["one dataset", "a mixture"])
def test_a_run_resumes_with_its_data_after_another_start_has_replaced_its_cache(
    weight: str, changes: dict[str, Any], untied_base: Path, conversations: Path, tmp_path: Path
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

    with pytest.raises(DataError, match="no conversation to evaluate on"):
        train(make_settings(untied_base, Path(other), run, eval_data_path=str(broken), **shared, **changes))
    assert read_examples_manifest(cache)["inputs"] != before["inputs"]

    with pytest.raises(Stopped):
        train(settings, stop_at(Advanced("train", 4)))
    assert (run / "checkpoint-5").is_dir()
    assert read_examples_manifest(cache)["inputs"] == before["inputs"]
    with pytest.raises(SettingsError, match=r"data: .*conversations.* before, .*pairs.* now"):
        train(make_settings(untied_base, Path(other), run, **shared))
