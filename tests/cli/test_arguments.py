"""Arguments become values and problems. What pydantic makes of the values: tests/settings/test_loading.py."""

from typing import Any

import pytest

from t5tune.cli.arguments import parse_arguments
from t5tune.settings import ExportSettings, InspectSettings, Settings, TemplatesSettings, TrainSettings


@pytest.mark.parametrize(
    ("model", "line", "values"),
    [
        (TrainSettings, "--lora_r=8 --bf16 --no-q-lora", {"lora_r": "8", "bf16": "true", "q_lora": "false"}),
        (TrainSettings, "--seed -3 --max-steps=-1", {"seed": "-3", "max_steps": "-1"}),
        (TrainSettings, "--lora-r 8 --lora-r 16", {"lora_r": "16"}),
        (TrainSettings, "--data-path a b --data_path=c", {"data_path": ["a", "b", "c"]}),
        (TrainSettings, "--no_cuda --fsdp full_shard auto_wrap", {"no_cuda": "true", "fsdp": "full_shard auto_wrap"}),
        (InspectSettings, "--stats cache --all true", {"stats": "true", "cache": "cache", "all": "true"}),
        (InspectSettings, "--all -- --stats", {"all": "true", "cache": "--stats"}),
        (ExportSettings, "--lora-target-modules q v -- run", {"lora_target_modules": ["q", "v"], "checkpoint": "run"}),
        (TemplatesSettings, "copy pocket -", {"action": "copy", "name": "pocket", "to": "-"}),
    ],
)
def test_values_are_the_text_that_was_typed(model: type[Settings], line: str, values: dict[str, Any]) -> None:
    parsed = parse_arguments(line.split(), model)
    assert parsed.values == values
    assert parsed.problems == []


@pytest.mark.parametrize(
    ("model", "line", "problems"),
    [
        (TrainSettings, "-x 1 --lora-r", ["-x: unknown flag", "--lora-r: expected a value after it"]),
        (TrainSettings, "-5 -- --bf16", ["-5: unexpected argument", "--bf16: unexpected argument"]),
        (InspectSettings, "--cache c d", ["--cache: unknown flag", "d: unexpected argument"]),
        (InspectSettings, "--cach c", ["--cach: unknown flag"]),
        (InspectSettings, "--exampel c", ["--exampel: unknown flag; did you mean --example?"]),
    ],
)
def test_what_is_wrong_is_collected(model: type[Settings], line: str, problems: list[str]) -> None:
    assert parse_arguments(line.split(), model).problems == problems


def test_the_flags_of_all_commands_are_no_settings() -> None:
    parsed = parse_arguments(["--json", "--config", "a", "--quiet", "--config=b", "--debug="], TrainSettings)
    assert (parsed.values, parsed.config, parsed.json, parsed.quiet, parsed.debug) == ({}, "b", True, True, True)
    assert parsed.problems == ["--debug=: --debug takes no value"]
