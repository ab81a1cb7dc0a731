"""The command line as a Typer app, which parses it, calls the command, explains it and completes it in a shell.

Only the command in use is built, since its options need its settings, which are slow to import. `t5tune --help` and a
mistyped command import neither pydantic nor the settings.
"""

import inspect
from itertools import takewhile
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from t5tune.cli.summaries import SUMMARIES, fit_help, format_first_steps
from t5tune.errors import SettingsError, suggest_name
from t5tune.version import __version__

# names of our commands in other tools
COMMANDS_IN_OTHER_TOOLS = {
    "prepare": "preprocess tokenize",
    "train": "finetune fine-tune fine_tune sft fit",
    "evaluate": "eval predict test",
    "chat": "generate infer inference",
    "serve": "server api deploy",
}


class Commands(TyperGroup):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read `help train` and `-h train`, and refuse an unknown command, before Typer parses the words."""
        if ctx.resilient_parsing:  # a shell completes the words
            fit_help(10_000)  # fish would take each line of a longer text as a word
        else:
            args = _arrange_words(args)
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(SUMMARIES)

    def get_command(self, ctx: Any, cmd_name: str) -> TyperCommand | None:
        """Return a command that is only listed."""
        return TyperCommand(cmd_name, help=escape(SUMMARIES[cmd_name])) if cmd_name in SUMMARIES else None

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, *rest = args
        return (name, build_command(name), rest) if name in SUMMARIES else super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self.epilog = format_first_steps(fit_help())
        super().format_help(ctx, formatter)


def _arrange_words(words: list[str]) -> list[str]:
    """Put a help flag that precedes the command after it, and refuse an unknown command."""
    if words[:1] == ["help"]:
        words = ["--help", *words[1:]]
    options = list(takewhile(lambda word: word.startswith("-"), words))
    command, rest = next(iter(words[len(options) :]), None), words[len(options) + 1 :]
    # the deepspeed launcher puts --local_rank before the command; the environment has the rank as well
    options = [word for word in options if word != "--" and not word.startswith(("--local_rank", "--local-rank"))]
    if command is not None and command not in SUMMARIES:
        raise _make_unknown_command_error(command, options)
    given = {word.partition("=")[0] for word in takewhile(lambda word: word != "--", [*options, *rest])}
    if given & {"-h", "--help", "--help-all"} or not (command or options):
        help_flag = "--help-all" if "--help-all" in given and command else "--help"
        return [command, help_flag] if command else [help_flag]
    return [*options, command, *rest] if command else options


def _make_unknown_command_error(command: str, options: list[str]) -> SettingsError:
    if options and options[-1] in ("--install-completion", "--show-completion"):  # Typer would ignore the word
        problem = f"{options[-1]} {command}: the option takes no value and detects the current shell"
        return SettingsError(problem, hint=f"run t5tune {options[-1]}")
    problem = f"{command}: no such command"
    if command == "version":
        return SettingsError(problem, hint="run t5tune --version")
    ours = [name for name, others in COMMANDS_IN_OTHER_TOOLS.items() if command.lower() in others.split()]
    advice = f"; did you mean {ours[0]}?" if ours else suggest_name(command, SUMMARIES)
    return SettingsError(problem + (advice or f"; the commands are {', '.join(SUMMARIES)}"))


def build_command(name: str) -> TyperCommand:
    """Build a command with its options."""
    from t5tune.cli.options import make_parameters
    from t5tune.cli.spellings import SettingsCommand
    from t5tune.settings import COMMANDS

    model = next(model for model in COMMANDS if model.command == name)

    def run(ctx: typer.Context, **values: Any) -> int:
        from t5tune.cli.command import run_command

        return run_command(model, ctx.obj)

    context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    parameters = [context, *make_parameters(model)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    alone = typer.Typer(add_completion=False)
    alone.command(name, cls=SettingsCommand, help=escape(SUMMARIES[name]), add_help_option=False)(run)
    command = typer.main.get_command(alone)
    assert isinstance(command, SettingsCommand)
    command.model = model
    return command


app = typer.Typer(name="t5tune", cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Fine-tune T5, mT5, ByT5 and related models: prepare → train → export → merge."""
