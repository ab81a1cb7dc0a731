"""Plain descriptions of pydantic's validation errors.

describe_value_error({"type": "int_parsing", …})
# "expected a whole number"
"""

from collections.abc import Collection, Iterable, Mapping

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from t5tune.errors import suggest_name
from t5tune.formatting import shorten
from t5tune.settings.other_names import find_meant_setting, is_name_elsewhere, suggest_setting

# pydantic error type -> text; {…} is filled from the error's context
VALUE_REASONS = {
    "int_type": "expected a whole number",
    "int_parsing": "expected a whole number",
    "int_from_float": "expected a whole number",
    "int_parsing_size": "the number is too large",
    "float_type": "expected a number",
    "float_parsing": "expected a number",
    "finite_number": "expected a finite number",
    "bool_type": "expected true or false",
    "bool_parsing": "expected true or false",
    "string_type": "expected text",
    "path_type": "expected a path",
    "list_type": "expected a list",
    "dict_type": "expected names with values",
    "model_type": "expected names with values, such as path: chats.jsonl",
    "missing": "missing",
    "unexpected_keyword_argument": "unknown key",
    "literal_error": "expected {expected}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
}

MAX_SHOWN_VALUE = 80  # characters
HIDDEN_VALUE = "…"  # in place of a secret


def describe_value_error(error: ErrorDetails) -> str:
    """Describe why the value can't be used."""
    if error["type"] == "bool_parsing":
        return VALUE_REASONS[error["type"]] + suggest_name(str(error["input"]).lower(), ("true", "false"))
    if error["type"] in VALUE_REASONS:
        context = error.get("ctx", {})
        bounds = {
            name: int(value) for name, value in context.items() if isinstance(value, float) and value == int(value)
        }
        return VALUE_REASONS[error["type"]].format(**context | bounds)  # a bound of 1.0 is shown as 1
    reason = get_reason(error)
    return reason[0].lower() + reason[1:] if reason[1:2].islower() else reason  # lowercase "Input", but not "T5"


def get_reason(error: ErrorDetails) -> str:
    """Return the message of a validator's ValueError, or pydantic's message."""
    return str(error["ctx"]["error"]) if error["type"] == "value_error" else error["msg"]


def describe_python_errors(error: ValidationError, secrets: Collection[str] = ()) -> list[str]:
    """Describe wrong values of settings in Python, a line for each setting; values of `secrets` aren't shown."""
    problems: dict[str, str] = {}
    for detail in error.errors():
        name, reason = str(next(iter(detail["loc"]), "")), describe_value_error(detail)
        if name and detail["type"] != "missing":
            reason = f"{HIDDEN_VALUE if name in secrets else shorten_value(detail['input'])}: {reason}"
        problems.setdefault(name, f"{name}: {reason}" if name else reason)  # each item of a list may be an error
    return list(problems.values())


def describe_unknown_names(
    names: Iterable[str], own: Collection[str], commands: Mapping[str, Collection[str]]
) -> list[str]:
    """Describe unknown settings in Python, a line for each, with a suggestion from `own` or the command that has it.

    Args:
        commands: command -> its settings.
    """
    problems = []
    others = {other for settings in commands.values() for other in settings}
    for name in names:
        # a command's setting of this very name is a better guess than a similar name
        is_exact = name in others and not is_name_elsewhere(name)
        advice = "" if is_exact else suggest_setting(name, own, write=_write_argument)
        if not advice:
            meant = name if name in others else find_meant_setting(name, (), others)
            users = sorted(command for command, settings in commands.items() if meant in settings)
            advice = f"; {meant} is a setting of {', '.join(users)}" if users else ""
        problems.append(f"{name}: unknown setting{advice}")
    return problems


def format_place(place: tuple[int | str, ...]) -> str:
    """Format pydantic's place of an error: ("data", 1, "weight") -> data[1].weight."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")


def shorten_value(value: object) -> str:
    try:
        shown = repr(value)
    except RecursionError:
        return f"a {type(value).__name__}"
    return shorten(shown, MAX_SHOWN_VALUE)


def shorten_file_value(value: object) -> str:
    """Write a value from a YAML or JSON file for a message: null, not None."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else shorten_value(value)


def _write_argument(setting: str, value: str | None) -> str:
    if value is None:
        return setting
    return f"{setting}={value.title() if value in ('true', 'false') else repr(value)}"
