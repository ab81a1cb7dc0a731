"""What Typer does: the help, the version, completion in a shell, and errors in the options before the command.

Typer knows the commands and their options, but doesn't run them: see arguments.py and command.py.
"""

import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

import typer

from t5tune import __version__
from t5tune.cli.summaries import SUMMARIES
from t5tune.errors import SettingsError

EPILOG = (
    "Flags may use _ instead of -; a BOOL may also be written as --flag or --no-flag; a list as a b, as a,b or by "
    "repeating the flag. Precedence: default < --config file < environment variable T5TUNE_NAME < flag."
)
HELP_HINT = "run t5tune --help to list the commands"


def run_typer(arguments: list[str], command: str | None = None) -> int:
    """Let Typer handle the arguments, with the options of one command. Return the exit code.

    Raises:
        SettingsError: Typer doesn't know an option.
    """
    app = build_app(_find_completed_command() or command)
    try:
        code = app(arguments, standalone_mode=False, prog_name="t5tune")
    except typer.TyperException as error:
        raise SettingsError(getattr(error, "message", None) or str(error), hint=HELP_HINT) from None
    except typer.Abort:
        raise KeyboardInterrupt from None
    return code if isinstance(code, int) else 0


def build_app(command: str | None = None) -> typer.Typer:
    """Build the Typer app. Only `command` gets its options, because building those of all commands is slow."""
    app = typer.Typer(
        name="t5tune",
        help="Fine-tune T5-family encoder-decoders: prepare → train → export → merge.",
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
    )

    @app.callback()
    def root(
        version: bool = typer.Option(
            False, "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ) -> None:
        pass

    for name, summary in SUMMARIES.items():
        parameters: Sequence[inspect.Parameter] = ()
        if name == command:
            from t5tune.cli.options import make_parameters  # imports pydantic, which the list of commands doesn't need

            parameters = make_parameters(name)
        app.command(name, epilog=EPILOG)(_make_command(summary, parameters))
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


def _make_command(summary: str, parameters: Sequence[inspect.Parameter]) -> Callable[..., None]:
    def command(**values: Any) -> None:
        raise AssertionError("Typer only shows the command")

    command.__doc__ = summary
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _find_completed_command() -> str | None:
    """Return the command on the line being completed, which the shell passes in a variable."""
    if "_T5TUNE_COMPLETE" not in os.environ:
        return None
    # bash sets the first variable, the other shells the second
    words = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS", "")
    return next((word for word in words.split()[1:] if word in SUMMARIES), None)
