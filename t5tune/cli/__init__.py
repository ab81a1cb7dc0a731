"""The command line.

`run` finds the command; command.py runs it and shows its result. Typer only renders the help (help.py). Typer and Rich
are used only in this package. A command's module is imported when the command runs, and Typer when help is asked for,
so that neither costs what it doesn't need.
"""

import atexit
import io
import os
import sys
from contextlib import suppress
from itertools import takewhile
from typing import NoReturn

from t5tune.cli.summaries import SUMMARIES
from t5tune.distributed.world import World
from t5tune.errors import SettingsError, T5TuneError, WriteError, suggest_name

COMPLETION_FLAGS = ("--install-completion", "--show-completion")


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 success, 1 failure, 2 invalid input, 130 interrupted, 143 terminated."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the arrows in --help, on a terminal whose encoding lacks them
    if os.environ.get("COLUMNS") == "0":  # Rich would print nothing at all
        del os.environ["COLUMNS"]
    code = run(sys.argv[1:] if arguments is None else arguments)
    with suppress(SettingsError):  # invalid variables of a launcher, which train has reported
        if World.from_environment().launched:
            # gloo's threads may outlive the process group and abort the process (SIGABRT) while the interpreter shuts
            # down (pytorch/pytorch#190489). Run the exit handlers here and skip the shutdown.
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run the command line and return the exit code."""
    failure: BaseException
    try:
        options, command, rest = _split(arguments or ["--help"])
        wants_help = any(word.partition("=")[0] == "--help" for word in takewhile(lambda word: word != "--", rest))
        if command is None or options or wants_help or "_T5TUNE_COMPLETE" in os.environ:
            from t5tune.cli.help import run_typer

            return run_typer([command, "--help"] if command and not options else options, command)
        from t5tune.cli.command import run_command

        return run_command(command, rest)
    except BrokenPipeError:  # the reader of the help has closed the pipe
        return 1
    except OSError as error:
        failure = WriteError(f"{error.filename or 'standard output'}: can't be written: {error.strerror}")
    except (T5TuneError, KeyboardInterrupt) as error:
        failure = error
    from t5tune.cli.output import Output

    wants_json = "--json" in arguments and not isinstance(failure, WriteError)
    return Output(sys.stdout, json=wants_json, debug="--debug" in arguments).fail(failure)


def _split(arguments: list[str]) -> tuple[list[str], str | None, list[str]]:
    """Split the arguments into the options before the command, the command, and what follows it."""
    options = list(takewhile(lambda word: word.startswith("-"), arguments))
    command = next(iter(arguments[len(options) :]), None)
    rest = arguments[len(options) + 1 :]
    # the deepspeed launcher puts --local_rank before the command; the environment has the rank as well
    options = [word for word in options if word != "--" and not word.startswith(("--local_rank", "--local-rank"))]
    if command is not None and command not in SUMMARIES:
        raise _make_unknown_command_error(command, options)
    return options, command, rest


def _make_unknown_command_error(command: str, options: list[str]) -> SettingsError:
    if options and options[-1] in COMPLETION_FLAGS:
        problem = f"{options[-1]} {command}: the option takes no value and detects the current shell"
        return SettingsError(problem, hint=f"run t5tune {options[-1]}")
    problem = f"{command}: no such command{suggest_name(command, SUMMARIES)}"
    return SettingsError(problem, hint=f"the commands are {', '.join(SUMMARIES)}")
