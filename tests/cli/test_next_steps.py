"""The commands that a command suggests when it ends; test_help.py has those that follow the examples in the help."""

from pathlib import Path

import pytest

from t5tune.cli.next_steps import list_next_steps
from t5tune.settings import EvaluateSettings
from tests.support.command_line import t5tune

PREPARE = ["prepare", "--model-name-or-path", "pocket", "--data-path", "pocket", "--output-dir", "cache"]


def test_commands_repeat_the_settings_that_find_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = EvaluateSettings(
        model_name_or_path="google/flan-t5-base", revision="v1", cache_dir=Path("my cache"), adapter=Path("tuned"),
        bf16=True, data_path=["dev.csv"],
    )  # fmt: skip
    base, adapter = "google/flan-t5-base --revision v1 --cache-dir 'my cache'", "--adapter tuned"
    assert list_next_steps(settings, None) == [
        ("next", f"t5tune chat {base} {adapter} --bf16"),
        ("", f"t5tune evaluate {base} {adapter} --bf16 --data-path dev.csv --compare-base"),
        ("", f"t5tune merge --model-name-or-path {base} {adapter} --output-dir merged"),
    ]


@pytest.mark.parametrize("flag", ["--quiet", "--json"])
def test_nothing_is_suggested_to_a_script(tmp_path: Path, flag: str) -> None:
    assert "next    " not in t5tune(*PREPARE, flag, cwd=tmp_path).stderr
