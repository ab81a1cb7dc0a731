"""A command line becomes values and problems. What pydantic makes of the values: tests/settings/test_loading.py.

tests/golden/command_lines.jsonl has a command line per row: with the text of the settings that it gives, the problems
that it is refused with, the settings that these suggest, and its switches.
"""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from t5tune.settings import COMMANDS, TrainSettings
from tests.support.processes.command_line import parse_words

GOLDEN = Path(__file__).parents[1] / "golden" / "command_lines.jsonl"


def read(line: str) -> dict[str, Any]:
    """Read a command line, and return its row of the file."""
    command, *words = shlex.split(line)
    parsed = parse_words(words, next(model for model in COMMANDS if model.command == command))
    config = {} if parsed.config is None else {"config": parsed.config}
    row = {
        "line": line,
        "values": parsed.values | config,
        "problems": parsed.problems,
        "meant": sorted(parsed.meant),
        "switches": [name for name in ("json", "quiet", "debug") if getattr(parsed, name)],
    }
    return {key: value for key, value in row.items() if value}


@pytest.mark.parametrize("command", [model.command for model in COMMANDS])
def test_command_lines_give_their_values_and_problems(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # no word is the name of a file
    rows = [json.loads(row) for row in GOLDEN.read_text(encoding="utf-8").splitlines()]
    expected = {row["line"]: row for row in rows if shlex.split(row["line"])[0] == command}
    assert {line: read(line) for line in expected} == expected


def test_words_are_read_as_files_where_there_are_such_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.json").mkdir()
    assert parse_words(["data.json"], TrainSettings).problems == []
    Path("tru").write_text("lora_r: 8\n")
    assert parse_words(["--bf16", "tru"], TrainSettings).config == "tru"
    Path("model").mkdir()
    assert parse_words(["model"], TrainSettings).problems == []
    Path("model/config.json").write_text("{}")
    given = parse_words(["pocket", "model"], TrainSettings)
    assert (given.config, given.values, given.problems) == ("pocket", {"model_name_or_path": "model"}, [])
