"""Typed lines for tests of chat."""

from pathlib import Path
from typing import Any

from t5tune.settings import ChatSettings
from tests.support.processes.command_line import CommandResult, t5tune_in_fork

PROMPT = "Hello, two tea for Mira please."


def settings(base: Path, **changes: Any) -> ChatSettings:
    return ChatSettings(model_name_or_path=str(base), max_new_tokens=12, use_cpu=True, **changes)


def chat_in_fork(model: Path, *flags: object, stdin: str) -> CommandResult:
    return t5tune_in_fork("chat", "--model-name-or-path", model, *flags, stdin=stdin.encode())
