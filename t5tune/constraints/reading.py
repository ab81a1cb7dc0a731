"""Read the constraint of a command's settings."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t5tune.constraints import Constraint
from t5tune.constraints.trials import try_constraint
from t5tune.errors import SettingsError
from t5tune.formatting import shorten
from t5tune.settings.groups.constraints import CONSTRAINTS, ConstraintSettings

MAX_BYTES = 1 << 20  # of a schema, a regular expression or a grammar
MAX_ANSWERS_BYTES = 256 << 20


def read_constraint(settings: ConstraintSettings, trained_schema: Mapping[str, Any] | None) -> Constraint | None:
    """Read the constraint that the settings name, else training's schema, unless json_schema was set to None.

    Raises:
        SettingsError: a file can't be read, or has no JSON or no answers; or it would take too long to compile.
    """
    constraint = _read(settings, trained_schema)
    if constraint is not None:
        try_constraint(constraint)
    return constraint


def _read(settings: ConstraintSettings, trained_schema: Mapping[str, Any] | None) -> Constraint | None:
    name = next((name for name in CONSTRAINTS if getattr(settings, name)), None)
    if name is None:
        if trained_schema is None or "json_schema" in settings.model_fields_set:
            return None
        return _make_schema(trained_schema, "json_schema of training")
    value = getattr(settings, name)
    if name == "json_schema":
        return _read_schema(value)
    if name == "json_object":
        return Constraint("json_schema", '{"type": "object"}', name)
    if name == "regex":
        return Constraint("regex", value, name)
    if name == "grammar":
        return Constraint("grammar", _read_text(value, name, MAX_BYTES), f"{name}: {value}")
    if name == "choices":
        return make_choices(value, name)
    lines = _read_text(value, name, MAX_ANSWERS_BYTES).splitlines()
    return make_choices([line for line in lines if line.strip()], f"{name}: {value}")


def read_schema(value: str) -> Constraint:
    """Read a JSON schema from a file or from JSON. Raises SettingsError as `read_constraint` does."""
    try_constraint(constraint := _read_schema(value))
    return constraint


def _read_schema(value: str) -> Constraint:
    is_json = value.lstrip().startswith("{")
    place = "json_schema" if is_json else f"json_schema: {value}"
    text = value if is_json else _read_text(Path(value), "json_schema", MAX_BYTES)
    try:
        schema = json.loads(text)
        json.dumps(schema)  # fails where it is nested too deeply
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{place}: not valid JSON: {shorten(str(error), 100)}") from None
    if not isinstance(schema, dict):
        raise SettingsError(f'{place}: expected a JSON object, such as {{"type": "object", …}}')
    return _make_schema(schema, place)


def _make_schema(schema: Mapping[str, Any], place: str) -> Constraint:
    return Constraint("json_schema", json.dumps(schema, ensure_ascii=False), place)


def make_choices(answers: list[str], place: str) -> Constraint:
    """Make a constraint of a list of answers. Raises SettingsError if there are no answers, or a blank one."""
    if not answers:
        raise SettingsError(f"{place}: no answers")
    if not all(answer.strip() for answer in answers):
        raise SettingsError(f"{place}: an answer is empty")
    return Constraint("choices", json.dumps(answers, ensure_ascii=False), place)


def _read_text(path: Path, setting: str, max_bytes: int) -> str:
    place = f"{setting}: {path}"
    try:
        if (size := path.stat().st_size) > max_bytes:
            raise SettingsError(f"{place}: {size:,} bytes; at most {max_bytes:,} are allowed")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise SettingsError(f"{place}: isn't UTF-8", hint="save it as UTF-8") from None
    except OSError as error:
        raise SettingsError(f"{place}: {error.strerror}") from None
