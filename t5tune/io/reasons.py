"""Short, plain texts for messages: the reason why a file can't be read, instead of the library's message.

describe_error(JSONDecodeError("Expecting ',' delimiter", text, 12))
# "not valid JSON: expected a comma or a closing bracket at line 1, column 13"
"""

import json
import re
from collections.abc import Sequence

from t5tune.errors import T5TuneError

MAX_NAMES = 5  # in a message
# a `?` in the names of a dataset's files and of local ones is part of a pattern
_URL_IN_TEXT = re.compile(
    r"\b(?!hf:|file:)(?P<begin>[a-z][a-z0-9+.-]*://)([^\s/?'\"<>]*@)?(?P<path>[^\s?'\"<>]*)(?P<query>\?[^\s'\"<>]*)?",
    re.IGNORECASE,
)
# beginning of a message of Python's json module -> plain description
JSON_REASONS = {
    "Expecting value": "expected a value",
    "Extra data": "there is text after the end of the value",
    "Expecting property name enclosed in double quotes": "expected a key in double quotes",
    "Expecting ':' delimiter": "expected a colon",
    "Expecting ',' delimiter": "expected a comma or a closing bracket",
    "Unterminated string starting at": "a string without a closing quote begins",
    "Invalid control character at": "a string contains a control character",
    "Invalid \\escape": "a string contains an unknown escape",
    "Invalid \\uXXXX escape": "a string contains an incomplete \\u escape",
    "Illegal trailing comma": "a comma before a closing bracket",
}


def describe_json_error(error: json.JSONDecodeError) -> str:
    """Describe an error in JSON without its position."""
    return next((words for begin, words in JSON_REASONS.items() if error.msg.startswith(begin)), error.msg)


def describe_error(error: BaseException) -> str:
    """Describe an error of reading a file in one short line."""
    match error:
        case json.JSONDecodeError():
            return f"not valid JSON: {describe_json_error(error)} at line {error.lineno}, column {error.colno}"
        case UnicodeDecodeError():
            line = error.object.count(b"\n", 0, error.start) + 1
            return f"line {line}: the byte 0x{error.object[error.start]:02X} is not valid UTF-8"
        case OSError() if error.strerror:
            return error.strerror
        case RecursionError():
            return "nested too deeply"
        case _:
            return join_lines(error)


def join_lines(text: object) -> str:
    """Join the lines of a text or of an error's message, without a T5TuneError's hint."""
    return " ".join(str(text.message if isinstance(text, T5TuneError) else text).split())


def hide_queries(text: str) -> str:
    """Hide the queries, users and passwords of URLs in a text: a query may be a secret, such as a signature."""
    text = _URL_IN_TEXT.sub(lambda found: f"{found['begin']}{found['path']}{'?…' if found['query'] else ''}", text)
    return re.sub(r"\?[^\s'\"<>]+=[^\s'\"<>]*", "?…", text)  # also of a URL without its beginning


def join_first(names: Sequence[object]) -> str:
    """Join the first MAX_NAMES names, and count the rest: `a, b, c, d, e and 3 more`."""
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(map(str, names[:MAX_NAMES])) + more
