"""The options of a command as Typer gets them, made from the fields of its settings; and the rows of its help.

lora_r: int = Field(default=8, description="Rank.")   ->   --lora-r INT  Rank. Default: 8.

An option's value stays text, because pydantic reads all values, from flags, files and the environment.
"""

import textwrap
import typing
from collections.abc import Iterable, Iterator
from copy import copy
from inspect import Parameter
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union

import typer
from pydantic.fields import FieldInfo
from rich.markup import escape
from typer.core import TyperArgument, TyperOption

from t5tune.settings import Settings
from t5tune.settings.fastchat_names import LEGACY_NAMES
from t5tune.settings.field_types import get_extra

MAX_CHOICES = 24  # characters; longer choices are in the description
MAX_LABEL = 30  # characters of a line
TYPE_NAMES = {int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH"}
LIST_TYPE_NAMES = {**TYPE_NAMES, str: "NAME"}
REQUIRED = "Required, here or in the --config file"
COMMON = "All commands"
SWITCHES = {
    "json": "Print the result as one JSON object.",
    "quiet": "Print only errors and the result.",
    "debug": "Print the traceback of an error.",
}
HELP_FLAGS = {"-h/--help": "Show the options that most people use.", "--help-all": "Show all options."}
CONFIG_DESCRIPTION = "YAML file of settings, or the name of a run config that comes with t5tune: `pocket`, …"


def make_parameters(model: type[Settings]) -> Iterator[Parameter]:
    """Yield the parameters of a command: its settings, their legacy names, and the options that all commands have."""
    fields = {name: field for name, field in model.model_fields.items() if not get_extra(field, "yaml_only")}
    for name, field in fields.items():
        yield _make_parameter(name, *_declare(name, field, model))
    # a config may serve several commands, but command lines with these names are for training
    for name in [name for name in LEGACY_NAMES if model.command == "train" and name not in fields]:
        yield _make_parameter(name, str, typer.Option(format_flag(name), hidden=True, parser=str))
    config = typer.Option(metavar="FILE_OR_NAME", help=CONFIG_DESCRIPTION, parser=str, rich_help_panel=COMMON)
    yield _make_parameter("config", str, config)
    for name, text in SWITCHES.items():
        yield _make_parameter(name, bool, typer.Option(f"--{name}", help=text, rich_help_panel=COMMON))
    for flags, text in HELP_FLAGS.items():
        option = typer.Option(*flags.split("/"), help=text, is_eager=True, callback=_show_help, rich_help_panel=COMMON)
        yield _make_parameter(flags.rpartition("--")[2].replace("-", "_"), bool, option)


def _make_parameter(name: str, kind: Any, declared: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, declared])


def _declare(name: str, field: FieldInfo, model: type[Settings]) -> tuple[Any, Any]:
    """Return the type of a setting's parameter, and its declaration for Typer."""
    flag, plain = model.format_option(name), unwrap_type(field)
    kind = list[str] if typing.get_origin(plain) is list else str
    choices = ["true", "false"] if plain is bool else _list_choices(field)
    complete = (lambda incomplete: choices) if choices else None  # Typer filters them by what is typed
    text = escape(_describe(field))
    if get_extra(field, "positional"):
        return kind, typer.Argument(metavar=flag, help=text, parser=str, autocompletion=complete)
    return kind, typer.Option(
        f"{flag}/--no-{flag.removeprefix('--')}" if plain is bool else flag,
        metavar="" if plain is bool else _make_metavar(field),
        help=text,
        hidden=bool(get_extra(field, "hidden")),
        parser=str,
        autocompletion=complete,
        rich_help_panel=REQUIRED if field.is_required() else model.find_panel(name),
    )


def _show_help(ctx: typer.Context, param: typer.CallbackParam, is_wanted: bool) -> None:
    if is_wanted and not ctx.resilient_parsing:
        command: Any = ctx.command
        command.show_help(ctx, everything=param.name == "help_all")
        raise typer.Exit


