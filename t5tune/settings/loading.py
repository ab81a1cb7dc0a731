"""File, environment and flags -> one validated settings model, or every problem at once."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from t5tune.errors import SettingsError, suggestion
from t5tune.settings import packaged_templates
from t5tune.settings.commands import COMMANDS
from t5tune.settings.fields import Settings
from t5tune.settings.legacy_names import RENAMED
from t5tune.settings.messages import value_reason

PREFIX = "T5TUNE_"
Model = TypeVar("Model", bound=Settings)


@dataclass(frozen=True)
class _Value:
    """A value and where the user wrote it, such as `--lora-r` or `run.yaml: lora_r`."""

    value: Any
    place: str


def load_settings(
    model: type[Model],
    file: str | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
    problems: Iterable[str] = (),
) -> tuple[Model, list[str]]:
    """Read the settings of one command.

    Args:
        file: a YAML file, or the name of a run under templates/runs.
        environment: variables; those that begin with T5TUNE_ are read.
        flags: setting name -> value as typed.
        problems: what the caller found wrong already, to be raised with the rest.

    Returns: the settings, and notes on names that were taken for others or left out.

    Raises:
        SettingsError: with one line for each problem of all three sources.
    """
    problems = list(problems)
    notes: list[str] = []
    values: dict[str, _Value] = {}
    for source in (_from_file(file), _from_environment(environment or {}), _from_flags(flags or {}, model)):
        values.update(_with_known_names(model, source, problems, notes))
    settings = None
    try:
        settings = model.model_validate({name: value.value for name, value in values.items()})
    except ValidationError as error:
        problems += [_problem(detail, values, model) for detail in error.errors()]
    if problems or settings is None:
        raise SettingsError(*problems, hint=f"t5tune {model.command} --help lists every option")
    if getattr(settings, "q_lora", False) and model.command == "train" and "bf16" not in values:
        notes.append("q_lora turns bf16 on: the 4-bit base computes in it")
    return settings, notes


def dump_settings(settings: Settings) -> str:
    """The settings as YAML that `--config` reads back to the same model."""
    from t5tune.io.yaml_file import to_yaml

    header = f"# t5tune {settings.command} --config THIS_FILE does it again\n"
    return header + to_yaml(settings.model_dump(mode="json"))


def _from_file(file: str | None) -> dict[str, _Value]:
    if file is None:
        return {}
    from t5tune.io.yaml_file import read_yaml

    path = packaged_templates.find_run(file)
    return {name: _Value(value, f"{path}: {name}") for name, value in read_yaml(path).items()}


def _from_environment(environment: Mapping[str, str]) -> dict[str, _Value]:
    return {
        key.removeprefix(PREFIX).lower(): _Value(value, key)
        for key, value in environment.items()
        if key.startswith(PREFIX)
    }


def _from_flags(flags: Mapping[str, Any], model: type[Settings]) -> dict[str, _Value]:
    return {name: _Value(value, model.as_typed(name)) for name, value in flags.items()}


def _with_known_names(
    model: type[Settings], source: dict[str, _Value], problems: list[str], notes: list[str]
) -> dict[str, _Value]:
    """Map old names, leave out those of other commands with a note, and refuse unknown ones."""
    elsewhere = {name for other in COMMANDS for name in other.model_fields}
    elsewhere |= {name for names in RENAMED.values() for name in names}
    renamed = RENAMED.get(model.command, {})
    known: dict[str, _Value] = {}
    unused: list[str] = []
    for name, value in source.items():
        if name in model.model_fields:
            known[name] = value
        elif name in renamed:
            change = renamed[name]
            new = change.convert(value.value) if change.new else None
            if change.new and new is not None:
                known.setdefault(change.new, _Value(new, value.place))
                notes.append(f"{value.place}: taken as {change.new} {new} ({change.why})")
            elif change.new is None and str(value.value).lower() not in {"", "-1", "false"}:
                notes.append(f"{value.place}: left out ({change.why})")
        elif name in elsewhere and not value.place.startswith("--"):
            unused.append(name)
        else:
            problems.append(f"{value.place}: unknown setting{suggestion(name, [*model.model_fields, *renamed])}")
    if unused:
        notes.append(f"{model.command} does not use {', '.join(unused)}")
    return known


def _problem(error: ErrorDetails, values: dict[str, _Value], model: type[Settings]) -> str:
    """One pydantic error as `lora_r: abc (--lora-r): not a whole number`."""
    if not error["loc"]:
        return error["msg"].removeprefix("Value error, ")
    name = str(error["loc"][0])
    if error["type"] == "missing":
        typed = model.as_typed(name)
        give = typed if typed.startswith("--") else f"t5tune {model.command} {typed}"
        return f"{name}: missing; give {give} or set it in a --config file"
    given = values.get(name)
    shown = repr(given.value if given else error["input"])
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return f"{name}: {shown}{f' ({given.place})' if given else ''}: {value_reason(error)}"
