"""The command line up to the command itself, and files of settings."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from t5tune import cli
from t5tune.cli import command
from t5tune.settings import Settings


@pytest.fixture
def run_command_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[Any, str]]:
    """Run the real command line up to the command itself: (the settings that it would get, the text on stderr)."""
    for name in [name for name in os.environ if name.startswith("T5TUNE_")]:
        monkeypatch.delenv(name)
    received: list[Settings] = []
    monkeypatch.setattr(command, "_import_command", lambda name: lambda settings, output: received.append(settings))
    monkeypatch.setattr(command, "_configure_libraries", lambda name, debug: None)

    def run(*arguments: str) -> tuple[Any, str]:
        received.clear()
        code = cli.run(list(arguments))
        stderr = capfd.readouterr().err
        assert code == (0 if received else 2), stderr
        return (received[0] if received else None), stderr

    return run


@pytest.fixture
def yaml_file(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write