def list_rows(params: Iterable[Any], model: type[Settings], everything: bool, width: int) -> list[Any]:
    """List copies of the options that a help page shows; the only name of each is its label.

    Typer's columns for the flag, its `--no-` flag and the type would take half of the page.
    """
    shown = [param for param in params if not param.hidden] if everything else list_essential(params, model)
    required, limit = model.list_required(), min(MAX_LABEL, width // 2 - 4)
    rows = [copy(param) for param in sorted(shown, key=lambda param: (*required, param.name).index(param.name))]
    wrapper = textwrap.TextWrapper(limit, subsequent_indent="  ", break_on_hyphens=False)
    labels = [wrapper.wrap(format_label(row, model)) for row in rows]
    column = 2 + max((len(line) for label in labels for line in label if len(line) <= limit), default=0)
    for row, label in zip(rows, labels, strict=True):
        row.metavar = "\n".join(line.ljust(column) for line in label)
        row.display_type_rich = lambda ctx: ""  # the label has the type
        if isinstance(row, TyperOption):
            row.opts, row.secondary_opts = [row.metavar], []
            row.rich_help_panel = row.rich_help_panel if everything or row.name in required else "Common options"
    return rows


def list_essential(params: Iterable[Any], model: type[Settings]) -> list[Any]:
    """List the options of the short help: required, then most used; or all, if the short help would hide none."""
    shown = {param.name: param for param in params if not param.hidden}
    names = dict.fromkeys((*model.list_required(), *model.essential, "config"))
    is_all = all(name in names or param.rich_help_panel == COMMON for name, param in shown.items())
    return list(shown.values()) if is_all else [shown[name] for name in names]


def format_label(param: Any, model: type[Settings]) -> str:
    """Write an option as the help shows it: `--lora-r INT`, `--bf16 / --no-bf16`, `MODEL, --model-name-or-path`."""
    if isinstance(param, TyperArgument):
        return str(param.metavar)
    if param.name == model.also_positional:
        return f"{name_argument(param.name, model)}, {param.opts[0]}"
    return f"{' / '.join([', '.join(param.opts), *param.secondary_opts])} {param.metavar or ''}".rstrip()


def list_arguments(model: type[Settings]) -> list[str]:
    """List the settings that words without a flag fill, as the usage shows them: `MODEL`, `[CONFIG]`."""
    positional = [name for name, field in model.model_fields.items() if get_extra(field, "positional")]
    names = {name: name_argument(name, model) for name in positional or filter(None, [model.also_positional])}
    required = model.list_required()
    return [word if name in required else f"[{word}]" for name, word in names.items()]


def name_argument(name: str, model: type[Settings]) -> str:
    """Return the name in the usage of a setting that a word without a flag fills: `CACHE`, `MODEL`."""
    field = model.model_fields.get(name)  # None: `config`
    is_positional = field is not None and get_extra(field, "positional")
    return model.format_option(name) if is_positional else name.removesuffix("_name_or_path").upper()


def format_flag(name: str, value: str | None = None) -> str:
    """Write a setting as it is typed: `--q-lora`, or `--quant-type int8`."""
    flag = f"--{name.replace('_', '-')}"
    return flag if value in (None, "true") else f"{flag} {value}"


def _make_metavar(field: FieldInfo) -> str:
    """Return the metavar of a value: INT, NUMBER, PATH, TEXT, NAME, short choices, or the field's metavar."""
    plain = unwrap_type(field)
    if metavar := get_extra(field, "metavar"):
        return str(metavar)
    if typing.get_origin(plain) is list:
        return f"{LIST_TYPE_NAMES[typing.get_args(plain)[0]]}…"
    if choices := _list_choices(field):
        shown = "|".join(choices)
        return f"[{shown}]" if len(shown) <= MAX_CHOICES else "NAME"
    return TYPE_NAMES[plain]


def _list_choices(field: FieldInfo) -> list[str]:
    plain = unwrap_type(field)
    return [str(choice) for choice in typing.get_args(plain)] if typing.get_origin(plain) is typing.Literal else []


def _describe(field: FieldInfo) -> str:
    """Return the description, the choices unless the metavar shows them, and the default."""
    text, default = field.description or "", field.default
    if (choices := _list_choices(field)) and (get_extra(field, "positional") or _make_metavar(field) == "NAME"):
        text += f" One of {', '.join(choices)}."
    if unwrap_type(field) is bool:
        return f"{text} On by default." if default is True else text
    if field.is_required() or default in (None, "", []):
        return text
    if isinstance(default, list):
        default = " ".join(default)
    elif isinstance(default, float):
        default = f"{default:g}"  # 0 instead of 0.0
    elif default == Path():
        default = "the current folder"
    return f"{text} Default: {default}."


def unwrap_type(field: FieldInfo) -> Any:
    """Return the type of a field without Annotated and None: `int`, `list[str]`, `Literal[...]`, …"""
    plain: Any = field.annotation
    while typing.get_origin(plain) in (Annotated, Union, UnionType):
        plain = next(part for part in typing.get_args(plain) if part is not NoneType)
    return plain
