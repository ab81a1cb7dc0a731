"""The command line.

`run` finds the command; command.py runs it and shows its result, and help.py explains it. Typer only completes words in
a shell (completion.py). Typer and Rich are used only in this package. A command's module is imported when the command
runs, so that the help doesn't wait for it.
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

HELP_FLAGS = {"-h", "--help", "--help-all"}
# what other tools call our commands
COMMANDS_IN_OTHER_TOOLS = {
    "prepare": "preprocess tokenize",
    "train": "finetune fine-tune fine_tune sft fit",
    "evaluate": "eval predict test",
    "chat": "generate infer inference",
    "serve": "server api deploy",
}
COMPLETION_FLAGS = ("--install-completion", "--show-completion")


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 success, 1 failure, 2 invalid input, 130 interrupted, 143 terminated."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the arrows in --help, on a terminal whose encoding lacks them
    if os.environ.get("COLUMNS") == "0":  # Rich would print nothing at all
        del os.environ["COLUMNS"]
    code = run(sys.argv[1:] if arguments is None else arguments)
    if sys.stdout is not None:
        try:
            sys.stdout.flush()
        except OSError:  # what can't be written is reported; Python would report it again, and exit with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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
        options, command, rest = _split(arguments)
        words = [*options, *takewhile(lambda word: word != "--", rest)]
        help_flags = HELP_FLAGS & {word.partition("=")[0] for word in words}
        if "_T5TUNE_COMPLETE" not in os.environ and (help_flags or not (command or options)):
            from t5tune.cli.help import show_help

            show_help(command, everything="--help-all" in help_flags)
            return 0
        if command is None or options or "_T5TUNE_COMPLETE" in os.environ:
            from t5tune.cli.completion import run_typer

            return run_typer(options)
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
    if arguments[:1] == ["help"]:  # t5tune help, t5tune help train
        arguments = ["--help", *arguments[1:]]
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
    problem = f"{command}: no such command"
    if command == "version":
        return SettingsError(problem, hint="run t5tune --version")
    ours = [name for name, others in COMMANDS_IN_OTHER_TOOLS.items() if command.lower() in others.split()]
    advice = f"; did you mean {ours[0]}?" if ours else suggest_name(command, SUMMARIES)
    return SettingsError(problem + advice, hint=None if ours else f"the commands are {', '.join(SUMMARIES)}")
