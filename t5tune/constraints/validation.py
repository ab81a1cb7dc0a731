"""Check complete replies with a validator, independently of the grammar that they followed."""

import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from t5tune.constraints.json_strings import CannotEnforceError
from t5tune.errors import InvalidReplyError
from t5tune.formatting import shorten

MAX_REASON = 200  # characters
SECONDS = 1.0  # for the patterns of a reply; `re` takes years for some


def make_validator(schema: Any) -> Any:
    """Make jsonschema's validator for a schema, of the draft that it names, else of 2020-12. It checks formats, too.

    Raises:
        CannotEnforceError: the schema is invalid.
    """
    import jsonschema
    from jsonschema.validators import validator_for

    kind = validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        place = ": ".join(map(str, error.path))
        reason = shorten(_explain_pattern(error) or error.message, MAX_REASON)
        raise CannotEnforceError(f"{place}: {reason}" if place else reason) from None
    return kind(schema, format_checker=kind.FORMAT_CHECKER)


def _explain_pattern(error: Any) -> str | None:
    """Describe a fault of a regular expression in a schema; None: the fault isn't in a regular expression."""
    if error.validator_value != "regex":
        return None
    try:
        re.compile(error.instance)
    except re.error as problem:
        return f"{error.instance!r}: {problem}"
    return None


def hides_siblings(validator: Any) -> bool:
    """Return True if a reference hides the keywords next to it, as it does before the draft of 2019-09."""
    import jsonschema as js

    return isinstance(validator, js.Draft3Validator | js.Draft4Validator | js.Draft6Validator | js.Draft7Validator)


class ReplyCheck:
    """Checks that complete replies are JSON that satisfies a schema. May be called by several threads.

    Args:
        place: of the constraint, for messages.

    Raises:
        CannotEnforceError: the schema is invalid.
    """

    def __init__(self, schema: Any, place: str) -> None:
        self._validator = make_validator(schema)
        self._place = place

    def check(self, reply: str) -> None:
        """Raise InvalidReplyError if a complete reply doesn't satisfy the schema."""
        from jsonschema import exceptions, validators

        keywords = _make_keywords(_make_search(time.monotonic() + SECONDS))
        kind = validators.extend(type(self._validator), keywords)
        validator = kind(self._validator.schema, format_checker=self._validator.format_checker)
        try:
            problem = exceptions.best_match(validator.iter_errors(json.loads(reply)))
        except TimeoutError:
            raise self._refuse(f"its patterns take longer than {SECONDS:g} s to check") from None
        except RecursionError:
            raise self._refuse("it is nested too deeply") from None
        except ValueError as error:
            raise self._refuse(f"not JSON that Python reads: {error}") from None
        if problem is not None:
            raise self._refuse(f"{problem.json_path}: {problem.message}")

    def _refuse(self, reason: str) -> InvalidReplyError:
        problem = f"{self._place}: the reply doesn't satisfy the schema: {shorten(reason, MAX_REASON)}"
        return InvalidReplyError(problem, hint="report this schema as a bug of t5tune")


def _make_search(deadline: float) -> Callable[[str, str], bool]:
    """Make a function like `re.search` that raises TimeoutError after a time."""
    import regex

    def search(pattern: str, text: str) -> bool:
        return regex.search(pattern, text, timeout=max(0.001, deadline - time.monotonic())) is not None

    return search


def _make_keywords(search: Callable[[str, str], bool]) -> dict[str, Any]:
    """Make the checks of the keywords that have patterns."""
    from jsonschema import ValidationError

    def check_pattern(validator: Any, pattern: str, value: Any, schema: Any) -> Iterator[Any]:
        if isinstance(value, str) and not search(pattern, value):
            yield ValidationError(f"{value!r} does not match {pattern!r}")

    def check_pattern_properties(validator: Any, schemas: Any, value: Any, schema: Any) -> Iterator[Any]:
        if not isinstance(value, dict):
            return
        for pattern, each in schemas.items():
            for name in value:
                if search(pattern, name):
                    yield from validator.descend(value[name], each, path=name, schema_path=pattern)

    def check_additional_properties(validator: Any, additional: Any, value: Any, schema: Any) -> Iterator[Any]:
        if not isinstance(value, dict):
            return
        for name in value:
            is_known = name in schema.get("properties", {})
            if not is_known and not any(search(pattern, name) for pattern in schema.get("patternProperties", {})):
                yield from validator.descend(value[name], additional, path=name)

    return {
        "pattern": check_pattern,
        "patternProperties": check_pattern_properties,
        "additionalProperties": check_additional_properties,
    }
