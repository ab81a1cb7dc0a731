"""The options of a command as text: what its help lists and what a shell completes."""

import typing
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic.fields import FieldInfo

from t5tune.cli.arguments import classify_field, has_extra, select_flag_fields, unwrap_type
from t5tune.settings import COMMANDS, Settings

MAX_CHOICES = 24  # characters; longer choices are in the description
TYPE_NAMES = {int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH"}
LIST_TYPE_NAMES = {**TYPE_NAMES, str: "NAME"}


@dataclass(frozen=True)
class Option:
    """An option of a command.

    Attributes:
        flags: such as `--lora-r`, or `--bf16` and `--no-bf16`; none for an argument that has only its place.
        metavar: the type of the flag's value; "" if it takes none.
        argument: what the usage calls the value where it is given without a flag; "" if that isn't possible.
        is_hidden: whether no help lists it, because every value is refused.
    """

    name: str
    flags: tuple[str, ...]
    metavar: str
    description: str
    panel: str
    argument: str = ""
    is_required: bool = False
    is_hidden: bool = False

    @property
    def label(self) -> str:
        """The option as the help shows it: `--lora-r INT`, `--bf16 / --no-bf16`, `MODEL, --model-name-or-path`."""
        if self.argument:
            return ", ".join([self.argument, *self.flags])
        separator = " / " if self.is_bool else ", "
        return f"{separator.join(self.flags)} {self.metavar}".rstrip()

    @property
    def is_bool(self) -> bool:
        """Whether it is a setting with one flag for on and one for off."""
        return bool(self.flags) and self.flags[-1].startswith("--no-")


CONFIG_DESCRIPTION = "YAML file of settings, or the name of a run config that comes with t5tune: `pocket`, …"
COMMON_OPTIONS = (
    Option("config", ("--config",), "FILE_OR_NAME", CONFIG_DESCRIPTION, "All commands"),
    Option("json", ("--json",), "", "Print the result as one JSON object.", "All commands"),
    Option("quiet", ("--quiet",), "", "Print only errors and the result.", "All commands"),
    Option("debug", ("--debug",), "", "Print the traceback of an error.", "All commands"),
    Option("help", ("-h", "--help"), "", "Show the options that most people use.", "All commands"),
    Option("help_all", ("--help-all",), "", "Show all options.", "All commands"),
)


def list_options(command: str) -> list[Option]:
    """List the options of a command in the order in which they are declared, then those that all commands have."""
    model = _find_model(command)
    settings = [_make_option(name, field, model) for name, field in select_flag_fields(model).items()]
    common = [replace(option, argument=_name_argument(option.name, model)) for option in COMMON_OPTIONS]
    return [*settings, *common]


def list_essential_options(command: str) -> list[Option]:
    """List the options for the short help: what is required, then what most people use; if that is all, all options."""
    options = {option.name: option for option in list_options(command)}
    required = [name for name, option in options.items() if option.is_required]
    names = [*required, *_find_model(command).essential]
    if options.keys() - names <= {option.name for option in COMMON_OPTIONS}:
        return list(options.values())
    return [options[name] for name in (*names, "config")]


def _find_model(command: str) -> type[Settings]:
    return next(model for model in COMMANDS if model.command == command)


def _make_option(name: str, field: FieldInfo, model: type[Settings]) -> Option:
    flag, is_bool = model.format_option(name), classify_field(field) == "bool"
    flags = (flag, f"--no-{flag.removeprefix('--')}") if is_bool else (flag,)
    return Option(
        name,
        () if has_extra(field, "positional") else flags,
        "" if is_bool else _make_metavar(field),
        _describe(field),
        model.find_panel(name),
        argument=flag if has_extra(field, "positional") else _name_argument(name, model),
        is_required=field.is_required(),
        is_hidden=has_extra(field, "hidden"),
    )


def _name_argument(name: str, model: type[Settings]) -> str:
    """Return what to call the value of a setting that a word without a flag fills; "" for other settings."""
    return name.removesuffix("_name_or_path").upper() if name == model.also_positional else ""


def _make_metavar(field: FieldInfo) -> str:
    """Return the type of a value: INT, NUMBER, PATH, TEXT, NAME, the choices if they are short, or its metavar."""
    extra, plain = field.json_schema_extra, unwrap_type(field)
    if isinstance(extra, dict) and "metavar" in extra:
        return str(extra["metavar"])
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
    """Return the description, followed by the choices that the type doesn't show and the default, if there are any."""
    text, default = field.description or "", field.default
    if (choices := _list_choices(field)) and (has_extra(field, "positional") or _make_metavar(field) == "NAME"):
        text += f" One of {', '.join(choices)}."
    if classify_field(field) == "bool":
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
