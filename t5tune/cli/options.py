"""Settings models -> Typer options, and the command line as users type it -> the one that Typer reads.

Typer sees every value as text; pydantic alone parses and judges values, whether they come from a flag, a
file or the environment, so that all problems can be shown at once.
"""

import inspect
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic.fields import FieldInfo

from t5tune.cli.summaries import SUMMARIES
from t5tune.errors import suggestion
from t5tune.settings import Settings
from t5tune.settings.legacy_names import RENAMED

COMMON_PANEL = "Everywhere"
TRUE_FALSE = {"true", "1", "yes", "on", "false", "0", "no", "off"}


def command_function(model: type[Settings], run: Callable[..., None]) -> Callable[..., None]:
    """A function with one parameter per setting, for Typer to make a command of.

    It calls `run(model, flags, problems, config=…, json=…, quiet=…, debug=…)`: `flags` holds what was typed,
    `problems` what `normalise` found wrong with it.
    """

    def command(renamed: list[str] | None, problem: list[str] | None, **values: Any) -> None:
        common = {name: values.pop(name) for name in ("config", "json", "quiet", "debug")}
        typed = {name: value for name, value in values.items() if value not in (None, [])}
        old_names = dict(item.split("=", 1) for item in renamed or [])
        run(model, old_names | typed, problem or [], **common)

    parameters = [_parameter(name, field, model) for name, field in _flags(model).items()] + _common()
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = SUMMARIES[model.command]
    return command


def normalise(arguments: list[str], model: type[Settings]) -> list[str]:
    """Rewrite one command's arguments into the form that Typer reads.

    `--lora_r=8` -> `--lora-r 8`; `--bf16` -> `--bf16 true`; `--no-bf16` -> `--bf16 false`;
    `--lora-target-modules q v` -> the flag twice.
    Names that others renamed or dropped (see settings/renamed.py) travel in the hidden flag --renamed;
    an unknown flag, a missing value or a stray one in --problem, to be shown with what pydantic finds.
    """
    fields = _flags(model)
    kinds: dict[str, str] = {name: _kind(field) for name, field in fields.items()}
    renamed = RENAMED.get(model.command, {}).keys() - fields.keys()
    kinds |= {"config": "one", "json": "switch", "quiet": "switch", "debug": "switch", "help": "switch"}
    positional = [name for name, field in fields.items() if _extra(field, "positional")]
    result: list[str] = []
    problems: list[str] = []
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        if not token.startswith("-") and not positional:
            problems.append(f"{token or repr(token)}: stands behind no flag")
            continue
        if not token.startswith("--") or token == "--":
            result.append(token)
            continue
        flag, equals, attached = token[2:].partition("=")
        name = flag.replace("-", "_")
        negated = name.removeprefix("no_")
        values = [attached] if equals else []
        if kinds.get(name) == "bool":
            if not values and rest and not _is_flag(rest[0]) and (not positional or rest[0].lower() in TRUE_FALSE):
                values = [rest.pop(0)]
            result += [f"--{name.replace('_', '-')}", values[0] if values else "true"]
        elif kinds.get(negated) == "bool" and name != negated and not equals:
            result += [f"--{negated.replace('_', '-')}", "false"]
        elif kinds.get(name) == "switch":
            result.append(f"--{name}")
        elif name in renamed:
            while not equals and rest and not _is_flag(rest[0]):
                values.append(rest.pop(0))
            result += ["--renamed", f"{name}={' '.join(values) or 'true'}"]
        elif name in kinds:
            while not equals and rest and not _is_flag(rest[0]) and (kinds[name] == "many" or not values):
                values.append(rest.pop(0))
            if not values:
                problems.append(f"--{flag}: expected a value after it")
            for value in values:
                result += [f"--{name.replace('_', '-')}", value]
        else:
            known = [f"--{field.replace('_', '-')}" for field in [*fields, *renamed]]
            problems.append(f"--{flag}: unknown flag{suggestion('--' + flag.replace('_', '-'), known)}")
            if not equals and rest and not _is_flag(rest[0]) and not positional:
                rest.pop(0)
    return result + [part for problem in problems for part in ("--problem", problem)]


