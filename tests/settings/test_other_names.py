"""The names of other tools: each leads to a setting that exists, for flags, YAML keys and environment variables."""

import re
from pathlib import Path

import pytest

from t5tune.errors import SettingsError
from t5tune.settings import (
    COMMANDS,
    ChatSettings,
    EvaluateSettings,
    InspectSettings,
    MergeSettings,
    PrepareSettings,
    Settings,
    TrainSettings,
    load_settings,
)
from t5tune.settings.fastchat_names import LEGACY_NAMES
from t5tune.settings.field_types import get_extra
from t5tune.settings.other_names import ADVICE, NAMES_IN_OTHER_TOOLS, suggest_setting
from tests.support.processes.command_line import parse_words

ALL_SETTINGS = {name for model in COMMANDS for name in model.list_suggestions()}


def test_every_suggested_name_is_a_visible_setting() -> None:
    mentioned = {name for text in ADVICE.values() for name in re.findall(r"\{(\w+)\}", text)}
    assert not mentioned - ALL_SETTINGS
    assert not set(NAMES_IN_OTHER_TOOLS) - ALL_SETTINGS
    assert not ALL_SETTINGS & ({*LEGACY_NAMES, "fp16"})


def test_no_flag_suggests_a_different_flag() -> None:
    def list_flags(model: type[Settings]) -> set[str]:
        return {name for name, field in model.model_fields.items() if not get_extra(field, "yaml_only")}

    for model in COMMANDS:
        own = list_flags(model)
        for ours, names in NAMES_IN_OTHER_TOOLS.items():
            assert ours not in own or not own & {*names.split()}, (model.command, ours)
    advised = " ".join(ADVICE).split()
    others = " ".join(NAMES_IN_OTHER_TOOLS.values()).split()
    assert len(advised) == len({*advised})
    # a command with a matching setting suggests this setting; the advice is for commands without it
    both = [text for names, text in ADVICE.items() if {*names.split()} & {*others}]
    assert all("{" in text for text in both)
    assert not {*advised} & list_flags(TrainSettings)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        # axolotl
        ("base_model", "model_name_or_path"),
        ("datasets", "data_path"),
        ("val_set_size", "eval_fraction"),
        ("sequence_len", "model_max_length"),
        # LLaMA-Factory
        ("lora_rank", "lora_r"),
        # TRL
        ("max_length", "model_max_length"),
        ("bnb_4bit_quant_type", "quant_type"),
        ("model_revision", "revision"),
        # transformers and its scripts
        ("batch_size", "per_device_train_batch_size"),
        ("summary_column", "target_column"),
        ("precision", "bf16"),
        ("limit", "num_data"),
        ("pref_beta", "dpo_beta"),
    ],
)
def test_names_of_other_tools_suggest_our_settings(name: str, meant: str) -> None:
    flag, meant_flag = (f"--{word.replace('_', '-')}" for word in (name, meant))
    assert parse_words([flag, "1"], TrainSettings).problems == [f"{flag}: unknown flag; did you mean {meant_flag}?"]
    assert parse_words([f"{name}=1"], TrainSettings).problems == [f"{name}: unknown setting; did you mean {meant}?"]
    with pytest.raises(SettingsError) as caught:
        load_settings(TrainSettings, environment={f"T5TUNE_{name.upper()}": "1"})
    assert f"T5TUNE_{name.upper()}: unknown setting; did you mean {meant}?" in caught.value.problems


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("resume_from_checkpoint", "run the same command again: it resumes"),
        ("load_best_model_at_end", "metric_for_best_model does it"),
        ("hub_token", "set HF_TOKEN"),
        ("lora_target_linear", "use lora_target_modules: all-linear"),
        ("quantization_bit", "use q_lora: true"),
        ("wandb_project", "use report_to: wandb"),
        ("use_flash_attn", "leave it out"),
        ("generation_max_length", "t5tune evaluate has this option"),
        ("special_tokens", "the tokenizer's special tokens are used"),
        ("save_only_model", "save_total_limit keeps fewer"),
        ("adam_beta2", "under training_args"),
        ("predict_with_generate", "use eval_generate: 32, the number of held-out examples"),
        ("mask_history", "use train_on: last"),
        ("source_lang", "use source_column and target_column, and source_prefix"),
        ("eval_sample_packing", "leave it out"),
        ("tokenizer_type", "the model has its tokenizer"),
        ("val_max_target_length", "as long as the longest target"),
    ],
)
def test_names_without_an_equivalent_give_advice(name: str, advice: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"{name}: 1\n")
    with pytest.raises(SettingsError) as caught:
        load_settings(TrainSettings, str(tmp_path / "run.yaml"))
    (problem,) = [line for line in caught.value.problems if f"{name}: unknown setting; " in line]
    assert advice in problem
    (problem,) = parse_words([f"--{name}"], TrainSettings).problems
    assert "unknown flag; " in problem
    flags = {word for word in re.findall(r"[a-z0-9]+(?:_[a-z0-9]+)+", advice) if word != "training_args"}
    assert all(f"--{word.replace('_', '-')}" in problem for word in flags)


