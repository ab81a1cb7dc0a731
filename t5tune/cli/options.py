"""The options of a command as Typer parameters, for its help page and for completion."""

import inspect
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic.fields import FieldInfo

from t5tune.cli.arguments import classify_field, has_extra, select_flag_fields, unwrap_type
from t5tune.settings import COMMANDS, Settings

COMMON_OPTIONS = (
    ("config", str, "FILE_OR_NAME", "YAML file of settings, or the name of a run config that comes with t5tune."),
    ("json", bool, "", "Print the result as one JSON object."),
    ("quiet", bool, "", "Print only errors and the result."),
    ("debug", bool, "", "Print the traceback of an error."),
)


def make_parameters(command: str) -> list[inspect.Parameter]:
    """Make one parameter for each setting that isn't only for YAML, and those that all commands have."""
    model = next(model for model in COMMANDS if model.command == command)
    parameters = [_make_setting_parameter(name, field, model) for name, field in select_flag_fields(model).items()]
    for name, kind, metavar, text in COMMON_OPTIONS:
        option = typer.Option(f"--{name}", metavar=metavar, help=text, rich_help_panel="All commands")
        parameters.append(_make_parameter(name, kind, option))
    return parameters


def _make_setting_parameter(name: str, field: FieldInfo, model: type[Settings]) -> inspect.Parameter:
    option, text = model.format_option(name), _format_help(field)
    plain: Any = list[str] if classify_field(field) == "many" else str
    if has_extra(field, "positional"):
        return _make_parameter(name, plain, typer.Argument(metavar=option, help=text))
    panel = model.find_panel(name)
    return _make_parameter(
        name, plain, typer.Option(option, metavar=_make_metavar(field), help=text, rich_help_panel=panel)
    )


def _make_parameter(name: str, kind: Any, option: Any) -> inspect.Parameter:
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _make_metavar(field: FieldInfo) -> str:
    plain = unwrap_type(field)
    if typing.get_origin(plain) is Literal:
        return "NAME"
    if has_extra(field, "has_unit"):
        return "SIZE"
    if typing.get_origin(plain) is list:
        return "TEXT…"
    return {int: "INT", float: "FLOAT", str: "TEXT", bool: "BOOL"}.get(plain, "PATH")


def _format_help(field: FieldInfo) -> str:
    """Return the description, followed by the choices and the default, if there are any."""
    text = field.description or ""
    if typing.get_origin(unwrap_type(field)) is Literal:
        text += f" One of {', '.join(str(choice) for choice in typing.get_args(unwrap_type(field)))}."
    if field.is_required():
        return f"{text} [red]Required.[/]"
    if classify_field(field) == "bool":
        return f"{text} [dim]On by default.[/]" if field.default else text
    if field.default in (None, "", []):
        return text
    default = " ".join(field.default) if isinstance(field.default, list) else field.default
    if default == Path():
        default = "the current folder"
    return f"{text} [dim]Default: {default}.[/]"
