"""Settings: where values come from, what is refused, and FastChat's own command lines."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from t5tune.errors import SettingsError
from t5tune.settings import (
    ChatSettings,
    ExportSettings,
    MergeSettings,
    PlanSettings,
    PrepareSettings,
    Settings,
    TrainSettings,
    dump_settings,
    load_settings,
)
from tests.settings.values import NEEDED, NEEDED_FLAGS


def problems_of(
    model: type[Settings] = TrainSettings,
    file: str | None = None,
    environment: dict[str, str] | None = None,
    **flags: Any,
) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load_settings(model, file, environment, flags)
    return list(caught.value.problems)


def test_flags_override_the_environment_which_overrides_the_file(
    yaml_file: Callable[[str], str],
) -> None:
    file = yaml_file("lora_r: 2\nseed: 2\nsave_steps: 2\n")
    environment = {"T5TUNE_SEED": "3", "T5TUNE_SAVE_STEPS": "3"}
    settings, _ = load_settings(TrainSettings, file, environment, {**NEEDED, "save_steps": "4"})
    assert (settings.lora_alpha, settings.lora_r, settings.seed, settings.save_steps) == (16, 2, 3, 4)


def test_the_command_line_reads_file_environment_and_flags(
    run_command_line: Callable[..., tuple[Any, str]], yaml_file: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = yaml_file("lora_r: 2\nseed: 2\nsave_steps: 2\n")
    monkeypatch.setenv("T5TUNE_SEED", "3")
    monkeypatch.setenv("T5TUNE_SAVE_STEPS", "3")
    settings, _ = run_command_line("train", *NEEDED_FLAGS, "--config", file, "--save-steps", "4")
    assert (settings.lora_r, settings.seed, settings.save_steps) == (2, 3, 4)


def test_variables_without_the_prefix_are_not_read() -> None:
    settings, _ = load_settings(TrainSettings, None, {"SEED": "3", "XT5TUNE_SEED": "4"}, NEEDED)
    assert settings.seed == 42


def test_problems_of_all_sources_are_raised_together(yaml_file: Callable[[str], str]) -> None:
    file = yaml_file("lora_dropout: 1.5\nsave_strategy: sometimes\n")
    found = problems_of(
        TrainSettings, file, {"T5TUNE_SAVE_STEPS": "0"}, lora_r="abc", model_name_or_path="m", data_path="d"
    )
    assert len(found) == 5
    for key, value, place in [
        ("lora_dropout", "1.5", f"{file}: lora_dropout"),
        ("save_strategy", "'sometimes'", f"{file}: save_strategy"),
        ("save_steps", "'0'", "T5TUNE_SAVE_STEPS"),
        ("lora_r", "'abc'", "--lora-r"),
    ]:
        assert [problem for problem in found if problem.startswith(f"{key}: {value} ({place}): ")]
    assert [problem for problem in found if problem.startswith("output_dir: missing; give --output-dir")]


def test_unknown_names_suggest_the_closest_known_name(
    yaml_file: Callable[[str], str], run_command_line: Callable[..., tuple[Any, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = yaml_file("lora_rr: 8\n")
    monkeypatch.setenv("T5TUNE_SAVE_STEP", "5")
    settings, stderr = run_command_line(
        "train", *NEEDED_FLAGS, "--config", file, "--lora-alfa", "8", "--zzz=1", "--model", "m", "--quant", "nf4"
    )
    assert settings is None
    errors = stderr.splitlines()
    assert all(line.startswith("error: ") for line in errors)
    assert len(errors) == 6
    assert f"error: {file}: lora_rr: unknown setting; did you mean lora_r?" in errors
    assert any(line.startswith("error: T5TUNE_SAVE_STEP: unknown setting; did you mean save_steps?") for line in errors)
    assert "error: --lora-alfa: unknown flag; did you mean --lora-alpha?" in errors
    assert "error: --model: unknown flag; did you mean --model-name-or-path?" in errors
    assert "error: --quant: unknown flag; did you mean --quant-type?" in errors
    assert "error: --zzz: unknown flag; t5tune train --help-all lists every option" in errors


def test_numbers_in_scientific_notation_are_numbers(yaml_file: Callable[[str], str]) -> None:
    file = yaml_file("learning_rate: 1e-4\nweight_decay: 1.e-2\ntraining_args:\n  adam_epsilon: 1E-6\n")
    settings, _ = load_settings(TrainSettings, file, {}, NEEDED)
    assert (settings.learning_rate, settings.weight_decay) == (1e-4, 1e-2)
    assert settings.training_args == {"adam_epsilon": 1e-6}


@pytest.mark.parametrize(
    ("text", "number"),
    [("010", 10), ("008", 8), ("+7", 7), ("1_000", 1000), ("0", 0), ("00", 0), ("0x1F", 31), ("0b11", 3)],
)
def test_whole_numbers_in_yaml_are_decimal_as_in_flags(yaml_file: Callable[[str], str], text: str, number: int) -> None:
    file = yaml_file(f"seed: {text}\ntraining_args: {{seeds: [{text}, -{text.lstrip('+')}]}}\n")
    settings, _ = load_settings(TrainSettings, file, {}, NEEDED)
    assert (settings.seed, settings.training_args) == (number, {"seeds": [number, -number]})
    if text[1:2] not in ("x", "b"):
        assert load_settings(TrainSettings, None, {}, {**NEEDED, "seed": text})[0].seed == number


def test_a_time_is_no_number(yaml_file: Callable[[str], str]) -> None:
    file = yaml_file("max_steps: 1:40\nwarmup_steps: 1:40.5\n")
    assert problems_of(file=file, **NEEDED) == [
        f"max_steps: '1:40' ({file}: max_steps): expected a whole number",
        f"warmup_steps: '1:40.5' ({file}: warmup_steps): expected a number",
    ]


@pytest.mark.parametrize("word", ["no", "'no'"])
def test_no_is_a_word_where_a_word_is_expected(yaml_file: Callable[[str], str], word: str) -> None:
    settings, _ = load_settings(TrainSettings, yaml_file(f"eval_strategy: {word}\nsave_strategy: {word}"), {}, NEEDED)
    assert (settings.eval_strategy, settings.save_strategy) == ("no", "no")


@pytest.mark.parametrize(("word", "value"), [("yes", True), ("no", False), ("true", True), ("off", False)])
def test_yes_and_no_are_accepted_for_booleans(yaml_file: Callable[[str], str], word: str, value: bool) -> None:
    settings, _ = load_settings(TrainSettings, yaml_file(f"bf16: {word}\n"), {}, NEEDED)
    assert settings.bf16 is value


def test_an_empty_file_sets_nothing(yaml_file: Callable[[str], str]) -> None:
    assert load_settings(TrainSettings, yaml_file("# nothing yet\n"), {}, NEEDED)[0].lora_r == 8


def test_keys_of_another_command_are_ignored_with_a_note(yaml_file: Callable[[str], str]) -> None:
    file = yaml_file("lora_r: 16\nlearning_rate: 1e-4\nmodel_max_length: 64\n")
    settings, notes = load_settings(PrepareSettings, file, {}, NEEDED)
    assert settings.model_max_length == 64
    assert notes == ["prepare does not use lora_r, learning_rate"]
    file = yaml_file(dump_settings(load_settings(TrainSettings, None, {}, NEEDED)[0]))
    _, [note] = load_settings(MergeSettings, file, {}, {"adapter": "run"})
    assert re.fullmatch(r"merge does not use \d\d settings, which are for other commands", note)


def test_plan_ignores_settings_of_train_without_a_note(yaml_file: Callable[[str], str]) -> None:
    file = yaml_file(dump_settings(load_settings(TrainSettings, None, {}, NEEDED)[0]))
    assert load_settings(PlanSettings, file, {})[1] == []
    planned, notes = load_settings(
        PlanSettings, yaml_file("model_name_or_path: pocket\neval_data: [{path: a.jsonl}]\n")
    )
    assert (planned.eval_data_path, notes) == (["a.jsonl"], [])
    file = yaml_file("model_name_or_path: pocket\noutput_dir: run\nmax_shard_size: 1GB\ndata: [{path: a.jsonl}]\n")
    assert load_settings(PlanSettings, file, {})[1] == ["plan does not use max_shard_size"]
    assert problems_of(PlanSettings, yaml_file("model_name_or_path: pocket\noutput_dirr: run\n"), {}) == [
        f"{file}: output_dirr: unknown setting; t5tune plan --help-all lists every option"
    ]


def test_a_suggested_setting_is_not_also_missing(yaml_file: Callable[[str], str]) -> None:
    found = problems_of(TrainSettings, yaml_file("base_model: pocket\ndatasets: a.jsonl\n"), {})
    assert [problem.split("; ")[1] for problem in found] == [
        "did you mean model_name_or_path?", "did you mean data_path?", "give --output-dir or set it in a --config file"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("model: {name_or_path: pocket, revision: main}", "its keys at the top level, as model_name_or_path, revision"),
        ("training: {lr: 1e-3, num_train_epochs: 2}", "its keys at the top level, as learning_rate, num_train_epochs"),
        ("lora: {r: 8, alpha: 16, rank: 8}", "its keys at the top level, as lora_r, lora_alpha"),
        ("optimizer: {_component_: torch.optim.AdamW, lr: 1e-3}", "its keys at the top level, as learning_rate"),
        ("zzz: {yyy: 1}", "its keys at the top level"),
        # the nested keys aren't settings
        ("special_tokens: {pad_token: <pad>}", "leave it out: the tokenizer's special tokens are used"),
        ("datasets: {path: a.jsonl}", "did you mean data_path?"),
        ("lora: {}", "did you mean lora_r?"),
    ],
)
def test_nested_settings_suggest_names_at_the_top_level(
    text: str, advice: str, yaml_file: Callable[[str], str]
) -> None:
    (problem,) = problems_of(file=yaml_file(text), **NEEDED)
    written = "settings aren't nested: write " if advice.startswith("its keys") else ""
    assert problem.endswith(f": {text.partition(':')[0]}: unknown setting; {written}{advice}")


def test_a_nested_setting_is_not_reported_as_missing_too(yaml_file: Callable[[str], str]) -> None:
    file = yaml_file("model: {name_or_path: pocket}\ndata_path: pocket\noutput_dir: run\n")
    (problem,) = problems_of(file=file)
    assert problem.startswith(f"{file}: model: unknown setting; settings aren't nested")


def test_values_of_other_tools_are_read_or_explained() -> None:
    for value, read in [(True, "on"), ("true", "on"), ("False", "off"), ("auto", "auto")]:
        assert load_settings(TrainSettings, None, {}, {**NEEDED, "packing": value})[0].packing == read
    settings, _ = load_settings(TrainSettings, None, {}, {**NEEDED, "lora_target_modules": "all"})
    assert settings.lora_target_modules == ["all-linear"]
    assert "set q_lora: true (--q-lora)" in problems_of(**NEEDED, train_mode="qlora")[0]
    assert problems_of(**NEEDED, bf16="flase") == [
        "bf16: 'flase' (--bf16): expected true or false; did you mean false?"
    ]


def test_paths_are_not_split_at_commas_or_spaces(run_command_line: Callable[..., tuple[Any, str]]) -> None:
    arguments = ["--model-name-or-path", "pocket", "--output-dir", "a, b", "--data-path", "c, d.json", "e.json"]
    settings, _ = run_command_line("prepare", *arguments)
    assert settings.data_path == ["c, d.json", "e.json"]
    assert settings.output_dir == Path("a, b")


def test_a_list_in_yaml_can_be_a_list_or_text(yaml_file: Callable[[str], str]) -> None:
    for text in ("[q, v]", "q v", "q,v", '"q, v"', "['q,v']"):
        settings, _ = load_settings(TrainSettings, yaml_file(f"lora_target_modules: {text}"), {}, NEEDED)
        assert settings.lora_target_modules == ["q", "v"]


@pytest.mark.parametrize("unset", ["-1", "none", ""])
def test_minus_one_none_and_an_empty_value_mean_unset(
    run_command_line: Callable[..., tuple[Any, str]], unset: str
) -> None:
    settings, _ = run_command_line("train", *NEEDED_FLAGS, f"--num_data={unset}", "--max_steps", "-1")
    assert settings.num_data is None
    assert settings.max_steps is None


COMPLETE: list[Settings] = [
    PrepareSettings(model_name_or_path="m", data_path=["a b.json", "c,d"], output_dir="o", num_data=3),
    PrepareSettings(model_name_or_path="m", data_path="a", output_dir="o", add_tokens=["\n", "{", "'"]),
    TrainSettings(**NEEDED, q_lora=True, learning_rate=1e-5, eval_strategy="no", tf32=False, deepspeed="zero3"),
    TrainSettings(**NEEDED, q_lora=True, bf16=False, training_args={"adam_beta2": 0.95, "label_names": ["no"]}),
    TrainSettings(**NEEDED, eval_data_path=["x", "y"], preprocessed_path="p", num_processes=2, max_steps=7),
    ExportSettings(checkpoint="run/checkpoint-5", output_dir="o", non_lora_state="full", format="bin"),
    MergeSettings(model_name_or_path="m", adapter="a", output_dir="o", verify=False, verify_tolerance=1e-6),
    ChatSettings(model_name_or_path="m", prompt="no\n  – \ttab: # “ü”", system="", temperature=0.5),
]


@pytest.mark.parametrize("settings", COMPLETE, ids=lambda settings: settings.command)
def test_dumped_settings_read_back_as_equal_settings(yaml_file: Callable[[str], str], settings: Settings) -> None:
    file = yaml_file(dump_settings(settings))
    assert load_settings(type(settings), file, {}, {}) == (settings, [])


@pytest.mark.parametrize(
    "name", ["1e-4", "1e3", "008", "1_0", "no", "True", "12", "2026-11-24", "~", "0x1f", "a: b", "ü"]
)
def test_dumped_names_that_look_like_numbers_read_back_as_names(yaml_file: Callable[[str], str], name: str) -> None:
    settings = PrepareSettings(model_name_or_path=name, data_path=[name], output_dir=name)
    file = yaml_file(dump_settings(settings))
    assert load_settings(PrepareSettings, file, {}, {}) == (settings, [])


def test_dumped_settings_can_be_read_by_a_plain_yaml_parser() -> None:
    values = yaml.safe_load(dump_settings(TrainSettings(**NEEDED)))
    assert set(values) == set(TrainSettings.model_fields) - {"bf16"}  # which isn't given, so q_lora may turn it on


def test_settings_are_immutable() -> None:
    settings = TrainSettings(**NEEDED)
    with pytest.raises(SettingsError) as caught:
        settings.lora_r = 16  # type: ignore[misc]
    assert str(caught.value) == "lora_r: settings can't be changed; use settings.replace(lora_r=16)"
    with pytest.raises(SettingsError, match="lora_rank: unknown setting; did you mean lora_r?"):
        settings.lora_rank = 16  # type: ignore[attr-defined]
    assert settings.lora_r == 8


def test_booleans_for_numbers_and_nul_in_paths_are_refused() -> None:
    for values, message in (
        ({"lora_r": True}, "lora_r: true (--lora-r): expected a number, not true or false"),
        ({"learning_rate": False}, "learning_rate: false (--learning-rate): expected a number, not true or false"),
        (
            {"output_dir": "a\0b"},
            "output_dir: 'a\\x00b' (--output-dir): contains a NUL character, which no path or name can contain",
        ),
    ):
        given = {"model_name_or_path": "pocket", "data_path": "pocket", "output_dir": "run", **values}
        with pytest.raises(SettingsError) as refused:
            load_settings(TrainSettings, flags=given)
        assert refused.value.problems == (message,)
