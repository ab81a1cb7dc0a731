"""Turn settings models into Typer options, and rewrite the arguments that a user types into the form that Typer parses.

Typer treats every value as text. Only pydantic parses and validates values, whether they come from a flag, a file or
the environment, so that all problems are reported at once.
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
from t5tune.errors import suggest_name
from t5tune.settings import Settings
from t5tune.settings.legacy_names import LEGACY_NAMES

COMMON_PANEL = "All commands"
BOOLEAN_WORDS = {"true", "1", "yes", "on", "false", "0", "no", "off"}


def make_command(model: type[Settings], run: Callable[..., None]) -> Callable[..., None]:
    """Make a function with one parameter per setting, which Typer turns into a command.

    It calls `run(model, flags, problems, config=…, json=…, quiet=…, debug=…)`: `flags` contains the values as typed,
    `problems` the problems that `normalize_arguments` found.
    """

    def command(renamed: list[str] | None, problem: list[str] | None, **values: Any) -> None:
        common = {name: values.pop(name) for name in ("config", "json", "quiet", "debug")}
        typed = {name: value for name, value in values.items() if value not in (None, [])}
        legacy = dict(item.split("=", 1) for item in renamed or [])
        run(model, legacy | typed, problem or [], **common)

    parameters = [_make_parameter(name, field, model) for name, field in _select_flag_fields(model).items()]
    parameters += _make_common_parameters()
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = SUMMARIES[model.command]
    return command


def normalize_arguments(arguments: list[str], model: type[Settings]) -> list[str]:
    """Rewrite the arguments of one command into the form that Typer parses.

    `--lora_r=8` -> `--lora-r 8`; `--bf16` -> `--bf16 true`; `--no-bf16` -> `--bf16 false`;
    `--lora-target-modules q v` -> the flag twice.
    Legacy names (see settings/legacy_names.py) are passed on in the hidden flag --renamed. Unknown flags, missing
    values and unexpected arguments are passed on in the hidden flag --problem, so that they are reported together with
    the problems that pydantic finds.
    """
    fields = _select_flag_fields(model)
    kinds: dict[str, str] = {name: _classify_field(field) for name, field in fields.items()}
    legacy = LEGACY_NAMES.get(model.command, {}).keys() - fields.keys()
    kinds |= {"config": "one", "json": "switch", "quiet": "switch", "debug": "switch", "help": "switch"}
    positional = [name for name, field in fields.items() if _has_extra(field, "positional")]
    result: list[str] = []
    problems: list[str] = []
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        if not token.startswith("-") and not positional:
            problems.append(f"{token or repr(token)}: unexpected argument")
            continue
        if not token.startswith("--") or token == "--":
            result.append(token)
            continue
        flag, equals, attached = token[2:].partition("=")
        name = flag.replace("-", "_")
        negated = name.removeprefix("no_")
        if kinds.get(name) == "bool":
            values = [attached] if equals else []
            # where there are positional arguments, a word after a BOOL flag may be one of them
            if not values and rest and not _is_flag(rest[0]) and (not positional or rest[0].lower() in BOOLEAN_WORDS):
                values = [rest.pop(0)]
            result += [f"--{name.replace('_', '-')}", values[0] if values else "true"]
        elif kinds.get(negated) == "bool" and name != negated and not equals:
            result += [f"--{negated.replace('_', '-')}", "false"]
        elif kinds.get(name) == "switch":
            result.append(f"--{name}")
            if equals:
                problems.append(f"--{flag}={attached}: --{flag} takes no value")
        elif name in legacy:
            values = [attached] if equals else _take_values(rest)
            result += ["--renamed", f"{name}={' '.join(values) or 'true'}"]
        elif name in kinds:
            values = [attached] if equals else _take_values(rest, only_first=kinds[name] != "many")
            if not values:
                problems.append(f"--{flag}: expected a value after it")
            for value in values:
                result += [f"--{name.replace('_', '-')}", value]
        else:
            known = [f"--{field.replace('_', '-')}" for field in [*fields, *legacy]]
            problems.append(f"--{flag}: unknown flag{suggest_name('--' + flag.replace('_', '-'), known)}")
            if not equals and rest and not _is_flag(rest[0]) and not positional:
                rest.pop(0)  # its value, which would otherwise be reported as a second problem
    return result + [part for problem in problems for part in ("--problem", problem)]


def _take_values(rest: list[str], only_first: bool = False) -> list[str]:
    """Remove the words before the next flag, or only the first of them, from `rest`, and return them."""
    values: list[str] = []
    while rest and not _is_flag(rest[0]) and not (only_first and values):
        values.append(rest.pop(0))
    return values


def _is_flag(token: str) -> bool:
    if not token.startswith("-") or token == "-":  # - is standard input
        return False
    try:
        float(token)  # a negative number
    except ValueError:
        return True
    return False


def _select_flag_fields(model: type[Settings]) -> dict[str, FieldInfo]:
    """Select the fields that have a flag, in the order of the mixins: base model first, output last."""
    return {name: field for name, field in model.model_fields.items() if not _has_extra(field, "yaml_only")}


def _has_extra(field: FieldInfo, key: str) -> bool:
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get(key))


def unwrap_type(field: FieldInfo) -> Any:
    """Return the type of a field without Annotated and None: `int`, `list[str]`, `Literal[...]`, …"""
    annotation: Any = field.annotation
    while True:
        if typing.get_origin(annotation) is Annotated:
            annotation = typing.get_args(annotation)[0]
        elif typing.get_origin(annotation) in {typing.Union, types.UnionType}:
            annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
        else:
            return annotation


def _classify_field(field: FieldInfo) -> Literal["bool", "many", "one"]:
    plain = unwrap_type(field)
    if plain is bool:
        return "bool"
    return "many" if typing.get_origin(plain) is list else "one"


def _make_metavar(field: FieldInfo) -> str:
    plain = unwrap_type(field)
    if typing.get_origin(plain) is Literal:
        return "NAME"
    if _has_extra(field, "has_unit"):
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
    if _classify_field(field) == "bool":
        return f"{text} [dim]On by default.[/]" if field.default else text
    if field.default in (None, "", []):
        return text
    default = " ".join(field.default) if isinstance(field.default, list) else field.default
    if default == Path():
        default = "the current folder"
    return f"{text} [dim]Default: {default}.[/]"


def _make_parameter(name: str, field: FieldInfo, model: type[Settings]) -> inspect.Parameter:
    """Turn a setting into a Typer parameter; its value is None if the user didn't give it."""
    kind = _classify_field(field)
    help_text = _format_help(field)
    option: Any
    if _has_extra(field, "positional"):
        option = typer.Argument(help=help_text, metavar=model.format_option(name), show_default=False)
    else:
        option = typer.Option(
            model.format_option(name),
            help=help_text,
            rich_help_panel=model.find_panel(name),
            metavar=_make_metavar(field),
            show_default=False,
        )
    plain: Any = list[str] if kind == "many" else str
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[plain | None, option]
    )


def _make_common_parameters() -> list[inspect.Parameter]:
    """Make every command's flags (--config, --json, --quiet, --debug), and those that `normalize_arguments` adds."""

    def make_switch(name: str, help_text: str) -> inspect.Parameter:
        option = typer.Option(f"--{name}", help=help_text, metavar="", rich_help_panel=COMMON_PANEL)
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option]
        )

    config = typer.Option(
        "--config",
        metavar="FILE_OR_NAME",
        help="YAML file of settings, or the name of a run config that comes with t5tune.",
        rich_help_panel=COMMON_PANEL,
        show_default=False,
    )

    def make_hidden(name: str) -> inspect.Parameter:
        option = typer.Option(f"--{name}", hidden=True)
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[list[str] | None, option]
        )

    return [
        make_hidden("renamed"),
        make_hidden("problem"),
        inspect.Parameter(
            "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, config]
        ),
        make_switch("json", "Print the result as one JSON object."),
        make_switch("quiet", "Print only errors and the result."),
        make_switch("debug", "Print the traceback of an error."),
    ]
