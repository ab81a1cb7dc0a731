"""The generated parts of docs/for-agents.md, which `t5tune docs` prints.

The rest of the page is written by hand.
"""

import dataclasses
import importlib
import typing
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from rich.text import Text

import t5tune
from t5tune import errors, progress
from t5tune.cli.app import build_command
from t5tune.cli.inspect import JSON_FIELDS
from t5tune.cli.options import COMMON, format_label, list_essential
from t5tune.cli.results import TEMPLATE_FLAGS
from t5tune.cli.summaries import SUMMARIES
from t5tune.commands.serve import Address
from t5tune.data.caches.cache_view import ExampleView
from t5tune.errors import T5TuneError
from t5tune.settings import COMMANDS, Settings
from t5tune.settings.packaged_templates import describe_templates
from tools import REPOSITORY
from tools.generated_blocks import fill_blocks

PAGE = REPOSITORY / "docs" / "for-agents.md"
TYPE_NAMES = {bool: "bool", int: "int", float: "number", str: "text", Path: "path", list: "list", dict: "object"}


def build_page() -> str:
    """Return the page's text with its generated parts as they should be."""
    return fill_blocks(PAGE, GENERATED)


def describe_command(model: type[Settings]) -> Iterator[str]:
    """Yield the summary of a command, its essential settings as its help shows them, and its result's keys."""
    yield SUMMARIES[model.command]
    earlier = {line for other in COMMANDS[: COMMANDS.index(model)] for line in list_options(other)}
    options = list_options(model)
    yield ""
    if repeated := [line for line in options if line in earlier]:
        yield f"- as above: {', '.join(line.partition(': ')[0] for line in repeated)}"
    yield from (f"- {line}" for line in options if line not in repeated)
    yield f"- result: {', '.join(find_result_keys(model.command)) or 'the JSON schema'}"


@cache
def list_options(model: type[Settings]) -> list[str]:
    """List a line for each option of a command's short help, without the options that all commands have."""
    required = model.list_required()
    return [
        f"`{format_label(param, model)}`{' (required)' if param.name in required else ''}: "
        f"{Text.from_markup(param.help).plain}"
        for param in list_essential(build_command(model.command).params, model)
        if param.rich_help_panel != COMMON or param.name == model.also_positional
    ]


def find_result_keys(command: str) -> list[str]:
    """List the keys of a command's output with --json, each with its type; empty for schema's JSON schema."""
    result = typing.get_type_hints(getattr(importlib.import_module(f"t5tune.commands.{command}"), command))["return"]
    if command == "schema":
        return []
    if command == "serve":  # a running server, whose address is printed
        result = Address
    # inspect prints an object for each example
    names = JSON_FIELDS if command == "inspect" else [field.name for field in dataclasses.fields(result)]
    hints = typing.get_type_hints(ExampleView if command == "inspect" else result)
    return [f"`{name}` {name_type(hints[name])}" for name in names]


def name_type(hint: Any) -> str:
    """Return the type of a value in JSON: `path`, `number?`, `object`, …"""
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    if type(None) in typing.get_args(hint):
        return f"{name_type(kinds[0])}?"
    return TYPE_NAMES.get(typing.get_origin(hint) or hint, "object")


def list_errors() -> Iterator[str]:
    """Yield a line for each kind of error, by exit code."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, T5TuneError)]
    for kind in sorted(kinds[1:], key=lambda kind: kind.exit_code):  # without T5TuneError itself
        yield f"- {kind.exit_code} `{kind.__name__}`: {get_summary(kind)}"


def list_templates() -> Iterator[str]:
    """Yield a line for each kind of template, with the names of the packaged templates."""
    for kind, flag in TEMPLATE_FLAGS.items():
        names = (f"`{name}` ({text.removesuffix('.')})" for name, text in describe_templates(kind).items())
        yield f"- `{flag}`: {'; '.join(names)}"


def list_events() -> Iterator[str]:
    """Yield a line for each event that a report receives."""
    for event in typing.get_args(progress.Event):
        fields = ", ".join(field.name for field in dataclasses.fields(event))
        yield f"- `{event.__name__}({fields})`: {get_summary(event)}"


def get_summary(described: type) -> str:
    return (described.__doc__ or "").partition("\n")[0]


def list_names() -> Iterator[str]:
    """Yield the names that can be imported from t5tune."""
    yield ", ".join(f"`{name}`" for name in dir(t5tune) if not name.startswith("_"))


GENERATED: dict[str, Callable[[], Iterator[str]]] = {
    **{model.command: partial(describe_command, model) for model in COMMANDS},
    "errors": list_errors,
    "names of templates": list_templates,
    "events": list_events,
    "names": list_names,
}
