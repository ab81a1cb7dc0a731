"""Parse a command line, or run it in a process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from t5tune.cli.app import build_command
from t5tune.cli.spellings import CommandLine
from t5tune.settings import Settings
from tests.support.processes.forks import get_fork_server


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


# a sitecustomize.py that sends a signal when a module is imported; the environment names both
SIGNAL_WHILE_IMPORTING = """
import importlib.abc, os, signal, sys
class Sender:
    def __set_name__(self, owner, name):  # where Python 3.11 makes a RuntimeError of a KeyboardInterrupt
        os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL_NAME"]))
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == os.environ["SIGNAL_AT"] and self in sys.meta_path:
            sys.meta_path.remove(self)
            type("Imported", (), {"sender": Sender()})
sys.meta_path.insert(0, Finder())
"""

OnRanks = Callable[..., CommandResult]
"""The fixture `on_ranks`."""


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


_RUN_EACH = """
import os, sys
from t5tune.cli import run

for folder, words in RUNS:
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}.{name}", os.O_WRONLY | os.O_CREAT), number)
    code = run(words)
    sys.stdout.flush()
    sys.stderr.flush()
    with open(f"{folder}.code", "w") as file:
        file.write(str(code))
"""


def t5tune_in_one_fork(runs: Sequence[tuple[Path, list[str]]], env: dict[str, str]) -> list[CommandResult]:
    """Run command lines one after the other in a single fork, each in its folder, which is faster than a fork for each.

    Their output is in files next to the folder.
    """
    code = f"RUNS = {[(str(folder), words) for folder, words in runs]!r}\n{_RUN_EACH}"
    log = runs[0][0].with_name("log")
    log.touch()
    assert get_fork_server().start(["-c", code], log, log, {**os.environ, **env}).wait(500) == 0, log.read_text()
    read = [[Path(f"{folder}.{name}").read_text() for name in ("code", "stdout", "stderr")] for folder, _ in runs]
    return [CommandResult(int(code), stdout, stderr) for code, stdout, stderr in read]
