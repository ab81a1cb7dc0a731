"""What Typer does: completion in a shell, the version, and errors in the options before the command.

Typer knows the commands and their options, but neither runs nor explains them: see command.py and help.py.
"""

import inspect
import os
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from t5tune.cli.summaries import SUMMARIES
from t5tune.errors import SettingsError
from t5tune.version import __version__

HELP_HINT = "run t5tune --help to list the commands"


def run_typer(arguments: list[str]) -> int:
    """Let Typer handle the options before the command, or the line that a shell completes. Return the exit code.

    Raises:
        SettingsError: Typer doesn't know an option.
    """
    app = build_app(_find_completed_command())
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
        name="t5tune", pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
    )

    @app.callback()
    def root(
        version: bool = typer.Option(
            False, "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ) -> None:
        pass

    for name, summary in SUMMARIES.items():
        parameters = _make_parameters(name) if name == command else ()
        app.command(name, add_help_option=False)(_make_command(summary, parameters))
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


def _make_command(summary: str, parameters: Sequence[inspect.Parameter]) -> Callable[..., None]:
    def command(**values: Any) -> None:
        raise AssertionError("Typer only completes the command")

    command.__doc__ = summary
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _make_parameters(command: str) -> list[inspect.Parameter]:
    """Make one Typer parameter for each option of a command."""
    from t5tune.cli.options import list_options  # imports pydantic, which the list of commands doesn't need

    parameters = []
    for option in list_options(command):
        kind: Any = list[str] if option.metavar.endswith("…") else str if option.metavar else bool
        if not option.flags:
            kind, made = str, typer.Argument(metavar=option.argument)
        else:
            flags = ("/".join(option.flags),) if option.is_bool else option.flags
            made = typer.Option(*flags, help=option.description, hidden=option.is_hidden)
        annotation = Annotated[kind | None, made]
        parameters.append(
            inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )
    return parameters


def _find_completed_command() -> str | None:
    """Return the command on the line being completed, which the shell passes in a variable."""
    if "_T5TUNE_COMPLETE" not in os.environ:
        return None
    # bash sets the first variable, the other shells the second
    words = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS", "")
    return next((word for word in words.split()[1:] if word in SUMMARIES), None)