def test_flags_suggest_only_flags_of_the_same_command() -> None:
    assert parse_words(["--lora-rank=8"], PrepareSettings).problems == [
        "--lora-rank: unknown flag; t5tune prepare --help-all lists every option"
    ]
    with pytest.raises(SettingsError) as caught:
        load_settings(PrepareSettings, environment={"T5TUNE_LORA_RANK": "8"})
    assert "T5TUNE_LORA_RANK: unknown setting; did you mean lora_r?" in caught.value.problems
    assert parse_words(["--batch-size=8"], EvaluateSettings).problems == [
        "--batch-size: unknown flag; did you mean --per-device-eval-batch-size?"
    ]
    assert parse_words(["--load-in-4bit"], ChatSettings).problems == [
        "--load-in-4bit: unknown flag; did you mean --q-lora?"
    ]


@pytest.mark.parametrize(
    ("model", "words", "advice"),
    [
        (TrainSettings, "--load-in-8bit", "use --q-lora and --quant-type int8"),
        (TrainSettings, "--wandb-project=x", "use --report-to wandb, and the variable WANDB_PROJECT"),
        (TrainSettings, "--num-beams=3", "--eval-generate are greedy"),
        (TrainSettings, "--device=cpu", "--use-cpu none"),
        (TrainSettings, "--stage=dpo", "use --objective: sft (the default), dpo, orpo or span-corruption"),
        (TrainSettings, "--max-eval-samples=9", "all of --eval-data-path is evaluated"),
        (TrainSettings, "-o=x", "did you mean --output-dir?"),
        (TrainSettings, "--overwrite", "did you mean --fresh?"),
        (TrainSettings, "--force", "did you mean --fresh?"),
        (ChatSettings, "--max-length=9", "did you mean --max-new-tokens?"),
        (EvaluateSettings, "--generation-max-length=9", "did you mean --max-new-tokens?"),
        (MergeSettings, "--torch-dtype=bfloat16", "did you mean --dtype?"),
        (InspectSettings, "--limit=3", "--example shows one example, by its index, and --all all of them"),
    ],
)
def test_advice_fits_the_command_and_shows_flags(model: type[Settings], words: str, advice: str) -> None:
    (problem,) = parse_words(words.split(), model).problems
    assert problem.startswith(f"{words.partition('=')[0]}: unknown flag; ")
    assert advice in problem


def test_the_short_flags_of_fastchats_apply_lora_suggest_ours() -> None:
    words = ["--base", "pocket", "--target", "merged", "--lora", "run"]
    assert parse_words(words, MergeSettings).problems == [
        "--base: unknown flag; did you mean --model-name-or-path?",
        "--target: unknown flag; did you mean --output-dir?",
        "--lora: unknown flag; did you mean --adapter?",
    ]
    assert parse_words(words, TrainSettings).problems[1:] == [
        "--target: unknown flag; did you mean --target-column?",
        "--lora: unknown flag; did you mean --lora-r?",
    ]


def test_a_mistyped_legacy_or_hidden_name_never_suggests_itself() -> None:
    for name in (*LEGACY_NAMES, "fp16"):
        assert f"did you mean {name}?" not in suggest_setting(name[:-1], TrainSettings.list_suggestions())
        flag = f"--{name[:-1].replace('_', '-')}"
        (problem,) = parse_words([flag], TrainSettings).problems
        assert f"--{name.replace('_', '-')}?" not in problem
