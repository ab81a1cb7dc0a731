"""Names and command lines of FastChat, and what q_lora turns on."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from t5tune.settings import PlanSettings, PrepareSettings, TrainSettings, dump_settings, load_settings
from tests.settings.values import NEEDED, NEEDED_FLAGS

FASTCHAT = """
    --model_name_or_path google/flan-t5-xl --data_path ./data/dummy_conversation.json --bf16 True
    --output_dir ./checkpoints_flant5_3b --num_train_epochs 3 --per_device_train_batch_size 1
    --per_device_eval_batch_size 1 --gradient_accumulation_steps 4 --evaluation_strategy "no" --save_strategy "steps"
    --save_steps 300 --save_total_limit 1 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03
    --lr_scheduler_type "cosine" --logging_steps 1 --model_max_length 2048
    --preprocessed_path ./preprocessed_data/processed.json --gradient_checkpointing True
"""
FASTCHAT_SETTINGS = {
    "model_name_or_path": "google/flan-t5-xl",
    "data_path": ["./data/dummy_conversation.json"],
    "bf16": True,
    "output_dir": Path("checkpoints_flant5_3b"),
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 4,
    "eval_strategy": "no",
    "save_strategy": "steps",
    "save_steps": 300,
    "save_total_limit": 1,
    "learning_rate": 2e-5,
    "weight_decay": 0.0,
    "warmup_steps": 0.03,
    "lr_scheduler_type": "cosine",
    "logging_steps": 1,
    "model_max_length": 2048,
    "preprocessed_path": Path("preprocessed_data/processed.json"),
    "gradient_checkpointing": True,
}


@pytest.mark.parametrize("steps", [5, 0])
@pytest.mark.parametrize("text", ["warmup_steps: {}\nwarmup_ratio: 0.1", "warmup_ratio: 0.1\nwarmup_steps: {}"])
def test_a_new_name_overrides_its_legacy_name(yaml_file: Callable[[str], str], text: str, steps: int) -> None:
    file = yaml_file(text.format(steps))
    settings, notes = load_settings(TrainSettings, file, {}, NEEDED)
    assert settings.warmup_steps == steps
    assert notes == [f"{file}: warmup_ratio: ignored (warmup_steps is given too)"]


def test_a_legacy_name_that_a_flag_overrides_is_not_noted(yaml_file: Callable[[str], str]) -> None:
    file = yaml_file("warmup_ratio: 0.1\n")
    for environment, flags in (({}, {"warmup_steps": "5"}), ({"T5TUNE_WARMUP_STEPS": "5"}, {})):
        settings, notes = load_settings(TrainSettings, file, environment, {**NEEDED, **flags})
        assert (settings.warmup_steps, notes) == (5, [])
    _, notes = load_settings(TrainSettings, file, {}, {**NEEDED, "warmup_ratio": "0.2"})
    assert notes == ["--warmup-ratio: read as warmup_steps 0.2 (a value below 1 is a fraction of all steps)"]


def test_every_command_reads_legacy_names_of_its_settings(
    yaml_file: Callable[[str], str],
) -> None:
    text = "load_in_4bit: true\nper_gpu_train_batch_size: 1\nmax_seq_length: 512\nevaluation_strategy: epoch\n"
    file = yaml_file(f"{text}model_name_or_path: pocket\n")
    planned, notes = load_settings(PlanSettings, file)
    assert (planned.q_lora, planned.bf16, planned.per_device_train_batch_size) == (True, True, 1)
    assert notes == [
        f"{file}: load_in_4bit: read as q_lora true (NF4 with double quantization)",
        f"{file}: per_gpu_train_batch_size: read as per_device_train_batch_size 1 (renamed by transformers)",
        f"{file}: max_seq_length: read as model_max_length 512 (the same thing)",
        f"{file}: evaluation_strategy: read as eval_strategy epoch (renamed by transformers)",
    ]
    prepared, notes = load_settings(PrepareSettings, file, {}, NEEDED)
    assert prepared.model_max_length == 512
    assert notes == [
        "prepare does not use load_in_4bit, per_gpu_train_batch_size, evaluation_strategy",
        f"{file}: max_seq_length: read as model_max_length 512 (the same thing)",
    ]


@pytest.mark.parametrize("word", ["true", "True", "1", "yes", "y", "t", "on", True])
def test_q_lora_turns_bf16_on_with_a_note(word: Any) -> None:
    settings, notes = load_settings(TrainSettings, None, {}, {**NEEDED, "q_lora": word})
    assert settings.q_lora
    assert settings.bf16
    assert notes == ["q_lora turns bf16 on: the quantized base computes in bfloat16"]


@pytest.mark.parametrize(("given", "bf16"), [({}, True), ({"bf16": True}, True), ({"bf16": False}, False)])
def test_q_lora_turns_on_bf16_that_saved_settings_leave_unset(
    run_command_line: Callable[..., tuple[Any, str]], yaml_file: Callable[[str], str], given: Any, bf16: bool
) -> None:
    file = yaml_file(dump_settings(TrainSettings(**NEEDED, **given)))
    settings, stderr = run_command_line("train", "--config", file, "--q-lora")
    assert settings.bf16 is bf16
    assert ("q_lora turns bf16 on" in stderr) == (not given)
    assert run_command_line("train", "--config", file)[0].bf16 is given.get("bf16", False)


def changed(settings: TrainSettings) -> dict[str, Any]:
    """The settings that differ from their default or have none."""
    fields = type(settings).model_fields
    return {
        name: value
        for name, value in settings
        if fields[name].is_required() or value != fields[name].default or name in FASTCHAT_SETTINGS
    }


def test_fastchats_qlora_command_line_gives_its_settings(run_command_line: Callable[..., tuple[Any, str]]) -> None:
    more = "--q_lora True --deepspeed playground/deepspeed_config_s2.json"
    settings, stderr = run_command_line("train", *shlex.split(FASTCHAT), *shlex.split(more))
    assert changed(settings) == FASTCHAT_SETTINGS | {"q_lora": True, "deepspeed": "playground/deepspeed_config_s2.json"}
    assert "--evaluation-strategy: read as eval_strategy no" in stderr
    assert "--warmup-ratio: read as warmup_steps 0.03" in stderr


def test_fastchats_fsdp_command_line_becomes_zero3_with_a_note(
    run_command_line: Callable[..., tuple[Any, str]],
) -> None:
    more = '--fsdp "full_shard auto_wrap" --fsdp_transformer_layer_cls_to_wrap T5Block --tf32 True'
    settings, stderr = run_command_line("train", *shlex.split(FASTCHAT), *shlex.split(more))
    assert changed(settings) == FASTCHAT_SETTINGS | {"deepspeed": "zero3", "tf32": True}
    assert "--fsdp: read as deepspeed zero3" in stderr
    assert "--fsdp-transformer-layer-cls-to-wrap: ignored" in stderr


@pytest.mark.parametrize(("value", "is_noted"), [("False", True), ("True", False)])
def test_only_a_request_for_pickled_weights_is_noted(
    value: str, is_noted: bool, run_command_line: Callable[..., tuple[Any, str]]
) -> None:
    stderr = run_command_line("train", *NEEDED_FLAGS, "--save_safetensors", value)[1]
    assert ("--save-safetensors: ignored (weights are always written as safetensors)" in stderr) == is_noted


@pytest.mark.parametrize(
    ("value", "config"),
    [
        ("full_shard auto_wrap offload", "zero3-offload"),
        ("shard_grad_op auto_wrap", "zero2"),
        ("shard_grad_op offload", "zero2-offload"),
        ("true", "zero3"),
        ("[full_shard, auto_wrap]", "zero3"),
        ("hybrid_shard", None),
        ("no_shard", None),
    ],
)
def test_fsdp_becomes_deepspeed_or_a_note(value: str, config: str | None, yaml_file: Callable[[str], str]) -> None:
    settings, notes = load_settings(TrainSettings, yaml_file(f"fsdp: {value}\n"), {}, NEEDED)
    assert settings.deepspeed == config
    said = f"read as deepspeed {config} (" if config else "ignored (t5tune shards with DeepSpeed ZeRO; set deepspeed"
    (note,) = notes
    assert f"fsdp: {said}" in note


@pytest.mark.parametrize("value", ['""', "false", "null", "[]"])
def test_an_empty_fsdp_shards_nothing(value: str, yaml_file: Callable[[str], str]) -> None:
    settings, notes = load_settings(TrainSettings, yaml_file(f"fsdp: {value}\n"), {}, NEEDED)
    assert (settings.deepspeed, notes) == (None, [])
