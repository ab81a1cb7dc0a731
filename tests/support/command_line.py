"""Parse a command line, or run it in a process."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from t5tune.cli.app import build_command
from t5tune.cli.spellings import CommandLine
from t5tune.settings import Settings
from tests.support.forks import get_fork_server


@dataclass(frozen=True)
class CommandResult:
    """The result of a command that has finished."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.stdout)

    @property
    def errors(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith("error:")]


@cache
def get_command(name: str) -> TyperCommand:
    """Return a command as Typer has it, with its options."""
    return build_command(name)


def parse_words(words: list[str], model: type[Settings]) -> CommandLine:
    """Parse the words that follow a command."""
    command_line: CommandLine = get_command(model.command).make_context(model.command, words).obj
    return command_line


def t5tune(*arguments: Any, env: dict[str, str] | None = None, cwd: Path | None = None) -> CommandResult:
    """Run the command line in a new process."""
    command = [sys.executable, "-m", "t5tune", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **(env or {})}, cwd=cwd, timeout=500
    )
    return CommandResult(done.returncode, done.stdout, done.stderr)


def t5tune_in_fork(
    *arguments: Any, env: dict[str, str] | None = None, cwd: Path | None = None, stdin: bytes = b""
) -> CommandResult:
    """Run the command line in a fork of a process that has imported everything.

    This saves five seconds if the command imports torch. Variables that libraries read when they are imported have no
    effect, but for those of huggingface_hub.
    """
    environment = {**os.environ, **(env or {})}
    done = get_fork_server().run([*map(str, arguments)], environment=environment, cwd=cwd, stdin=stdin)
    return CommandResult(done.codes[0], done.stdout, done.log)
