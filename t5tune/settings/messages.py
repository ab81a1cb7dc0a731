"""Plain descriptions of pydantic's validation errors.

describe_value_error({"type": "int_parsing", …})
# "expected a whole number"
"""

from pydantic_core import ErrorDetails

from t5tune.errors import suggest_name

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
    "missing": "missing",
    "literal_error": "expected {expected}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
}


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
    reason = error["msg"].removeprefix("Value error, ")
    return reason[0].lower() + reason[1:] if reason[1:2].islower() else reason  # lowercase "Input", but not "T5"