def _is_flag(token: str) -> bool:
    if not token.startswith("-") or token == "-":  # which stands for standard input
        return False
    try:
        float(token)
    except ValueError:
        return True
    return False


def _flags(model: type[Settings]) -> dict[str, FieldInfo]:
    """The fields that have a flag, in the order of their mixins from the base model to the output."""
    return {name: field for name, field in model.model_fields.items() if not _extra(field, "yaml_only")}


def _extra(field: FieldInfo, key: str) -> bool:
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get(key))


def _plain_type(field: FieldInfo) -> Any:
    """The field's type without Annotated and None: `int`, `list[str]`, `Literal[...]`, …"""
    annotation: Any = field.annotation
    while True:
        if typing.get_origin(annotation) is Annotated:
            annotation = typing.get_args(annotation)[0]
        elif typing.get_origin(annotation) in {typing.Union, types.UnionType}:
            annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
        else:
            return annotation


def _kind(field: FieldInfo) -> Literal["bool", "many", "one"]:
    plain = _plain_type(field)
    if plain is bool:
        return "bool"
    return "many" if typing.get_origin(plain) is list else "one"


def _metavar(field: FieldInfo) -> str:
    plain = _plain_type(field)
    if typing.get_origin(plain) is Literal:
        return "NAME"
    if _extra(field, "has_unit"):
        return "SIZE"
    if typing.get_origin(plain) is list:
        return "TEXT…"
    return {int: "INT", float: "FLOAT", str: "TEXT", bool: "BOOL"}.get(plain, "PATH")


def _help(field: FieldInfo) -> str:
    """The description, and the default where it isn't "not set"."""
    text = field.description or ""
    if typing.get_origin(_plain_type(field)) is Literal:
        text += f" One of {', '.join(str(choice) for choice in typing.get_args(_plain_type(field)))}."
    if field.is_required():
        return f"{text} [red]Required.[/]"
    if _kind(field) == "bool":
        return f"{text} [dim]On by default.[/]" if field.default else text
    if field.default in (None, "", []):
        return text
    default = " ".join(field.default) if isinstance(field.default, list) else field.default
    if default == Path():
        default = "the current folder"
    return f"{text} [dim]Default: {default}.[/]"


def _parameter(name: str, field: FieldInfo, model: type[Settings]) -> inspect.Parameter:
    """One setting as a parameter that Typer understands; None means that the user didn't give it."""
    kind = _kind(field)
    help_text = _help(field)
    option: Any
    if _extra(field, "positional"):
        option = typer.Argument(help=help_text, metavar=model.as_typed(name), show_default=False)
    else:
        option = typer.Option(
            model.as_typed(name),
            help=help_text,
            rich_help_panel=model.panel_of(name),
            metavar=_metavar(field),
            show_default=False,
        )
    plain: Any = list[str] if kind == "many" else str
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[plain | None, option]
    )


def _common() -> list[inspect.Parameter]:
    """--config, --json, --quiet and --debug, which every command has, and what `normalise` hands over."""

    def switch(name: str, help_text: str) -> inspect.Parameter:
        option = typer.Option(f"--{name}", help=help_text, metavar="", rich_help_panel=COMMON_PANEL)
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option]
        )

    config = typer.Option(
        "--config",
        metavar="FILE_OR_NAME",
        help="YAML file of settings, or the name of a run that comes with t5tune.",
        rich_help_panel=COMMON_PANEL,
        show_default=False,
    )

    def hidden(name: str) -> inspect.Parameter:
        option = typer.Option(f"--{name}", hidden=True)
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[list[str] | None, option]
        )

    return [
        hidden("renamed"),
        hidden("problem"),
        inspect.Parameter(
            "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, config]
        ),
        switch("json", "Print the result as one JSON object."),
        switch("quiet", "Show errors and the result only."),
        switch("debug", "Show the traceback of an error."),
    ]
