"""Combine a YAML file, environment variables and flags into one validated settings model, or report all problems."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from t5tune.errors import SettingsError
from t5tune.file_names import SETTINGS_FILE
from t5tune.settings import packaged_templates
from t5tune.settings.commands import COMMANDS
from t5tune.settings.dataset_list import PATHS_OF_DATASETS, DatasetSettings
from t5tune.settings.fastchat_names import LEGACY_NAMES, select_legacy_names
from t5tune.settings.field_types import Settings, get_extra
from t5tune.settings.messages import HIDDEN_VALUE, describe_value_error, format_place, get_reason, shorten_file_value
from t5tune.settings.other_names import (
    detect_tool,
    find_meant_setting,
    find_nested_setting,
    mention_help,
    suggest_setting,
)

VARIABLE_PREFIX = "T5TUNE_"
SETTINGS_HEADER = "# to run this again: t5tune "  # which marks a folder as an output of t5tune
MAX_UNUSED_NAMES = 8  # in a note about settings that a command doesn't use
Model = TypeVar("Model", bound=Settings)


@dataclass(frozen=True)
class _Value:
    """A value, its location, such as `--lora-r` or `run.yaml: lora_r`, and a note to show if the value is used."""

    value: Any
    place: str
    note: str | None = None


def load_settings(
    model: type[Model],
    file: str | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
    problems: Iterable[str] = (),
    meant: Iterable[str] = (),
) -> tuple[Model, list[str]]:
    """Load the settings of one command.

    Args:
        file: a YAML file, or the name of a run config under templates/runs.
        environment: environment variables; only those that begin with T5TUNE_ are read.
        flags: setting name -> value as typed.
        problems: problems that the caller found, to raise together with the problems found here.
        meant: settings that these problems suggest, so that they aren't reported as missing too.

    Returns:
        The settings, and notes about legacy names and about settings that the command doesn't use.

    Raises:
        SettingsError: with one line for each problem in any of the three sources.
    """
    problems, meant = list(problems), set(meant)
    notes: list[str] = []
    values: dict[str, _Value] = {}
    from_flags = {name: _Value(value, model.format_option(name)) for name, value in (flags or {}).items()}
    in_file = _read_file(file) if file is not None else {}
    # in increasing order of precedence
    for source in (in_file, _read_environment(environment or {}), from_flags):
        given = _resolve_names(model, source, source is from_flags, problems, notes, meant)
        for data, paths in PATHS_OF_DATASETS.items():  # either replaces both in a source of lower precedence
            if not given.keys().isdisjoint({data, paths}):
                values.pop(data, None)
                values.pop(paths, None)
        values.update(given)
    notes += [value.note for value in values.values() if value.note is not None]
    settings = None
    try:
        settings = model.model_validate({name: value.value for name, value in values.items()})
    except ValidationError as error:
        details = [detail for detail in error.errors() if detail["type"] != "missing" or detail["loc"][0] not in meant]
        problems += dict.fromkeys(_format_problem(detail, values, model) for detail in details)
    if problems or settings is None:
        hint = f"if {file} is from a different tool: t5tune migrate {file}" if detect_tool(in_file) else None
        raise SettingsError(*problems, hint=hint)
    for name, note in model.notes_on_implied.items():
        if name not in values and getattr(settings, name) != model.model_fields[name].default:
            notes.append(note)
    return settings, notes


def dump_settings(settings: Settings, only_given: bool = False, leave_out: Collection[str] = ()) -> str:
    """Write the settings as YAML that `--config` reads back to an equal model.

    Args:
        only_given: leave out unset settings, so that the command may choose their values.
        leave_out: names of more settings to leave out.
    """
    from t5tune.io.yaml_file import to_yaml

    start_over = next((f" --{name}" for name in ("fresh", "overwrite") if name in type(settings).model_fields), "")
    header = f"{SETTINGS_HEADER}{settings.command} --config THIS_FILE{start_over}\n"
    # an implied value isn't written as if it were given: bf16, which q_lora turns on
    unset = settings.notes_on_implied.keys() - settings.model_fields_set
    fields = type(settings).model_fields
    implied = {name for name in unset if getattr(settings, name) == fields[name].default}
    values = settings.model_dump(mode="json", exclude_unset=only_given, exclude={*leave_out, *implied})
    for data, paths in PATHS_OF_DATASETS.items():
        if values.get(data) is not None:  # the datasets have the paths
            del values[paths]
    return header + to_yaml(values)


def write_settings(folder: Path, settings: Settings, only_given: bool = False, leave_out: Collection[str] = ()) -> Path:
    """Write settings.yaml to a folder, as `dump_settings` does, and return its path."""
    path = folder / SETTINGS_FILE
    path.write_text(dump_settings(settings, only_given, leave_out), encoding="utf-8")
    return path


def _read_file(file: str) -> dict[str, _Value]:
    from t5tune.io.yaml_file import MAX_SETTINGS_BYTES, read_yaml

    path = packaged_templates.find_template_file("config", file)
    values = read_yaml(path, MAX_SETTINGS_BYTES)
    return {name: _Value(value, f"{path}: {name}") for name, value in values.items()}


def _read_environment(environment: Mapping[str, str]) -> dict[str, _Value]:
    prefixed = {key: value for key, value in environment.items() if key.startswith(VARIABLE_PREFIX)}
    return {key.removeprefix(VARIABLE_PREFIX).lower(): _Value(value, key) for key, value in prefixed.items()}


def _resolve_names(
    model: type[Settings],
    source: dict[str, _Value],
    are_flags: bool,
    problems: list[str],
    notes: list[str],
    meant: set[str],
) -> dict[str, _Value]:
    """Map legacy names to current names, skip settings of other commands with a note, and report unknown names.

    Adds to `problems` and `notes`, and adds the settings that unknown names mean to `meant`.
    """
    of_any_command = {*LEGACY_NAMES, *(name for other in COMMANDS for name in other.model_fields)}
    legacy = select_legacy_names(model)
    known: dict[str, _Value] = {}
    unused: list[str] = []
    for name, value in source.items():
        if name in model.model_fields:
            known[name] = value
        elif name in legacy:
            change = legacy[name]
            new = change.convert(value.value) if change.new else None
            if new is not None and change.new in source:  # today's name wins, whichever comes first
                notes.append(f"{value.place}: ignored ({change.new} is given too)")
            elif change.new is not None and new is not None:
                shown = new if isinstance(new, str) else shorten_file_value(new)
                note = f"{value.place}: read as {change.new} {shown} ({change.why})"
                known[change.new] = _Value(new, value.place, note)
            elif new is None and change.is_noted(value.value):
                instead = f"; set {change.new} instead" if change.new else ""
                notes.append(f"{value.place}: ignored ({change.why}{instead})")
        # one file or environment may serve several commands, but a different command's flag is a mistake
        elif name in of_any_command and not are_flags:
            today = LEGACY_NAMES[name].new if name in LEGACY_NAMES else name
            if value.value is not None and today not in model.unused_quietly:
                unused.append(name)
        else:
            others = {other_name for other in COMMANDS for other_name in other.list_suggestions()}
            own = model.list_suggestions()
            nested = list(value.value) if isinstance(value.value, Mapping) else []
            inner = list(filter(None, (find_nested_setting(name, str(key), own) for key in nested)))
            advice = suggest_setting(name, own, others)
            if inner or (nested and not advice):
                advice = "; settings aren't nested: write its keys at the top level"
                advice += f", as {', '.join(dict.fromkeys(inner))}" if inner else ""
                meant.update(inner)
            elif (setting := find_meant_setting(name, own, others)) is not None:
                meant.add(setting)
            problems.append(f"{value.place}: unknown setting{advice or mention_help(model.command)}")
    if len(unused) > MAX_UNUSED_NAMES:
        notes.append(f"{model.command} does not use {len(unused)} settings, which are for other commands")
    elif unused:
        notes.append(f"{model.command} does not use {', '.join(unused)}")
    return known


def _format_problem(error: ErrorDetails, values: dict[str, _Value], model: type[Settings]) -> str:
    """Format a pydantic error as `lora_r: 'abc' (--lora-r): expected a whole number`."""
    if not error["loc"]:
        return get_reason(error)
    name = str(error["loc"][0])
    given = values.get(name)
    place, found = f" ({given.place})" if given else "", error["input"]
    if name in PATHS_OF_DATASETS and len(error["loc"]) > 1:
        name = format_place(error["loc"])
        if error["type"] == "extra_forbidden":
            names = list(DatasetSettings.model_fields)
            return f"{name}{place}: unknown setting{suggest_setting(str(error['loc'][-1]), names)}"
        if error["type"] == "missing":
            return f"{name}{place}: missing; each dataset needs it"
    elif error["type"] == "missing":
        typed = model.format_option(name)
        is_positional = get_extra(model.model_fields[name], "positional")
        give = f"t5tune {model.command} {typed}" if is_positional else typed
        if name == model.also_positional:
            give = f"it right after t5tune {model.command}, as {typed},"
        return f"{name}: missing; give {give} or set it in a --config file"
    elif given:
        found = given.value
    shown = HIDDEN_VALUE if name in model.list_secrets() else shorten_file_value(found)
    is_number = error["type"] == "string_type" and isinstance(error["input"], int | float)
    advice = "; put numbers, true and false in quotes" if is_number else ""
    return f"{name}: {shown}{place}: {describe_value_error(error)}{advice}"
