"""Plain descriptions of library errors, for invalid values and broken files."""

import json
from pathlib import Path
from typing import Any

import pytest

from t5tune.errors import SettingsError, WriteError
from t5tune.io.reasons import describe_error, join_lines
from t5tune.settings import MergeSettings, Settings, TrainSettings, load_settings
from tests.support.processes.command_line import t5tune_in_fork

VALUES: dict[str, tuple[type[Settings], str, Any, str]] = {
    "word for a whole number": (TrainSettings, "lora_r", "abc", "expected a whole number"),
    "fraction for a whole number": (TrainSettings, "lora_r", 1.5, "expected a whole number"),
    "5,000 digits": (TrainSettings, "lora_r", "9" * 5000, "the number is too large"),
    "word for a number": (TrainSettings, "learning_rate", "fast", "expected a number"),
    "infinity": (TrainSettings, "learning_rate", "inf", "expected a finite number"),
    "word for a boolean": (TrainSettings, "bf16", "perhaps", "expected true or false"),
    "number for text": (
        TrainSettings,
        "model_name_or_path",
        1.5,
        "expected text; put numbers, true and false in quotes",
    ),
    "number for a path": (TrainSettings, "cache_dir", 1.5, "expected a path"),
    "number for a list": (TrainSettings, "allow_change", 1.5, "expected a list"),
    "word for a mapping": (TrainSettings, "training_args", "abc", "expected names with values"),
    "other choice": (TrainSettings, "save_strategy", "often", "expected 'no', 'steps' or 'epoch'"),
    "0 for a positive number": (TrainSettings, "save_steps", 0, "must be greater than 0"),
    "below the minimum": (TrainSettings, "model_max_length", 7, "must be at least 8"),
    "above the maximum": (TrainSettings, "max_rejected_fraction", 1.5, "must be at most 1"),
    "at an excluded bound": (TrainSettings, "eval_fraction", 1, "must be less than 1"),
    "empty list": (TrainSettings, "data_path", [], "must not be empty"),
    "size that is too large": (MergeSettings, "max_shard_size", "9" * 400 + "GB", "the size is too large"),
}


def test_the_reason_of_an_error_has_no_hint() -> None:
    assert join_lines(WriteError("a.pt: no space", hint="free up space")) == "a.pt: no space"
    assert join_lines(OSError("two\nlines")) == "two lines"


@pytest.mark.parametrize(("model", "name", "value", "reason"), VALUES.values(), ids=VALUES)
def test_a_wrong_value_is_described_without_pydantics_message(
    model: type[Settings], name: str, value: Any, reason: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(model, None, {}, {name: value})
    (problem,) = [line for line in caught.value.problems if line.startswith(f"{name}: ") and "missing;" not in line]
    assert problem.endswith(f"): {reason}")


JSON = {
    "": "expected a value at line 1, column 1",
    '{"a": 1,\n "b" 2}': "expected a colon at line 2, column 6",
    '{"a": 1 "b": 2}': "expected a comma or a closing bracket at line 1, column 9",
    "{'a': 1}": "expected a key in double quotes at line 1, column 2",
    '{"a": "b': "a string without a closing quote begins at line 1, column 7",
    '{"a": 1} x': "there is text after the end of the value at line 1, column 10",
    '{"a": "\\x"}': "a string contains an unknown escape at line 1, column 8",
    '{"a": "\\u12"}': "a string contains an incomplete \\u escape at line 1, column 9",
    '{"a": "\x01"}': "a string contains a control character at line 1, column 8",
}


@pytest.mark.parametrize(("text", "reason"), JSON.items(), ids=map(repr, JSON))
def test_broken_json_is_described_without_the_parsers_message(text: str, reason: str) -> None:
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads(text)
    assert describe_error(caught.value) == f"not valid JSON: {reason}"


def test_file_errors_are_described_without_error_numbers(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file") as missing:
        (tmp_path / "nowhere").read_text()
    assert describe_error(missing.value) == "No such file or directory"
    with pytest.raises(UnicodeDecodeError) as caught:
        b"a\n\xe9".decode()
    assert describe_error(caught.value) == "line 2: the byte 0xE9 is not valid UTF-8"


def run_to_error(*arguments: Any) -> str:
    """Run a command that fails, and return its only error line."""
    done = t5tune_in_fork(*arguments)
    assert done.code == 2, done.stderr
    (line,) = done.errors
    return line.removeprefix("error: ")


@pytest.mark.slow
def test_broken_files_are_described_on_the_command_line(tmp_path: Path) -> None:
    deepspeed, base, cache = (tmp_path / name for name in ("zero.json", "base", "cache"))
    deepspeed.write_text("{'a': 1}")
    train = ["train", "--model-name-or-path", "pocket", "--data-path", "pocket", "--output-dir", tmp_path / "run"]
    said = run_to_error(*train, "--deepspeed", deepspeed)
    reason = "can't be read: not valid JSON: expected a key in double quotes at line 1, column 2"
    assert said.startswith(f"deepspeed: {deepspeed}: {reason}")
    base.mkdir()
    (base / "config.json").write_text("{'a': 1}")
    prepare = ["prepare", "--output-dir", tmp_path / "out", "--data-path", "pocket"]
    assert run_to_error(*prepare, "--model-name-or-path", base) == f"{base / 'config.json'}: {reason}"
    cache.mkdir()
    (cache / "manifest.json").write_text("[1]")
    assert "manifest.json: not the manifest of a token cache (expected a JSON object)" in run_to_error("inspect", cache)
